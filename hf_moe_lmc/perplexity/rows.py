"""Text files, plain or with rows, read in blocks. Knows nothing of MoE."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

from hf_moe_lmc.errors import InputError

BLOCK = 1 << 16  # characters read at a time
LINE = 1 << 20  # characters of a first line that are looked at
TEXT_TYPES = ("string", "large_string", "string_view", "null")  # of columns, as `datasets` names them
NAME, NAMES = 40, 20  # characters of a column's name, and columns, that an error shows
BOM = "\ufeff"

Row = dict[str, Any]


def has_rows(path: str | PathLike[str]) -> bool:
    """Whether each row of a text file is a document.

    Example:
        >>> has_rows("rows.jsonl"), has_rows("ROWS.CSV.gz"), has_rows("held_out.txt")
        (True, True, False)
    """
    return _format(Path(path)) in READERS


def read_rows(path: Path, column: str) -> Iterator[Row]:
    """The rows of a file, at least with `column` where the file has it.

    Raises:
        InputError: the file is not of the format that its name says.
    """
    return READERS[_format(path)](path, column)


def text_blocks(path: Path) -> Iterator[str]:
    """A plain UTF-8 file, or one behind .gz. A byte order mark is no text.

    Raises:
        InputError: no UTF-8, or rows by another name.
    """
    with _opened(path) as file:
        first = file.readline(LINE)
        if _is_json(first):
            raise InputError(
                f"{path}: its first line is JSON, and the name says plain text; rename it to .jsonl (an object in each line) "
                "or .json (one array). Where it is a text after all, put an empty line in front"
            )
        yield first
        while block := file.read(BLOCK):
            yield block


def wrong_column(source: str, column: str, found: Iterable[str], instead: str = "") -> InputError:
    """The error for rows that have no text in a column."""
    names = [name if len(name) <= NAME else f"{name[:NAME]}..." for name in found]
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return InputError(
        f"{source}: expected text in column {column!r}, found columns {', '.join(names[:NAMES])}{more}{instead}; "
        "see --column, which names the one to read"
    )


def only_column(rows: Any, column: str, source: str) -> Iterable[Row]:
    """Rows of `datasets` with one column alone, so that images in others, say, are not decoded.

    Raises:
        InputError: there is no such column, or it holds something else than text.
    """
    from datasets import Value  # slow to import, and plain text needs none of it

    if rows.features is None:  # of a stream that tells its columns row by row
        selected: Iterable[Row] = rows
        return selected
    kind = rows.features.get(column)
    if kind is None or (isinstance(kind, Value) and kind.dtype not in TEXT_TYPES):
        raise wrong_column(source, column, rows.features, "" if kind is None else f" ({column} holds {kind.dtype})")
    selected = rows.select_columns([column])
    return selected


def _format(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file, decompressed if its name ends in .gz, without its byte order mark."""
    compressed = path.suffix.lower() == ".gz"
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
            if compressed
            else path.open(encoding="utf-8-sig", newline=newline)
        ) as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); convert it, for example with iconv") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); fetch it again, or rename it if it is none") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _is_json(line: str) -> bool:
    """Whether a line is a JSON object or array, or the beginning of a very long one."""
    text = line.strip()
    if not text.startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        ends = error.msg.startswith("Unterminated string") or error.pos >= len(text) - 8
        return len(line) >= LINE and ends
    except RecursionError:
        return False
    return True


def _json_lines(path: Path, column: str) -> Iterator[Row]:
    # The reader of `datasets` takes texts that look like dates for dates, and stops where another column changes its type.
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                found = f"{type(row).__name__}; a file that is one array is named .json"
                raise InputError(f"{path}, line {number}: expected a JSON object, found {found}")
            yield row


