"""Two checkpoints side by side, from headers and files alone: whether their tensors and tokenizers belong together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.configuration import differing, with_changes
from hf_moe_lmc.checkpoints.joint import Joint, join, rows_of
from hf_moe_lmc.checkpoints.mtp import has_own_prefix, uncounted
from hf_moe_lmc.checkpoints.sizes import LAYER, text_settings
from hf_moe_lmc.checkpoints.source import Folder, Repository
from hf_moe_lmc.checkpoints.token_ids import Agreement, agreement_of
from hf_moe_lmc.errors import MismatchError, listing, worded

# Sizes that the weights have: where two checkpoints with the same tensors disagree about one, a configuration is wrong.
STRUCTURE = (
    "num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "hidden_size",
    "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
WANTED = "Take two checkpoints of one model, in one layout, that differ in nothing but their values"


def origins(a: Checkpoint, b: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """The origins of two checkpoints. Folders of one name are named with as few parents as tell them apart."""
    found = a.origin(), b.origin()
    if isinstance(a.source, Folder) and isinstance(b.source, Folder):
        names = told_apart(a.source.root, b.source.root)
        return {**found[0], "source": names[0]}, {**found[1], "source": names[1]}
    return found


def told_apart(a: Path, b: Path) -> tuple[str, str]:
    """Names of two folders, with as few parents as tell them apart.

    Example:
        >>> told_apart(Path("/models/base"), Path("/models/tuned"))
        ('base', 'tuned')
        >>> told_apart(Path("/models/run1/checkpoint-500"), Path("/models/run2/checkpoint-500"))
        ('run1/checkpoint-500', 'run2/checkpoint-500')
    """
    parts = [folder.resolve().parts for folder in (a, b)]
    for count in range(1, max(map(len, parts)) + 1):
        one, other = ("/".join(found[-count:]) for found in parts)
        if one != other:
            return one, other
    return parts[0][-1], parts[1][-1]  # one folder


def check_plain_pair(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Checks, without knowing their family, that two checkpoints can be averaged tensor by tensor under equal names.

    Returns:
        Warnings: settings that differ, tokenizers that could not be compared, the same checkpoint twice.

    Raises:
        MismatchError: listing every difference with what A and B have.
    """
    types = a.config.get("model_type"), b.config.get("model_type")
    facts = [f"model type: A has {worded(types[0])}, B has {worded(types[1])}"] if types[0] != types[1] else []
    sizes = [
        f"config.json: {key} is {worded(of_a)} in A and {worded(of_b)} in B, though they hold the same tensors"
        for key in STRUCTURE
        for of_a, of_b in [(text_settings(a).get(key), text_settings(b).get(key))]
        if of_a is not None and of_b is not None and of_a != of_b
    ]
    problems = [facts, *tensor_problems(a, b, a.tensors, b.tensors), sizes]
    if any(problems):
        raise not_one_architecture(a, b, problems)
    of_a, of_b = (with_changes(one.config, one.changes) for one in (a, b))
    return same_weights(a, b) + differing(of_a, of_b, only_common=True)


def join_plain(a: Checkpoint, b: Checkpoint) -> tuple[Joint, Agreement]:
    """Two checkpoints of which nothing is known but their files, brought to one set of tensors as far as could be helped."""
    agreement = agreement_of(a, b, rows_of(a, a.tensors), rows_of(b, b.tensors))
    tied = bool(text_settings(a).get("tie_word_embeddings")), bool(text_settings(b).get("tie_word_embeddings"))
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
    count = text_settings(checkpoint).get("num_hidden_layers")

    def found(name: str) -> bool:
        match = LAYER.match(name)
        return has_own_prefix(name) or bool(match and type(count) is int and int(match[2]) >= count)

    return found


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


def same_weights(a: Checkpoint, b: Checkpoint) -> list[str]:
    """The warning that both are one checkpoint, if they are."""
    return [f"A and B hold the same weights: both are {a.name}"] if same_place(a, b) else []


def same_place(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether both are one folder, or one commit of one repository."""
    one, other = a.source, b.source
    if isinstance(one, Folder) and isinstance(other, Folder):
        return one.root.resolve() == other.root.resolve()
    if isinstance(one, Repository) and isinstance(other, Repository):
        return (one.repo_id, one.commit) == (other.repo_id, other.commit)
    return False
