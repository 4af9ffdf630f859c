"""Datasets in a folder, as `save_to_disk` of the library datasets writes them: one dataset, or several splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_moe_lmc.errors import InputError, worded

ONE, SPLITS = "state.json", "dataset_dict.json"  # what marks the folder of a Dataset, and of a DatasetDict


def is_one(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder: rows without a choice of splits."""
    return (folder / ONE).is_file()


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder.

    Example:
        >>> is_saved(Path("data.jsonl"))
        False
    """
    return is_one(folder) or (folder / SPLITS).is_file()


def load_saved(folder: Path, split: str | None) -> Any:
    """The rows of a saved dataset, a `datasets.Dataset`, which reads them from disk when they are asked for.

    Args:
        split: of a DatasetDict, such as `test`, `train[:100]` or `train+test`; None for the folder of one Dataset.

    Raises:
        InputError: there is no such split.

    Example:
        >>> from datasets import Dataset, DatasetDict
        >>> DatasetDict(test=Dataset.from_dict({"text": ["one", "two", "three"]})).save_to_disk("saved")  # doctest: +SKIP
        >>> load_saved(Path("saved"), "test[1:]")["text"][:]  # doctest: +SKIP
        ['two', 'three']
    """
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets, load_from_disk

    found = load_from_disk(str(folder))
    if not isinstance(found, DatasetDict):
        return found
    lengths = {name: len(rows) for name, rows in found.items()}
    try:
        wanted = ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise InputError(
            f"dataset {folder}: no split or slice {worded(split)}; it has the splits {', '.join(lengths)}: choose with --split"
        ) from error
    return concatenate_datasets([found[part.splitname].select(range(part.from_, part.to)) for part in wanted])
