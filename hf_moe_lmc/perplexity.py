"""Token-weighted negative log-likelihood of a causal language model on windows of text. Knows nothing of MoE."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_lmc.errors import InputError

POSITIONS_AT_ONCE = 512  # rows of logits that are widened to float32 at a time
TOKENS_PER_BATCH = 4096  # default budget of one forward pass


class Text(Protocol):
    """Documents to evaluate on, and what a report says of them."""

    def documents(self) -> Iterator[str]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 files; each is one document."""

    paths: tuple[Path, ...]

    @classmethod
    def of(cls, paths: Sequence[str | os.PathLike[str]]) -> TextFiles:
        """Raises InputError where one is missing, is no text or is empty."""
        files = cls(tuple(Path(path) for path in paths))
        for path in files.paths:
            if not path.is_file():
                raise InputError(f"{path}: no such text file")
        for path, text in zip(files.paths, files.documents(), strict=True):
            if not text.strip():
                raise InputError(f"{path}: the text file is empty")
        return files

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: not UTF-8 text ({error})") from error

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "files",
            "files": [{"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in self.paths],
        }


@dataclass(frozen=True)
class DatasetText:
    """One column of a dataset on the Hub or in a folder, as `datasets.load_dataset` takes it; each row is one document."""

    name: str
    config: str | None = None
    split: str = "test"
    column: str = "text"

    def documents(self) -> Iterator[str]:
        """Raises InputError where there is no such dataset, configuration, split or column."""
        from datasets import load_dataset  # slow to import, and text files need none of it
        from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

        try:
            # slices such as train[:100] exist only without streaming
            rows = load_dataset(self.name, self.config, split=self.split, streaming="[" not in self.split)
            yield from self._texts(rows)
        except (DatasetNotFoundError, DatasetGenerationError, FileNotFoundError, ValueError) as error:
            raise InputError(f"dataset {self.name}, config {self.config}, split {self.split}: {error}") from error

    def _texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        for row in rows:
            if not isinstance(row.get(self.column), str):
                raise InputError(
                    f"dataset {self.name}: expected text in column {self.column!r}, "
                    f"found columns {', '.join(row)}; see --column"
                )
            if row[self.column].strip():
                yield row[self.column]

    def describe(self) -> dict[str, Any]:
        return {"kind": "dataset", "name": self.name, "config": self.config, "split": self.split, "column": self.column}


@dataclass(frozen=True)
class Windows:
    """What every point of a path is evaluated on.

    Attributes:
        rows: token ids of each window, int64 [length <= context].
        documents: number of the document that each window comes from.
        context: tokens that a model sees at once, a BOS included.
        bos: whether each window starts with a BOS token.
        tokens_read: tokens of text in all windows; a BOS is not read.
    """

    rows: tuple[Tensor, ...]
    documents: tuple[int, ...]
    context: int
    bos: bool
    tokens_read: int

    @property
    def scored(self) -> Tensor:
        """Predicted tokens of each window, float64 [window]: all but its first."""
        return torch.tensor([len(row) - 1 for row in self.rows], dtype=torch.float64)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row.numpy().tobytes() + b"|")
        return {
            "context": self.context,
            "stride": self.context - self.bos,
            "bos": self.bos,
            "tokens_read": self.tokens_read,
            "tokens_scored": int(self.scored.sum()),
            "windows": len(self.rows),
            "documents": len(set(self.documents)),
            "tokens_sha256": digest.hexdigest(),
        }


def cut_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, context: int, max_tokens: int | None = None
) -> Windows:
    """Cuts each document into consecutive windows from its start: no overlap, no padding, no window across documents.

    A BOS opens each window only if the tokenizer adds one by itself. A document's last window may be shorter; one that
    leaves nothing to predict is dropped.

    Args:
        max_tokens: stop after so many tokens of text; None reads everything.

    Raises:
        InputError: nothing to predict.
    """
    bos = _own_bos(tokenizer)
    step = context - len(bos)
    if step < 1 or context < 2:
        raise InputError(f"context {context}: expected at least {2 + len(bos)} tokens")
    rows, owners, read = [], [], 0
    for number, document in enumerate(documents):
        if max_tokens is not None and read >= max_tokens:
            break
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids if max_tokens is None else ids[: max_tokens - read]
        read += len(ids)
        for first in range(0, len(ids), step):
            window = torch.tensor([*bos, *ids[first : first + step]])
            if len(window) > 1:
                rows.append(window)
                owners.append(number)
    if not rows:
        raise InputError(f"the text holds {read} tokens: nothing to predict; give more text or a larger --max-tokens")
    return Windows(tuple(rows), tuple(owners), context, bool(bos), read)


def _own_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer puts one in front by itself, else []."""
    bos = tokenizer.bos_token_id
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    return [bos] if bos is not None and with_special[:1] == [bos] and without[:1] != [bos] else []


def window_losses(
    model: PreTrainedModel, windows: Windows, *, batch_size: int, progress: Callable[[int], None] = lambda count: None
) -> Tensor:
    """Summed negative log-likelihood of each window: float64 [window], nats.

    Windows of equal length go through the model together, so nothing is padded; logits are taken to float32, sums are
    kept in float64.

    Args:
        progress: called with the number of windows of each batch once it is done.
    """
    losses = torch.empty(len(windows.rows), dtype=torch.float64)
    device = next(parameter.device for parameter in model.get_input_embeddings().parameters())
    device = torch.device("cpu") if device.type == "meta" else device  # offloaded: hooks move the inputs
    for batch in batches_of(windows.rows, batch_size):
        ids = torch.stack([windows.rows[i] for i in batch]).to(device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            losses[batch] = token_losses(logits, ids[:, 1:]).sum(dim=1).cpu()
        progress(len(batch))
    return losses


def batches_of(rows: Sequence[Tensor], batch_size: int) -> list[list[int]]:
    """Numbers of windows of equal length, so many that one forward takes them together."""
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    return [same[first : first + batch_size] for same in by_length.values() for first in range(0, len(same), batch_size)]


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each token: logits [batch, token, vocabulary], targets [batch, token] -> float64 [batch, token]."""
    targets = targets.to(logits.device)
    parts = [
        torch.nn.functional.cross_entropy(
            logits[:, first : first + POSITIONS_AT_ONCE].float().transpose(1, 2),
            targets[:, first : first + POSITIONS_AT_ONCE],
            reduction="none",
        ).double()
        for first in range(0, logits.shape[1], POSITIONS_AT_ONCE)
    ]
    return torch.cat(parts, dim=1)
