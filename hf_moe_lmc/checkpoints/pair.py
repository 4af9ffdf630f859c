"""Two checkpoints side by side, from headers and files alone: whether their tensors and tokenizers belong together."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.configuration import differing
from hf_moe_lmc.checkpoints.joint import Joint, join, rows_of
from hf_moe_lmc.checkpoints.mtp import has_own_prefix, uncounted
from hf_moe_lmc.checkpoints.source import Folder, Repository
from hf_moe_lmc.checkpoints.token_ids import Agreement, agreement_of
from hf_moe_lmc.errors import FamilyError, Faults, MismatchError, listing, shown

# Sizes that the weights have: where two checkpoints with the same tensors disagree about one, a configuration is wrong.
STRUCTURE = (
    "num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "hidden_size",
    "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
_LAYER = re.compile(r"((?:.*?\.)?(?:layers|blocks|h)\.)(\d{1,6})\.")
WANTED = "Take two checkpoints of one model, in one layout, that differ in nothing but their values"


def check_plain_pair(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Checks, without knowing their family, that two checkpoints can be averaged tensor by tensor under equal names.

    Returns:
        Warnings: settings that differ, tokenizers that could not be compared, the same checkpoint twice.

    Raises:
        MismatchError: listing every difference with what A and B have.
    """
    facts = [
        f"{what}: A has {shown(repr(of_a))}, B has {shown(repr(of_b))}"
        for what, of_a, of_b in (
            ("model type", a.config.get("model_type"), b.config.get("model_type")),
            ("quantization", a.quantization, b.quantization),
        )
        if of_a != of_b
    ]
    sizes = [
        f"config.json: {key} is {shown(repr(of_a))} in A and {shown(repr(of_b))} in B, though they hold the same tensors"
        for key in STRUCTURE
        for of_a, of_b in [(_text(a).get(key), _text(b).get(key))]
        if of_a is not None and of_b is not None and of_a != of_b
    ]
    problems = [facts, *tensor_problems(a, b, a.tensors, b.tensors), sizes]
    faults, warnings = Faults(), []
    for checkpoint in (a, b):
        with faults.gather():
            check_layers(checkpoint)
    if any(problems):
        faults.add(not_one_architecture(a, b, problems))
    faults.check()
    if same_weights(a, b):
        warnings.append(f"A and B hold the same weights: {same(a, b)}")
    return warnings + differing(a.config, b.config, only_common=True)


def join_plain(a: Checkpoint, b: Checkpoint) -> tuple[Joint, Agreement]:
    """Two checkpoints of which nothing is known but their files, brought to one set of tensors as far as could be helped."""
    agreement = agreement_of(a, b, rows_of(a, a.tensors), rows_of(b, b.tensors))
    tied = bool(_text(a).get("tie_word_embeddings")), bool(_text(b).get("tie_word_embeddings"))
    joint = join(
        a,
        b,
        a.tensors,
        b.tensors,
        agreement.ids,
        tied=tied,
        is_extra=(_is_extra(a), _is_extra(b)),
        without_extra=uncounted(a.config),
    )
    return joint, agreement


def _is_extra(checkpoint: Checkpoint) -> Callable[[str], bool]:
    """Whether a tensor belongs to a layer behind the last one, or stands under a prefix for multi-token prediction."""
    count = _text(checkpoint).get("num_hidden_layers")

    def found(name: str) -> bool:
        match = _LAYER.match(name)
        return has_own_prefix(name) or bool(match and type(count) is int and int(match[2]) >= count)

    return found


def check_layers(checkpoint: Checkpoint) -> None:
    """Compares the number of layers in config.json with the layers that hold experts, or, without experts, with all.

    Raises:
        FamilyError: there are more in the shards, which transformers would leave out without a word, or fewer.
    """
    text = _text(checkpoint)
    count, extra = text.get("num_hidden_layers"), text.get("num_nextn_predict_layers")
    found: dict[str, set[int]] = {}
    holding: dict[str, int] = {}
    for name in checkpoint.tensors:
        if match := _LAYER.match(name):
            found.setdefault(match[1], set()).add(int(match[2]))
            holding[match[1]] = holding.get(match[1], 0) + ("expert" in name)
    if not found or type(count) is not int:
        return
    prefix = max(found, key=lambda stem: (holding[stem], len(found[stem])))
    layers = found[prefix]
    allowed = count + (extra if type(extra) is int else 0)
    problems = [f"layer {index} is missing" for index in range(count) if index not in layers]
    problems += [f"layer {index} is one too many" for index in sorted(layers) if index >= allowed]
    if problems:
        raise FamilyError(
            f"{checkpoint.name}: config.json says {count} layers; in the shards ({prefix}N.):\n{listing(problems)}\n"
            "Fetch the checkpoint again, whole, with the config.json that these weights came with"
        )


def _text(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The settings of the language model, which a composite model keeps in a configuration of their own."""
    inner = checkpoint.config.get("text_config")
    return inner if isinstance(inner, Mapping) else checkpoint.config


def tensor_problems(a: Checkpoint, b: Checkpoint, of_a: Collection[str], of_b: Collection[str]) -> list[list[str]]:
    """How the tensors `of_a` and `of_b` differ in names, shapes and kinds of numbers: for each kind of difference, lines."""
    in_a, in_b = set(of_a), set(of_b)
    shapes, dtypes = [], []
    for name in sorted(in_a & in_b):
        one, other = a.tensors[name], b.tensors[name]
        if one.shape != other.shape:
            shapes.append(f"{name}: A has shape {list(one.shape)}, B has {list(other.shape)}")
        elif one.dtype.is_floating_point != other.dtype.is_floating_point:
            dtypes.append(f"{name}: A has dtype {one.dtype}, B has {other.dtype}")
    return [
        [f"{name}: in A, not in B" for name in sorted(in_a - in_b)],
        [f"{name}: in B, not in A" for name in sorted(in_b - in_a)],
        shapes,
        dtypes,
    ]


def shapes_of(checkpoint: Checkpoint, names: Collection[str]) -> list[tuple[int, ...]]:
    return sorted(checkpoint.tensors[name].shape for name in names)


def not_one_architecture(a: Checkpoint, b: Checkpoint, problems: Sequence[list[str]]) -> MismatchError:
    """The error that lists problems, of each kind some."""
    lines = "\n".join(listing(of_a_kind) for of_a_kind in problems if of_a_kind)
    return MismatchError(f"A ({a.name}) and B ({b.name}) are not of one architecture:\n{lines}\n{WANTED}")


def same_place(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether both are one folder, or one commit of one repository."""
    one, other = a.source, b.source
    if isinstance(one, Folder) and isinstance(other, Folder):
        return one.root.resolve() == other.root.resolve()
    if isinstance(one, Repository) and isinstance(other, Repository):
        return (one.repo_id, one.commit) == (other.repo_id, other.commit)
    return False


def same_weights(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether both are the same as far as their fingerprints see; of what is still on the Hub, only the place is compared."""
    if same_place(a, b):
        return True
    here = all(isinstance(one.source, Folder) or one.source.cached for one in (a, b))
    alike = here and [(shard.header, shard.size) for shard in a.shards.values()] == [
        (shard.header, shard.size) for shard in b.shards.values()
    ]
    return alike and a.fingerprint() == b.fingerprint()


def same(a: Checkpoint, b: Checkpoint) -> str:
    return f"both are {a.name}" if same_place(a, b) else f"{a.name} and {b.name} are copies of one checkpoint"
