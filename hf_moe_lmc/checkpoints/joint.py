"""Two checkpoints brought to one set of tensors outside their MoE blocks, as far as what differs there changes no function."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.extended import Assembled, ExtendedCheckpoint, Piece
from hf_moe_lmc.checkpoints.token_ids import OF_A, OF_B, TokenIds

# Tables with a row for each token id, wherever they stand: input embeddings, and heads that give a logit for each.
EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|embed_in|tok_embeddings|word_embeddings|embeddings?|wte|shared)\.weight")
HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|output_layer|shared_head\.head)\.(?:weight|bias)")
# What older releases saved and no model reads: transformers computes it.
IGNORED = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.inv_freq|attn\.(?:masked_)?bias|attention\.(?:masked_)?bias|position_ids|causal_mask)"
)


@dataclass
class _Side:
    """One checkpoint, and what of it changes."""

    checkpoint: Checkpoint
    assembled: dict[str, Assembled] = field(default_factory=dict)
    without: set[str] = field(default_factory=set)
    changes: dict[str, Any] = field(default_factory=dict)

    def take(self, name: str, other: Checkpoint, of: str | None = None) -> None:
        """Has a tensor of another checkpoint, or with `of` another tensor, under a name."""
        info = other.tensors[of or name]
        self.assembled[name] = Assembled(info.dtype, info.shape, (Piece(info.numel, other, of or name, 0),))

    def extended(self) -> Checkpoint:
        if not (self.assembled or self.without or self.changes):
            return self.checkpoint
        return ExtendedCheckpoint.of(self.checkpoint, self.assembled, self.without, self.changes)


@dataclass(frozen=True)
class Joint:
    """Two checkpoints that hold the same tensors outside their MoE blocks, as far as could be helped.

    Attributes:
        a, b: those given, or extended.
        notes: what was done, in words.
    """

    a: Checkpoint
    b: Checkpoint
    notes: tuple[str, ...]


def embedding_of(checkpoint: Checkpoint, names: Collection[str]) -> str | None:
    """The table of input embeddings of the language model; None where none has a usual name."""
    found = [name for name in names if EMBEDDING.fullmatch(name) and len(checkpoint.tensors[name].shape) == 2]
    rows = _vocab_size(checkpoint)
    fitting = [name for name in found if checkpoint.tensors[name].shape[0] == rows] or found
    return min(fitting, key=len, default=None)


def _vocab_size(checkpoint: Checkpoint) -> int | None:
    text = checkpoint.config.get("text_config") or checkpoint.config
    found = text.get("vocab_size") if isinstance(text, dict) else None
    return found if type(found) is int else None


def rows_of(checkpoint: Checkpoint, names: Collection[str]) -> int:
    """Rows of the input embeddings; where none has a usual name, what the configuration says."""
    name = embedding_of(checkpoint, names)
    return checkpoint.tensors[name].shape[0] if name else _vocab_size(checkpoint) or 0


def join(
    a: Checkpoint,
    b: Checkpoint,
    names_a: Collection[str],
    names_b: Collection[str],
    ids: TokenIds,
    *,
    tied: tuple[bool, bool],
    is_extra: tuple[Callable[[str], bool], Callable[[str], bool]],
    without_extra: Mapping[str, Any],
) -> Joint:
    """Extends two checkpoints to one set of tensors.

    Args:
        names_a, names_b: tensors outside the MoE blocks.
        ids: their rows are those of the embeddings.
        tied: whether a head that a file lacks is the embedding.
        is_extra: whether a tensor belongs to multi-token prediction.
        without_extra: how A's configuration says that it has no multi-token prediction.
    """
    side_a, side_b = _Side(a), _Side(b)
    notes: list[str] = []
    in_a, in_b = set(names_a), set(names_b)
    _join_extra(side_a, side_b, in_a, in_b, is_extra, without_extra, notes)
    for name in sorted(in_a - in_b):
        if IGNORED.fullmatch(name) or is_extra[0](name):
            side_b.take(name, a)
    side_b.without |= {name for name in in_b - in_a if IGNORED.fullmatch(name) or is_extra[1](name)}
    _join_heads(side_a, side_b, in_a, in_b, tied, notes)
    if not ids.alike:
        _join_tables(side_a, side_b, in_a, in_b, ids)
        for side, rows in ((side_a, ids.rows_a), (side_b, ids.rows_b)):
            if rows != ids.rows:
                side.changes["vocab_size"] = ids.rows
    return Joint(side_a.extended(), side_b.extended(), tuple(notes))


def _join_extra(
    side_a: _Side,
    side_b: _Side,
    in_a: set[str],
    in_b: set[str],
    is_extra: tuple[Callable[[str], bool], Callable[[str], bool]],
    without_extra: Mapping[str, Any],
    notes: list[str],
) -> None:
    """Says what becomes of multi-token prediction that one has; where the two differ in it, B counts as having none."""
    extra_a, extra_b = set(filter(is_extra[0], in_a)), set(filter(is_extra[1], in_b))
    own_a, own_b = ({name for name in names if not _is_table(name)} for names in (extra_a, extra_b))
    if own_a and not own_b:
        notes.append("B lacks the multi-token-prediction layers of A: a merge has A's, as they are")
    elif own_b and not own_a:
        side_a.changes |= without_extra
        set_to = "".join(f", and {key} is {value}" for key, value in without_extra.items())
        notes.append(f"A lacks the multi-token-prediction layers of B: a merge leaves them out{set_to}")
    elif own_a != own_b:
        notes.append("A and B have other multi-token-prediction layers: a merge has A's, those that B lacks as they are")


def _is_table(name: str) -> bool:
    """Whether a tensor has a row for each token id: layers for multi-token prediction may hold copies of the model's."""
    return bool(EMBEDDING.fullmatch(name) or HEAD.fullmatch(name))


