"""Documents to evaluate on, from files or from a dataset. Knows nothing of MoE."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hf_moe_lmc.checkpoints.source import looks_local
from hf_moe_lmc.errors import InputError, refuse_idle

DEFAULT_SPLIT = "test"
DEFAULT_COLUMN = "text"

TextFile = str | os.PathLike[str]


class Text(Protocol):
    """Documents to evaluate on."""

    def documents(self) -> Iterator[str]:
        """The documents, in their order."""

    def describe(self) -> dict[str, Any]:
        """The `evaluation.text` of report.json."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text to evaluate on: either text files or one dataset.

    None stands for an option that was not given. Options without effect are refused.

    Attributes:
        text: a UTF-8 file or several, each one document; each row of a .jsonl or .parquet file is a document.
        dataset: name on the Hub, or folder, of a dataset whose rows are documents.
        dataset_config: configuration of the dataset.
        dataset_revision: branch, tag or commit of a dataset on the Hub.
        split: of the dataset, by default DEFAULT_SPLIT.
        column: column that holds the text of a row, by default DEFAULT_COLUMN.

    Raises:
        InputError: neither or both of text and dataset, or an option without effect.

    Example:
        >>> TextOptions(dataset="Salesforce/wikitext", dataset_config="wikitext-2-raw-v1").source()
        DatasetText(name='Salesforce/wikitext', config='wikitext-2-raw-v1', split='test', column='text', revision=None)
        >>> TextOptions(text="held_out.txt", split="train")
        Traceback (most recent call last):
        hf_moe_lmc.errors.InputError: --split would have no effect: the text is a file; leave it out
    """

    text: TextFile | Sequence[TextFile] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    split: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self.files)
        if bool(self.files) == (self.dataset is not None):
            raise InputError("give the text to evaluate on: either text files or one dataset")
        if self.files:
            self._refuse(("dataset_config", "dataset_revision", "split"), "the text is a file")
            if not any(map(has_rows, self.files)):
                self._refuse(("column",), "the text is a plain file")

    @property
    def files(self) -> tuple[Path, ...]:
        """The text files; empty with a dataset."""
        paths = [self.text] if isinstance(self.text, str | os.PathLike) else self.text
        return tuple(Path(path) for path in paths)

    def source(self) -> Text:
        """The text, with defaults for what was not given. Reads files; the dataset is read later.

        Raises:
            InputError: a file or a local dataset is missing, or a file is no text or empty.
        """
        column = DEFAULT_COLUMN if self.column is None else self.column
        if self.dataset is None:
            return TextFiles.of(self.files, column)
        folder = Path(self.dataset).expanduser()
        if "/" in self.dataset and looks_local(self.dataset) and not folder.exists():
            raise InputError(f"{self.dataset}: no such folder (it looks like a local path, so the Hub was not asked)")
        if self.dataset_revision is not None and folder.exists():
            raise InputError(
                f"dataset-revision {self.dataset_revision}: {self.dataset} is a folder here, which has no revisions; "
                "leave it out"
            )
        split = DEFAULT_SPLIT if self.split is None else self.split
        return DatasetText(self.dataset, self.dataset_config, split, column, self.dataset_revision)

    def _refuse(self, names: Sequence[str], reason: str) -> None:
        """Raises InputError if any of these options was given."""
        refuse_idle({name: getattr(self, name) for name in names}, reason)


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 files, each one document; or .jsonl and .parquet files, each row a document.

    Attributes:
        column: column that holds the text of a row.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "held_out.txt"
        ...     size = path.write_text("One document.")
        ...     list(TextFiles.of([path]).documents())
        ['One document.']
    """

    paths: tuple[Path, ...]
    column: str = DEFAULT_COLUMN

    @classmethod
    def of(cls, paths: Sequence[TextFile], column: str = DEFAULT_COLUMN) -> TextFiles:
        """Raises InputError where a file is missing, is no text or is empty."""
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


@dataclass(frozen=True)
class DatasetText:
    """One column of a dataset on the Hub or in a folder, as `datasets.load_dataset` takes it; each row is a document."""

    name: str
    config: str | None = None
    split: str = DEFAULT_SPLIT
    column: str = DEFAULT_COLUMN
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


def has_rows(path: TextFile) -> bool:
    """Whether each row of a text file is a document.

    Example:
        >>> has_rows("rows.jsonl"), has_rows("held_out.txt")
        (True, False)
    """
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
    """The documents in rows, without blank ones.

    Raises:
        InputError: no text in `column` of a row.
    """
    for row in rows:
        if not isinstance(row.get(column), str):
            raise InputError(f"{source}: expected text in column {column!r}, found columns {', '.join(row)}; see --column")
        if row[column].strip():
            yield row[column]
