"""Which weight of a quantized checkpoint each tensor of a small model is stored like: by kind of layer and role, not by number.

Real files store layers in several ways: FP8 beside bfloat16 layers, experts in FP4 and a shared one in FP8. Each way that the
layers of one kind have goes to a layer of the small model, as far as it has as many of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.formats.encoding import misfit
from hf_moe_lmc.formats.protocol import StoredWeight
from hf_moe_lmc.formats.recognition import Storage

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_IN_LAYER = re.compile(r"(?P<stem>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)")

Where = tuple[str, int]  # what stands before a layer's number, and the number; outside layers: "" and -1
Kinds = dict[str, list[str]]  # names in a layer by their kind: the name below the layer, with N for each number
How = tuple[object, ...]  # a way to store a weight: equal where it is the same one


@dataclass(frozen=True)
class StoredLike:
    """How the tensors of a small model are stored.

    Attributes:
        weights: the quantized ones, by name: a weight of the checkpoint that it is stored like.
        dtypes: of the others, by name, as far as the checkpoint has such tensors.
        missed: sentences on quantized weights of the checkpoint that none of the small model is stored like.
    """

    weights: Mapping[str, StoredWeight]
    dtypes: Mapping[str, torch.dtype]
    missed: tuple[str, ...]


def stored_like(checkpoint: Checkpoint, storage: Storage, shapes: Mapping[str, tuple[int, ...]]) -> StoredLike:
    """How the tensors of a small model are stored, after the checkpoint of a large one.

    Args:
        checkpoint: as decoded.
        storage: of its weights.
        shapes: of the small model's tensors, by name.
    """
    weights: dict[str, StoredWeight] = {}
    dtypes: dict[str, torch.dtype] = {}
    unfit: dict[str, str] = {}
    for name, like in _counterparts(checkpoint, storage, shapes).items():
        weight = storage.weights.get(like)
        if weight is None:
            dtypes[name] = checkpoint.tensors[like].dtype
        elif why := misfit(weight, shapes[name]):
            unfit[_place(like)[1]] = why
        else:
            weights[name] = weight
    return StoredLike(weights, dtypes, tuple(_missed(storage, weights.values(), unfit)))


def _counterparts(checkpoint: Checkpoint, storage: Storage, names: Iterable[str]) -> dict[str, str]:
    """For each tensor of the small model that has one, a tensor of the checkpoint of its kind."""
    theirs = _layers(checkpoint.tensors)
    hows = {where: {kind: _distinct(checkpoint, storage, of) for kind, of in kinds.items()} for where, kinds in theirs.items()}
    taken: Counter[tuple[str, ...]] = Counter()
    found: dict[str, str] = {}
    for kinds in _layers(names).values():
        ways = _ways(kinds, hows)
        alike = tuple(sorted(kinds))
        if ways:
            like = hows[ways[taken[alike] % len(ways)]]
            for kind in kinds.keys() & like.keys():
                examples = list(like[kind].values())
                found |= {name: examples[number % len(examples)] for number, name in enumerate(kinds[kind])}
        taken[alike] += 1
    return found


def _ways(kinds: Kinds, hows: Mapping[Where, Mapping[str, Mapping[How, str]]]) -> list[Where]:
    """A layer of the checkpoint for each way that layers with most of these kinds are stored, the commonest first."""
    closest = max(((len(kinds.keys() & one.keys()), -len(one.keys() - kinds.keys())) for one in hows.values()), default=(0, 0))
    layers: dict[object, list[Where]] = defaultdict(list)
    for where, one in hows.items():
        shared = kinds.keys() & one.keys()
        if shared and (len(shared), -len(one.keys() - kinds.keys())) == closest:
            layers[tuple((kind, tuple(one[kind])) for kind in sorted(shared))].append(where)
    return [found[0] for found in sorted(layers.values(), key=len, reverse=True)]


def _layers(names: Iterable[str]) -> dict[Where, Kinds]:
    """Names by the layer that they are in, and by kind."""
    layers: dict[Where, Kinds] = defaultdict(lambda: defaultdict(list))
    for name in names:
        where, kind = _place(name)
        layers[where][kind].append(name)
    return dict(layers)


def _place(name: str) -> tuple[Where, str]:
    """The layer that a tensor is in, and its kind.

    Example:
        >>> _place("model.layers.3.mlp.experts.12.w1.weight")
        (('model.layers', 3), 'mlp.experts.N.w1.weight')
    """
    match = _IN_LAYER.fullmatch(name)
    where, rest = ((match["stem"], int(match["layer"])), match["rest"]) if match else (("", -1), name)
    return where, _NUMBER.sub("N", rest)


def _distinct(checkpoint: Checkpoint, storage: Storage, names: Iterable[str]) -> dict[How, str]:
    """The ways in which some tensors are stored, with the first one that is stored so."""
    found: dict[How, str] = {}
    for name in names:
        weight = storage.weights.get(name)
        found.setdefault(_how(weight) if weight else (checkpoint.tensors[name].dtype,), name)
    return found


def _how(weight: StoredWeight) -> How:
    split = weight.matrices // math.prod(weight.shape[:-2])
    parts = tuple((role, part.info.dtype) for role, part in weight.parts.items())
    return weight.format, weight.transposed, split, parts, tuple(info.dtype for info in weight.activations)


def _missed(storage: Storage, used: Iterable[StoredWeight], unfit: Mapping[str, str]) -> Iterable[str]:
    covered = {(_place(weight.name)[1], _how(weight)) for weight in used}
    missed: dict[tuple[str, How], list[StoredWeight]] = defaultdict(list)
    for weight in storage.weights.values():
        key = _place(weight.name)[1], _how(weight)
        if key not in covered:
            missed[key].append(weight)
    for (kind, _), weights in missed.items():
        more = f" and {len(weights) - 1} more of its kind" if weights[1:] else ""
        why = unfit.get(kind)
        reason = f"in the small model it has {why}" if why else "the small model has no such weight"
        yield f"{weights[0].name}{more} ({weights[0].format.kind}): {reason}"
