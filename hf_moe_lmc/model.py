"""A checkpoint as a model: its family, its MoE layers as views, and the tensors outside of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from hf_moe_lmc.checkpoint import Checkpoint
from hf_moe_lmc.claim import Block, check_declared, check_scales, claim_block
from hf_moe_lmc.configuration import differing
from hf_moe_lmc.errors import CheckpointError, FamilyError, Faults, SymmetryError, listing, shown
from hf_moe_lmc.family import (
    SHARED_ROLES,
    MoEFamily,
    Stack,
    families,
    get_family,
    is_expert_role,
    refusals,
    split_role,
)
from hf_moe_lmc.layer import ActedLayer, LayerSource, MoELayer
from hf_moe_lmc.pairing import not_one_architecture, shapes_of, tensor_problems
from hf_moe_lmc.quantisation import WAY_OUT, Quantisation
from hf_moe_lmc.symmetry import LayerSymmetry, ModelSymmetry

_EXPERTS_ANYWHERE = re.compile(r"(?P<prefix>.*?[^.]+)\.\d+\.(?:[^.]+\.)*experts\.(?:\d+\.)?[^.]*(?:w[123]|fc[123]|_proj)")


@dataclass(frozen=True)
class MoEModel:
    """A checkpoint whose every tensor has been accounted for, from headers alone.

    Attributes:
        config: as AutoConfig reads it, the whole of a composite one.
        num_layers: layers of all stacks of the text model.
        groups: number of expert groups that bind (1: none).
        top_k: experts per token.
        layers: the MoE layers by number, multi-token-prediction layers included.
        towers: what stands before `layers.` (or what the family has in its place), by stack.
    """

    checkpoint: Checkpoint
    family: MoEFamily
    config: PreTrainedConfig
    num_layers: int
    groups: int
    top_k: int
    layers: Mapping[int, MoELayer]
    towers: tuple[str, ...]

    @cached_property
    def layer_of(self) -> dict[str, MoELayer]:
        """The MoE layer that claims a tensor, by tensor name; names outside the MoE blocks are absent."""
        return {name: layer for layer in self.layers.values() for name in layer.claims}

    @cached_property
    def outside(self) -> tuple[str, ...]:
        """Names of the tensors outside the MoE blocks."""
        return tuple(name for name in self.checkpoint.tensors if name not in self.layer_of)

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.config.get_text_config()

    @property
    def quantisation(self) -> Quantisation | None:
        return self.checkpoint.quantisation

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes of the axis words in the first MoE layer; in nearly all models, of every one."""
        return next(iter(self.layers.values())).sizes

    @cached_property
    def extra_layers(self) -> tuple[int, ...]:
        """The multi-token-prediction layers that are present and have experts."""
        return tuple(index for index in self.layers if index >= self.num_layers)

    @cached_property
    def experts_outside(self) -> tuple[str, ...]:
        """Prefixes under which experts stand that are not of the text model's layers: other towers, prediction layers."""
        found = (_EXPERTS_ANYWHERE.match(name) for name in self.outside)
        return tuple(dict.fromkeys(match["prefix"] for match in found if match))

    def is_extra(self, name: str) -> bool:
        """Whether a tensor belongs to a multi-token-prediction layer."""
        if len(self.towers) > 1:
            return False
        match = _layer_pattern(self.family.stacks[0], self.towers[0]).fullmatch(name)
        return match is not None and int(match["layer"]) >= self.num_layers

    def identity(self) -> ModelSymmetry:
        """The identity of this model's group."""
        return ModelSymmetry(self.family.name, self.groups, {index: layer.identity() for index, layer in self.layers.items()})

    def random(self, generator: torch.Generator, *, scale: float = 1.0) -> ModelSymmetry:
        """A random element of this model's group; `scale`: see LayerSymmetry.random."""
        layers = {index: layer.random(generator, groups=self.groups, scale=scale) for index, layer in self.layers.items()}
        return ModelSymmetry(self.family.name, self.groups, layers)

    def check_symmetry(self, symmetry: ModelSymmetry) -> None:
        """Raises SymmetryError unless `symmetry` acts on this model."""
        where = self.checkpoint.name
        if symmetry.family != self.family.name:
            raise SymmetryError(f"the symmetry is of family {symmetry.family}, {where} is of family {self.family.name}")
        expected = self.identity()
        problems = [
            f"layer {index}: {'absent from the model' if index not in expected.layers else 'absent from the symmetry'}"
            for index in sorted(symmetry.layers.keys() ^ expected.layers.keys())
        ]
        problems += [
            f"layer {index}: expected {expected.layers[index].sizes}, found {layer.sizes}"
            for index, layer in symmetry.layers.items()
            if index in expected.layers and layer.sizes != expected.layers[index].sizes
        ]
        problems += [
            f"layer {index}: expected the banks {_banks(expected.layers[index])}, found {_banks(layer)}"
            for index, layer in symmetry.layers.items()
            if index in expected.layers and _banks(layer) != _banks(expected.layers[index])
        ]
        if problems:
            raise SymmetryError(f"the symmetry does not have the shapes of {where}:\n{listing(problems)}")
        ModelSymmetry(symmetry.family, self.groups, symmetry.layers).validate(f"the symmetry for {where}")
        problems = [problem for index, layer in self.layers.items() for problem in layer.problems(symmetry.layers[index])]
        if problems and self.quantisation:
            raise SymmetryError(
                f"{where} is quantised ({self.quantisation.method}): only whole experts can change places, anything else would "
                f"need new scales:\n{listing(problems)}\n{WAY_OUT}"
            )
        if problems:
            raise SymmetryError(f"{where}: no element of the group of family {self.family.name}:\n{listing(problems)}")

    def acted(self, elements: Mapping[int, LayerSymmetry]) -> dict[int, LayerSource]:
        """The MoE layers in the coordinates that group elements give them, each looked up when its layer is read."""
        return {index: _Acted(layer, elements) for index, layer in self.layers.items()}