def _join_heads(
    side_a: _Side, side_b: _Side, in_a: set[str], in_b: set[str], tied: tuple[bool, bool], notes: list[str]
) -> None:
    """A head that one file lacks, because it is its embedding, becomes a tensor of its own where the other has one."""
    for side, own, others, is_tied, letter in (
        (side_a, in_a, in_b - in_a, tied[0], "A"),
        (side_b, in_b, in_a - in_b, tied[1], "B"),
    ):
        embedding = embedding_of(side.checkpoint, own)
        for name in sorted(others):
            if HEAD.fullmatch(name) and name.endswith(".weight") and "shared_head" not in name and is_tied and embedding:
                side.take(name, side.checkpoint, of=embedding)
                side_a.changes["tie_word_embeddings"] = side_b.changes["tie_word_embeddings"] = False
                notes.append(
                    f"the head of {letter} is its embedding, the other file holds its own: the path and a merge hold both"
                )


def _join_tables(side_a: _Side, side_b: _Side, in_a: set[str], in_b: set[str], ids: TokenIds) -> None:
    """Every row of a table over the vocabulary from where it belongs, see `TokenIds`."""
    names = sorted(in_a | in_b | side_a.assembled.keys() | side_b.assembled.keys())
    for name in [name for name in names if EMBEDDING.fullmatch(name) or HEAD.fullmatch(name)]:
        places = []
        for side, own, rows in ((side_a, in_a, ids.rows_a), (side_b, in_b, ids.rows_b)):
            source, table = side.checkpoint, name
            if name not in own and name in side.assembled:
                piece = side.assembled[name].pieces[0]
                source, table = piece.checkpoint, piece.name
            info = source.tensors.get(table)
            if info is None or not info.shape or info.shape[0] != rows:
                break
            places.append((source, table, info))
        if len(places) < 2 or places[0][2].shape[1:] != places[1][2].shape[1:]:
            continue
        width = max(places[0][2].numel // max(places[0][2].shape[0], 1), 1)
        for side, own_kind in ((side_a, OF_A), (side_b, OF_B)):
            pieces = []
            for run in ids.runs():
                source, table, _ = places[(run.kind or own_kind) - 1]
                pieces.append(Piece(run.count * width, source, table, run.first * width))
            info = places[own_kind - 1][2]
            side.assembled[name] = Assembled(info.dtype, (ids.rows, *info.shape[1:]), tuple(pieces))
