"""Weights that were fitted, on disk by decoder layer, and a merge that takes them in place of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.writing.results import ENDING, ResultFolder
from hf_moe_lmc.writing.spans import Span, TensorSource, alone

OUTSIDE = "outside"
BLOCK = "block"
Role = tuple[str, int | None]  # and the number of the expert


@dataclass(frozen=True)
class Fitted:
    """The weights of one repaired merge that differ from those it started from, layer by layer.

    A file holds what was fitted in one decoder layer: `block/ROLE/EXPERT`, matrices [unit, model], and `outside/NAME` for
    tensors outside of the MoE blocks, all in the dtypes of A's checkpoint. The file `head` holds what follows the layers.
    """

    folder: ResultFolder

    def file(self, layer: int | None) -> str:
        return "head" if layer is None else f"layer-{layer:04d}"

    def write(self, layer: int | None, block: Mapping[Role, Tensor], outside: Mapping[str, Tensor], **facts: Any) -> None:
        """Keeps what was fitted in a layer, with facts for the report."""
        values = {f"{BLOCK}/{role}/{'-' if expert is None else expert}": value for (role, expert), value in block.items()}
        values |= {f"{OUTSIDE}/{name}": value for name, value in outside.items()}
        self.__dict__.pop("places", None)  # what was known of the folder
        with self.folder.new(self.file(layer) + ENDING) as path:
            safetensors.torch.save_file(
                {name: value.cpu().contiguous() for name, value in values.items()},
                path,
                {"facts": json.dumps(facts)},
            )

    def has(self, layer: int | None) -> bool:
        return self.folder.path(self.file(layer) + ENDING).exists()

    def facts(self, layer: int | None) -> dict[str, Any]:
        with safetensors.safe_open(self.folder.path(self.file(layer) + ENDING), framework="pt") as found:
            facts: dict[str, Any] = json.loads(found.metadata()["facts"])
            return facts

    @cached_property
    def places(self) -> dict[str, str]:
        """The file that holds a value, by its name there, with `block` preceded by the layer's number."""
        found = {}
        for name in sorted(self.folder.names()):
            with safetensors.safe_open(self.folder.path(name + ENDING), framework="pt") as opened:
                layer = name.removeprefix("layer-").lstrip("0") or "0"
                for key in opened.keys():  # noqa: SIM118
                    found[f"{layer}/{key}" if key.startswith(BLOCK) else key] = name
        return found

    def value(self, layer: int, role: str, expert: int | None) -> Tensor | None:
        """Of an MoE block, [unit, model]; None where nothing was fitted."""
        return self._read(f"{layer}/", f"{BLOCK}/{role}/{'-' if expert is None else expert}")

    def outside(self, name: str) -> Tensor | None:
        """Of a tensor outside of the MoE blocks; None where nothing was fitted."""
        return self._read("", f"{OUTSIDE}/{name}")

    def _read(self, before: str, key: str) -> Tensor | None:
        file = self.places.get(before + key)
        if file is None:
            return None
        with safetensors.safe_open(self.folder.path(file + ENDING), framework="pt") as opened:
            value: Tensor = opened.get_tensor(key)
            return value

    def layers(self, start: Mapping[int, LayerSource]) -> dict[int, LayerSource]:
        """The MoE layers of the repaired merge, over those that it started from."""
        return {index: FittedLayer(index, source, self) for index, source in start.items()}

    def outside_of(self, model: MoEModel, start: TensorSource) -> TensorSource:
        """The tensors outside of the MoE blocks, over those that the merge started from."""
        return FittedOutside(model, start, self)


@dataclass(frozen=True)
class FittedLayer:
    """An MoE block of a repaired merge: what was fitted, else what it started from."""

    index: int
    start: LayerSource
    fitted: Fitted

    @property
    def parents(self) -> tuple[LayerSource, ...]:
        parents: tuple[LayerSource, ...] = getattr(self.start, "parents", (self.start,))
        return parents

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        value = self.fitted.value(self.index, role, expert)
        return self.start.stored(role, expert) if value is None else value


@dataclass(frozen=True)
class FittedOutside:
    """Tensors outside of the MoE blocks: what was fitted, else what the merge started from."""

    model: MoEModel
    start: TensorSource
    fitted: Fitted

    def spans(self, names: Sequence[str]) -> Iterator[Span]:
        for name in names:
            value = self.fitted.outside(name)
            if value is None:
                yield from self.start.spans([name])
            else:
                info = self.model.checkpoint.tensors[name]
                yield Span(info.start, info.numel, info.dtype, alone(partial(self._flat, name)))

    def _flat(self, name: str) -> Tensor:
        value = self.fitted.outside(name)
        assert value is not None
        return value.reshape(-1)

    def read(self, name: str) -> Tensor:
        return self.start.read(name) if self.fitted.outside(name) is None else self._flat(name)

    def values(self, name: str, first: int, count: int) -> Tensor:
        if self.fitted.outside(name) is None:
            return self.start.values(name, first, count)
        return self._flat(name)[first : first + count]

    def keeps(self, side: str, name: str, ranges: Sequence[tuple[int, int]]) -> bool:
        return self.fitted.outside(name) is None and self.start.keeps(side, name, ranges)
