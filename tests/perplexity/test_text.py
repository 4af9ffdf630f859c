from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.text import DatasetText, TextFiles, TextOptions


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


def test_rows_of_tables_are_documents(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"text": "eins", "n": 1}, {"text": "  ", "n": 2}, {"text": "zwei\nZeilen", "n": 3}]
    lines, parquet, plain = tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.txt"
    lines.write_text("\n\n".join(json.dumps(row) for row in rows))
    Dataset.from_list(rows).to_parquet(parquet)
    plain.write_text("drei")
    files = TextFiles.of([lines, parquet, plain])
    assert list(files.documents()) == ["eins", "zwei\nZeilen", "eins", "zwei\nZeilen", "drei"]
    assert files.describe()["column"] == "text" and "column" not in TextFiles.of([plain]).describe()
    for path in (lines, parquet):
        with pytest.raises(InputError, match="expected text in column 'n', found columns text, n"):
            TextFiles.of([path], "n")
    for content, message in (("[1]", "line 1: expected a JSON object, found list"), ("{", "line 1: not JSON"), ("\n", "empty")):
        lines.write_text(content)
        with pytest.raises(InputError, match=message):
            TextFiles.of([lines])
    parquet.write_bytes(b"no parquet")
    with pytest.raises(InputError, match="not a parquet file"):
        TextFiles.of([parquet])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A plain file and one with rows."""
    made = {"plain": tmp_path / "plain.txt", "rows": tmp_path / "rows.jsonl"}
    made["plain"].write_text("ein Text")
    made["rows"].write_text('{"text": "eins", "body": "zwei"}')
    return made


def test_options_give_the_text_with_defaults_for_what_was_not_given(files: dict[str, Path], tmp_path: Path) -> None:
    for text in (files["plain"], str(files["plain"]), [files["plain"]], (str(files["plain"]),)):
        options = TextOptions(text=text)
        assert options.source() == TextFiles((files["plain"],), "text") and options.files == (files["plain"],)
        assert options == TextOptions(text=files["plain"]) and hash(options) == hash(TextOptions(text=files["plain"]))
    assert list(TextOptions(text=[files["rows"], files["plain"]]).source().documents()) == ["eins", "ein Text"]
    assert list(TextOptions(text=files["rows"], column="body").source().documents()) == ["zwei"]
    assert TextOptions(dataset="org/name").source() == DatasetText("org/name")
    everything = TextOptions(dataset="org/name", dataset_config="c", dataset_revision="r", split="s", column="x")
    assert everything.source() == DatasetText("org/name", "c", "s", "x", "r")
    assert TextOptions(dataset=str(tmp_path), split="train").source() == DatasetText(str(tmp_path), None, "train")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give the text to evaluate on: either text files or one dataset"),
        ({"text": []}, "give the text to evaluate on"),
        ({"text": "plain", "dataset": "org/name"}, "give the text to evaluate on"),
        ({"text": "plain", "split": "test"}, "--split would have no effect: the text is a file; leave it out"),
        ({"text": "rows", "split": "test"}, "--split would have no effect: the text is a file; leave it out"),
        (
            {"text": "plain", "dataset_config": "c", "dataset_revision": "r", "split": "s"},
            "--dataset-config and --dataset-revision and --split would have no effect: the text is a file; leave them out",
        ),
        ({"text": "plain", "column": "text"}, "--column would have no effect: the text is a plain file; leave it out"),
    ],
)
def test_options_without_effect_are_refused(files: dict[str, Path], given: dict[str, Any], message: str) -> None:
    named = {key: files.get(value, value) if key == "text" and value else value for key, value in given.items()}
    with pytest.raises(InputError) as error:
        TextOptions(**named)
    assert str(error.value).startswith(message)


def test_files_and_folders_are_checked_when_the_source_is_made(tmp_path: Path) -> None:
    for given, message in (
        ({"text": tmp_path / "none"}, "no such text file"),
        ({"dataset": "./none"}, "the Hub was not asked"),
        ({"dataset": str(tmp_path), "dataset_revision": "main"}, "dataset-revision main: .* has no revisions; leave it out"),
    ):
        options = TextOptions(**given)
        with pytest.raises(InputError, match=message):
            options.source()
