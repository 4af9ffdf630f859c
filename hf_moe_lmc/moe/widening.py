"""A model's layout with twice as many hidden units in each expert: tensors, sizes, and the configuration to go with it."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from transformers import PreTrainedConfig

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.configuration import with_changes
from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.checkpoints.virtual import laid_out
from hf_moe_lmc.errors import CheckpointError, FamilyError
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_config
from hf_moe_lmc.symmetry.banks import qualified


@dataclass(frozen=True)
class Wider:
    """What a model gets for twice as many hidden units.

    Attributes:
        changes: of config.json, as `with_changes` takes them.
        sizes: of the axis words in each MoE layer.
    """

    changes: Mapping[str, Any]
    sizes: Mapping[int, Mapping[str, int]]


def widened(model: MoEModel, base: Checkpoint) -> MoEModel:
    """A model of the same architecture and layout with twice as many hidden units in each expert that allows it.

    Nothing can be read from it: its tensors have places only.

    Args:
        base: with the tensors, shards and configuration of an output of the same size.

    Raises:
        FamilyError: no setting of the configuration has this effect and no other.
    """
    found = _wider(model, base)
    shards, tensors = {}, dict[str, TensorInfo]()
    for shard in base.shards.values():
        infos = [_wide_info(model, base.tensors[name], found) for name in shard.tensors]
        shards[shard.name], placed = laid_out(infos, shard.name)
        tensors |= {info.name: info for info in placed}
    wide = replace(base, shards=shards, tensors=tensors, changes={**base.changes, **found.changes})
    layers = {
        index: replace(layer, checkpoint=wide, config=replace(layer.config, sizes=found.sizes[index]))
        for index, layer in model.layers.items()
    }
    return replace(model, checkpoint=wide, config=_configured(model.config, found.changes), layers=layers)


def widening_words(layer: MoELayer) -> set[str]:
    """The axis words of hidden units that may be doubled: those of experts whose output is a sum over units."""
    words = {
        qualified(name, "unit") if qualified(name, "unit") in layer.sizes else "unit"
        for name, bank in layer.banks.items()
        if bank.unit_count and bank.kind.permutation
    }
    return words | ({"shared"} if layer.shared.unit_count and layer.shared.kind.permutation else set())


def _wide_info(model: MoEModel, info: TensorInfo, found: Wider) -> TensorInfo:
    layer = model.layer_of.get(info.name)
    if layer is None:
        return info
    claim = layer.claims[info.name]
    if not {"unit", "shared"} & set(claim.spec.axes):
        return info
    return replace(info, shape=claim.spec.shape(found.sizes[layer.index], claim.segment))


def _wider(model: MoEModel, base: Checkpoint) -> Wider:
    text, family = model.text_config, model.family
    sizes = {
        index: {word: 2 * size if word in widening_words(layer) else size for word, size in layer.sizes.items()}
        for index, layer in model.layers.items()
    }
    words = dict.fromkeys(word for layer in model.layers.values() for word in sorted(widening_words(layer)))
    names = list(dict.fromkeys(name for word in words for name in _attributes(family.sizes[word])))
    for count in range(1, len(names) + 1):
        for some in combinations(names, count):
            changes = _changes(base.config, text, some)
            if changes is not None and _sizes_with(model, base, changes) == sizes:
                return Wider(changes, sizes)
    raise FamilyError(
        f"{model.checkpoint.name}: cannot be widened: {', '.join(names)} in config.json cannot be set so that its experts "
        "alone have twice as many hidden units"
    )


def _sizes_with(model: MoEModel, base: Checkpoint, changes: Mapping[str, Any]) -> Mapping[int, Mapping[str, int]] | None:
    """The sizes of each layer under a changed configuration, None where it cannot be read."""
    try:
        written = with_changes(base.config, {**base.changes, **changes})  # under the model type that an output has
        text = read_config(replace(base, config=written, changes={})).get_text_config()
        return {index: model.family.at(text, at).sizes for index, at in _places(model, text)}
    except (CheckpointError, FamilyError):
        return None


def _places(model: MoEModel, text: PreTrainedConfig) -> Iterator[tuple[int, int]]:
    """(number of an MoE layer, its number within its stack), as the family counts."""
    counts = [model.family.number(stack.layers, text) for stack in model.family.stacks]
    for index in model.layers:
        within = index
        for count in counts[:-1]:
            if within < count:
                break
            within -= count
        else:
            count = counts[-1]
        yield index, min(within, count - 1)


def _attributes(expression: str) -> Iterator[str]:
    """The settings of a configuration that an expression reads: names, or `outer.inner`."""
    tree = ast.parse(expression, mode="eval")
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            inner.add(node.value)
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            inner.add(node.func)
            if node.func.id == "attr" and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)
        elif isinstance(node, ast.Name) and node not in inner and node.id != "layer":
            yield node.id


def _changes(written: Mapping[str, Any], text: PreTrainedConfig, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The settings doubled, as config.json has them; None where one is no number."""
    found: dict[str, Any] = {}
    for name in names:
        outer, _, inner = name.partition(".")
        value = getattr(text, outer, None)
        doubled = _doubled(getattr(value, inner, None) if inner else value)
        if doubled is None:
            return None
        key = getattr(text, "attribute_map", {}).get(outer, outer)
        key = key if key in written or outer not in written else outer
        found[key] = {**dict(written.get(outer) or {}), inner: doubled} if inner else doubled
    return found


def _doubled(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return 2 * value
    if isinstance(value, (list, tuple)) and all(isinstance(one, int) for one in value):
        return [2 * one for one in value]
    return None


def _configured(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    found = copy.deepcopy(config)
    text = found.get_text_config()
    for key, value in changes.items():
        if isinstance(value, Mapping):
            for inner, one in value.items():
                setattr(getattr(text, key), inner, one)
        else:
            setattr(text, key, value)
    return found
