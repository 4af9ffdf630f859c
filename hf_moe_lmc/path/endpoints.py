"""The points of a path, and the weights of both its ends in the names of the transformers model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe_lmc.errors import MismatchError
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.path.skeleton import Conversion, Group, Skeleton
from hf_moe_lmc.runtime.memory import CPU
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.writing.interpolation import interpolate_into
from hf_moe_lmc.writing.spans import Copied
from hf_moe_lmc.writing.streams import ModelStream, rewritten, whole


@dataclass(frozen=True)
class Point:
    """A model between A and B: theta = (1 - t) A + t (g B), in all of it or in some decoder layers only.

    Attributes:
        path: name of g among the symmetries.
        layers: numbers of the decoder layers that leave A; None: everything does.
    """

    path: str
    t: float
    layers: frozenset[int] | None = None

    def at(self, layer: int | None) -> float:
        """t in a decoder layer, or with None in what belongs to none."""
        return self.t if self.layers is None or layer in self.layers else 0.0


def stored(path: str) -> str:
    """The path of the same merges as an output stores them, rounded to its dtypes or quantized."""
    return f"{path}, stored"


@dataclass(frozen=True)
class Part:
    """Parameters of one decoder layer, or with `layer` None of what belongs to none."""

    layer: int | None
    names: tuple[str, ...]


@dataclass
class Endpoints:
    """Weights of both models in the names of the transformers model, read as they are asked for.

    Attributes:
        conversions: of A and of B, see `conversions`.
        merged: points, by path and t, whose weights are those of a checkpoint of their own, in A's layout or in B's.
        home: where the weights of both ends wait for their points; on the device of the model they cross over to it once, and
            are interpolated there.
    """

    a: MoEModel
    b: MoEModel
    symmetries: Mapping[str, ModelSymmetry]
    skeleton: Skeleton
    conversions: tuple[Conversion, Conversion]
    merged: Mapping[tuple[str, float], ModelStream] = field(default_factory=dict)
    home: torch.device = CPU
    held: dict[tuple[str | None, str], Tensor] = field(default_factory=dict)

    @cached_property
    def streams(self) -> dict[str, ModelStream]:
        return {path: rewritten(self.b, symmetry.layers) for path, symmetry in self.symmetries.items()}

    @cached_property
    def layers_path(self) -> str:
        """The module list of the decoder layers: where the parameters of an MoE block stand."""
        claimed = self.a.layer_of.keys()
        target = next(name for name, group in self.conversions[0].group_of.items() if group.keys[0] in claimed)
        match = re.match(r"(.*?)\.\d+\.", target)
        assert match is not None
        return match[1]

    def layouts(self) -> dict[str, str]:
        """What tells apart the ends that are not read as their files have them, by side."""
        digests = {"a": self.a.checkpoint.layout_digest(), "b": self.b.checkpoint.layout_digest()}
        return {side: digest for side, digest in digests.items() if digest}

    def parts(self) -> tuple[list[Part], Part]:
        """The decoder layers in their order, and what a text needs besides."""
        at, module = self.layers_path, self.skeleton.module
        names = [name for name in self.skeleton.state if name not in self.skeleton.tied]
        of_layers = [
            Part(layer, tuple(name for name in names if name.startswith(f"{at}.{layer}.")))
            for layer, _ in enumerate(module.get_submodule(at).children())
        ]
        other_towers = [
            f"{path}."
            for path, part in module.named_modules()
            if isinstance(part, PreTrainedModel) and path and not f"{at}.".startswith(f"{path}.")
        ]
        return of_layers, Part(None, tuple(name for name in names if not name.startswith((f"{at}.", *other_towers))))

    def load(self, wanted: Sequence[str]) -> None:
        """Reads parameters of A and of every path's B, unless they are held; what no symmetry touches is held once."""
        names = [name for name in wanted if (None, name) not in self.held]
        plain = ModelStream(self.a, dict(self.a.layers), Copied(self.a.checkpoint))
        for group in groups(self.conversions[0], names):
            self._hold(None, self.conversions[0].convert(group, partial(whole, plain)))
        for group in groups(self.conversions[1], names):
            touched = any(key in self.b.layer_of for key in group.keys)
            for i, (path, stream) in enumerate(self.streams.items()):
                if touched or i == 0:
                    values = self.conversions[1].convert(group, partial(whole, stream))
                self._hold(path, values)

    def _hold(self, path: str | None, values: Mapping[str, Tensor]) -> None:
        self.held.update(((path, name), value.to(self.home)) for name, value in values.items())

    def drop(self, names: Sequence[str]) -> None:
        for path in (None, *self.symmetries):
            for name in names:
                self.held.pop((path, name), None)

    def place(self, names: Sequence[str], path: str, t: float, *, reuse: bool = False) -> None:
        """Puts the weights of a point into the model, cast once to the dtype that it keeps them in.

        Args:
            reuse: write over those of another point where they stand, which nobody may need any more.
        """
        if (path, t) in self.merged:
            self._place_merged(names, self.merged[path, t])
            return
        for name in names:
            a, b = self.held[None, name], self.held[path, name]
            standing = self.skeleton.value(name) if reuse else None
            if standing is not None and standing.stride() != a.stride():
                standing = None  # from a checkpoint of another layout
            value = standing
            if value is None:
                # kernels choose by layout: that which A's checkpoint would be loaded with
                value = torch.empty_strided(
                    a.shape, a.stride(), dtype=self.skeleton.dtype_of(name), device=self.skeleton.device
                )
            try:
                interpolate_into(value, a, b, t)
            except MismatchError as error:
                raise MismatchError(f"{name}: {error}") from error
            if standing is None:
                self.skeleton.place({name: value})

    def _place_merged(self, names: Sequence[str], stream: ModelStream) -> None:
        alike = stream.template.tensors.keys() == self.a.checkpoint.tensors.keys()
        conversion = self.conversions[0 if alike else 1]
        for group in groups(conversion, names):
            self.skeleton.place(conversion.convert(group, partial(whole, stream)))


def conversions(skeleton: Skeleton, a: MoEModel, b: MoEModel) -> tuple[Conversion, Conversion]:
    """Which tensors of A and of B become which parameters; multi-token-prediction layers have no part in it.

    Raises:
        CheckpointError: parameters without tensors, or with tensors of another shape.
    """
    return conversion(skeleton, a), conversion(skeleton, b)


def conversion(skeleton: Skeleton, model: MoEModel) -> Conversion:
    """As `conversions`, of one model."""
    shapes = {name: info.shape for name, info in model.checkpoint.tensors.items() if not model.is_extra(name)}
    return Conversion(skeleton, model.checkpoint.name, shapes)


def groups(conversion: Conversion, names: Sequence[str]) -> list[Group]:
    """The groups of tensors that some parameters come from, each once."""
    return list(dict.fromkeys(conversion.group_of[name] for name in names if name in conversion.group_of))
