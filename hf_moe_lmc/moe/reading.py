"""From a checkpoint to its model: towers, layers, blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.configuration import with_changes, without_foreign_switches
from hf_moe_lmc.checkpoints.mtp import MARKS, ONLY_EXTRA, has_own_prefix
from hf_moe_lmc.checkpoints.sizes import check_head
from hf_moe_lmc.checkpoints.tensor_names import check_whole
from hf_moe_lmc.errors import CheckpointError, FamilyError, Faults, listing, shown, worded
from hf_moe_lmc.formats.decoded import decoded
from hf_moe_lmc.moe.alias import Alias, read_as
from hf_moe_lmc.moe.block import Block
from hf_moe_lmc.moe.claim import claim_block
from hf_moe_lmc.moe.family import MoEFamily, Stack
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.notation import is_expert_role
from hf_moe_lmc.moe.registry import aliases, families, first_releases, get_family, refusals

# Model types that have a class with a head, which a checkpoint of the base class alone lacks.
WITH_HEAD = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}


def read_model(checkpoint: Checkpoint, family: MoEFamily | None = None) -> MoEModel:
    """Recognises a checkpoint: family, sizes, MoE layers; every tensor under an MoE block claimed exactly once.

    Args:
        family: what to read it as; by default the family that its model type is registered under. Of a composite model,
            that is the family of its own type or else of its text tower's.

    Raises:
        CheckpointError: the configuration cannot be read.
        FamilyError: an unknown family, missing or extra tensors or layers, shapes that contradict the configuration.
    """
    checkpoint = decoded(checkpoint)
    config = read_config(checkpoint)
    if config.model_type in WITH_HEAD:
        check_whole(checkpoint.name, checkpoint.tensors, checkpoint.source.files())
        check_head(checkpoint, tied=bool(getattr(config.get_text_config(), "tie_word_embeddings", True)))
    family = family or get_family(model_type(config), checkpoint.name)
    text = config.get_text_config()
    layers, towers, num_layers = _read_layers(checkpoint, family, config)
    if not layers:
        raise FamilyError(
            f"{checkpoint.name}: no MoE layer in it: config.json ({family.stacks[0].moe_layers}) makes every layer dense"
        )
    groups, top_k = family.number(family.groups, text), family.number(family.top_k, text)
    _check_routing(checkpoint.name, text, layers, groups, top_k)
    return MoEModel(
        checkpoint=checkpoint,
        family=family,
        config=config,
        num_layers=num_layers,
        groups=groups,
        top_k=top_k,
        layers=layers,
        towers=towers,
    )


def _read_layers(
    checkpoint: Checkpoint, family: MoEFamily, config: PreTrainedConfig
) -> tuple[dict[int, MoELayer], tuple[str, ...], int]:
    """The MoE layers by number, the tower of each stack, and the number of layers of all stacks."""
    text, layers, towers, start = config.get_text_config(), dict[int, MoELayer](), list[str](), 0
    faults = Faults()
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
                    config=family.at(text, min(index, count - 1)),
                )
                layers[block.index] = _layer(block)
        start += count
    for index, (prefix, names) in _blocks_apart(checkpoint, family, max([start - 1, *layers]) + 1).items():
        with faults.gather():
            facts = family.at(text, count - 1)
            layers[index] = _layer(Block(checkpoint, family, index, prefix, names, facts))
    faults.check()
    return layers, tuple(towers), start


def _layer(block: Block) -> MoELayer:
    return MoELayer(block.checkpoint, block.index, block.config, claim_block(block))


def model_type(config: PreTrainedConfig) -> str:
    """The model type that decides the family: the configuration's own if it is known, else that of its text tower."""
    known = families().keys() | refusals().keys()
    return str(config.model_type if config.model_type in known else config.get_text_config().model_type)


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """config.json as AutoConfig reads it, without switches to foreign code and without what no tensor bears out.

    Raises:
        FamilyError: the installed release of transformers is older than the model type.
        CheckpointError: transformers cannot read it, or it asks for code of its own.
    """
    alias = aliases().get(str(checkpoint.config.get("model_type")))
    _check_release(checkpoint, alias)
    if alias and alias.model_type not in CONFIG_MAPPING:
        return read_as(checkpoint, alias)
    written = with_changes(without_foreign_switches(checkpoint.config), checkpoint.changes)
    folder = ""
    try:
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(written), encoding="utf-8")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config  # weights are read as numbers, and transformers implies it for some
    except Exception as error:  # configuration classes compute with foreign values, and raise whatever comes of it
        foreign = checkpoint.config.get("auto_map")
        if foreign and str(checkpoint.config.get("model_type")) not in CONFIG_MAPPING:
            reason = f"it asks for code of its own (auto_map: {worded(foreign)}), which is never run; take a release of"
            reason += f" transformers that knows model type {worded(checkpoint.config.get('model_type'))}"
        else:
            reason = f"{type(error).__name__}: {shown(str(error).replace(folder, checkpoint.name), 400)}"
        raise CheckpointError(f"{checkpoint.name}/config.json: transformers cannot read it ({reason})") from error
    config._name_or_path = str(checkpoint.source.path("config.json").parent)
    return config


