"""What a checkpoint is, from its configuration and shard headers alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from hf_moe_lmc.checkpoint import Checkpoint
from hf_moe_lmc.hub import Repository
from hf_moe_lmc.model import MoEModel
from hf_moe_lmc.recognition import recognise


@dataclass(frozen=True)
class Inspection:
    """The facts that `inspect` reports; `symmetry` describes the group of one MoE layer in words.

    Attributes:
        moe_layers: numbers of the MoE layers; those from num_layers on are for multi-token prediction.
        layouts: how the experts lie on disk, `per-expert` or `fused` tensors.
        dtypes: bytes by dtype.
    """

    source: str
    commit: str | None
    family: str
    model_type: str
    num_layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    router: str
    expert_groups: int
    shared_units: int
    units: int
    width: int
    layouts: tuple[str, ...]
    dtypes: dict[str, int]
    bytes: int
    tensors: int
    shards: int
    symmetry: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def table(self) -> str:
        """The facts for a terminal."""
        extra = [index for index in self.moe_layers if index >= self.num_layers]
        layers = f"{len(self.moe_layers) - len(extra)} of {self.num_layers} layers"
        dtypes = ", ".join(f"{dtype} {size / 1e9:.3f}" for dtype, size in self.dtypes.items())
        rows = {
            "checkpoint": self.source + (f" at {self.commit[:12]}" if self.commit else ""),
            "family": f"{self.family} (model type {self.model_type})",
            "MoE layers": layers + (f", and for multi-token prediction {', '.join(map(str, extra))}" if extra else ""),
            "experts": f"{self.experts}, top-{self.top_k}, {self.router} router",
            "expert groups": f"{self.expert_groups} that bind" if self.expert_groups > 1 else "none that bind",
            "hidden units": f"{self.units} per expert, width {self.width}",
            "shared expert": f"{self.shared_units} hidden units" if self.shared_units else "none",
            "on disk": f"{' and '.join(self.layouts)} tensors; {self.tensors} tensors in {self.shards} shard(s)",
            "size": f"{self.bytes / 1e9:.3f} GB ({dtypes})",
            "symmetry": self.symmetry[0],
        }
        lines = [f"{name:<14} {value}" for name, value in rows.items()]
        return "\n".join([*lines, *(f"{'':<14} {line}" for line in self.symmetry[1:])])


def inspect(model: str | os.PathLike[str]) -> Inspection:
    """Describes a local folder or a Hub id (OWNER/NAME[@REVISION]); of a Hub id, only headers are downloaded.

    Raises:
        InputError: not a checkpoint that this package reads; the message says why.
    """
    with Checkpoint.open(model) as checkpoint:
        return _describe(recognise(checkpoint))


def _describe(model: MoEModel) -> Inspection:
    checkpoint = model.checkpoint
    dtypes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + info.nbytes
    layouts = {
        "per-expert" if claim.template.is_per_expert else "fused"
        for layer in model.layers.values()
        for claim in layer.claims.values()
        if claim.template.spec.roles[0] in layer.expert_roles
    }
    return Inspection(
        source=checkpoint.name,
        commit=checkpoint.source.commit if isinstance(checkpoint.source, Repository) else None,
        family=model.family.name,
        model_type=str(checkpoint.config["model_type"]),
        num_layers=model.num_layers,
        moe_layers=tuple(model.layers),
        experts=model.sizes["expert"],
        top_k=model.top_k,
        router=next(iter(model.layers.values())).facts.router,
        expert_groups=model.groups,
        shared_units=model.sizes.get("shared", 0),
        units=model.sizes["unit"],
        width=model.sizes["model"],
        layouts=tuple(sorted(layouts, reverse=True)),
        dtypes=dtypes,
        bytes=checkpoint.nbytes,
        tensors=len(checkpoint.tensors),
        shards=len(checkpoint.shards),
        symmetry=_symmetry_in_words(model),
    )


def _symmetry_in_words(model: MoEModel) -> tuple[str, ...]:
    experts, units, shared = (model.sizes.get(word, 0) for word in ("expert", "unit", "shared"))
    if model.groups > 1:
        size = experts // model.groups
        order = (
            f"experts move within their group of {size} and with it among {model.groups} groups (S_{size} wr S_{model.groups})"
        )
    else:
        order = f"experts in any order (S_{experts})"
    lines = [
        f"{order}, each with its router row" + (" and correction bias" if "correction_bias" in _roles(model) else ""),
        f"hidden units of each expert in any order (S_{units}), the up row of each times s and its down column divided by s, "
        "s of either sign",
    ]
    if shared:
        lines.append(f"hidden units of the shared expert likewise (S_{shared})")
    if next(iter(model.layers.values())).facts.router == "softmax":
        lines.append("one vector added to all router rows (left alone: it cannot change a barrier)")
    else:
        lines.append("no translation of the router (sigmoid)")
    return tuple(lines)


def _roles(model: MoEModel) -> tuple[str, ...]:
    return next(iter(model.layers.values())).roles
