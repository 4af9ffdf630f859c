"""Tokenizers that agree are never refused, however they are written; ids that mean different tokens always are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.token_ids import BOTH, OF_A, OF_B, PLACEHOLDER, agreement_of
from hf_moe_lmc.errors import CheckpointError

FAST: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}, {"id": 1, "content": "</s>", "special": True}],
    "model": {
        "type": "BPE",
        "vocab": {"<s>": 0, "</s>": 1, "t": 2, "h": 3, "e": 4, "th": 5, "the": 6},
        "merges": [["t", "h"], ["th", "e"]],
    },
}
SETTINGS: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


ROWS = 10


def check_tokenizers(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Warnings; fails where ids mean different tokens."""
    found = agreement_of(a, b, ROWS, ROWS)
    assert found.problems == []
    return found.warnings


def edited(value: Any, change: Callable[[Any], object]) -> Any:
    fresh = json.loads(json.dumps(value))
    change(fresh)
    return fresh


@pytest.fixture
def with_tokenizer(copy: Callable[..., Path]) -> Callable[..., Checkpoint]:
    """A checkpoint with these tokenizer files and no others; a string is written as it is."""

    def make(name: str, files: dict[str, Any]) -> Checkpoint:
        folder = copy("mixtral", name=name)
        for file in folder.glob("*token*"):
            file.unlink()
        for file_name, content in files.items():
            (folder / file_name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return Checkpoint.open(folder)

    return make


PLAIN = {"tokenizer.json": FAST, "tokenizer_config.json": SETTINGS}
SLOW = {"vocab.json": FAST["model"]["vocab"], "merges.txt": "#version: 0.2\nt h\nth e\n", "tokenizer_config.json": SETTINGS}


@pytest.mark.parametrize(
    "other",
    [
        PLAIN,
        {**PLAIN, "tokenizer.json": json.dumps(FAST, indent=4, sort_keys=True)},
        {**PLAIN, "tokenizer.json": edited(FAST, lambda f: f["model"].update(merges=["t h", "th e"]))},
        {**PLAIN, "tokenizer.json": edited(FAST, lambda f: f["added_tokens"].reverse())},
        {**PLAIN, "tokenizer.json": edited(FAST, lambda f: f.update(added_tokens=[]))},
        {**PLAIN, "tokenizer_config.json": {**SETTINGS, "bos_token": {"content": "<s>", "lstrip": False}}},
        {**PLAIN, "tokenizer_config.json": {**SETTINGS, "added_tokens_decoder": {"0": {"content": "<s>"}}}},
        {**PLAIN, "tokenizer_config.json": {**SETTINGS, "chat_template": "{{ other }}", "model_max_length": 5}},
        {"tokenizer.json": FAST, "special_tokens_map.json": SETTINGS},
        {"tokenizer.json": FAST},
        {**PLAIN, "tokenizer.model": "bytes that only one of them has"},
        SLOW,
    ],
)
def test_what_says_the_same_is_taken(with_tokenizer: Callable[..., Checkpoint], other: dict[str, Any]) -> None:
    a, b = with_tokenizer("a", PLAIN), with_tokenizer("b", other)
    assert check_tokenizers(a, b) == [] == check_tokenizers(b, a)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {**PLAIN, "tokenizer.json": edited(FAST, lambda f: f["model"]["vocab"].update(t=3, h=2))},
            "id 2: 't' in A, 'h' in B",
        ),
        (
            {**PLAIN, "tokenizer.json": edited(FAST, lambda f: f["model"]["merges"].reverse())},
            "merge 0: t + h in A, th + e in B",
        ),
        ({**SLOW, "merges.txt": "#version: 0.2\nth e\nt h\n"}, "merge 0"),
        # a token of the text in one, a special one in the other
        ({**PLAIN, "added_tokens.json": {"<x>": 6}}, "id 6: 'the' in A, '<x>' in B"),
    ],
)
def test_ids_that_mean_something_else_are_found(
    with_tokenizer: Callable[..., Checkpoint], other: dict[str, Any], message: str
) -> None:
    a, b = with_tokenizer("a", PLAIN), with_tokenizer("b", other)
    assert message in "\n".join(line for lines in agreement_of(a, b, ROWS, ROWS).problems for line in lines)


def kinds(a: Checkpoint, b: Checkpoint, rows_a: int = ROWS, rows_b: int = ROWS) -> list[int]:
    found = agreement_of(a, b, rows_a, rows_b)
    assert found.problems == [] and sum(found.ids.account().values()) == 2 * found.ids.rows, found.ids.account()
    assert [run.kind for run in found.ids.runs() for _ in range(run.count)] == found.ids.kinds.tolist()
    return found.ids.kinds.tolist()


def test_rows_come_from_where_the_tokens_are(with_tokenizer: Callable[..., Checkpoint]) -> None:
    a = with_tokenizer("a", PLAIN)
    assert kinds(a, a) == [BOTH] * ROWS  # padding, too
    grown = with_tokenizer("b", {**PLAIN, "added_tokens.json": {"<|im_start|>": 7, "<|im_end|>": 8}})
    assert kinds(a, grown) == [BOTH] * 7 + [OF_B, OF_B, OF_A]
    assert kinds(grown, a) == [BOTH] * 7 + [OF_A] * 3
    assert kinds(a, grown, 7, 9) == [BOTH] * 7 + [OF_B] * 2  # embeddings cut to the tokenizer
    assert kinds(a, a, 7, 16) == [BOTH] * 7 + [OF_B] * 9  # rows padded to a multiple
    assert kinds(a, grown, 16, 9) == [BOTH] * 7 + [OF_B] * 2 + [OF_A] * 7
    merged = with_tokenizer("c", {**PLAIN, "tokenizer.json": edited(FAST, lambda f: f["model"]["vocab"].update(x=7))})
    assert kinds(a, merged) == [BOTH] * 7 + [OF_B, OF_A, OF_A]


