"""Data: images and text that every machine has, and the paper's own data sets through `datasets`.

`digits` ships with scikit-learn, `docs` with Python. MNIST, CIFAR-10, CIFAR-100, ImageNet-style folders, WikiText-103 and
One Billion Word are read from the Hub, or from a local copy in the Hub's layout. Text that is trained on and text that is
evaluated on share no window of WINDOW tokens; what training text shared is cut out, and `Text.proof` says how much.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_moe_lmc.example.protocol import VOCABULARY, standard_library_text, token_stream, train_tokenizer
from hf_moe_lmc.perplexity.overlap import Hashes, hashes_in_a_row
from hf_moe_lmc.runtime.progress import quiet_datasets, silenced

WINDOW = 16  # tokens; no window of so many stands in both texts


@dataclass(frozen=True)
class Images:
    """Images with labels, split.

    Attributes:
        train, test: float32 [image, channel, row, column], normalised by the mean and deviation of `train`.
        train_labels, test_labels: int64 [image].
        facts: what it is, in JSON's types.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Text:
    """Tokens, split.

    Attributes:
        train: int64 [token].
        test: int64 [window, token], windows without overlap.
        proof: of `proof_of_no_overlap`, with what was cut out before.
        facts: what it is, in JSON's types.
    """

    train: Tensor
    test: Tensor
    vocabulary: int
    proof: dict[str, int]
    facts: dict[str, Any]


@dataclass(frozen=True)
class HubImages:
    """Where a data set of images stands on the Hub, and how its columns are called."""

    path: str
    config: str | None
    image: str
    label: str
    test: str = "test"


@dataclass(frozen=True)
class HubText:
    """Where a data set of text stands on the Hub, and how its column is called; `join` is put between its rows."""

    path: str
    config: str | None
    column: str = "text"
    test: str = "test"
    join: str = "\n"


IMAGES = {
    "mnist": HubImages("ylecun/mnist", "mnist", "image", "label"),
    "cifar10": HubImages("uoft-cs/cifar10", "plain_text", "img", "label"),
    "cifar100": HubImages("uoft-cs/cifar100", "cifar100", "img", "fine_label"),
    "imagefolder": HubImages("imagefolder", None, "image", "label", "validation"),
}
TEXTS = {
    "wikitext103": HubText("Salesforce/wikitext", "wikitext-103-raw-v1", join=""),
    "lm1b": HubText("dvruette/lm1b", None),
}
VISION_NAMES, TEXT_NAMES = ("digits", *IMAGES), ("docs", *TEXTS)


def load_images(name: str, *, folder: str | None = None, size: int | None = None, most: int | None = None) -> Images:
    """The images of a data set.

    Args:
        folder: a local copy in the Hub's layout; for `imagefolder`, the folder with train/ and validation/.
        size: rows and columns to bring the images to; None: those that they have.
        most: images to take of each split, the first ones.
    """
    if name == "digits":
        return _digits()
    known = IMAGES[name]
    if name == "imagefolder" and folder is None:
        raise SystemExit("imagefolder: name its folder: imagefolder=FOLDER, with train/CLASS/* and validation/CLASS/* in it")
    train, test = (_hub_images(known, split, folder, size, most) for split in ("train", known.test))
    where = {"source": folder or known.path, "size": size}
    return _images(name, train, test, where)


