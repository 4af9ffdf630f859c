from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.rows import has_rows
from hf_moe_lmc.perplexity.text import DatasetText, TextFiles, TextOptions
from hf_moe_lmc.perplexity.windows import cut_texts
from tests import tiny


def test_text_files_are_checked(tmp_path: Path) -> None:
    good, empty, binary = (tmp_path / name for name in ("good", "empty", "binary"))
    good.write_text("grüße", encoding="utf-8")
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    assert list(TextFiles.of([good, good]).documents()) == ["grüße", "grüße"]
    assert TextFiles.of([good]).describe()["files"][0]["name"] == "good"
    for path, message in (
        (tmp_path / "none", "no such text file"),
        (tmp_path, "found a folder"),
        (empty, "empty"),
        (binary, "not UTF-8"),
    ):
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
        assert options.source() == TextFiles.of([files["plain"]], "text") and options.files == (files["plain"],)
        assert options == TextOptions(text=files["plain"]) and hash(options) == hash(TextOptions(text=files["plain"]))
    assert list(TextOptions(text=[files["rows"], files["plain"]]).source().documents()) == ["eins", "ein Text"]
    assert list(TextOptions(text=files["rows"], column="body").source().documents()) == ["zwei"]
    assert TextOptions(dataset="org/name").source() == DatasetText("org/name")
    everything = TextOptions(dataset="org/name", dataset_config="c", dataset_revision="r", split="s", column="x")
    assert everything.source() == DatasetText("org/name", "c", "s", "x", "r")
    assert TextOptions(dataset="org/name", join="").source() == DatasetText("org/name", join="") != DatasetText("org/name")
    assert list(TextOptions(text=[files["rows"], files["plain"]], join="+").source().documents()) == ["eins", "ein Text"]
    assert TextOptions(dataset=str(tmp_path), split="train").source() == DatasetText(str(tmp_path), None, "train")


def test_each_file_is_a_text_with_a_name(files: dict[str, Path], tmp_path: Path) -> None:
    plain, rows = files["plain"], files["rows"]
    packed = tmp_path / "more.jsonl.gz"
    assert TextOptions(text=[plain, rows, packed]).names == ("plain", "rows", "more")
    pairs = (("prose", plain), ("code", rows))
    for given in ([f"prose={plain}", f"code={rows}"], {"prose": plain, "code": str(rows)}):
        options = TextOptions(text=given)
        assert options == TextOptions(text=dict(pairs)) and options.names == ("prose", "code")
        assert options.files == (plain, rows) and options.source().names == ("prose", "code")
        assert [file["text"] for file in options.source().describe()["files"]] == ["prose", "code"]
    odd = tmp_path / "b=1" / "x=y.txt"
    odd.parent.mkdir()
    odd.write_text("text")
    assert TextOptions(text=str(odd)).names == ("x=y",) and TextOptions(text=f"name={odd}").files == (odd,)
    assert TextOptions(text=odd.parent / "a=none.txt").files == (odd.parent / "a=none.txt",)  # a Path is never cut
    assert TextOptions(dataset="org/wikitext").source().names == ("wikitext",)
    with pytest.raises(InputError, match="no such text file"):
        TextOptions(text="name=none.txt").source()
    for bad in ("=plain.txt", "name="):
        with pytest.raises(InputError, match="expected NAME=FILE or FILE"):
            TextOptions(text=bad)
    other = tmp_path / "b=1" / "plain.txt"
    with pytest.raises(InputError, match=f"two texts are named plain: {plain} and {other}; .* --text plain2={other}"):
        TextOptions(text=[plain, other])


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
        ({"text": "plain", "join": ""}, "--join would have no effect: the text is a plain file; leave it out"),
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


ROWS = [
    {"text": "eins", "n": "007"},
    {"text": "NA", "n": "2"},
    {"text": "  ", "n": "x"},
    {"text": 'zwei "Zeilen",\nund\tmehr', "n": ""},
]
TEXTS = ["eins", "NA", 'zwei "Zeilen",\nund\tmehr']


