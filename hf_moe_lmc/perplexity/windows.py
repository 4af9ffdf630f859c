"""Token-weighted negative log-likelihood of a causal language model on windows of text. Knows nothing of MoE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_lmc.errors import InputError

POSITIONS_AT_ONCE = 512  # rows of logits that are widened to float32 at a time
TOKENS_PER_BATCH = 4096  # default budget of one forward pass


@dataclass(frozen=True)
class Windows:
    """What every point of a path is evaluated on.

    Attributes:
        rows: token ids of each window, int64 [length <= context].
        documents: number of the document that each window comes from.
        context: tokens that a model sees at once, a BOS included.
        bos: whether each window starts with a BOS token.
        tokens_read: tokens of text in all windows; neither a BOS nor what overlapping windows read again counts.
        stride: tokens of text from the start of one window to that of the next; None: no overlap.
        context_only: predicted tokens at the start of each window that are not scored, since the window before has scored
            them; empty: none.
        bytes_scored: UTF-8 bytes of the scored text of each window, None where they cannot be known. They reach from the
            end of the last token before the scored ones to the end of the last scored one, so that nothing is counted twice
            and spaces that a tokenizer drops are counted with the token behind them.
        text_hash: SHA-256 of the documents that were read (each in UTF-8 behind its length, 8 bytes little-endian).
        tokenizer_hash: SHA-256 of the tokenizer, see `tokenizer_hash`.
    """

    rows: tuple[Tensor, ...]
    documents: tuple[int, ...]
    context: int
    bos: bool
    tokens_read: int
    stride: int | None = None
    context_only: tuple[int, ...] = ()
    bytes_scored: tuple[int, ...] | None = None
    text_hash: str | None = None
    tokenizer_hash: str | None = None

    @property
    def scored(self) -> Tensor:
        """Scored tokens of each window, float64 [window]: the predicted ones (all but its first) that no other scores."""
        predicted = torch.tensor([len(row) - 1 for row in self.rows], dtype=torch.float64)
        return predicted - torch.tensor(self.context_only, dtype=torch.float64) if self.context_only else predicted

    def sums(self, numbers: Sequence[int], losses: Tensor) -> Tensor:
        """Adds up what is scored in some windows of one length.

        Args:
            numbers: of the windows.
            losses: of their predicted tokens, float64 [window, length - 1], nats.

        Returns:
            float64 [window], nats.
        """
        if self.context_only:
            first = torch.tensor([self.context_only[i] for i in numbers], device=losses.device)
            losses = losses.masked_fill(torch.arange(losses.shape[1], device=losses.device) < first[:, None], 0.0)
        return losses.sum(dim=1)

    @property
    def convention_hash(self) -> str:
        """SHA-256 of all that a loss depends on besides the model: equal hashes, comparable losses."""
        convention = {
            "context": self.context,
            "stride": self.stride or self.context - self.bos,
            "bos": self.bos,
            "tokens_read": self.tokens_read,
            "text": self.text_hash,
            "tokenizer": self.tokenizer_hash,
        }
        return hashlib.sha256(json.dumps(convention, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row.numpy().tobytes() + b"|")
        return {
            "context": self.context,
            "stride": self.stride or self.context - self.bos,
            "bos": self.bos,
            "tokens_read": self.tokens_read,
            "tokens_scored": int(self.scored.sum()),
            "bytes_scored": None if self.bytes_scored is None else sum(self.bytes_scored),
            "windows": len(self.rows),
            "documents": len(set(self.documents)),
            "tokens_sha256": digest.hexdigest(),
            "text_hash": self.text_hash,
            "tokenizer_hash": self.tokenizer_hash,
            "convention_hash": self.convention_hash,
        }


def cut_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_tokens: int | None = None,
    stride: int | None = None,
) -> Windows:
    """Cuts each document into consecutive windows from its start: no padding, no window across documents.

    A BOS opens each window only if the tokenizer adds one by itself. A document's last window may be shorter; one that
    leaves nothing to predict is dropped. Windows do not overlap unless `stride` says so: then each starts `stride` tokens of
    text behind the one before and is scored only where that one ended, as in the perplexity recipe of transformers' docs
    (which weights all windows but the first as if they scored one token less; here weights are the tokens scored).

    Args:
        max_tokens: stop after so many tokens of text; None reads everything.
        stride: at most the tokens of text in a window; None: just those, no overlap.

    Raises:
        InputError: nothing to predict, or a stride that leaves gaps.
    """
    bos = _own_bos(tokenizer)
    width = context - len(bos)
    if width < 1 or context < 2:
        raise InputError(f"context {context}: expected at least {2 + len(bos)} tokens")
    step = width if stride is None else stride
    if not 1 <= step <= width:
        raise InputError(f"stride {step}: expected 1 to {width}, the tokens of text in a window")
    rows, owners, unscored, sizes, read = [], [], [], [], 0
    digest, sized = hashlib.sha256(), True
    for number, document in enumerate(documents):
        if max_tokens is not None and read >= max_tokens:
            break
        encoded = document.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        found = tokenizer(document, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        ids = found["input_ids"] if max_tokens is None else found["input_ids"][: max_tokens - read]
        ends = _byte_ends(document, found["offset_mapping"]) if tokenizer.is_fast else None
        sized = sized and ends is not None
        read += len(ids)
        done = 0  # tokens that windows have held
        for first in range(0, len(ids), step):
            last = min(first + width, len(ids))
            window = torch.tensor([*bos, *ids[first:last]])
            scores = min(last - done, len(window) - 1)
            if scores:
                rows.append(window)
                owners.append(number)
                unscored.append(len(window) - 1 - scores)
                sizes.append(ends[last - 1] - (ends[last - scores - 1] if last > scores else 0) if ends else 0)
            done = last
            if last == len(ids):
                break
    if not rows:
        raise InputError(f"the text holds {read} tokens: nothing to predict; give more text or a larger --max-tokens")
    return Windows(
        tuple(rows),
        tuple(owners),
        context,
        bool(bos),
        read,
        stride=step,
        context_only=tuple(unscored) if any(unscored) else (),
        bytes_scored=tuple(sizes) if sized else None,
        text_hash=digest.hexdigest(),
        tokenizer_hash=tokenizer_hash(tokenizer),
    )


def _byte_ends(document: str, offsets: Sequence[tuple[int, int]]) -> list[int] | None:
    """Where each token ends in the UTF-8 bytes of its document; None where the tokenizer does not say it plausibly.

    Tokens that share a character (bytes as tokens) all end behind it: its bytes count with the first of them.
    """
    ends, at, size = [], 0, 0
    for _, end in offsets:
        if end < at:
            return None
        size += len(document[at:end].encode())
        at = end
        ends.append(size)
    return ends if size or not document.strip() else None


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer does: of a fast one its whole definition, else class and vocabulary; its special tokens.

    Truncation and padding are left out: they are settings of the last call.
    """
    if tokenizer.is_fast:
        facts: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        facts.update(truncation=None, padding=None)
    else:
        facts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = sorted(tokenizer.special_tokens_map.items(), key=str)
    return hashlib.sha256(json.dumps([facts, special], sort_keys=True, default=str).encode()).hexdigest()


def _own_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer puts one in front by itself, else []."""
    bos = tokenizer.bos_token_id
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    return [bos] if bos is not None and with_special[:1] == [bos] and without[:1] != [bos] else []


def window_losses(
    model: PreTrainedModel, windows: Windows, *, batch_size: int, progress: Callable[[int], None] = lambda count: None
) -> Tensor:
    """Summed negative log-likelihood of the scored tokens of each window: float64 [window], nats.

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
            losses[batch] = windows.sums(batch, token_losses(logits, ids[:, 1:])).cpu()
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


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    context: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
