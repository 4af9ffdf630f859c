"""Merges with the experts of both models: twice as many hidden units, so that each expert computes (1 - t) f_A + t f_B'.

Nothing is averaged but the router and what lies outside the experts. So it matters which experts share a place, and how the
router of the merge chooses between places. Units need not be matched. Places are those of like router rows, unless an order was
asked for: a token that an expert of A is for then finds that expert of B' beside it which is for such tokens as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.virtual import VirtualCheckpoint
from hf_moe_lmc.errors import CheckpointError, InputError
from hf_moe_lmc.formats.decoded import storage_of
from hf_moe_lmc.formats.templates import Template, output_template
from hf_moe_lmc.moe.action import Elements
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.model_class import language_model_of
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.moe.widening import widened
from hf_moe_lmc.path.skeleton import Conversion, Skeleton
from hf_moe_lmc.repair.data_free import OF_UNITS, base_of
from hf_moe_lmc.repair.routers import AveragedRouters, routers_of
from hf_moe_lmc.runtime.progress import size_of
from hf_moe_lmc.symmetry.banks import qualified
from hf_moe_lmc.writing.blocks import ModelBlocks
from hf_moe_lmc.writing.encoded import EncodedStream, EncodedStreams
from hf_moe_lmc.writing.formats import OutputFormat
from hf_moe_lmc.writing.held import Held
from hf_moe_lmc.writing.spans import Interpolated
from hf_moe_lmc.writing.streams import InterpolatedLayer

VERSION = 2  # of the values, for resume


class CannotWidenError(InputError):
    """Experts of twice the size cannot stand in this model or format."""


@dataclass(frozen=True)
class WidenedLayer:
    """A block whose experts have A's hidden units, their down columns times 1 - t, and then those of B', times t.

    Attributes:
        straight: what is no hidden unit, nor of a router.
        units: roles with a row for each hidden unit.
        routers: of the block.
    """

    straight: InterpolatedLayer
    units: frozenset[str]
    routers: AveragedRouters

    @classmethod
    def of(cls, layer: MoELayer, b: LayerSource, t: float) -> WidenedLayer:
        """Of A's block and B''s."""
        straight = InterpolatedLayer(layer.index, layer, b, t)
        return cls(straight, frozenset(_unit_roles(layer)), AveragedRouters(routers_of(layer), layer, b, t))

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        if role in self.routers.of_role and 0 < self.straight.t < 1:
            return self.routers.stored(role)
        if role not in self.units:
            return self.straight.stored(role, expert)
        straight = self.straight
        a, b = straight.a.stored(role, expert), straight.b.stored(role, expert)
        dtype = torch.promote_types(a.dtype, b.dtype)
        if base_of(role) == "down":
            dtype = torch.promote_types(dtype, torch.float32)
            a, b = a.to(dtype) * (1 - straight.t), b.to(dtype) * straight.t
        return torch.cat([a.to(dtype), b.to(dtype)])


@dataclass
class WideCheckpoint(VirtualCheckpoint):
    """A widened merge, read as if it had been written.

    Attributes:
        stream: computes its values.
        made_of: all that these depend on besides the two models, as text.
    """

    stream: EncodedStream = field(kw_only=True)
    made_of: str = field(kw_only=True)

    def _lay_out(self) -> None:
        """Its tensors have their places already."""

    def _is_kept(self, shard: str) -> bool:
        return False

    def resume_key(self) -> str:
        return f"{self.original.resume_key()} widened {VERSION} {self.made_of}"

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        return self.stream.numbers(name, first, self.tensors[name].numel - first if count is None else count)


