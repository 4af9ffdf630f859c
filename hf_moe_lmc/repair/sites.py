"""Where the MoE block of each decoder layer stands in a transformers model, and what its parameters hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_moe_lmc.errors import FamilyError, InputError
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.notation import TensorSpec
from hf_moe_lmc.proof.memory_layout import Block, find_blocks


class UnsuitedError(InputError):
    """The experts of a family cannot be refitted on calibration text."""


@dataclass(frozen=True)
class Site:
    """The MoE block of one decoder layer.

    Attributes:
        layer: number of the decoder layer.
        prefix: full name of the block.
        memory: its tensors, and what they hold.
        block: computes its output, float [.., token, model]; stop: what lanes stop before, the block itself or its experts.
        router: where the experts stand in the layer itself, beside their router; None: they stand in a block.
        down, shared_down: full names of the down projections; None: no shared expert.
    """

    layer: int
    prefix: str
    block: nn.Module
    stop: nn.Module
    router: nn.Module | None
    experts: nn.Module
    memory: Block
    down: str
    shared_down: str | None
    shared_gate: nn.Module | None

    @property
    def transposed(self) -> bool:
        """Whether matrices of experts are [input, output]."""
        return self.memory.tensors[self.down].axes[1] == "unit"

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the block's parameters."""
        return tuple(f"{self.prefix}.{name}" for name, _ in self.block.named_parameters())

    @cached_property
    def count(self) -> int:
        return self.memory.sizes["expert"]

    def units(self, expert: int, inputs: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Hidden units of an expert, [token, unit], in the dtype of the weights.

        Args:
            values: parameters by full name; None: those that stand in the module.
        """
        matrix, bias = (self._of_expert(name, expert, values) for name in ("gate_up_proj", "gate_up_proj_bias"))
        assert matrix is not None
        matrix = matrix.to(inputs.device, inputs.dtype)
        products = inputs @ (matrix if self.transposed else matrix.T)
        if bias is not None:
            products = products + bias.to(inputs.device, inputs.dtype)
        units: Tensor = self._apply_gate(products)
        return units

    def _of_expert(self, name: str, expert: int, values: Mapping[str, Tensor] | None) -> Tensor | None:
        found = (values or {}).get(f"{self.memory.experts}.{name}")
        if found is None:
            found = getattr(self.experts, name, None)
        return None if found is None else found[expert]

    @property
    def roles(self) -> dict[str, str]:
        """Full names of its parameters by role."""
        return {role: name for name, spec in self.memory.tensors.items() for role in spec.roles}

    @property
    def _apply_gate(self) -> Callable[[Tensor], Tensor]:
        return cast("Callable[[Tensor], Tensor]", getattr(self.experts, "_apply_gate", self._activated))

    def _activated(self, products: Tensor) -> Tensor:
        gate, up = products.chunk(2, dim=-1)
        activation = cast("Callable[[Tensor], Tensor]", self.experts.act_fn)
        return activation(gate) * up

    def down_of(self, expert: int) -> Tensor:
        """What stands in the module, [unit, model]."""
        matrix = self.experts.get_parameter("down_proj")[expert]
        return matrix if self.transposed else matrix.T


def sites_of(module: PreTrainedModel, model: MoEModel) -> dict[int, Site]:
    """The MoE blocks of a model by decoder layer.

    Raises:
        UnsuitedError: experts that are no gated MLPs, or that do not stand in a block of their own.
    """
    try:
        blocks = find_blocks(module)
    except FamilyError as error:
        raise unsuited(model, str(error)) from error
    return {layer: _site(module, model, layer, memory) for layer, memory in blocks.items()}


def _site(module: PreTrainedModel, model: MoEModel, layer: int, memory: Block) -> Site:
    experts = module.get_submodule(memory.experts)
    prefix = memory.experts.rpartition(".")[0]
    if not hasattr(experts, "gate_up_proj") or not (hasattr(experts, "_apply_gate") or hasattr(experts, "act_fn")):
        raise unsuited(model, f"layer {layer}: its experts are no gated MLPs with one matrix for gate and up projection")
    block, holders = module.get_submodule(prefix), {role: name for name, spec in memory.tensors.items() for role in spec.roles}
    router, stop = None, block
    if f"{prefix}." == memory.prefix:
        name = holders["router"].removeprefix(memory.prefix).partition(".")[0]
        router, stop = block.get_submodule(name), experts
        block = RouterAndExperts(name, router, memory.experts.rpartition(".")[2], experts)
    elsewhere = router is not None  # and a shared expert may stand beside its block
    within = {role: name for role, name in holders.items() if name.startswith(f"{prefix}.") and not elsewhere}
    gate = within.get("shared_router")
    return Site(
        layer=layer,
        prefix=prefix,
        block=block,
        stop=stop,
        router=router,
        experts=experts,
        memory=memory,
        down=holders["down"],
        shared_down=within.get("shared_down"),
        shared_gate=None if gate is None else module.get_submodule(gate.rpartition(".")[0]),
    )


class RouterAndExperts(nn.Module):
    """The routed experts of a layer that have no block of their own, under the names that they have in the layer."""

    def __init__(self, router_name: str, router: nn.Module, experts_name: str, experts: nn.Module) -> None:
        super().__init__()
        self.add_module(router_name, router)
        self.add_module(experts_name, experts)
        self._parts = (router_name, experts_name)

    def forward(self, routed_by: Tensor, inputs: Tensor) -> Tensor:
        """What the experts give, [token, model].

        Args:
            routed_by: what the router reads.
            inputs: what the experts read.
        """
        router, experts = (self.get_submodule(name) for name in self._parts)
        returned = router(routed_by)
        chosen = next(value for value in returned if not value.is_floating_point())
        weights = next(value for value in returned if value.is_floating_point() and value.shape == chosen.shape)
        output: Tensor = experts(inputs, chosen, weights)
        return output


def unsuited(model: MoEModel, why: str) -> UnsuitedError:
    return UnsuitedError(
        f"{model.checkpoint.name}: the experts of family {model.family.name} cannot be refitted on text: {why}. "
        "Expected: gated experts whose weighted sum is what their block gives. Take a repair that needs no text, or none"
    )


def canonical(spec: TensorSpec, values: Tensor) -> dict[tuple[str, int | None], Tensor]:
    """A parameter by (role, expert), each [unit, model] or as the role has it; views where they can be."""
    axes: Sequence[str] = spec.axes
    found = _ungrouped(spec, values)
    roles = spec.segments[0]
    halves = found.unbind(axes.index("half")) if "half" in axes else (found,)
    rest = [axis for axis in axes if axis != "half"]
    result: dict[tuple[str, int | None], Tensor] = {}
    for role, half in zip(roles, halves, strict=True):
        if rest[0] == "expert" and role in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
            for expert, one in enumerate(half):
                result[role, expert] = _rowwise(rest[1:], one)
        else:
            result[role, None] = _rowwise(rest, half)
    return result


def _ungrouped(spec: TensorSpec, values: Tensor) -> Tensor:
    """With an axis for each word: `(half unit)` becomes two."""
    shape: list[int] = []
    for group, size in zip(spec.groups, values.shape, strict=True):
        halves = len(spec.segments[0])
        shape += [size] if len(group) == 1 else [halves if word == "half" else size // halves for word in group]
    return values.reshape(shape)


def _rowwise(axes: Sequence[str], values: Tensor) -> Tensor:
    """Units before what they read or write."""
    order = sorted(range(len(axes)), key=lambda i: axes[i] not in ("expert", "unit", "shared"))
    return values.permute(order)