def _digits() -> Images:
    """1,797 images of 8 x 8; the last quarter, which other people wrote for the most part, is for evaluation."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, labels = torch.from_numpy(found.images)[:, None] / 16, torch.from_numpy(found.target).long()
    cut = len(labels) * 3 // 4
    return _images("digits", (pixels[:cut], labels[:cut]), (pixels[cut:], labels[cut:]), {"source": "scikit-learn"})


def _hub_images(known: HubImages, split: str, folder: str | None, size: int | None, most: int | None) -> tuple[Tensor, Tensor]:
    from datasets import load_dataset

    with quiet_datasets():
        if known.path == "imagefolder":
            rows = load_dataset("imagefolder", data_dir=folder, split=split)
        else:
            rows = load_dataset(folder or known.path, known.config, split=split)
    if missing := {known.image, known.label} - set(rows.column_names):
        raise SystemExit(
            f"{folder or known.path}: no column {', '.join(sorted(missing))}; found {', '.join(rows.column_names)}"
        )
    rows = rows.select(range(min(len(rows), most or len(rows))))
    grey = known.path == "ylecun/mnist"
    pictures, labels = [], []
    for row in rows:
        picture = row[known.image].convert("L" if grey else "RGB")
        pictures.append(np.asarray(picture if size is None else picture.resize((size, size)), dtype=np.float32))
        labels.append(row[known.label])
    shapes = {picture.shape for picture in pictures}
    if len(shapes) != 1:
        raise SystemExit(f"{folder or known.path}: images of {len(shapes)} sizes; give one with --image-size")
    pixels = torch.from_numpy(np.stack(pictures)) / 255
    return (pixels[:, None] if grey else pixels.permute(0, 3, 1, 2)), torch.tensor(labels)


def _images(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], facts: dict[str, Any]) -> Images:
    """Normalised, without training images that stand in the test split as well."""
    tested = {image.numpy().tobytes() for image in test[0]}
    kept = torch.tensor([image.numpy().tobytes() not in tested for image in train[0]])
    pixels, labels = train[0][kept].float(), train[1][kept]
    mean = pixels.mean(dim=(0, 2, 3), keepdim=True)
    deviation = pixels.std(dim=(0, 2, 3), keepdim=True)
    classes = int(max(labels.max(), test[1].max())) + 1
    return Images(
        train=((pixels - mean) / deviation).contiguous(),
        train_labels=labels,
        test=((test[0].float() - mean) / deviation).contiguous(),
        test_labels=test[1],
        classes=classes,
        facts={
            "name": name, **facts, "shape": list(pixels.shape[1:]), "classes": classes,
            "train_images": len(labels), "test_images": len(test[1]),
            "training_images_left_out_because_tested": int((~kept).sum()),
        },
    )  # fmt: skip


def load_text(
    name: str, *, folder: str | None = None, window: int = 64, test_tokens: int = 8192, most: int = 4_000_000
) -> Text:
    """The tokens of a text, by a byte-level BPE tokenizer that is trained on the training part.

    Args:
        folder: a local copy in the Hub's layout.
        window: tokens of a window that is evaluated.
        test_tokens: tokens to evaluate on, at most.
        most: tokens to train on, at most; about four times as many characters are read.
    """
    if name == "docs":
        with silenced():
            corpus = standard_library_text()
        train, test = list(corpus.train), list(corpus.held_out)
        source = f"documentation of Python {platform.python_version()}'s standard library"
    else:
        known = TEXTS[name]
        train = _hub_text(known, "train", folder, 4 * most)
        test = _hub_text(known, known.test, folder, 16 * test_tokens)
        source = folder or known.path
    tokenizer = train_tokenizer(train[: max(1, 4_000_000 // max(1, len(train[0])))] if name != "docs" else train)
    stream, tested = token_stream(tokenizer, train)[:most], token_stream(tokenizer, test)
    windows = tested[: min(test_tokens, len(tested)) // window * window].view(-1, window)
    clean, cut = without_shared_windows(stream, windows.flatten(), int(tokenizer.eos_token_id))
    return Text(
        train=clean,
        test=windows,
        vocabulary=VOCABULARY,
        proof={**proof_of_no_overlap(clean, windows.flatten()), "training_tokens_cut_out": cut},
        facts={
            "name": name, "source": source, "documents": len(train), "train_tokens": len(clean),
            "test_tokens": windows.numel(), "window": window, "vocabulary": VOCABULARY,
        },
    )  # fmt: skip


def _hub_text(known: HubText, split: str, folder: str | None, characters: int) -> list[str]:
    """The rows of a split, joined to documents of about 20,000 characters, as many as asked for."""
    from datasets import load_dataset

    with quiet_datasets():
        rows = load_dataset(folder or known.path, known.config, split=split, streaming=True)
    documents, part, read = list[str](), list[str](), 0
    for row in rows:
        if known.column not in row:
            raise SystemExit(f"{folder or known.path}: no column {known.column}; found {', '.join(row)}")
        part.append(row[known.column])
        if sum(map(len, part)) > 20_000:
            documents.append(known.join.join(part))
            read += len(documents[-1])
            part = []
        if read > characters:
            break
    documents += [known.join.join(part)] if part else []
    return [document for document in documents if document.strip()]


def hashes(tokens: Tensor) -> Hashes:
    """A hash of each window of WINDOW tokens, uint64 [window]; equal windows have equal hashes."""
    return hashes_in_a_row(tokens.long().numpy(), WINDOW)


def shared(tokens: Tensor, others: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which windows of `tokens` stand somewhere in `others`, bool [window]. A chance collision of hashes counts as one."""
    found: np.ndarray[Any, np.dtype[np.bool_]] = np.isin(hashes(tokens), hashes(others))
    return found


def without_shared_windows(train: Tensor, test: Tensor, end_of_text: int) -> tuple[Tensor, int]:
    """Training tokens without the windows that stand in `test`, and how many tokens were cut out.

    Each run that goes is replaced by one end of text, so that what stood around it makes no new text.
    """
    before = len(train)
    while (found := shared(train, test)).any():
        covered = np.zeros(len(train), dtype=bool)
        for place in range(WINDOW):
            covered[place : place + len(found)] |= found
        opens = covered & ~np.concatenate([[False], covered[:-1]])
        values = train.numpy().copy()
        values[opens] = end_of_text
        train = torch.from_numpy(values[~covered | opens])
    return train, before - len(train)


def proof_of_no_overlap(train: Tensor, test: Tensor) -> dict[str, int]:
    """What was compared, and how many windows of `test` stand in `train`."""
    return {
        "window": WINDOW,
        "training_windows": len(hashes(train)),
        "test_windows": len(hashes(test)),
        "shared_windows": int(shared(test, train).sum()),
    }


def save(data: Images | Text, path: Path) -> None:
    """Writes what `restore` reads, so that it is prepared once for all processes."""
    part = path.with_suffix(".part")
    torch.save(vars(data), part)
    part.replace(path)


def restore(path: Path) -> Images | Text:
    found = torch.load(path, weights_only=True)
    return Text(**found) if "vocabulary" in found else Images(**found)


def batches(data: Images | Text, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Random training batches without end, inputs and labels: `size` images, or so many windows of a text."""
    if isinstance(data, Images):
        while True:
            chosen = torch.randint(len(data.train), (size,), generator=generator)
            yield data.train[chosen], data.train_labels[chosen]
    length = data.test.shape[1]
    while True:
        starts = torch.randint(len(data.train) - length, (size, 1), generator=generator)
        rows = data.train[starts + torch.arange(length)]
        yield rows, rows


def parsed(given: Sequence[str], known: Iterable[str]) -> dict[str, str | None]:
    """NAME or NAME=FOLDER, several: the folder of each name.

    Raises:
        SystemExit: an unknown name.
    """
    found = {name: folder or None for name, _, folder in (one.partition("=") for one in given)}
    if unknown := found.keys() - set(known):
        raise SystemExit(f"unknown data {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return found
