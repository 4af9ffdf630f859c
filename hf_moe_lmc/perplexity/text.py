"""Documents to evaluate on, from files or from a dataset. Knows nothing of MoE."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hf_moe_lmc.checkpoints.source import looks_local
from hf_moe_lmc.errors import InputError, refuse_idle
from hf_moe_lmc.perplexity.documents import Document, joined
from hf_moe_lmc.perplexity.rows import BOM, has_rows, only_column, read_rows, text_blocks, wrong_column
from hf_moe_lmc.perplexity.saved import is_one, is_saved, load_saved
from hf_moe_lmc.runtime.progress import quiet_datasets

DEFAULT_SPLIT = "test"
DEFAULT_COLUMN = "text"

ROWS_WITHOUT_COLUMN = 1000  # rows may lack the column; where all of so many do, its name is wrong

TextFile = str | os.PathLike[str]
GivenText = TextFile | Sequence[TextFile] | Mapping[str, TextFile]


class Text(Protocol):
    """Documents to evaluate on.

    Attributes:
        names: of the texts, one for each file, or that of the dataset.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    def texts(self) -> Iterator[Iterator[Document]]:
        """The documents of each file, or of the dataset, in their order; each as far as it is asked for."""

    def documents(self) -> Iterator[str]:
        """All documents, whole."""

    def describe(self) -> dict[str, Any]:
        """The `evaluation.text` of report.json, of what was read last."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text to evaluate on: either text files or one dataset.

    None stands for an option that was not given. Options without effect are refused.

    Attributes:
        text: a UTF-8 file or several, each one document; each row of a .json, .jsonl, .csv, .tsv, .parquet or .arrow file is
            a document. Any may be compressed, named .gz. Each file is a text with a name of its own: the stem of the file
            unless given, as a str NAME=FILE or by a mapping from names to files. A file that exists as it is named wins.
        dataset: name on the Hub, or folder, of a dataset whose rows are documents; also a folder of `save_to_disk`.
        dataset_config: configuration of the dataset.
        dataset_revision: branch, tag or commit of a dataset on the Hub.
        split: of the dataset, by default DEFAULT_SPLIT.
        column: column that holds the text of a row, by default DEFAULT_COLUMN.
        join: put between the rows of a dataset or file, which are then one document; by default each row is one.

    Raises:
        InputError: neither or both of text and dataset, two texts of one name, or an option without effect.

    Example:
        >>> TextOptions(dataset="Salesforce/wikitext", dataset_config="wikitext-2-v1").source()
        DatasetText(name='Salesforce/wikitext', config='wikitext-2-v1', split='test', column='text', revision=None, join=None)
        >>> TextOptions(text=["held_out.txt", "code=repositories.jsonl"]).names
        ('held_out', 'code')
        >>> TextOptions(text="held_out.txt", split="train")
        Traceback (most recent call last):
        hf_moe_lmc.errors.InputError: --split would have no effect: the text is a file; leave it out
    """

    text: GivenText = ()
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    split: str | None = None
    column: str | None = None
    join: str | None = None

    def __post_init__(self) -> None:
        # as pairs of a name and a file, so that equal options are equal however they were given
        object.__setattr__(self, "text", _named(self.text))
        if bool(self.files) == (self.dataset is not None):
            raise InputError("give the text to evaluate on: either text files or one dataset")
        if self.files:
            _refuse_one_name(self.names, self.files)
            self._refuse(("dataset_config", "dataset_revision", "split"), "the text is a file")
            if not any(map(has_rows, self.files)):
                self._refuse(("column", "join"), "the text is a plain file")

    @property
    def files(self) -> tuple[Path, ...]:
        """The text files; empty with a dataset."""
        return tuple(file for _, file in _named(self.text))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the text files; empty with a dataset."""
        return tuple(name for name, _ in _named(self.text))

    def source(self) -> Text:
        """The text, with defaults for what was not given. Reads files; the dataset is read later.

        Raises:
            InputError: a file or a local dataset is missing, or a file is no text or empty.
        """
        column = DEFAULT_COLUMN if self.column is None else self.column
        if self.dataset is None:
            return TextFiles.of(self.files, column, self.join, names=self.names)
        folder = Path(self.dataset).expanduser()
        if "/" in self.dataset and looks_local(self.dataset) and not folder.exists():
            raise InputError(f"{self.dataset}: no such folder (it looks like a local path, so the Hub was not asked)")
        if self.dataset_revision is not None and folder.exists():
            raise InputError(
                f"dataset-revision {self.dataset_revision}: {self.dataset} is a folder here, which has no revisions; "
                "leave it out"
            )
        if is_saved(folder):
            self._refuse(("dataset_config",), f"{self.dataset} was written by save_to_disk, which keeps one configuration")
        if is_one(folder):
            self._refuse(("split",), f"{self.dataset} holds one dataset without splits")
        split = None if is_one(folder) else DEFAULT_SPLIT if self.split is None else self.split
        return DatasetText(self.dataset, self.dataset_config, split, column, self.dataset_revision, self.join)

    def _refuse(self, names: Sequence[str], reason: str) -> None:
        """Raises InputError if any of these options was given."""
        refuse_idle({name: getattr(self, name) for name in names}, reason)


@dataclass
class Reading:
    """What the last reading of a text has met.

    Attributes:
        documents: that were read of each file.
        rows_skipped: rows without text.
    """

    documents: list[int] = field(default_factory=list)
    rows_skipped: int = 0

    def start(self) -> None:
        self.documents.clear()
        self.rows_skipped = 0

    def counted(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents of one more file."""
        number = len(self.documents)
        self.documents.append(0)
        for document in documents:
            self.documents[number] += 1
            yield document

    def of_rows(self, rows: Iterable[dict[str, Any]], column: str, source: str, join: str | None) -> Iterator[Document]:
        """Each row as a document, or all of them as one.

        Rows that are null, empty or white space are left out. Between joined ones only null is: perplexity recipes join
        empty rows, too.
        """
        texts = self._texts(rows, column, source, blank=join is not None)
        return iter([Document(joined(texts, join))]) if join is not None else (Document([text]) for text in texts)

    def _texts(self, rows: Iterable[dict[str, Any]], column: str, source: str, blank: bool) -> Iterator[str]:
        """Raises InputError where rows have no such column, or something else than text in it."""
        columns: dict[str, None] = {}
        for number, row in enumerate(rows, 1):
            if column not in columns:
                columns |= dict.fromkeys(row)
                if column not in columns and number == ROWS_WITHOUT_COLUMN:
                    break
            text = row.get(column)
            if text is None:
                self.rows_skipped += 1
                continue
            if not isinstance(text, str):
                raise wrong_column(source, column, row, f" (row {number} holds {type(text).__name__})")
            text = text.removeprefix(BOM)
            _refuse_halves(text, f"{source}, row {number}")
            if blank or text.strip():
                yield text
            else:
                self.rows_skipped += 1
        if columns and column not in columns:
            raise wrong_column(source, column, columns)


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 files, each one document; or files with rows, each row a document.

    Attributes:
        column: column that holds the text of a row.
        join: put between the rows of a file, which are then one document; None: each row is one.
        names: of the texts, one for each file.
        reading: what was read last.

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
    join: str | None = None
    names: tuple[str, ...] = ()
    reading: Reading = field(default_factory=Reading, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        paths: Sequence[TextFile],
        column: str = DEFAULT_COLUMN,
        join: str | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> TextFiles:
        """Files by their names, or by their stems.

        Raises:
            InputError: a file is missing, is no text or is empty.
        """
        every = tuple(Path(path) for path in paths)
        files = cls(every, column, join, tuple(map(stem, every) if names is None else names))
        for path in files.paths:
            if not path.is_file():
                found = "a text file, found a folder; give the files in it" if path.is_dir() else None
                raise InputError(f"{path}: expected {found}" if found else f"{path}: no such text file")
        for path in files.paths:
            blocks = (block for document in files._read(path) for block in document.blocks())
            if not any(block.strip() for block in blocks):
                skipped = f" (rows without text: {files.reading.rows_skipped})" if files.reading.rows_skipped else ""
                raise InputError(f"{path}: the text file is empty{skipped}")
        return files

    def texts(self) -> Iterator[Iterator[Document]]:
        self.reading.start()
        for path in self.paths:
            yield self.reading.counted(self._read(path))

    def documents(self) -> Iterator[str]:
        return (document.whole() for text in self.texts() for document in text)

    def _read(self, path: Path) -> Iterator[Document]:
        if has_rows(path):
            return self.reading.of_rows(read_rows(path, self.column), self.column, str(path), self.join)
        return iter([Document(text_blocks(path))])

    def describe(self) -> dict[str, Any]:
        files = []
        for number, (path, name) in enumerate(zip(self.paths, self.names, strict=True)):
            with path.open("rb") as file:
                found: dict[str, Any] = {
                    "name": path.name,
                    "text": name,
                    "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                }
            read = {"documents": self.reading.documents[number]} if len(self.paths) > 1 and self.reading.documents else {}
            files.append(found | read)
        if not any(map(has_rows, self.paths)):
            return {"kind": "files", "files": files}
        return {"kind": "files", "files": files, "column": self.column} | _of_rows(self.join, self.reading)


@dataclass(frozen=True)
class DatasetText:
    """One column of a dataset on the Hub or in a folder, as `load_dataset` takes it or `save_to_disk` wrote it.

    Each row is a document.

    Attributes:
        split: None: a saved dataset without splits.
        join: put between the rows, which are then one document; None: each row is one.
        reading: what was read last.
    """

    name: str
    config: str | None = None
    split: str | None = DEFAULT_SPLIT
    column: str = DEFAULT_COLUMN
    revision: str | None = None
    join: str | None = None
    reading: Reading = field(default_factory=Reading, compare=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The last part of the name: a dataset is one text."""
        return (Path(self.name).name or self.name,)

    def texts(self) -> Iterator[Iterator[Document]]:
        self.reading.start()
        yield self.reading.counted(self.reading.of_rows(self._rows(), self.column, f"dataset {self.name}", self.join))

    def documents(self) -> Iterator[str]:
        """Raises InputError where there is no such dataset, configuration, split, revision or column."""
        return (document.whole() for text in self.texts() for document in text)

    def _rows(self) -> Iterator[dict[str, Any]]:
        from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

        try:
            with quiet_datasets():
                folder = Path(self.name).expanduser()
                rows = load_saved(folder, self.split) if is_saved(folder) else self._load()
            yield from only_column(rows, self.column, f"dataset {self.name}")
        except (DatasetNotFoundError, DatasetGenerationError, FileNotFoundError, ValueError) as error:
            at = f", revision {self.revision}" if self.revision else ""
            raise InputError(f"dataset {self.name}, config {self.config}, split {self.split}{at}: {error}") from error

    def _load(self) -> Any:
        from datasets import load_dataset  # slow to import, and text files need none of it

        streaming = "[" not in (self.split or "")  # slices such as train[:100] exist only without
        return load_dataset(self.name, self.config, split=self.split, streaming=streaming, revision=self.revision)

    def describe(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("name", "config", "split", "column", "revision")}
        return {"kind": "dataset", **named} | _of_rows(self.join, self.reading)


def stem(path: TextFile) -> str:
    """The name of a text that was given none: that of its file, without what tells its format.

    Example:
        >>> stem("texts/prose.jsonl.gz"), stem("README")
        ('prose', 'README')
    """
    name = Path(path).name
    return Path(name[:-3] if name.lower().endswith(".gz") else name).stem or name


def _named(given: Any) -> tuple[tuple[str, Path], ...]:
    """Names and files of `TextOptions.text`, which may hold such pairs already."""
    if isinstance(given, Mapping):
        return tuple((name, Path(file)) for name, file in given.items())
    every = [given] if isinstance(given, str | os.PathLike) else given
    return tuple(entry if isinstance(entry, tuple) else _name_and_file(entry) for entry in every)


def _name_and_file(entry: TextFile) -> tuple[str, Path]:
    """A file by its stem, or NAME=FILE. What exists as a file as it stands is one, and so is what has a folder before `=`."""
    if isinstance(entry, str) and "=" in entry and not Path(entry).is_file():
        name, file = entry.split("=", 1)
        if os.sep not in name:
            if not name.strip() or not file:
                raise InputError(f"text {entry}: expected NAME=FILE or FILE")
            return name.strip(), Path(file)
    return stem(entry), Path(entry)


def _refuse_one_name(names: Sequence[str], files: Sequence[Path]) -> None:
    """Raises InputError where two texts have one name."""
    first: dict[str, Path] = {}
    for name, file in zip(names, files, strict=True):
        if name in first:
            raise InputError(
                f"two texts are named {name}: {first[name]} and {file}; each is reported by its name, so give another, as in "
                f"--text {name}2={file}. Files that are to count as one text can be rows of one .jsonl file"
            )
        first[name] = file


def _of_rows(join: str | None, reading: Reading) -> dict[str, Any]:
    """What a report says of rows; `join` only where it was asked for."""
    return ({} if join is None else {"join": join}) | {"rows_skipped": reading.rows_skipped}


def _refuse_halves(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: half of a surrogate pair at character {error.start}; mend the row") from error
