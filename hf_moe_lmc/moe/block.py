"""One MoE block on disk: its tensors, and the rule that claims each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.checkpoints.quantization import (
    Quantization,
)
from hf_moe_lmc.moe.family import LayerConfig, MoEFamily, Template
from hf_moe_lmc.moe.notation import (
    TensorSpec,
    bank_size,
    split_role,
)


@dataclass(frozen=True)
class Part:
    """What a tensor is to the quantized weight that it belongs to.

    Attributes:
        weight: the name that the weight has, or would have.
        ending: of the role: `_blocks` (the values), `_scales` or `_activation_scales`.
        spec: what the weight is, or would be.
        numel: elements per expert.
    """

    weight: str
    ending: str
    spec: TensorSpec
    numel: int


@dataclass(frozen=True)
class Claim:
    """One tensor on disk under a block, and the rule that claims it.

    Attributes:
        template: the rule; spec: what it says of this tensor's axes.
        segment: the bank that the key's number falls into; None where the tensor holds all of its template's.
        expert: number within that bank of the expert that the key names.
        part: where it is a part of a quantized weight; its own spec is then opaque, with the axis `packed`.
    """

    name: str
    template: Template
    spec: TensorSpec
    segment: int | None
    expert: int | None
    part: Part | None = None

    @property
    def segments(self) -> Sequence[int]:
        return range(len(self.spec.segments)) if self.segment is None or self.part else [self.segment]

    @cached_property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for segment in self.segments for role in self.spec.segments[segment])

    def axis_sizes(self, sizes: Mapping[str, int], segment: int) -> tuple[int, ...]:
        return self.spec.axis_sizes({**sizes, "packed": self.part.numel if self.part else 0}, segment)

    @property
    def weight_roles(self) -> tuple[str, ...]:
        """Of a part of a quantized weight, the roles of the weight."""
        return self.part.spec.segments[self.segment or 0] if self.part else ()


@dataclass(frozen=True)
class Block:
    """The tensors under one MoE block, and what they are to be held against.

    Attributes:
        prefix: what stands before the keys of its layer.
        names: tensor names under the block, by their key below the layer.
        config: what the configuration says of the layer.
    """

    checkpoint: Checkpoint
    family: MoEFamily
    index: int
    prefix: str
    names: Mapping[str, str]
    config: LayerConfig
    quantization: Quantization | None

    @cached_property
    def expected(self) -> dict[str, list[Template]]:
        """The roles that such a block may hold, and the templates that may fill each."""
        templates: dict[str, list[Template]] = {}
        for template in self.family.templates:
            for segment, roles in enumerate(template.spec.segments):
                if all(template.spec.axis_sizes(self.config.sizes, segment)):
                    for role in roles:
                        if self.config.when.get(role, True) is not False:
                            templates.setdefault(role, []).append(template)
        return templates

    def experts(self, role: str) -> int:
        return bank_size(self.config.sizes, split_role(role)[0], "expert")

    def info(self, name: str) -> TensorInfo:
        return self.checkpoint.tensors[name]
