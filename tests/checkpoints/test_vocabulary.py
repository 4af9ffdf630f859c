"""Tokenizers that agree are never refused, however they are written; those that do not always are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.vocabulary import check_tokenizers
from hf_moe_lmc.errors import CheckpointError, MismatchError

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
            "token 'h': 3 in A, 2 in B",
        ),
        (
            {**PLAIN, "tokenizer.json": edited(FAST, lambda f: f["model"]["vocab"].update(x=7))},
            "token 'x': absent in A, 7 in B",
        ),
        (
            {**PLAIN, "tokenizer.json": edited(FAST, lambda f: f["added_tokens"].append({"id": 7, "content": "<x>"}))},
            "7 tokens in A, 8 in B",
        ),
        ({**PLAIN, "added_tokens.json": {"<x>": 7}}, "token '<x>': absent in A, 7 in B"),
        ({**PLAIN, "tokenizer.json": edited(FAST, lambda f: f["model"]["merges"].reverse())}, "merge 0: .*'t', 'h'.* in A"),
        ({**PLAIN, "tokenizer.json": edited(FAST, lambda f: f["model"]["merges"].pop())}, "2 merges in A, 1 in B"),
        (
            {**PLAIN, "tokenizer_config.json": {**SETTINGS, "eos_token": "<s>"}},
            r"eos_token: '</s>' \(1\) in A, '<s>' \(0\) in B",
        ),
        ({**SLOW, "merges.txt": "#version: 0.2\nth e\nt h\n"}, "merge 0"),
    ],
)
def test_what_says_something_else_is_refused(
    with_tokenizer: Callable[..., Checkpoint], other: dict[str, Any], message: str
) -> None:
    a, b = with_tokenizer("a", PLAIN), with_tokenizer("b", other)
    with pytest.raises(MismatchError, match=message) as error:
        check_tokenizers(a, b)
    assert a.name in str(error.value) and b.name in str(error.value)


def test_files_in_other_formats_are_compared_byte_by_byte(with_tokenizer: Callable[..., Checkpoint]) -> None:
    a, b, c = (with_tokenizer(name, {"tokenizer.model": content}) for name, content in (("a", "x"), ("b", "x"), ("c", "y")))
    assert check_tokenizers(a, b) == []
    with pytest.raises(MismatchError, match=r"tokenizer\.model: other bytes in A than in B"):
        check_tokenizers(a, c)


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
