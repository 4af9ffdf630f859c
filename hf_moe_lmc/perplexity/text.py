"""Documents to evaluate on, from files or datasets. Knows nothing of MoE."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hf_moe_lmc.checkpoints.source import looks_local
from hf_moe_lmc.errors import InputError


class Text(Protocol):
    """Documents to evaluate on, and what a report says of them."""

    def documents(self) -> Iterator[str]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 files, each one document; or .jsonl and .parquet files, whose rows are documents.

    Attributes:
        column: where the text stands in a row.
    """

    paths: tuple[Path, ...]
    column: str = "text"

    @classmethod
    def of(cls, paths: Sequence[str | os.PathLike[str]], column: str = "text") -> TextFiles:
        """Raises InputError where one is missing, is no text or is empty."""
        files = cls(tuple(Path(path) for path in paths), column)
        for path in files.paths:
            if not path.is_file():
                raise InputError(f"{path}: no such text file")
        for path in files.paths:
            if not any(text.strip() for text in files._read(path)):
                raise InputError(f"{path}: the text file is empty")
        return files

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            yield from self._read(path)

    def _read(self, path: Path) -> Iterator[str]:
        try:
            if path.suffix == ".parquet":
                yield from _texts(_parquet_rows(path), self.column, str(path))
            elif path.suffix == ".jsonl":
                yield from _texts(_json_rows(path), self.column, str(path))
            else:
                yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error})") from error

    def describe(self) -> dict[str, Any]:
        files = []
        for path in self.paths:
            with path.open("rb") as file:
                files.append({"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()})
        return {"kind": "files", "files": files, **({"column": self.column} if any(map(has_rows, self.paths)) else {})}


def has_rows(path: str | os.PathLike[str]) -> bool:
    """Whether a text file is a table, each of whose rows is a document."""
    return Path(path).suffix in (".jsonl", ".parquet")


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # slow to import, and plain text needs none of it
    from datasets.exceptions import DatasetGenerationError

    try:
        yield from load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (DatasetGenerationError, ValueError, OSError) as error:  # pyarrow's errors are ValueErrors
        raise InputError(f"{path}: not a parquet file that datasets can read ({error})") from error


def _texts(rows: Iterable[dict[str, Any]], column: str, source: str) -> Iterator[str]:
    """The documents in rows, blank ones left out.

    Raises:
        InputError: no text in `column` of a row.
    """
    for row in rows:
        if not isinstance(row.get(column), str):
            raise InputError(f"{source}: expected text in column {column!r}, found columns {', '.join(row)}; see --column")
        if row[column].strip():
            yield row[column]


@dataclass(frozen=True)
class DatasetText:
    """One column of a dataset on the Hub or in a folder, as `datasets.load_dataset` takes it; each row is one document."""

    name: str
    config: str | None = None
    split: str = "test"
    column: str = "text"
    revision: str | None = None

    def documents(self) -> Iterator[str]:
        """Raises InputError where there is no such dataset, configuration, split, revision or column."""
        from datasets import load_dataset  # slow to import, and text files need none of it
        from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

        try:
            # slices such as train[:100] exist only without streaming
            streaming = "[" not in self.split
            rows = load_dataset(self.name, self.config, split=self.split, streaming=streaming, revision=self.revision)
            yield from _texts(rows, self.column, f"dataset {self.name}")
        except (DatasetNotFoundError, DatasetGenerationError, FileNotFoundError, ValueError) as error:
            at = f", revision {self.revision}" if self.revision else ""
            raise InputError(f"dataset {self.name}, config {self.config}, split {self.split}{at}: {error}") from error

    def describe(self) -> dict[str, Any]:
        return {"kind": "dataset", **vars(self)}


def text_source(
    text: Sequence[str | os.PathLike[str]],
    dataset: str | None,
    config: str | None,
    split: str,
    column: str,
    revision: str | None,
) -> Text:
    """The text to evaluate on: either files or a dataset.

    Raises:
        InputError: neither or both, or what is asked for cannot be.
    """
    if bool(text) == (dataset is not None):
        raise InputError("give the text to evaluate on: either text files or one dataset")
    if dataset is None:
        return TextFiles.of(text, column)
    if "/" in dataset and looks_local(dataset) and not Path(dataset).expanduser().exists():
        raise InputError(f"{dataset}: no such folder (it looks like a local path, so the Hub was not asked)")
    if revision is not None and Path(dataset).expanduser().exists():
        raise InputError(f"dataset-revision {revision}: {dataset} is a folder here, which has no revisions; leave it out")
    return DatasetText(dataset, config, split, column, revision)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    split: str | None = None
    column: str | None = None

    def source(self) -> Text:
        files = [self.text] if isinstance(self.text, str | os.PathLike) else self.text
        return text_source(
            files, self.dataset, self.dataset_config, self.split or "test", self.column or "text", self.dataset_revision
        )
