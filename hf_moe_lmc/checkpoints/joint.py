"""Two checkpoints brought to one set of tensors outside their MoE blocks, as far as what differs there changes no function."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.extended import Assembled, ExtendedCheckpoint, Piece
from hf_moe_lmc.checkpoints.token_ids import OF_A, OF_B, TokenIds

# Tables with a row for each token id, wherever they stand: input embeddings, and heads that give a logit for each.
EMBEDDING = re.compile(
    r"(?:.*\.)?(?:embed_tokens(?:_per_layer)?|embed_in|tok_embeddings|word_embeddings|embed(?:dings?)?|wte|shared)\.weight"
)
HEAD = re.compile(
    r"(?:.*\.)?(?:lm_head|embed_out|output_layer|unembed|shared_head\.head)\.(?:weight|bias)|(?:head|output)\.(?:weight|bias)"
)
# What configurations call the number of rows of these tables, besides vocab_size.
OTHER_SIZES = ("vocab_size_per_layer_input", "unpadded_vocab_size")
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


def head_of(checkpoint: Checkpoint, names: Collection[str]) -> str | None:
    """The head of the language model; None where a file has none."""
    found = [name for name in names if HEAD.fullmatch(name) and name.endswith(".weight") and "shared_head" not in name]
    return min(found, key=len, default=None)


def _text_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    text = checkpoint.config.get("text_config") or checkpoint.config
    return text if isinstance(text, Mapping) else {}


def _vocab_size(checkpoint: Checkpoint) -> int | None:
    found = _text_settings(checkpoint).get("vocab_size")
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
        _resize(side_a, side_b, ids)
    return Joint(side_a.extended(), side_b.extended(), tuple(notes))


def _resize(side_a: _Side, side_b: _Side, ids: TokenIds) -> None:
    """The sizes of the vocabulary in both configurations: the larger ones."""
    for side, rows in ((side_a, ids.rows_a), (side_b, ids.rows_b)):
        if rows != ids.rows:
            side.changes["vocab_size"] = ids.rows
    texts = [_text_settings(side.checkpoint) for side in (side_a, side_b)]
    for key in OTHER_SIZES if ids.rows_a != ids.rows_b else ():
        stated = [text[key] for text in texts if type(text.get(key)) is int]
        if len(stated) == 2 and stated[0] != stated[1]:
            side_a.changes[key] = side_b.changes[key] = max(stated)


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
    """Every row of a table over the vocabulary from where it belongs, see `TokenIds`.

    A table of A for multi-token prediction that B lacks stays A's; for ids of B alone it gets the rows of B's own table of
    its kind, as such tables are copies of the model's.
    """
    names = sorted(in_a | in_b | side_a.assembled.keys() | side_b.assembled.keys())
    for name in [name for name in names if _is_table(name)]:
        borrowed = (
            name not in in_b and name in side_b.assembled and side_b.assembled[name].pieces[0].checkpoint is side_a.checkpoint
        )
        place_a = _place(side_a, in_a, name, ids.rows_a)
        place_b = _place(side_b, in_b, _table_like(side_b.checkpoint, in_b, name) if borrowed else name, ids.rows_b)
        if place_a is None or place_b is None or place_a.shape[1:] != place_b.shape[1:]:
            continue
        width = max(place_a.numel // max(place_a.shape[0], 1), 1)
        for side, own_kind in ((side_a, OF_A), (side_b, OF_A if borrowed else OF_B)):
            own = place_a if own_kind == OF_A else place_b
            pieces = []
            for run in ids.runs():
                place = place_a if (run.kind or own_kind) == OF_A else place_b
                pieces.append(Piece(run.count * width, place.checkpoint, place.name, run.first * width))
            side.assembled[name] = Assembled(own.dtype, (ids.rows, *own.shape[1:]), tuple(pieces))


@dataclass(frozen=True)
class _Place:
    """Where a table stands."""

    checkpoint: Checkpoint
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.checkpoint.tensors[self.name].shape

    @property
    def numel(self) -> int:
        return self.checkpoint.tensors[self.name].numel

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.tensors[self.name].dtype


def _place(side: _Side, own: set[str], name: str | None, rows: int) -> _Place | None:
    """Where a side has a table, which may be that of another name; None: nowhere, or it has another number of rows."""
    if name is None:
        return None
    place = _Place(side.checkpoint, name)
    if name not in own and name in side.assembled:
        piece = side.assembled[name].pieces[0]
        place = _Place(piece.checkpoint, piece.name)
    if place.name not in place.checkpoint.tensors:
        return None
    return place if place.shape[:1] == (rows,) else None


def _table_like(checkpoint: Checkpoint, names: Collection[str], name: str) -> str | None:
    """The table of a model that one for multi-token prediction is a copy of."""
    embedding = embedding_of(checkpoint, names)
    return embedding if EMBEDDING.fullmatch(name) else head_of(checkpoint, names) or embedding