@dataclass(frozen=True)
class Widening:
    """The layout of a widened merge of two models, checked against transformers.

    Attributes:
        narrow: the layout of a merge that does not grow.
        wide: A with twice as many hidden units; only its headers and its configuration can be read.
        by_routers: experts share a place whose router rows are alike, as no order was asked for.
    """

    a: MoEModel
    b: MoEModel
    narrow: Template
    wide: MoEModel
    by_routers: bool = False

    @classmethod
    def of(cls, a: MoEModel, b: MoEModel, form: OutputFormat, *, by_routers: bool = False) -> Widening:
        """Raises CannotWidenError, or FamilyError: what is in the way."""
        storage = storage_of(a.checkpoint)
        if form == "b" or (storage is not None and form != "bf16"):
            kind = "B's" if form == "b" or storage is None else storage.kind
            raise CannotWidenError(f"--widen writes plain numbers in A's layout, not {kind}; take --format {_plain(storage)}")
        narrow = output_template(a.checkpoint, a.checkpoint, plain=True)
        found = cls(a, b, narrow, widened(a, narrow), by_routers)
        found._check_loads()
        return found

    @property
    def template(self) -> Template:
        found = self.wide.checkpoint
        assert isinstance(found, Template)
        return found

    def sentence(self) -> str:
        """How much the model grows."""
        before, after = (sum(info.numel for info in one.tensors.values()) for one in (self.a.checkpoint, self.template))
        order = "; experts are paired by their router rows, as no order was asked for" if self.by_routers else ""
        return (
            f"widened: each expert has the hidden units of both, so that the merge grows by {after / before - 1:.0%}, from "
            f"{before:,} to {after:,} parameters, to {size_of(self.template.nbytes)}{order}"
        )

    def facts(self) -> dict[str, Any]:
        """What the written weights depend on besides the options."""
        return {"version": VERSION}

    def record(self, t: float) -> dict[str, Any]:
        """The `repair` of report.json."""
        return {
            "asked": "widen", "t": t, "accepted": 0 < t < 1, "chosen": "widened", "sentence": self.sentence(), "tried": [],
        }  # fmt: skip

    def stream(self, elements: Elements, t: Sequence[float]) -> EncodedStreams:
        """The widened merges at some t."""
        acted = self.b.acted(elements)
        return EncodedStreams(self.template, tuple(self._point(acted, at) for at in t), Held())

    def model(self, elements: Elements, t: float, made_of: str) -> MoEModel:
        """The widened merge at one t, as a model that can be evaluated.

        Args:
            made_of: names B and its elements.
        """
        template, (stream,) = self.template, self.stream(elements, (t,)).streams
        checkpoint = WideCheckpoint(
            source=template.source,
            config=template.config,
            shards=template.shards,
            tensors=template.tensors,
            changes=template.changes,
            original=self.a.checkpoint,
            stream=stream,
            made_of=f"{made_of} {t!r}",
        )
        return self.wide.on(checkpoint)

    def _point(self, acted: dict[int, LayerSource], t: float) -> EncodedStream:
        layers: dict[int, LayerSource] = {
            index: WidenedLayer.of(layer, acted.get(index, layer), t) for index, layer in self.a.layers.items()
        }
        a, b = self.a.checkpoint, self.b.checkpoint
        blocks = ModelBlocks(self.wide, layers, None, a.stored)
        return EncodedStream(self.template, a.stored, (), Interpolated(a, b, (t,)), blocks, "")

    def _check_loads(self) -> None:
        """Raises CannotWidenError where transformers would make a model of other shapes from the configuration."""
        model_class = language_model_of(self.wide.config)
        if model_class is None:
            return
        skeleton = Skeleton(model_class, self.wide.config, dtype=torch.float32, device=torch.device("meta"))
        shapes = {name: info.shape for name, info in self.template.tensors.items() if not self.wide.is_extra(name)}
        try:
            Conversion(skeleton, self.a.checkpoint.name, shapes)
        except CheckpointError as error:
            keys = ", ".join(sorted(self.wide.checkpoint.changes.keys() - self.narrow.changes.keys()))
            raise CannotWidenError(
                f"{self.a.checkpoint.name}: cannot be widened: {keys} in config.json sets the size of its experts and of other "
                f"layers as well ({error})"
            ) from error


def _plain(storage: object) -> str:
    return "a" if storage is None else "bf16"


def _unit_roles(layer: MoELayer) -> Iterator[str]:
    """The roles of a block with a row for each hidden unit that is doubled."""
    for bank in layer.banks.values():
        if bank.unit_count and bank.kind.permutation:
            yield from (qualified(bank.name, role) for role in bank.roles if role in OF_UNITS)
    if layer.shared.unit_count and layer.shared.kind.permutation:
        yield from (f"shared_{role}" for role in layer.shared.roles if role in OF_UNITS)