@dataclass(frozen=True)
class _Acted:
    layer: MoELayer
    elements: Mapping[int, LayerSymmetry]

    def read(self, role: str, expert: int | None = None) -> Tensor:
        return ActedLayer(self.layer, self.elements[self.layer.index], self.layer.units).read(role, expert)


def read_model(checkpoint: Checkpoint, family: MoEFamily | None = None) -> MoEModel:
    """Recognises a checkpoint: family, sizes, MoE layers; every tensor under an MoE block claimed exactly once.

    Args:
        family: what to read it as; by default the family that its model type is registered under. Of a composite model,
            that is the family of its own type or else of its text tower's.

    Raises:
        CheckpointError: the configuration cannot be read.
        FamilyError: an unknown family, missing or extra tensors or layers, shapes that contradict the configuration.
    """
    config = read_config(checkpoint)
    family = family or get_family(model_type(config), checkpoint.name)
    check_declared(checkpoint, checkpoint.quantisation, checkpoint.tensors)
    text = config.get_text_config()
    layers: dict[int, MoELayer] = {}
    faults = Faults()
    towers, start = [], 0
    for stack in family.stacks:
        tower = _find_tower(checkpoint, family, stack, config)
        towers.append(tower)
        count = family.number(stack.layers, text)
        for index, names in _blocks(checkpoint, family, stack, tower, text, count).items():
            with faults.gather():
                block = Block(
                    checkpoint=checkpoint,
                    family=family,
                    index=start + index,
                    prefix=tower + stack.stem.format(layer=index),
                    names=names,
                    facts=family.at(text, min(index, count - 1)),
                    quantisation=checkpoint.quantisation,
                )
                layers[block.index] = MoELayer(
                    checkpoint, family, block.index, block.facts, claim_block(block), checkpoint.quantisation
                )
        start += count
    faults.check()
    if not layers:
        raise FamilyError(
            f"{checkpoint.name}: no MoE layer in it: config.json ({family.stacks[0].moe_layers}) makes every layer dense"
        )
    groups, top_k = family.number(family.groups, text), family.number(family.top_k, text)
    _check_routing(checkpoint.name, text, layers, groups, top_k)
    model = MoEModel(
        checkpoint=checkpoint,
        family=family,
        config=config,
        num_layers=start,
        groups=groups,
        top_k=top_k,
        layers=layers,
        towers=tuple(towers),
    )
    check_scales(checkpoint, checkpoint.quantisation, model.outside)
    return model


def model_type(config: PreTrainedConfig) -> str:
    """The model type that decides the family: the configuration's own if it is known, else that of its text tower."""
    known = families().keys() | refusals().keys()
    return str(config.model_type if config.model_type in known else config.get_text_config().model_type)


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """config.json as AutoConfig reads it.

    Raises:
        CheckpointError: transformers cannot read it, or it asks for code of its own.
    """
    folder = checkpoint.source.path("config.json").parent
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.get_text_config()
    except Exception as error:  # the one place where any class may come: configuration classes compute with foreign values
        foreign = checkpoint.config.get("auto_map")
        if foreign and str(checkpoint.config.get("model_type")) not in CONFIG_MAPPING:
            reason = f"it asks for code of its own (auto_map: {shown(foreign)}), which is never run; take a release of"
            reason += f" transformers that knows model type {shown(repr(checkpoint.config.get('model_type')))}"
        else:
            reason = f"{type(error).__name__}: {shown(error, 400)}"
        raise CheckpointError(f"{checkpoint.name}/config.json: transformers cannot read it ({reason})") from error
    return config


