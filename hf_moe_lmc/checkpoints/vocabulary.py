"""What a checkpoint's tokenizer files say, read without a tokenizer library.

Read are the vocabulary (with the added tokens, wherever they are written), the merges or scores that cut a text, and the
special tokens. Formatting, the order of keys and templates do not count. `token_ids` compares two of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.untrusted import JSON_LIMIT, open_regular, read_json_object
from hf_moe_lmc.errors import shown

OPAQUE = ("tokenizer.model", "spiece.model", "vocab.txt", "tiktoken.model", "qwen.tiktoken")  # compared byte by byte
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of one checkpoint.

    Attributes:
        tokens: token -> id with the added ones; None where only files in other formats hold them.
        rules: the merges in their order, or the scores of the tokens: how a text is cut.
        added: the tokens that stand outside of the model's own file, token -> id.
        opaque: SHA-256 of the files in other formats, by name.
        special: role -> token, `pad_token` among them.
        marked: tokens that are special, or added to the model's own.
        own: tokens in the model's own file.
    """

    tokens: Mapping[str, int] | None
    rules: tuple[tuple[Any, ...], ...]
    added: Mapping[str, int]
    opaque: Mapping[str, str]
    special: Mapping[str, str]
    marked: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()

    @property
    def beyond(self) -> Mapping[str, int]:
        """The added tokens that are not among the model's own, as far as those are known."""
        return {token: number for token, number in self.added.items() if token not in self.own}

    @cached_property
    def tokens_by_id(self) -> dict[int, str] | None:
        """The token of each id; None where only files in other formats hold them."""
        return None if self.tokens is None else {number: token for token, number in self.tokens.items()}

    def named(self, token: str) -> str:
        """A token with its id, for messages."""
        number = (self.tokens or self.added).get(token)
        return shown(repr(token)) + (f" ({number})" if number is not None else "")


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The tokenizer files of a checkpoint; None where there is no vocabulary among them.

    Raises:
        CheckpointError: a file is damaged; it is named.
    """
    files = set(checkpoint.source.files())

    def read(file: str) -> dict[str, Any]:
        if file not in files:
            return {}
        return read_json_object(checkpoint.source.path(file), f"{checkpoint.name}/{file}", constants=True)

    opaque = {file: _digest(checkpoint, file) for file in OPAQUE if file in files}
    fast, settings = read("tokenizer.json"), read("tokenizer_config.json")
    names = read("special_tokens_map.json")
    added = _ids(read("added_tokens.json"))
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        added |= {_text(token): int(number) for number, token in decoder.items() if number.isdecimal() and len(number) < 10}
    model = fast.get("model")
    if isinstance(fast.get("added_tokens"), list):
        entries = [entry for entry in fast["added_tokens"] if isinstance(entry, Mapping)]
        added |= _ids({_text(entry): entry.get("id") for entry in entries})
    added.pop("", None)
    tokens, rules = _read_model(model) if isinstance(model, Mapping) else (None, ())
    if tokens is None and "vocab.json" in files and not fast:
        tokens, rules = _ids(read("vocab.json")), _read_merges(checkpoint) if "merges.txt" in files else ()
    if tokens is None and (pieces := _read_pieces(checkpoint, files)):
        tokens = pieces
    if tokens is None and not opaque:
        if not fast:
            return None
        opaque["tokenizer.json"] = _digest(checkpoint, "tokenizer.json")
    texts = {role: _text(settings.get(role) or names.get(role)) for role in (*ROLES, "pad_token")}
    special = {role: text for role, text in texts.items() if text}
    return Vocabulary(
        tokens=None if tokens is None else {**tokens, **added},
        rules=rules,
        added=added,
        opaque=opaque,
        special=special,
        marked=frozenset({*added, *special.values()}),
        own=frozenset(tokens or ()),
    )


def _read_model(model: Mapping[str, Any]) -> tuple[dict[str, int] | None, tuple[tuple[Any, ...], ...]]:
    """Vocabulary and rules of the `model` in a tokenizer.json; None where it has another form."""
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if isinstance(vocabulary, Mapping):
        pairs = merges if isinstance(merges, list) else []
        return _ids(vocabulary), tuple(_pair(one) for one in pairs)
    if isinstance(vocabulary, list) and all(isinstance(one, list) and one and isinstance(one[0], str) for one in vocabulary):
        return {one[0]: i for i, one in enumerate(vocabulary)}, tuple(map(tuple, vocabulary))
    return None, ()


def _read_pieces(checkpoint: Checkpoint, files: Collection[str]) -> dict[str, int] | None:
    """The pieces of a sentencepiece model, by their places; None where there is none, or none that reads as one.

    The file is a protocol buffer: its field 1, repeated, is a piece, and field 1 of that the piece's text.
    """
    file = next((file for file in ("tokenizer.model", "spiece.model") if file in files), None)
    if file is None:
        return None
    pieces: dict[str, int] = {}
    data = memoryview(_bytes(checkpoint, file))
    try:
        for number, piece in enumerate(body for field, body in _fields(data) if field == 1):
            text = next(bytes(body) for field, body in _fields(piece) if field == 1)
            pieces[text.decode()] = number
    except (IndexError, StopIteration, UnicodeDecodeError, ValueError):  # another format: it is compared byte by byte
        return None
    return pieces or None


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of the length-delimited fields of a protocol buffer, the others skipped; ValueError: it is none."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("no number")

    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}.get(kind, -1)
        if size < 0 or at + size > len(data):
            raise ValueError("not a protocol buffer")
        if kind == 2:
            yield tag >> 3, data[at : at + size]
        at += size


def _pair(merge: Any) -> tuple[Any, ...]:
    """A merge, written as "a b" by older releases and as ["a", "b"] by newer ones."""
    return tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else (merge,)


def _read_merges(checkpoint: Checkpoint) -> tuple[tuple[Any, ...], ...]:
    raw = _bytes(checkpoint, "merges.txt").decode("utf-8", "replace")
    return tuple(_pair(line) for line in raw.split("\n") if line.strip() and not line.startswith("#version"))


def _ids(tokens: Mapping[Any, Any]) -> dict[str, int]:
    return {token: number for token, number in tokens.items() if isinstance(token, str) and type(number) is int}


def _text(token: Any) -> str:
    """A token, written as itself or as an object with its content."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else ""


def _bytes(checkpoint: Checkpoint, file: str) -> bytes:
    with open_regular(checkpoint.source.path(file), f"{checkpoint.name}/{file}") as opened:
        return opened.read(min(JSON_LIMIT, os.fstat(opened.fileno()).st_size))


def _digest(checkpoint: Checkpoint, file: str) -> str:
    return hashlib.sha256(_bytes(checkpoint, file)).hexdigest()
