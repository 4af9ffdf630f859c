from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.windows import WindowOptions, Windows, cut_windows, window_losses
from tests import tiny


@pytest.mark.parametrize(("name", "least"), [("context", 2), ("stride", 1), ("max_tokens", 1)])
def test_options_of_windows_check_themselves(name: str, least: int) -> None:
    for value in (least, 1000, None):
        assert getattr(WindowOptions(**{name: value}), name) == value
    for value in (least - 1, -5):
        with pytest.raises(InputError, match=f"^{name.replace('_', '-')} {value}: expected at least {least}$"):
            WindowOptions(**{name: value})
    assert WindowOptions(**{name: 7}) == WindowOptions(**{name: 7}) != WindowOptions()


def test_windows_are_consecutive_from_each_documents_start() -> None:
    windows = cut_windows(["abcdefg", "hi", "j", ""], tiny.tokenizer(), context=3)
    texts = [tiny.tokenizer().decode(row) for row in windows.rows]
    assert texts == ["abc", "def", "hi"]  # "g" and "j" leave nothing to predict
    assert windows.documents == (0, 0, 1)
    assert windows.scored.tolist() == [2, 2, 1] and not windows.bos
    assert windows.tokens_read == 10


def test_a_bos_opens_each_window_only_if_the_tokenizer_adds_it() -> None:
    windows = cut_windows(["abcde"], tiny.tokenizer(bos=True), context=3)
    assert [row.tolist()[0] for row in windows.rows] == [1, 1, 1] and windows.bos
    assert windows.scored.tolist() == [2, 2, 1] and windows.tokens_read == 5
    facts = windows.describe()
    assert (facts["stride"], facts["tokens_scored"], facts["windows"], facts["documents"]) == (2, 5, 3, 1)


@pytest.mark.parametrize(("limit", "read"), [(None, 14), (100, 14), (9, 9), (7, 7), (2, 2)])
def test_the_token_budget_counts_tokens_read(limit: int | None, read: int) -> None:
    windows = cut_windows(["abcdefg", "hijklmn"], tiny.tokenizer(), context=4, max_tokens=limit)
    assert windows.tokens_read == read
    whole = cut_windows(["abcdefg", "hijklmn"], tiny.tokenizer(), context=4)
    assert windows.rows[0].tolist() == whole.rows[0].tolist()[: limit or 4]


def test_no_text_to_predict_is_refused() -> None:
    for documents, context in (([], 8), (["a"], 8), (["abc"], 1)):
        with pytest.raises(InputError):
            cut_windows(documents, tiny.tokenizer(), context=context)


@pytest.mark.parametrize("bos", [False, True])
def test_losses_are_those_of_the_model_itself(saved: Callable[..., Path], text_file: Path, bos: bool) -> None:
    model = tiny.load(saved("mixtral"))
    text = text_file.read_text()[:200]
    windows = cut_windows([text, text[:77]], tiny.tokenizer(bos), context=32)
    losses = {size: window_losses(model, windows, batch_size=size) for size in (1, 3, 100)}
    for i, row in enumerate(windows.rows):  # transformers' own mean loss, one window at a time
        with torch.no_grad():
            mean = model(row[None], labels=row[None]).loss
        for found in losses.values():
            assert found[i].item() == pytest.approx(mean.item() * (len(row) - 1), rel=1e-5)
    assert losses[1].dtype == torch.float64


def recipe(model: PreTrainedModel, ids: torch.Tensor, max_length: int, stride: int) -> list[tuple[float, int, int]]:
    """The perplexity recipe of transformers' documentation: (mean loss, its weight, tokens it is the mean of) by window."""
    found, previous, length = [], 0, ids.shape[1]
    for begin in range(0, length, stride):
        end = min(begin + max_length, length)
        target_length = end - previous
        input_ids = ids[:, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, :-target_length] = -100
        with torch.no_grad():
            loss = model(input_ids, labels=target_ids).loss
        valid = int((target_ids != -100).sum())
        found.append((loss.item(), valid - 1, int((target_ids[:, 1:] != -100).sum())))
        previous = end
        if end == length:
            break
    return found