def _check_release(checkpoint: Checkpoint, alias: Alias | None) -> None:
    """Raises FamilyError where a later release of transformers has the model type."""
    name = str(checkpoint.config.get("model_type"))
    known_as = alias.known_as if alias and alias.known_as else name
    release = first_releases().get(known_as)
    if release and Version(transformers.__version__).release < Version(release).release:
        raise FamilyError(
            f"{checkpoint.name}: model type {shown(repr(known_as))} needs transformers {release} or later; "
            f"{transformers.__version__} is installed. Install a later one: pip install 'transformers>={release},<6'"
        )


def _check_routing(name: str, text: PreTrainedConfig, layers: Mapping[int, MoELayer], groups: int, top_k: int) -> None:
    """Raises FamilyError where config.json asks for a routing that there cannot be, or that no symmetry is exact for."""
    top_groups = getattr(text, "topk_group", None)
    for index, layer in layers.items():
        experts = layer.experts
        if not 1 <= top_k <= experts:
            raise FamilyError(f"{name}: config.json asks for {top_k} experts per token, layer {index} has {experts}")
        if groups > 1 and experts % groups:
            raise FamilyError(f"{name}: config.json divides experts into {groups} groups, layer {index} has {experts}")
        if groups > 1 and isinstance(top_groups, int) and not top_groups >= 1:
            raise FamilyError(f"{name}: config.json keeps {top_groups} of {groups} expert groups; expected at least 1")
        if groups > 1 and isinstance(top_groups, int) and top_k > top_groups * (experts // groups):
            raise FamilyError(
                f"{name}: config.json asks for {top_k} experts per token out of {top_groups} groups of {experts // groups}: "
                "the rest are ties, which depend on the order of the experts, so that no expert can change places"
            )


def _find_tower(checkpoint: Checkpoint, family: MoEFamily, stack: Stack, config: PreTrainedConfig) -> str:
    """What stands before `layers.N.` in this checkpoint: the family's own prefix, or that of a tower in a composite model.

    Raises:
        FamilyError: several towers hold experts of this family, and nothing says which one is the text tower.
    """
    pattern = stack.pattern(None)
    experts = [template.pattern for template in family.templates if is_expert_role(template.spec.roles[0])]
    holding = set()  # towers with experts
    for name in checkpoint.tensors:
        match = pattern.fullmatch(name)
        if match and match["tower"] not in holding and any(expert.fullmatch(match["rest"]) for expert in experts):
            holding.add(match["tower"])
    if stack.tower in holding:
        return stack.tower
    # layers for multi-token prediction may stand beside the others under a prefix of their own
    towers = sorted(
        tower
        for tower in holding
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
    pattern = stack.pattern(tower)
    for name in checkpoint.tensors:
        if match := pattern.fullmatch(name):
            layers.setdefault(int(match["layer"]), {})[match["rest"]] = name
    moe = [index for index in range(count) if family.evaluate(stack.moe_layers, config, layer=index)]
    extra = family.number(family.extra_layers, config) if len(family.stacks) == 1 else 0
    # a stack with a suffix after its number (an encoder's `layer.1`) shows only some of the tensors of a layer
    expected = range(count) if stack.stem.endswith("{layer}.") else moe
    problems = [f"layer {index} is missing" for index in expected if index not in layers]
    problems += [
        f"layer {index} is one too many" + ("" if index >= count + extra else f", as it holds nothing that {ONLY_EXTRA}")
        for index in sorted(layers)
        if index >= count + extra or (index >= count and not any(map(MARKS.fullmatch, layers[index])))
    ]
    if problems:
        raise FamilyError(
            f"{checkpoint.name}: config.json says {count} layers"
            + (f" and up to {extra} for multi-token prediction" if extra else "")
            + f"; in the shards ({tower}{stack.stem.format(layer='N')}):\n{listing(problems)}\n"
            "Fetch the checkpoint again, whole, with the config.json that these weights came with"
        )
    blocks = {}
    for index in sorted(layers):
        names = {key: name for key, name in layers[index].items() if key.startswith(family.block_prefixes)}
        held = [name for key, name in names.items() if any(pattern.fullmatch(key) for pattern in family.telling)]
        if index in moe or (index >= count and held):  # a layer for multi-token prediction may be dense
            blocks[index] = names
        elif held:
            raise FamilyError(
                f"{checkpoint.name}: config.json ({stack.moe_layers}) makes layer {index} dense, but it holds\n" + listing(held)
            )
    return blocks


def _blocks_apart(checkpoint: Checkpoint, family: MoEFamily, first: int) -> dict[int, tuple[str, dict[str, str]]]:
    """The MoE blocks for multi-token prediction under prefixes of their own: {layer: (prefix, {key below it: name})}.

    Layers count from `first` on, dense ones included; those under a second prefix follow the first one's.
    """
    stacks: dict[tuple[str, int], dict[int, tuple[str, dict[str, str]]]] = {}
    for name in filter(has_own_prefix, checkpoint.tensors):
        for kind, match in enumerate(pattern.fullmatch(name) for pattern in family.mtp_patterns):
            if match and match["rest"].startswith(family.block_prefixes):
                stack = stacks.setdefault((match["stack"], kind), {})
                _, names = stack.setdefault(int(match["layer"]), (match["prefix"], {}))
                names[match["rest"]] = name
                break
    blocks = {}
    for _, layers in sorted(stacks.items()):
        for number, (prefix, names) in sorted(layers.items()):
            if any(pattern.fullmatch(key) for key in names for pattern in family.telling):
                blocks[first + number] = prefix, names
        first += max(layers) + 1
    return blocks
