from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity import DatasetText, TextFiles, cut_windows, window_losses
from tests import tiny


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


def test_text_files_are_checked(tmp_path: Path) -> None:
    good, empty, binary = (tmp_path / name for name in ("good", "empty", "binary"))
    good.write_text("grüße", encoding="utf-8")
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    assert list(TextFiles.of([good, good]).documents()) == ["grüße", "grüße"]
    assert TextFiles.of([good]).describe()["files"][0]["name"] == "good"
    for path, message in ((tmp_path / "none", "no such text file"), (empty, "empty"), (binary, "not UTF-8")):
        with pytest.raises(InputError, match=message):
            TextFiles.of([good, path])


def test_each_row_of_a_dataset_is_a_document(tmp_path: Path) -> None:
    rows = [{"text": "first", "n": 1}, {"text": " ", "n": 2}, {"text": "third", "n": 3}]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    name = str(tmp_path)
    assert list(DatasetText(name).documents()) == ["first", "third"]
    with pytest.raises(InputError, match="found columns text, n"):
        list(DatasetText(name, column="body").documents())
    with pytest.raises(InputError, match="split nowhere"):
        list(DatasetText(name, split="nowhere").documents())
    assert list(DatasetText(name, split="test[2:]").documents()) == ["third"]
    with pytest.raises(InputError, match="dataset"):
        list(DatasetText(str(tmp_path / "none")).documents())
    (tmp_path / "test.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    with pytest.raises(InputError, match="dataset"):
        list(DatasetText(name).documents())
