"""The ridge fit of one MoE block, with the weights that stand in the module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.repair.block_map import SHARED, BlockMap, Call, block_maps, run_block
from hf_moe_lmc.repair.fitted import Fitted, Role
from hf_moe_lmc.repair.ridge import DOUBLE, ridge
from hf_moe_lmc.repair.run_models import PATH, RunModels
from hf_moe_lmc.repair.sites import Site
from hf_moe_lmc.runtime.memory import available_memory


@dataclass(frozen=True)
class RidgeLayer:
    """The MoE block of one decoder layer, whose start stands in the module and whose ends are loaded."""

    models: RunModels
    site: Site

    def fit(self, calls: Sequence[Call], strength: float) -> tuple[dict[Role, Tensor], dict[str, Any]]:
        """Fits the down projections to the interpolated outputs of both parents' blocks on what arrives there.

        Args:
            calls: what the block is called with on the calibration text.
            strength: lambda.

        Returns:
            The new down projections [unit, model], rounded as A's checkpoint holds them; none where both parents' blocks give
            the same, as far as the dtype tells. And the residual relative to the target, `before` and `after`.

        Raises:
            UnsuitedError: the block is no linear map of its units.
            InputError: outputs that are not finite, or more tokens than memory allows.
        """
        found = block_maps(self.site, calls, self.models.a)
        _check_memory(found)
        target = self._target(calls)
        residual, size = target - found.output, float(target.norm())
        if not math.isfinite(float(residual.norm())):
            raise InputError(
                f"layer {self.site.layer}: what its MoE block gives on the calibration text is not finite; expected numbers. "
                "Try --dtype float32"
            )
        facts: dict[str, Any] = {"tokens": len(target), "before": float(residual.norm()) / size if size else 0.0}
        block: dict[Role, Tensor] = {}
        if facts["before"] > torch.finfo(found.inputs.dtype).eps:
            fit = ridge(found.parts(), residual, strength)
            for key, change in fit.changes:
                role: Role = ("shared_down", None) if key == SHARED else ("down", int(str(key)))
                block[role] = self._changed(role, change)
            facts["after"] = fit.after / size
        return block, facts

    def _target(self, calls: Sequence[Call]) -> Tensor:
        """(1 - t) f_A(x) + t f_B'(x), float32 [token, model]; the start stands in the module again behind it."""
        models, names = self.models, self.site.names
        standing = {name: models.skeleton.value(name) for name in names}
        found: Tensor | None = None
        for t, weight in ((0.0, 1 - models.t), (1.0, models.t)):
            models.ends.place(names, PATH, t)
            output = weight * torch.cat([run_block(self.site, call) for call in calls])
            found = output if found is None else found + output
        models.skeleton.place({name: value for name, value in standing.items() if value is not None})
        assert found is not None
        return found

    def _standing(self, role: str) -> Tensor:
        """The parameter of a role, as it stands in the module."""
        name = self.site.shared_down if role == "shared_down" else self.site.down
        assert name is not None
        found = self.models.skeleton.value(name)
        assert found is not None
        return found

    def _changed(self, role: Role, change: Tensor) -> Tensor:
        """A new down projection [unit, model], rounded as the checkpoint will hold it."""
        old = self._standing(role[0]).T if role[1] is None else self.site.down_of(role[1])
        name, _ = self.models.a.layers[self.site.layer].piece_of(*role)
        return (old.float() + change).to(self.models.a.checkpoint.tensors[name].dtype)

    def stored(self, fitted: Fitted) -> dict[Role, Tensor]:
        """What an earlier call has left of the block."""
        roles: list[Role] = [("shared_down", None), *(("down", expert) for expert in range(self.site.count))]
        values = {role: fitted.value(self.site.layer, *role) for role in roles}
        return {role: value for role, value in values.items() if value is not None}

    def place(self, block: Mapping[Role, Tensor]) -> None:
        """Writes down projections [unit, model] over those that stand in the module."""
        for (role, expert), value in block.items():
            if expert is None:
                self._standing(role).copy_(value.T)
            else:
                self._standing(role)[expert].copy_(value if self.site.transposed else value.T)


def _check_memory(found: BlockMap) -> None:
    """Raises InputError where the system to solve does not fit."""
    tokens, columns = len(found.output), sum(part.units for part in found.parts())
    unknowns = min(tokens, columns)
    needed = 3 * unknowns * unknowns * (8 if unknowns <= DOUBLE else 4)
    if found.output.device.type == "cpu" and needed > available_memory():
        raise InputError(
            f"ridge on {tokens} calibration tokens and {columns} hidden units takes {needed >> 20} MiB for its equations; "
            f"{available_memory() >> 20} MiB are free. Take less calibration text (--calibration-tokens)"
        )