@pytest.mark.parametrize("stride", [None, 32, 16, 7, 1])
def test_the_recipe_of_transformers_gives_the_same(saved: Callable[..., Path], text_file: Path, stride: int | None) -> None:
    model = tiny.load(saved("mixtral"))
    text = text_file.read_text()[:150]
    windows = cut_windows([text], tiny.tokenizer(), context=32, stride=stride)
    losses = window_losses(model, windows, batch_size=4)
    found = recipe(model, torch.tensor([tiny.tokenizer()(text)["input_ids"]]), 32, stride or 32)
    assert [tokens for _, _, tokens in found] == windows.scored.tolist()
    assert losses / windows.scored == pytest.approx([loss for loss, _, _ in found], abs=1e-4)
    # the documented weights are one too small for every window but the first, which matters little unless strides are short
    weights = torch.tensor([weight for _, weight, _ in found], dtype=torch.float64)
    documented = sum(loss * weight for loss, weight, _ in found) / weights.sum()
    assert ((losses / windows.scored) @ weights / weights.sum()).item() == pytest.approx(float(documented), abs=1e-4)
    if stride in (None, 32):
        assert (losses.sum() / windows.scored.sum()).item() == pytest.approx(float(documented), abs=1e-4)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [None, 3, 1])
def test_every_token_is_scored_once_whatever_the_stride(bos: bool, stride: int | None) -> None:
    tokenizer = tiny.tokenizer(bos)
    windows = cut_windows(["abcdefghijk", "lm", "n"], tokenizer, context=6, stride=stride)
    scored = [
        tokenizer.decode(row[1 + first :])
        for row, first in zip(windows.rows, windows.context_only or [0] * len(windows.rows), strict=True)
    ]
    if bos:
        assert "".join(scored) == "abcdefghijklmn"
    elif stride is None:
        assert "".join(scored) == "bcdefhijkm"  # without BOS the first token of each window has no prediction
    else:
        assert "".join(scored) == "bcdefghijkm"
    assert [len(part) for part in scored] == windows.scored.tolist() == list(windows.bytes_scored or ())
    assert windows.tokens_read == 14
    for wrong in (0, 7):
        with pytest.raises(InputError, match=r"stride .: expected 1 to"):
            cut_windows(["abcdefghijk"], tokenizer, context=6, stride=wrong)


def test_windows_of_one_length_may_score_different_parts() -> None:
    rows = tuple(torch.arange(5) for _ in range(2))
    windows = Windows(rows, (0, 0), 5, False, 8, stride=3, context_only=(0, 2))
    losses = torch.tensor([[1.0, 2, 4, 8], [math.nan, 32, 64, 128]], dtype=torch.float64)
    assert windows.sums([0, 1], losses).tolist() == [15, 192]
    assert windows.sums([1], losses[1:]).tolist() == [192] and windows.scored.tolist() == [4, 2]


def test_bytes_are_those_of_the_scored_text() -> None:
    text = "grüße 🙂 aus Zürich"
    whole = cut_windows([text], tiny.tokenizer(bos=True), context=64)
    assert whole.bytes_scored == (len(text.encode()),) and whole.describe()["bytes_scored"] == len(text.encode())
    for context in (3, 5, 8):  # characters whose bytes fall into two windows count once
        windows = cut_windows([text], tiny.tokenizer(bos=True), context=context)
        assert sum(windows.bytes_scored or ()) == len(text.encode())
    assert cut_windows(["xyz"], tiny.tokenizer(), context=8).bytes_scored == (2,)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "bb": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    found = cut_windows(["a  bb a bb  a  "], words, context=3)  # [a bb a] [bb a]
    assert found.bytes_scored == (6, 3)


def test_the_convention_is_hashed() -> None:
    texts, options = ["abcdefghij", "klm"], {"context": 4}
    first = cut_windows(texts, tiny.tokenizer(), **options)
    assert cut_windows(texts, tiny.tokenizer(), context=4, stride=4, max_tokens=100).convention_hash == first.convention_hash
    others = [
        cut_windows(["abcdefghijklm"], tiny.tokenizer(), **options),
        cut_windows(texts, tiny.tokenizer(), context=5),
        cut_windows(texts, tiny.tokenizer(), context=4, stride=2),
        cut_windows(texts, tiny.tokenizer(), context=4, max_tokens=12),
        cut_windows(texts, tiny.tokenizer(bos=True), **options),
    ]
    hashes = {first.convention_hash, *(other.convention_hash for other in others)}
    assert len(hashes) == 6 and all(len(value) == 64 for value in hashes)
    assert others[0].text_hash != first.text_hash == others[2].text_hash
    assert others[-1].tokenizer_hash != first.tokenizer_hash
    tokenizer = tiny.tokenizer()
    tokenizer("long text", truncation=True, max_length=3)  # a setting of one call
    assert cut_windows(texts, tokenizer, **options).tokenizer_hash == first.tokenizer_hash
    tokenizer.add_tokens(["new"])
    assert cut_windows(texts, tokenizer, **options).tokenizer_hash != first.tokenizer_hash
