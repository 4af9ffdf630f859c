"""Whether the tensors and tokenizers of two checkpoints belong together, from headers and files alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.configuration import differing
from hf_moe_lmc.checkpoints.source import Folder, Repository
from hf_moe_lmc.checkpoints.vocabulary import check_tokenizers
from hf_moe_lmc.errors import FamilyError, Faults, MismatchError, listing, shown

# Sizes of the weights. Two checkpoints with equal tensors that disagree about one have a wrong configuration.
SIZE_SETTINGS = (
    "num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "hidden_size",
    "intermediate_size", "moe_intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
_LAYER = re.compile(r"((?:.*?\.)?(?:layers|blocks|h)\.)(\d{1,6})\.")
ADVICE = "Take two checkpoints of one model, in one layout, that differ in nothing but their values"


def check_plain_pair(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Checks, without knowing their family, that two checkpoints can be averaged tensor by tensor under equal names.

    Returns:
        Warnings: settings that differ, tokenizers that could not be compared, the same checkpoint twice.

    Raises:
        CheckpointError: a tokenizer file cannot be read.
        MismatchError: listing every difference with what A and B have.
    """
    settings = [
        f"{name}: A has {shown(repr(value_a))}, B has {shown(repr(value_b))}"
        for name, value_a, value_b in (
            ("model type", a.config.get("model_type"), b.config.get("model_type")),
            ("quantization", a.quantization, b.quantization),
        )
        if value_a != value_b
    ]
    sizes = [
        f"config.json: {key} is {shown(repr(size_a))} in A and {shown(repr(size_b))} in B, though they hold the same tensors"
        for key in SIZE_SETTINGS
        for size_a, size_b in [(_text_config(a).get(key), _text_config(b).get(key))]
        if size_a is not None and size_b is not None and size_a != size_b
    ]
    problems = [settings, *tensor_problems(a, b, a.tensors, b.tensors), sizes]
    faults, warnings = Faults(), []
    for checkpoint in (a, b):
        with faults.gather():
            check_layers(checkpoint)
    if any(problems):
        faults.add(not_one_architecture(a, b, problems))
    with faults.gather():
        warnings += check_tokenizers(a, b)
    faults.check()
    if same_weights(a, b):
        warnings.append(f"A and B hold the same weights: {_sameness(a, b)}")
    return warnings + differing(a.config, b.config, only_common=True)


def check_layers(checkpoint: Checkpoint) -> None:
    """Compares the number of layers in config.json with the layers that hold experts, or, without experts, with all.

    Raises:
        FamilyError: there are more in the shards, which transformers would leave out without a word, or fewer.
    """
    config = _text_config(checkpoint)
    count, extra = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    indices: dict[str, set[int]] = {}  # by prefix: numbers of the layers
    expert_tensors: dict[str, int] = {}  # by prefix: how many tensors of experts
    for name in checkpoint.tensors:
        if match := _LAYER.match(name):
            indices.setdefault(match[1], set()).add(int(match[2]))
            expert_tensors[match[1]] = expert_tensors.get(match[1], 0) + ("expert" in name)
    if not indices or type(count) is not int:
        return
    prefix = max(indices, key=lambda stem: (expert_tensors[stem], len(indices[stem])))
    layers = indices[prefix]
    allowed = count + (extra if type(extra) is int else 0)
    problems = [f"layer {index} is missing" for index in range(count) if index not in layers]
    problems += [f"layer {index} is one too many" for index in sorted(layers) if index >= allowed]
    if problems:
        raise FamilyError(
            f"{checkpoint.name}: config.json says {count} layers; in the shards ({prefix}N.):\n{listing(problems)}\n"
            "Fetch the checkpoint again, whole, with the config.json that these weights came with"
        )


def _text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The settings of the language model, which a composite model keeps in a configuration of their own."""
    inner = checkpoint.config.get("text_config")
    return inner if isinstance(inner, Mapping) else checkpoint.config


def tensor_problems(a: Checkpoint, b: Checkpoint, names_a: Collection[str], names_b: Collection[str]) -> list[list[str]]:
    """How two sets of tensors differ in names, shapes and kinds of numbers: lines of text for each kind of difference."""
    in_a, in_b = set(names_a), set(names_b)
    shapes, dtypes = [], []
    for name in sorted(in_a & in_b):
        info_a, info_b = a.tensors[name], b.tensors[name]
        if info_a.shape != info_b.shape:
            shapes.append(f"{name}: A has shape {list(info_a.shape)}, B has {list(info_b.shape)}")
        elif info_a.dtype.is_floating_point != info_b.dtype.is_floating_point:
            dtypes.append(f"{name}: A has dtype {info_a.dtype}, B has {info_b.dtype}")
    return [
        [f"{name}: in A, not in B" for name in sorted(in_a - in_b)],
        [f"{name}: in B, not in A" for name in sorted(in_b - in_a)],
        shapes,
        dtypes,
    ]


def shapes_of(checkpoint: Checkpoint, names: Collection[str]) -> list[tuple[int, ...]]:
    return sorted(checkpoint.tensors[name].shape for name in names)


def not_one_architecture(a: Checkpoint, b: Checkpoint, problems: Sequence[list[str]]) -> MismatchError:
    """The error that lists problems, some of each kind."""
    lines = "\n".join(listing(lines_of_kind) for lines_of_kind in problems if lines_of_kind)
    return MismatchError(f"A ({a.name}) and B ({b.name}) are not of one architecture:\n{lines}\n{ADVICE}")


def same_place(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether both are one folder, or one commit of one repository."""
    source_a, source_b = a.source, b.source
    if isinstance(source_a, Folder) and isinstance(source_b, Folder):
        return source_a.root.resolve() == source_b.root.resolve()
    if isinstance(source_a, Repository) and isinstance(source_b, Repository):
        return (source_a.repo_id, source_a.commit) == (source_b.repo_id, source_b.commit)
    return False


def same_weights(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether both have one fingerprint. Of a checkpoint that is not downloaded yet, only the place is compared."""
    if same_place(a, b):
        return True
    downloaded = a.is_here and b.is_here
    equal_headers = downloaded and [(shard.header, shard.size) for shard in a.shards.values()] == [
        (shard.header, shard.size) for shard in b.shards.values()
    ]
    return equal_headers and a.fingerprint() == b.fingerprint()


def _sameness(a: Checkpoint, b: Checkpoint) -> str:
    return f"both are {a.name}" if same_place(a, b) else f"{a.name} and {b.name} are copies of one checkpoint"