def table(path: Path, rows: list[dict[str, Any]], bom: bytes = b"") -> Path:
    """A file with these rows, of the format that its name says."""
    kind, packed = path.name.lower().removesuffix(".gz").rpartition(".")[2], path.name.lower().endswith(".gz")
    if kind in ("parquet", "arrow"):
        found = pyarrow.table({name: [row.get(name) for row in rows] for name in rows[0]})
        sink = io.BytesIO()
        if kind == "parquet":
            pyarrow.parquet.write_table(found, sink, row_group_size=2)
        else:
            with pyarrow.ipc.new_stream(sink, found.schema) as writer:
                writer.write_table(found, max_chunksize=2)
        content = sink.getvalue()
    elif kind in ("csv", "tsv"):
        file = io.StringIO()
        writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        content = bom + file.getvalue().encode()
    elif kind == "json":
        content = bom + json.dumps(rows, ensure_ascii=False, indent=1).encode()
    else:
        content = bom + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow"])
def test_rows_of_each_format_are_documents(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "with [brackets] and *"
    folder.mkdir()
    for spelt, bom in ((name, b""), (name.upper(), "\ufeff".encode()), (f"{name}.gz", b""), (f"{name.title()}.GZ", b"")):
        path = table(folder / spelt, ROWS, bom)
        assert has_rows(path)
        files = TextFiles.of([path])
        assert list(files.documents()) == TEXTS
        assert files.describe() | {"files": []} == {"kind": "files", "files": [], "column": "text", "rows_skipped": 1}
        assert list(TextFiles.of([path], "n").documents()) == ["007", "2", "x"]
        for join in ("\n\n", "", " | "):
            one = TextFiles.of([path], join=join)
            assert list(one.documents()) == [join.join(row["text"] for row in ROWS)]
            assert one.describe()["join"] == join and one.describe()["rows_skipped"] == 0
        with pytest.raises(InputError, match=r"expected text in column 'body', found columns text, n; see --column"):
            TextFiles.of([path], "body")
        empty = table(folder / f"empty-{spelt}", [{"text": "", "n": "1"}, {"text": " \n", "n": "2"}])
        with pytest.raises(InputError, match=r"the text file is empty \(rows without text: 2\)"):
            TextFiles.of([empty])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_rows_that_are_null_are_skipped_and_counted(name: str, tmp_path: Path) -> None:
    path = table(tmp_path / name, [{"text": None}, {"text": "eins"}, {"text": ""}, {"text": None}, {"text": "zwei"}])
    files = TextFiles.of([path, path])
    assert list(files.documents()) == ["eins", "zwei"] * 2
    assert files.describe()["rows_skipped"] == 6 and [file["documents"] for file in files.describe()["files"]] == [2, 2]
    assert list(files.documents()) and files.describe()["rows_skipped"] == 6  # of one reading
    joined = TextFiles.of([path], join="+")
    assert list(joined.documents()) == ["eins++zwei"] and joined.describe()["rows_skipped"] == 2
    with pytest.raises(InputError, match="empty"):
        TextFiles.of([table(tmp_path / f"null-{name}", [{"text": None}, {"text": None}])])


def test_json_comes_in_several_forms(tmp_path: Path) -> None:
    long = "x" * 200_000
    path = tmp_path / "a.json"
    for content, expected in (
        ('{"text": "eins"}\n{"text": "zwei", "n": 1}\n{"n": 2}', ["eins", "zwei"]),
        ('{\n  "text": "eins"\n}', ["eins"]),
        ('[\n"eins",\n null, "zwei"]\n', ["eins", "zwei"]),
        ('{"text": {"0": "eins", "1": "zwei"}, "n": {"0": 1, "1": 2}}', ["eins", "zwei"]),
        ('{"n": [1, 2], "text": ["eins", "zwei"]}', ["eins", "zwei"]),
        (json.dumps([{"text": long, "n": 1}, {"text": "2020-01-01", "n": "x"}]), [long, "2020-01-01"]),
    ):
        path.write_text(content)
        assert list(TextFiles.of([path]).documents()) == expected
    for content, message in (
        ("[1, 2]", "row 1: expected a JSON object, found int"),
        ('[{"text": "eins"}', "the array does not end"),
        ('[{"text": "eins"}, {"text": ', "not JSON, near"),
        ("words", "not JSON, near 'words'"),
        ('{"data": [{"text": "eins"}]}', "found columns data"),
        ('{"text": 5}', r"found columns text \(row 1 holds int\)"),
        ('{"text": "\\ud800"}', "row 1: half of a surrogate pair"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            list(TextFiles.of([path]).documents())


def test_tables_that_do_not_fit_their_first_line_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for content, message in (
        ("text,n\na,b,1\n", "line 2: expected 2 cells as in the first line, found 3; put cells that hold the separator"),
        ('text\n"a\n', "not a table"),
        ("text,text\na,b\n", "found columns text, text"),
        (
            f"{'A long line of text ' * 9},{'b,' * 40}\nc\n",
            r"found columns A long line of text A long line of text \.\.\., b, .* and 22 more",
        ),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            list(TextFiles.of([path]).documents())
    path.write_text(f"n,text\n1\n\n2,{'x' * 200_000}\n")
    files = TextFiles.of([path])
    assert list(files.documents()) == ["x" * 200_000] and files.describe()["rows_skipped"] == 1


def test_plain_text_is_one_document_whatever_its_name(tmp_path: Path) -> None:
    long = "grüße, 字\r\n" * 20_000
    for name, content, expected in (
        ("a.txt", "\ufeffein Text", "ein Text"),
        ("a.md", "[a link](there)\n{x}", "[a link](there)\n{x}"),
        ("a", "{not json}\n", "{not json}\n"),
        ("b.txt", "[\n1]", "[\n1]"),
        ("c.txt", "\n[1]", "\n[1]"),
        ("d.txt", long, long.replace("\r\n", "\n")),
        ("e.txt", "[" * 100_000, "[" * 100_000),
        ("f.txt", "[1, 2] and " * 200_000, "[1, 2] and " * 200_000),
    ):
        for packed in (False, True):
            path = tmp_path / f"{name}{'.gz' * packed}"
            path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
            assert list(TextFiles.of([path]).documents()) == [expected]
    (tmp_path / "half.txt.gz").write_bytes((tmp_path / "d.txt.gz").read_bytes()[:-200])
    (tmp_path / "none.txt.gz").write_text("plain")
    (tmp_path / "latin.txt").write_bytes("grüße".encode("latin-1"))
    (tmp_path / "late.txt").write_bytes(b"a" * 300_000 + b"\xff")
    for name, content, message in (
        ("x.txt", '{"text": "eins"}\n', "its first line is JSON, .* rename it to .jsonl"),
        ("x.dat", "\ufeff[1]\nwords", "its first line is JSON"),
        ("y.txt", json.dumps([{"text": "word " * 9}] * 40_000), "its first line is JSON"),  # longer than what is looked at
        ("half.txt.gz", None, "not a whole gzip file"),
        ("none.txt.gz", None, "not a whole gzip file"),
        ("latin.txt", None, "not UTF-8 text .*iconv"),
        ("late.txt", None, "not UTF-8 text"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            list(TextFiles.of([tmp_path / name]).documents())


def test_rows_of_a_dataset_are_counted_and_joined(tmp_path: Path) -> None:
    rows = [{"text": "", "n": 1}, {"text": " = Title = \n", "n": 2}, {"text": None, "n": 3}, {"text": "word\n", "n": 4}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("test", "test[:100]"):
        dataset = DatasetText(str(tmp_path), split=split)
        assert list(dataset.documents()) == [" = Title = \n", "word\n"] and dataset.describe()["rows_skipped"] == 2
        recipe = "\n\n".join(row["text"] for row in rows if row["text"] is not None)
        assert list(DatasetText(str(tmp_path), split=split, join="\n\n").documents()) == [recipe]
        with pytest.raises(InputError, match=r"expected text in column 'n', found columns text, n \(.* holds int"):
            list(DatasetText(str(tmp_path), split=split, column="n").documents())


def test_little_is_read_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        for _ in range(60):
            file.write(b"The expert that answers is the one that the router picked. " * 16_000)
    tracemalloc.start()
    found = cut_texts(TextFiles.of([path]).texts(), tiny.tokenizer(), context=512, max_tokens=2048)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tokens_read == 2048 and found.read_in_part == 1 and peak < path.stat().st_size / 2