def test_a_placeholder_gives_way_and_other_names_are_said(with_tokenizer: Callable[..., Checkpoint]) -> None:
    a, b, c = (
        with_tokenizer(name, {**PLAIN, "added_tokens.json": {token: 7}})
        for name, token in (("a", "<|place\u2581holder\u2581no\u25810|>"), ("b", "<think>"), ("c", "<plan>"))
    )
    assert kinds(a, b)[7] == OF_B and kinds(b, a)[7] == OF_A and kinds(b, c)[7] == BOTH
    assert "'<think>' in A, '<plan>' in B: the row is interpolated" in agreement_of(b, c, ROWS, ROWS).warnings[0]
    names = (
        "<|reserved_special_token_3|>",
        "<unused12>",
        "[control_8]",
        "<\uff5cplace\u2581holder\u2581no\u25812\uff5c>",
        "<|dummy_0|>",
    )
    assert all(PLACEHOLDER.fullmatch(name) for name in names)
    assert not any(PLACEHOLDER.fullmatch(name) for name in ("<think>", "<|im_end|>", "[INST]", "<tool_call>", "</s>"))


def test_special_tokens_may_play_other_parts(with_tokenizer: Callable[..., Checkpoint]) -> None:
    a = with_tokenizer("a", PLAIN)
    b = with_tokenizer("b", {**PLAIN, "tokenizer_config.json": {**SETTINGS, "eos_token": "<s>"}})
    assert kinds(a, b) == [BOTH] * ROWS
    assert "eos_token: '</s>' (1) in A, '<s>' (0) in B" in check_tokenizers(a, b)[0]


def pieces(*texts: str) -> str:
    """A sentencepiece model with these pieces, and a score for each."""
    found = b""
    for text in texts:
        body = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15\x00\x00\x80\xbf"
        found += b"\x0a" + bytes([len(body)]) + body
    return (found + b"\x12\x02\x18\x05").decode("latin-1")


def test_pieces_of_a_sentencepiece_model_are_tokens(with_tokenizer: Callable[..., Checkpoint]) -> None:
    tokens = sorted(FAST["model"]["vocab"], key=FAST["model"]["vocab"].__getitem__)
    fast, slow = with_tokenizer("a", PLAIN), with_tokenizer("b", {})
    (slow.folder / "tokenizer.model").write_bytes(pieces(*tokens).encode("latin-1"))
    other = with_tokenizer("c", {})
    (other.folder / "tokenizer.model").write_bytes(pieces(*tokens[:-1], "other").encode("latin-1"))
    slow, other = Checkpoint.open(slow.folder), Checkpoint.open(other.folder)
    assert kinds(fast, slow) == [BOTH] * ROWS and agreement_of(fast, slow, ROWS, ROWS).warnings == []
    assert agreement_of(fast, other, ROWS, ROWS).problems == [["id 6: 'the' in A, 'other' in B"]]


def test_equal_sentencepiece_files_are_equal_vocabularies(with_tokenizer: Callable[..., Checkpoint]) -> None:
    a = with_tokenizer("a", {"tokenizer.model": "pieces"})
    b = with_tokenizer("b", {**PLAIN, "tokenizer.model": "pieces", "added_tokens.json": {"<x>": 7}})
    assert kinds(a, b) == [BOTH] * 7 + [OF_B] + [BOTH] * 2
    assert not [warning for warning in check_tokenizers(a, b) if "formats" in warning]


def test_files_in_other_formats_are_compared_byte_by_byte(with_tokenizer: Callable[..., Checkpoint]) -> None:
    a, b, c = (with_tokenizer(name, {"tokenizer.model": content}) for name, content in (("a", "x"), ("b", "x"), ("c", "y")))
    assert check_tokenizers(a, b) == []
    assert agreement_of(a, c, ROWS, ROWS).problems == [["tokenizer.model: other bytes in A than in B"]]


def test_what_cannot_be_compared_is_said(with_tokenizer: Callable[..., Checkpoint]) -> None:
    fast, none, slow = with_tokenizer("a", PLAIN), with_tokenizer("b", {}), with_tokenizer("c", {"tokenizer.model": "x"})
    assert check_tokenizers(none, none) == []
    assert "the tokenizer files of A are taken" in check_tokenizers(fast, none)[0]
    assert "A has no tokenizer files" in check_tokenizers(none, fast)[0]
    assert "different formats" in check_tokenizers(fast, slow)[0]
    padded = with_tokenizer("d", {**PLAIN, "tokenizer_config.json": {**SETTINGS, "pad_token": "<s>"}})
    assert "pad_token: '</s>' (1) in A, '<s>' (0) in B" in check_tokenizers(fast, padded)[0]


@pytest.mark.parametrize(
    "content", ["{", '{"model": {"vocab": {"a": 1, "a": 2}}}', "[" * 100_000, '{"model": 3}', '{"model": {"vocab": [[]]}}']
)
def test_damage_is_refused_or_compared_byte_by_byte(with_tokenizer: Callable[..., Checkpoint], content: str) -> None:
    a, b = with_tokenizer("a", PLAIN), with_tokenizer("b", {"tokenizer.json": content})
    if content.startswith('{"model": 3') or "[[]]" in content:
        assert "different formats" in check_tokenizers(a, b)[0]
        assert check_tokenizers(b, b) == []
    else:
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: not valid JSON"):
            check_tokenizers(a, b)
