"""Folders of `save_to_disk` are datasets as others are: all rows, splits, slices; and what they lack is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Split

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.text import DatasetText, TextOptions

ROWS = [{"text": "first", "n": 1}, {"text": " ", "n": 2}, {"text": "third", "n": 3}]
MORE = [{"text": "fourth", "n": 4}]


@pytest.fixture
def one(tmp_path: Path) -> str:
    Dataset.from_list(ROWS, split=Split.TRAIN).save_to_disk(tmp_path / "one")
    return str(tmp_path / "one")


@pytest.fixture
def splits(tmp_path: Path) -> str:
    DatasetDict(train=Dataset.from_list(MORE), test=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    return str(tmp_path / "splits")


def documents(**options: str) -> list[str]:
    return list(TextOptions(**options).source().documents())


def test_one_dataset_is_read_whole(one: str) -> None:
    assert documents(dataset=one) == ["first", "third"]
    source = TextOptions(dataset=one).source()
    assert source == DatasetText(one, split=None) and source.describe()["split"] is None
    assert documents(dataset=one, join="|") == ["first| |third"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ({}, ["first", "third"]),
        ({"split": "train"}, ["fourth"]),
        ({"split": "test[2:]"}, ["third"]),
        ({"split": "test[:34%]"}, ["first"]),
        ({"split": "train+test[:1]"}, ["fourth", "first"]),
    ],
)
def test_splits_and_slices_are_those_of_other_datasets(splits: str, split: dict[str, str], expected: list[str]) -> None:
    assert documents(dataset=splits, **split) == expected


@pytest.mark.parametrize("split", ["nowhere", "test[", "nowhere[:2]", "test+nowhere"])
def test_a_split_that_is_not_there_is_named_with_those_that_are(splits: str, split: str) -> None:
    with pytest.raises(InputError, match=r"it has the splits train, test: choose with --split"):
        documents(dataset=splits, split=split)


def test_options_without_effect_are_refused(one: str, splits: str) -> None:
    with pytest.raises(InputError, match=r"--split would have no effect: .*one holds one dataset without splits"):
        documents(dataset=one, split="train")
    for folder in (one, splits):
        with pytest.raises(InputError, match=r"--dataset-config would have no effect: .* written by save_to_disk"):
            documents(dataset=folder, dataset_config="c")
        with pytest.raises(InputError, match="found columns text, n"):
            documents(dataset=folder, column="body")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: next(folder.glob("*.arrow")).unlink(),
        lambda folder: next(folder.glob("*.arrow")).write_bytes(b"junk"),
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "dataset_info.json").unlink(),
    ],
)
def test_a_damaged_folder_is_refused(one: str, damage: Callable[[Path], object]) -> None:
    damage(Path(one))
    with pytest.raises(InputError, match=f"dataset {one}"):
        documents(dataset=one)
