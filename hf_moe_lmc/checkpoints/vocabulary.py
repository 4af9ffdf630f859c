"""What a checkpoint's tokenizer files say, read without a tokenizer library, and whether those of two checkpoints agree.

Two models can be averaged only if a token id means the same token in both. Compared are the vocabulary (with the added tokens,
wherever they are written), the merges or scores that cut a text, and which token begins and ends it; formatting, the order of
keys, templates and padding do not count.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.untrusted import JSON_LIMIT, open_regular, read_json_object
from hf_moe_lmc.errors import MismatchError, listing, shown

OPAQUE = ("tokenizer.model", "spiece.model", "vocab.txt", "tiktoken.model", "qwen.tiktoken")  # compared byte by byte
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of one checkpoint.

    Attributes:
        tokens: token -> id, added tokens included; None where only files in other formats hold them.
        rules: the merges in their order, or the scores of the tokens. They decide how a text is cut.
        added: token -> id of the tokens outside the model's own file.
        opaque: file name -> SHA-256 of the files in other formats.
        special: role -> token.
        pad: the padding token.
    """

    tokens: Mapping[str, int] | None
    rules: tuple[tuple[Any, ...], ...]
    added: Mapping[str, int]
    opaque: Mapping[str, str]
    special: Mapping[str, str]
    pad: str | None


@dataclass(frozen=True)
class Comparison:
    """Of two tokenizers.

    Attributes:
        problems: the differences: lines of text for each kind.
        warnings: about parts that could not be compared, or need not agree.
        complete: whether the vocabularies were compared.
    """

    problems: list[list[str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    complete: bool = True


def check_tokenizers(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Compares the tokenizers of two checkpoints. Of a Hub checkpoint, only the tokenizer files are downloaded.

    Returns:
        Warnings.

    Raises:
        CheckpointError: a file cannot be read.
        MismatchError: vocabulary, merges or special tokens differ; the message lists those of A and B.
    """
    comparison = compare_tokenizers(a, b)
    if comparison.problems:
        raise different(a, b, "\n".join(listing(lines) for lines in comparison.problems))
    return comparison.warnings


def different(a: Checkpoint, b: Checkpoint, details: str) -> MismatchError:
    return MismatchError(
        f"A ({a.name}) and B ({b.name}) have different tokenizers, so that their token ids and losses cannot be compared:\n"
        f"{details}\n"
        "Take models with one tokenizer; if B was trained with A's, copy the tokenizer files of A over those of B"
    )


def compare_tokenizers(a: Checkpoint, b: Checkpoint) -> Comparison:
    """As `check_tokenizers`, with the differences in the result instead of an error."""
    vocab_a, vocab_b = read_vocabulary(a), read_vocabulary(b)
    if vocab_a is None or vocab_b is None:
        if vocab_a is vocab_b:
            return Comparison(complete=False)
        without, other = ("A", "B") if vocab_a is None else ("B", "A")
        taken = "the tokenizer files of A are taken" if without == "B" else "the output of a merge will have none"
        return Comparison(warnings=[f"{without} has no tokenizer files, {other} has: not compared; {taken}"], complete=False)
    problems, warnings, complete = [], [], True
    if vocab_a.tokens is not None and vocab_b.tokens is not None:
        problems.append(_differing("token", vocab_a.tokens, vocab_b.tokens))
        problems.append(_differing_rules(vocab_a.rules, vocab_b.rules))
    elif common := sorted(vocab_a.opaque.keys() & vocab_b.opaque.keys()):
        problems.append(
            [f"{name}: other bytes in A than in B" for name in common if vocab_a.opaque[name] != vocab_b.opaque[name]]
        )
        problems.append(_differing("added token", vocab_a.added, vocab_b.added))
    else:
        complete = False
        warnings.append("the tokenizers of A and B are stored in different formats: not compared")
    roles = [role for role in ROLES if role in vocab_a.special and role in vocab_b.special]
    problems.append(
        [
            f"{role}: {_named(vocab_a, vocab_a.special[role])} in A, {_named(vocab_b, vocab_b.special[role])} in B"
            for role in roles
            if vocab_a.special[role] != vocab_b.special[role]
        ]
    )
    if vocab_a.pad and vocab_b.pad and vocab_a.pad != vocab_b.pad:
        warnings.append(
            f"pad_token: {_named(vocab_a, vocab_a.pad)} in A, {_named(vocab_b, vocab_b.pad)} in B; a merge takes A's"
        )
    return Comparison([lines for lines in problems if lines], warnings, complete)


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The tokenizer files of a checkpoint; None where none of them holds a vocabulary.

    Raises:
        CheckpointError: a file is damaged.
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
    if tokens is None and not opaque:
        if not fast:
            return None
        opaque["tokenizer.json"] = _digest(checkpoint, "tokenizer.json")
    texts = {role: _text(settings.get(role) or names.get(role)) for role in (*ROLES, "pad_token")}
    pad = texts.pop("pad_token") or None
    return Vocabulary(
        tokens=None if tokens is None else {**tokens, **added},
        rules=rules,
        added=added,
        opaque=opaque,
        special={role: text for role, text in texts.items() if text},
        pad=pad,
    )


def _read_model(model: Mapping[str, Any]) -> tuple[dict[str, int] | None, tuple[tuple[Any, ...], ...]]:
    """Vocabulary and rules of the `model` in a tokenizer.json; None where it has another form."""
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if isinstance(vocabulary, Mapping):
        pairs = merges if isinstance(merges, list) else []
        return _ids(vocabulary), tuple(_pair(merge) for merge in pairs)
    if isinstance(vocabulary, list) and all(isinstance(row, list) and row and isinstance(row[0], str) for row in vocabulary):
        return {row[0]: i for i, row in enumerate(vocabulary)}, tuple(map(tuple, vocabulary))
    return None, ()


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


def _differing(what: str, a: Mapping[str, int], b: Mapping[str, int]) -> list[str]:
    if a == b:
        return []
    counts = [f"{len(a)} {what}s in A, {len(b)} in B"] if len(a) != len(b) else []
    absent = "absent"
    return counts + [
        f"{what} {shown(repr(token))}: {a.get(token, absent)} in A, {b.get(token, absent)} in B"
        for token in sorted(a.keys() | b.keys())
        if a.get(token) != b.get(token)
    ]


def _differing_rules(a: tuple[tuple[Any, ...], ...], b: tuple[tuple[Any, ...], ...]) -> list[str]:
    if a == b:
        return []
    if len(a) != len(b):
        return [f"{len(a)} merges in A, {len(b)} in B"]
    first = next(i for i in range(len(a)) if a[i] != b[i])
    return [f"merge {first}: {shown(repr(a[first]))} in A, {shown(repr(b[first]))} in B"]


def _named(vocabulary: Vocabulary, token: str) -> str:
    number = (vocabulary.tokens or vocabulary.added).get(token)
    return shown(repr(token)) + (f" ({number})" if number is not None else "")
