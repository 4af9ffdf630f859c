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
        tokens: token -> id with the added ones; None where only files in other formats hold them.
        rules: the merges in their order, or the scores of the tokens: how a text is cut.
        added: the tokens that stand outside of the model's own file, token -> id.
        opaque: SHA-256 of the files in other formats, by name.
        special: role -> token.
        pad: the token that fills up.
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
        problems: in which they differ, of each kind one list of lines.
        warnings: what could not be compared, or need not agree.
        complete: whether the vocabularies were compared.
    """

    problems: list[list[str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    complete: bool = True


def check_tokenizers(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Compares the tokenizers of two checkpoints; of the Hub's, only their files are fetched.

    Returns:
        Warnings.

    Raises:
        CheckpointError: a file cannot be read.
        MismatchError: vocabulary, merges or special tokens differ, with what A and B have.
    """
    found = compare_tokenizers(a, b)
    if found.problems:
        raise different(a, b, "\n".join(listing(lines) for lines in found.problems))
    return found.warnings


def different(a: Checkpoint, b: Checkpoint, details: str) -> MismatchError:
    return MismatchError(
        f"A ({a.name}) and B ({b.name}) have different tokenizers, so that their token ids and losses cannot be compared:\n"
        f"{details}\n"
        "Take models with one tokenizer; if B was trained with A's, copy the tokenizer files of A over those of B"
    )


def compare_tokenizers(a: Checkpoint, b: Checkpoint) -> Comparison:
    """See `check_tokenizers`; what cannot be compared is said."""
    of_a, of_b = read_vocabulary(a), read_vocabulary(b)
    if of_a is None or of_b is None:
        if of_a is of_b:
            return Comparison(complete=False)
        without, other = ("A", "B") if of_a is None else ("B", "A")
        taken = "the tokenizer files of A are taken" if without == "B" else "the output of a merge will have none"
        return Comparison(warnings=[f"{without} has no tokenizer files, {other} has: not compared; {taken}"], complete=False)
    problems, warnings, complete = [], [], True
    if of_a.tokens is not None and of_b.tokens is not None:
        problems.append(_differing("token", of_a.tokens, of_b.tokens))
        problems.append(_differing_rules(of_a.rules, of_b.rules))
    elif common := sorted(of_a.opaque.keys() & of_b.opaque.keys()):
        problems.append([f"{name}: other bytes in A than in B" for name in common if of_a.opaque[name] != of_b.opaque[name]])
        problems.append(_differing("added token", of_a.added, of_b.added))
    else:
        complete = False
        warnings.append("the tokenizers of A and B are stored in different formats: not compared")
    roles = [role for role in ROLES if role in of_a.special and role in of_b.special]
    problems.append(
        [
            f"{role}: {_named(of_a, of_a.special[role])} in A, {_named(of_b, of_b.special[role])} in B"
            for role in roles
            if of_a.special[role] != of_b.special[role]
        ]
    )
    if of_a.pad and of_b.pad and of_a.pad != of_b.pad:
        warnings.append(f"pad_token: {_named(of_a, of_a.pad)} in A, {_named(of_b, of_b.pad)} in B; a merge takes A's")
    return Comparison([lines for lines in problems if lines], warnings, complete)


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
        return _ids(vocabulary), tuple(_pair(one) for one in pairs)
    if isinstance(vocabulary, list) and all(isinstance(one, list) and one and isinstance(one[0], str) for one in vocabulary):
        return {one[0]: i for i, one in enumerate(vocabulary)}, tuple(map(tuple, vocabulary))
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
        f"{what} {shown(repr(one))}: {a.get(one, absent)} in A, {b.get(one, absent)} in B"
        for one in sorted(a.keys() | b.keys())
        if a.get(one) != b.get(one)
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
