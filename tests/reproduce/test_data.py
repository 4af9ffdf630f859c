"""The proof that texts are apart, with a planted overlap; and real data sets, in small local copies of the Hub's layout."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")


@pytest.fixture
def data(reproduce: dict[str, ModuleType]) -> ModuleType:
    return reproduce["data"]


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 1000, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [15, 16, 40])
def test_a_planted_overlap_is_found_and_cut_out(data: ModuleType, length: int) -> None:
    train, test = tokens(5000, 1), tokens(600, 2)
    assert data.proof_of_no_overlap(train, test)["shared_windows"] == 0
    train[1000 : 1000 + length] = test[100 : 100 + length]
    found = max(0, length - data.WINDOW + 1)
    assert data.proof_of_no_overlap(train, test)["shared_windows"] == found
    clean, cut = data.without_shared_windows(train, test, end_of_text=0)
    assert data.proof_of_no_overlap(clean, test)["shared_windows"] == 0
    assert cut == (length - 1 if found else 0) and len(clean) == 5000 - cut


def test_what_is_cut_out_leaves_no_new_text(data: ModuleType) -> None:
    test = tokens(64, 3)
    train = torch.cat([test[:10], test[20:40], test[10:40], tokens(100, 4)])  # once the middle is gone, the ends would join
    clean, _ = data.without_shared_windows(train, test, end_of_text=0)
    assert not data.shared(clean, test).any() and len(clean) >= 100


def test_digits_are_split(data: ModuleType) -> None:
    found = data.load_images("digits")
    assert found.train.shape[1:] == (1, 8, 8) and found.classes == 10 and len(found.train) + len(found.test) <= 1797
    assert set(found.test_labels.tolist()) == set(range(10)) and abs(float(found.train.mean())) < 1e-4
    tested = {image.numpy().tobytes() for image in found.test}
    assert not [image for image in found.train if image.numpy().tobytes() in tested]


def pictures(count: int, size: int, channels: int, seed: int) -> list[Image.Image]:
    shape = (count, size, size) if channels == 1 else (count, size, size, 3)
    return [Image.fromarray(pixels) for pixels in np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)]


def repository(folder: Path, config: str, splits: dict[str, Any]) -> Path:
    """A data set as the Hub lays it out: parquet files of a configuration, and a card that names them."""
    (folder / config).mkdir(parents=True)
    names = {}
    for split, rows in splits.items():
        names[split] = f"{config}/{split}-00000-of-00001.parquet"
        rows.to_parquet(str(folder / names[split]))
    files = "".join(f"  - split: {split}\n    path: {name}\n" for split, name in names.items())
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(("name", "size", "channels"), [("mnist", 28, 1), ("cifar10", 32, 3), ("cifar100", 32, 3)])
def test_images_of_the_hub(data: ModuleType, tmp_path: Path, name: str, size: int, channels: int) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Picture

    known, splits = data.IMAGES[name], {}
    more = {"coarse_label": ClassLabel(num_classes=20)} if name == "cifar100" else {}
    features = Features({known.image: Picture(), known.label: ClassLabel(num_classes=10), **more})
    for seed, (split, count) in enumerate((("train", 12), ("test", 6))):
        rows = {known.image: pictures(count, size, channels, seed), known.label: [i % 10 for i in range(count)]}
        if split == "train":
            rows[known.image][3] = pictures(6, size, channels, 1)[2]  # it stands in the test split
        splits[split] = Dataset.from_dict({**rows, **{key: [0] * count for key in more}}, features=features)
    found = data.load_images(name, folder=str(repository(tmp_path / name, known.config, splits)))
    assert found.train.shape == (11, channels, size, size) and found.test.shape == (6, channels, size, size)
    assert found.facts["training_images_left_out_because_tested"] == 1 and found.train_labels.tolist()[:3] == [0, 1, 2]
    smaller = data.load_images(name, folder=str(tmp_path / name), size=8, most=4)
    assert smaller.train.shape[2:] == (8, 8) and len(smaller.test) == 4


def test_a_folder_of_images(data: ModuleType, tmp_path: Path) -> None:
    for split, count in (("train", 4), ("validation", 2)):
        for number, kind in enumerate(("n01440764", "n01443537")):
            (tmp_path / split / kind).mkdir(parents=True)
            for i, picture in enumerate(pictures(count, 20 + 2 * number, 3, hash_of(split, kind))):
                picture.save(tmp_path / split / kind / f"{i}.png")
    found = data.load_images("imagefolder", folder=str(tmp_path), size=16)
    assert found.train.shape == (8, 3, 16, 16) and found.test.shape == (4, 3, 16, 16) and found.classes == 2
    with pytest.raises(SystemExit, match="--image-size"):
        data.load_images("imagefolder", folder=str(tmp_path))
    with pytest.raises(SystemExit, match="name its folder"):
        data.load_images("imagefolder")


def hash_of(split: str, kind: str) -> int:
    return sum(map(ord, split + kind))


@pytest.mark.parametrize("name", ["wikitext103", "lm1b"])
def test_text_of_the_hub(data: ModuleType, tmp_path: Path, name: str) -> None:
    from datasets import Dataset

    known, generator = data.TEXTS[name], np.random.default_rng(0)
    words = [f"word{i}" for i in range(400)]

    def lines(count: int) -> list[str]:
        return [" ".join(generator.choice(words, 12)) + (" \n" if name == "wikitext103" else "") for _ in range(count)]

    train, test = lines(300), lines(60)
    train[7:9] = test[5:7]  # a planted overlap
    splits = {"train": Dataset.from_dict({"text": train}), "test": Dataset.from_dict({"text": test})}
    folder = repository(tmp_path / name, known.config or "default", splits)
    found = data.load_text(name, folder=str(folder), window=32, test_tokens=512)
    assert found.test.shape[1] == 32 and found.proof["shared_windows"] == 0 < found.proof["training_tokens_cut_out"]
    assert found.proof["training_windows"] > 1000 and found.facts["source"] == str(folder)
    with pytest.raises(SystemExit, match="no column text"):
        bad = {"train": Dataset.from_dict({"line": train}), "test": Dataset.from_dict({"line": test})}
        data.load_text(name, folder=str(repository(tmp_path / "other", known.config or "default", bad)))


def test_data_that_is_not_known_is_refused(data: ModuleType) -> None:
    assert data.parsed(["docs", "lm1b=/there"], data.TEXT_NAMES) == {"docs": None, "lm1b": "/there"}
    with pytest.raises(SystemExit, match="unknown data enwik8; known: docs"):
        data.parsed(["enwik8"], data.TEXT_NAMES)


def test_what_is_prepared_is_restored(data: ModuleType, tmp_path: Path) -> None:
    images = data.load_images("digits")
    data.save(images, tmp_path / "digits.pt")
    assert torch.equal(data.restore(tmp_path / "digits.pt").test, images.test)