def _check_routing(name: str, text: PreTrainedConfig, layers: Mapping[int, MoELayer], groups: int, top_k: int) -> None:
    """Raises FamilyError where config.json asks for a routing that there cannot be, or that no symmetry is exact for."""
    kept = getattr(text, "topk_group", None)
    for index, layer in layers.items():
        experts = layer.experts
        if not 1 <= top_k <= experts:
            raise FamilyError(f"{name}: config.json asks for {top_k} experts per token, layer {index} has {experts}")
        if groups > 1 and experts % groups:
            raise FamilyError(f"{name}: config.json divides experts into {groups} groups, layer {index} has {experts}")
        if groups > 1 and isinstance(kept, int) and not kept >= 1:
            raise FamilyError(f"{name}: config.json keeps {kept} of {groups} expert groups; expected at least 1")
        if groups > 1 and isinstance(kept, int) and top_k > kept * (experts // groups):
            raise FamilyError(
                f"{name}: config.json asks for {top_k} experts per token out of {kept} groups of {experts // groups}: the rest "
                "are ties, which depend on the order of the experts, so that no expert can change places"
            )


def _layer_pattern(stack: Stack, tower: str | None) -> re.Pattern[str]:
    """Matches the keys of a stack's layers, in the given tower or in any."""
    stem = re.escape(stack.stem).replace(r"\{layer\}", "(?P<layer>0|[1-9][0-9]*)")
    before = r"(?P<tower>(?:.*\.)?)" if tower is None else re.escape(tower)
    return re.compile(before + stem + "(?P<rest>.+)")


def _find_tower(checkpoint: Checkpoint, family: MoEFamily, stack: Stack, config: PreTrainedConfig) -> str:
    """What stands before `layers.N.` in this checkpoint: the family's own prefix, or that of a tower in a composite model.

    Raises:
        FamilyError: several towers hold experts of this family, and nothing says which one is the text tower.
    """
    pattern = _layer_pattern(stack, None)
    experts = [template.pattern for template in family.templates if is_expert_role(template.spec.roles[0])]
    endings = tuple(checkpoint.quantisation.suffixes) if checkpoint.quantisation else ()
    found = set()
    for name in checkpoint.tensors:
        match = pattern.fullmatch(name)
        if match and match["tower"] not in found:
            key = next((match["rest"].removesuffix(ending) for ending in endings if name.endswith(ending)), match["rest"])
            if any(expert.fullmatch(key) for expert in experts):
                found.add(match["tower"])
    if stack.tower in found:
        return stack.tower
    # layers for multi-token prediction may stand beside the others under a prefix of their own
    towers = sorted(
        tower
        for tower in found
        if tower.startswith(family.towers.get(config.model_type, ""))
        and not any(part.startswith("mtp") for part in tower.split("."))
    )
    if len(towers) > 1:
        raise FamilyError(
            f"{checkpoint.name}: experts of family {family.name} stand under {' and under '.join(towers)}; "
            "expected one text tower. A family's `towers` says which it is"
        )
    return towers[0] if towers else stack.tower


def _blocks(
    checkpoint: Checkpoint, family: MoEFamily, stack: Stack, tower: str, config: PreTrainedConfig, count: int
) -> dict[int, dict[str, str]]:
    """Names of the tensors under each MoE block of a stack: {layer: {key below the layer: name}}.

    Raises:
        FamilyError: layers missing or in excess, or an MoE tensor in a layer that the configuration makes dense.
    """
    layers: dict[int, dict[str, str]] = {}
    pattern = _layer_pattern(stack, tower)
    for name in checkpoint.tensors:
        if match := pattern.fullmatch(name):
            layers.setdefault(int(match["layer"]), {})[match["rest"]] = name
    moe = [index for index in range(count) if family.evaluate(stack.moe_layers, config, layer=index)]
    extra = family.number(family.extra_layers, config) if len(family.stacks) == 1 else 0
    # a stack with a suffix after its number (an encoder's `layer.1`) shows only some of the tensors of a layer
    expected = range(count) if stack.stem.endswith("{layer}.") else moe
    problems = [f"layer {index} is missing" for index in expected if index not in layers]
    problems += [f"layer {index} is one too many" for index in sorted(layers) if index >= count + extra]
    if problems:
        raise FamilyError(
            f"{checkpoint.name}: config.json says {count} layers"
            + (f" and up to {extra} for multi-token prediction" if extra else "")
            + f"; in the shards ({tower}{stack.stem.format(layer='N')}):\n{listing(problems)}\n"
            "Fetch the checkpoint again, whole, with the config.json that these weights came with"
        )
    # what only an MoE layer has; a shared expert may be what a dense layer has as well
    telling = [
        t.pattern for t in family.templates if not t.spec.is_fixed and split_role(t.spec.roles[0])[1] not in SHARED_ROLES
    ]
    blocks = {}
    for index in sorted(layers):
        names = {key: name for key, name in layers[index].items() if key.startswith(family.block_prefixes)}
        held = [name for key, name in names.items() if any(pattern.fullmatch(key) for pattern in telling)]
        if index in moe or (index >= count and held):  # a layer for multi-token prediction may be dense
            blocks[index] = names
        elif held:
            raise FamilyError(
                f"{checkpoint.name}: config.json ({stack.moe_layers}) makes layer {index} dense, but it holds\n" + listing(held)
            )
    return blocks


def _banks(layer: LayerSymmetry) -> dict[str, dict[str, int]]:
    return {name: other.sizes for name, other in layer.others.items()}


def check_pair(a: MoEModel, b: MoEModel, *, ignore_extra_layers: bool = False) -> list[str]:
    """Checks that two models are of one architecture, from headers and configurations alone.

    Args:
        ignore_extra_layers: multi-token-prediction layers may be present in one of them only.

    Returns:
        Warnings: configuration fields that differ although they may change what the weights compute.

    Raises:
        MismatchError: listing every difference with both values.
    """
    facts = [
        f"{what}: A has {of_a}, B has {of_b}"
        for what, of_a, of_b in (
            ("family", a.family.name, b.family.name),
            ("layers", a.num_layers, b.num_layers),
            ("MoE layers", _regular(a), _regular(b)),
            ("experts per token", a.top_k, b.top_k),
            ("binding expert groups", a.groups, b.groups),
            ("quantisation", a.quantisation, b.quantisation),
            *((f"size of axis {word}", a.sizes[word], b.sizes.get(word)) for word in a.sizes),
        )
        if of_a != of_b
    ]
    problems = [facts]
    if a.family is b.family:
        problems += [_layer_problems(a, b), *_outside_problems(a, b, ignore_extra_layers)]
    if any(problems):
        raise not_one_architecture(a.checkpoint, b.checkpoint, problems)
    return differing(a.config.to_dict(), b.config.to_dict())


def _regular(model: MoEModel) -> list[int]:
    return [index for index in model.layers if index < model.num_layers]


def _layer_problems(a: MoEModel, b: MoEModel) -> list[str]:
    problems = []
    for i in [i for i in _regular(a) if i in b.layers]:
        layer_a, layer_b = a.layers[i], b.layers[i]
        for word in [word for word in a.sizes if a.sizes[word] == b.sizes.get(word)]:
            if layer_a.sizes[word] != layer_b.sizes[word]:
                problems.append(f"layer {i}: size of axis {word}: A has {layer_a.sizes[word]}, B has {layer_b.sizes[word]}")
        if not a.quantisation and set(layer_a.roles) != set(layer_b.roles):
            problems.append(f"layer {i}: in one of the two only: {', '.join(set(layer_a.roles) ^ set(layer_b.roles))}")
    return problems


def _outside_problems(a: MoEModel, b: MoEModel, ignore_extra_layers: bool) -> list[list[str]]:
    problems = []
    if a.extra_layers != b.extra_layers and not ignore_extra_layers:
        problems.append(
            f"multi-token-prediction layers: A has {list(a.extra_layers)}, B has {list(b.extra_layers)}; "
            "remove them from the one that has them, or add them to the other"
        )
    skip_extra = ignore_extra_layers or bool(problems)
    names_a, names_b = ({name for name in m.outside if not (skip_extra and m.is_extra(name))} for m in (a, b))
    if names_a != names_b and shapes_of(a.checkpoint, names_a) == shapes_of(b.checkpoint, names_b):
        other_names = (
            "outside the MoE blocks they hold the same tensors under other names: one is in the Hub's layout, the other in "
            f"that of transformers' memory ({sorted(names_a - names_b)[0]}, {sorted(names_b - names_a)[0]}); load one of "
            "them with transformers and save it with save_original_format=True (the Hub's) or False"
        )
        return [problems, [other_names]]
    return [problems, *tensor_problems(a.checkpoint, b.checkpoint, names_a, names_b)]