def _json_values(path: Path, column: str) -> Iterator[Row]:
    """The rows of a .json file: an array of objects or of texts, objects one after another, or one object of columns."""
    values = _values(path)
    start = list(islice(values, 2))
    if len(start) == 1:
        value, in_array = start[0]
        texts = value.get(column) if isinstance(value, dict) and not in_array else None
        if isinstance(texts, dict | list):
            yield from ({column: text} for text in (texts.values() if isinstance(texts, dict) else texts))
            return
    for number, (value, _) in enumerate(chain(start, values), 1):
        if value is None or isinstance(value, str):
            yield {column: value}
        elif isinstance(value, dict):
            yield value
        else:
            raise InputError(f"{path}, row {number}: expected a JSON object, found {type(value).__name__}")


def _values(path: Path) -> Iterator[tuple[Any, bool]]:
    """The elements of an array, or values one after another, and whether it is an array; one at a time is in memory."""
    decoder = json.JSONDecoder()
    with _opened(path) as file:
        text, at, array = "", 0, False
        while True:
            while at < len(text) and (text[at].isspace() or (array and text[at] == ",")):
                at += 1
            if at == len(text):
                text, at = file.read(BLOCK), 0
                if not text:
                    break
                continue
            if text[at] == "[" and not array:
                array, at = True, at + 1
            elif text[at] == "]" and array:
                return
            else:
                value, text, at = _value(decoder, file, text, at, path)
                yield value, array
        if array:
            raise InputError(f"{path}: not JSON, the array does not end; fetch the file again")


def _value(decoder: json.JSONDecoder, file: TextIO, text: str, at: int, path: Path) -> tuple[Any, str, int]:
    """The value at a place, the text that has been read, and where the value ends there."""
    while True:
        try:
            value, end = decoder.raw_decode(text, at)
            return value, text, end
        except json.JSONDecodeError as error:
            block = file.read(max(BLOCK, len(text)))  # twice as much: a long value is not read over and over
            if not block:
                raise InputError(f"{path}: not JSON, near {text[error.pos : error.pos + 30]!r} ({error.msg})") from error
            text, at = text[at:] + block, 0


def _separated(path: Path, separator: str, column: str) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a document may be longer than 128 KiB
    with _opened(path, newline="") as file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        try:
            header = next(rows, [])
            if header and header.count(column) != 1:
                raise wrong_column(str(path), column, header)
            for cells in rows:
                if len(cells) > len(header):
                    raise InputError(
                        f"{path}, line {rows.line_num}: expected {len(header)} cells as in the first line, found {len(cells)}; "
                        "put cells that hold the separator into double quotes"
                    )
                if cells or len(header) == 1:
                    yield dict.fromkeys(header) | dict(zip(header, cells, strict=False))
        except csv.Error as error:
            raise InputError(f"{path}, line {rows.line_num}: not a table ({error}); double a quote within quotes") from error


def _table(path: Path, builder: str, column: str) -> Iterator[Row]:
    """The rows of a binary table, read by `datasets`; other columns are not decoded."""
    from datasets import load_dataset  # slow to import, and plain text needs none of it
    from datasets.exceptions import DatasetsError

    with tempfile.TemporaryDirectory(prefix="hf-moe-lmc-") as folder:  # the user's cache is left alone
        file = Path(folder, "table")
        try:
            if path.suffix.lower() != ".gz":
                file.symlink_to(path.resolve())  # brackets in names of folders would be patterns
            else:
                with gzip.open(path) as packed, file.open("wb") as plain:
                    shutil.copyfileobj(packed, plain)
            more = {"batch_size": 256} if builder == "parquet" else {}
            rows = load_dataset(builder, data_files=str(file), split="train", streaming=True, cache_dir=folder, **more)
            yield from only_column(rows, column, str(path))
        except (DatasetsError, ValueError, OSError, EOFError, zlib.error, NotImplementedError) as error:
            # pyarrow's errors are ValueErrors
            raise InputError(f"{path}: not a {builder} file that datasets can read ({error})") from error


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_values,
    ".csv": lambda path, column: _separated(path, ",", column),
    ".tsv": lambda path, column: _separated(path, "\t", column),
    ".parquet": lambda path, column: _table(path, "parquet", column),
    ".arrow": lambda path, column: _table(path, "arrow", column),
}
