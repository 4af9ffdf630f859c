"""One MoE block on disk: its tensors, and the rule that claims each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.moe.family import LayerConfig, MoEFamily, Template
from hf_moe_lmc.moe.notation import (
    TensorSpec,
    bank_size,
    split_role,
)


@dataclass(frozen=True)
class Claim:
    """One tensor on disk under a block, and the rule that claims it.

    Attributes:
        template: the rule; spec: what it says of this tensor's axes.
        segment: the bank that the key's number falls into; None where the tensor holds all of its template's.
        expert: number within that bank of the expert that the key names.
    """

    name: str
    template: Template
    spec: TensorSpec
    segment: int | None
    expert: int | None

    @property
    def segments(self) -> Sequence[int]:
        return range(len(self.spec.segments)) if self.segment is None else [self.segment]

    @cached_property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for segment in self.segments for role in self.spec.segments[segment])

    def axis_sizes(self, sizes: Mapping[str, int], segment: int) -> tuple[int, ...]:
        return self.spec.axis_sizes(sizes, segment)


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
