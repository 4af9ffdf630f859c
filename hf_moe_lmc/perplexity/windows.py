"""Windows of text, and the losses of a causal language model on them. Knows nothing of MoE.

Losses are negative log-likelihoods in nats; means over them are weighted by token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.documents import Document
from hf_moe_lmc.perplexity.scores import token_losses
from hf_moe_lmc.perplexity.tokens import Tokens, first_tokens, own_bos, tokenizer_hash

TOKENS_PER_BATCH = 4096  # default budget of one forward pass
TEXT = "text"  # name of a text that has none


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How text is cut into windows. None stands for an option that was not given.

    Attributes:
        context: tokens that a model sees at once, a BOS included; by default the model decides.
        stride: tokens of text between the starts of windows, which then overlap; by default they do not.
        max_tokens: tokens to read of each text, by default all.

    Raises:
        InputError: a number out of range.

    Example:
        >>> WindowOptions(context=1024, stride=512)
        WindowOptions(context=1024, stride=512, max_tokens=None)
        >>> WindowOptions(context=1)
        Traceback (most recent call last):
        hf_moe_lmc.errors.InputError: context 1: expected at least 2
    """

    context: int | None = None
    stride: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("context", 2), ("stride", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name.replace('_', '-')} {value}: expected at least {least}")


@dataclass(frozen=True)
class Windows:
    """What every point of a path is evaluated on.

    Attributes:
        rows: token ids of each window, int64 [length], at most `context` of them.
        documents: number of the document that each window comes from.
        context: tokens that a model sees at once, a BOS included.
        bos: whether each window starts with a BOS token.
        tokens_read: tokens of text in all windows. Neither a BOS nor what overlapping windows repeat counts.
        stride: tokens of text from the start of one window to that of the next; None: no overlap.
        context_only: predicted tokens at the start of each window that are not scored, because the window before has scored
            them; empty: none.
        bytes_scored: UTF-8 bytes of the scored text of each window; None where they cannot be known. They reach from the
            end of the last token before the scored ones to the end of the last scored one. So nothing counts twice, and
            spaces that a tokenizer drops count with the token behind them.
        text_hash: SHA-256 of the documents that were read: each as its length (8 bytes, little-endian) and its UTF-8 bytes. Of
            a long document that a token budget ends, what was read of it counts.
        tokenizer_hash: SHA-256 of the tokenizer, see `tokenizer_hash`.
        read_in_part: documents of which `text_hash` covers a beginning alone.
        ended: (number, tokens read) of each document that a token budget ended, but for the last of all: there `tokens_read`
            tells it.
        texts: name of the text that each window comes from; empty: all from one, named TEXT.

    Example:
        >>> windows = Windows((torch.arange(5), torch.arange(3)), (0, 0), context=5, bos=False, tokens_read=8)
        >>> windows.scored.tolist()  # all tokens but the first of each window are predicted
        [4.0, 2.0]
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
    read_in_part: int = 0
    ended: tuple[tuple[int, int], ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def text_of(self) -> tuple[str, ...]:
        """Name of the text that each window comes from."""
        return self.texts or (TEXT,) * len(self.rows)

    @property
    def scored(self) -> Tensor:
        """Scored tokens of each window, float64 [window]: the predicted ones that no other window scores."""
        predicted = torch.tensor([len(row) - 1 for row in self.rows], dtype=torch.float64)
        return predicted - torch.tensor(self.context_only, dtype=torch.float64) if self.context_only else predicted

    def sums(self, numbers: Sequence[int], values: Tensor) -> Tensor:
        """Sums over the scored tokens of some windows of one length.

        Args:
            numbers: of the windows.
            values: of their predicted tokens, float64 [window, length - 1]: losses in nats, say.

        Returns:
            float64 [window].
        """
        if self.context_only:
            first = torch.tensor([self.context_only[i] for i in numbers], device=values.device)
            values = values.masked_fill(torch.arange(values.shape[1], device=values.device) < first[:, None], 0.0)
        return values.sum(dim=1)

    def new_ids(self) -> list[list[int]]:
        """Token ids of the text of each window: without a BOS, and without what it repeats of the window before.

        Example:
            >>> rows = (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 3, 4]))
            >>> Windows(rows, (0, 0), context=4, bos=True, tokens_read=4, stride=1, context_only=(0, 2)).new_ids()
            [[1, 2, 3], [4]]
        """
        width = self.context - self.bos
        repeated = width - (self.stride or width)
        before = [None, *self.documents[:-1]]
        return [
            row[int(self.bos) + (repeated if owner == last else 0) :].tolist()
            for row, owner, last in zip(self.rows, self.documents, before, strict=True)
        ]

    @property
    def convention_hash(self) -> str:
        """SHA-256 of everything but the model that a loss depends on. Losses with equal hashes can be compared."""
        convention = {
            "context": self.context,
            "stride": self.stride or self.context - self.bos,
            "bos": self.bos,
            "tokens_read": self.tokens_read,
            "text": self.text_hash,
            "tokenizer": self.tokenizer_hash,
            **({"ended": self.ended} if self.ended else {}),
        }
        return hashlib.sha256(json.dumps(convention, sort_keys=True).encode()).hexdigest()

    def _by_text(self) -> dict[str, dict[str, int]]:
        """Scored tokens, windows and documents of each text."""
        scored, found = self.scored.int().tolist(), {}
        for name in dict.fromkeys(self.text_of):
            own = [i for i, text in enumerate(self.text_of) if text == name]
            found[name] = {
                "tokens_scored": sum(scored[i] for i in own),
                "windows": len(own),
                "documents": len({self.documents[i] for i in own}),
            }
        return found

    def describe(self) -> dict[str, Any]:
        """The part of `evaluation` in report.json that concerns windows."""
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
            "texts": self._by_text(),
            "tokens_sha256": digest.hexdigest(),
            "text_hash": self.text_hash,
            "tokenizer_hash": self.tokenizer_hash,
            "convention_hash": self.convention_hash,
            **({"read_in_part": self.read_in_part} if self.read_in_part else {}),
        }


class _Window(NamedTuple):
    """One window as it is cut.

    Attributes:
        row: token ids, int64 [length].
        context_only: predicted tokens that are not scored.
        bytes_scored: 0 where they are not known.
    """

    row: Tensor
    document: int
    context_only: int
    bytes_scored: int


def cut_windows(
    documents: Iterable[str | Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_tokens: int | None = None,
    stride: int | None = None,
) -> Windows:
    """Cuts each document into consecutive windows from its start: no padding, no window across documents.

    A BOS opens each window only if the tokenizer adds one by itself. The last window of a document may be shorter; it is
    dropped where it leaves nothing to predict.

    Windows do not overlap without `stride`. With it, each starts `stride` tokens of text behind the one before, and is scored
    only where that one ended: the perplexity recipe of transformers' documentation. That recipe takes the weight of all
    windows but the first one token too small; here weights are the scored tokens.

    Args:
        context: tokens in a window, a BOS included.
        max_tokens: tokens of text to read; None: all. No more text is read than these need.
        stride: at most the tokens of text in a window; None: just these, so that nothing overlaps.

    Raises:
        InputError: nothing to predict, or a stride that leaves gaps.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate("abcdefg")}, merges=[]))
        >>> windows = cut_windows(["abcdefg"], PreTrainedTokenizerFast(tokenizer_object=letters), context=4, stride=2)
        >>> [row.tolist() for row in windows.rows]
        [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6]]
        >>> windows.scored.tolist()
        [3.0, 2.0, 1.0]
    """
    return cut_texts([documents], tokenizer, context=context, max_tokens=max_tokens, stride=stride, names=(TEXT,))


def cut_texts(
    texts: Iterable[Iterable[str | Document]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_tokens: int | None = None,
    stride: int | None = None,
    names: Sequence[str] | None = None,
) -> Windows:
    """As `cut_windows`, for several texts of several documents: `max_tokens` counts for each text.

    Documents are numbered through all texts.

    Args:
        names: of the texts; by default their numbers, from 1.

    Raises:
        InputError: as `cut_windows`, also where a single text leaves nothing to predict.
    """
    bos = own_bos(tokenizer)
    width = context - len(bos)
    if width < 1 or context < 2:
        raise InputError(f"context {context}: expected at least {2 + len(bos)} tokens")
    step = width if stride is None else stride
    if not 1 <= step <= width:
        raise InputError(f"stride {step}: expected 1 to {width}, the tokens of text in a window")
    windows: list[_Window] = []
    of_texts: list[str] = []
    read = _Read()
    for name, text in zip(map(str, count(1)) if names is None else names, texts, strict=names is not None):
        left, before, windows_before = max_tokens, len(read.tokens), len(windows)
        for document in text:
            found = first_tokens(document if isinstance(document, Document) else Document([document]), tokenizer, left)
            windows += _windows_of(len(read.tokens), found.ids, found.ends, bos, width, step)
            read.add(found)
            left = None if left is None else left - len(found.ids)
            if left is not None and left <= 0:
                break
        of_texts += [name] * (len(windows) - windows_before)
        if len(windows) == windows_before:
            which = "" if names is None or len(names) == 1 else f" {name}"
            tokens = sum(read.tokens[before:])
            raise InputError(
                f"the text{which} holds {tokens} tokens: nothing to predict; give more text or a larger --max-tokens"
            )
    rows, owners, context_only, bytes_scored = zip(*windows, strict=True)
    return Windows(
        rows,
        owners,
        context,
        bool(bos),
        sum(read.tokens),
        stride=step,
        context_only=context_only if any(context_only) else (),
        bytes_scored=bytes_scored if read.bytes_known else None,
        text_hash=read.digest.hexdigest(),
        tokenizer_hash=tokenizer_hash(tokenizer),
        read_in_part=read.in_part,
        ended=read.ended,
        texts=tuple(of_texts),
    )


@dataclass
class _Read:
    """What was read of all documents.

    Attributes:
        tokens: of each document.
        cut: whether a budget ended each document.
        in_part: documents whose end was not read.
    """

    tokens: list[int] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)
    in_part: int = 0
    bytes_known: bool = True
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, found: Tokens) -> None:
        encoded = found.text.encode()
        self.digest.update(len(encoded).to_bytes(8, "little") + encoded)
        self.bytes_known = self.bytes_known and found.ends is not None
        self.tokens.append(len(found.ids))
        self.cut.append(found.left)
        self.in_part += not found.whole

    @property
    def ended(self) -> tuple[tuple[int, int], ...]:
        numbers = range(len(self.tokens) - 1)
        return tuple((number, self.tokens[number]) for number in numbers if self.cut[number])


def _windows_of(
    document: int, ids: Sequence[int], ends: Sequence[int] | None, bos: list[int], width: int, step: int
) -> Iterator[_Window]:
    """The windows of one document.

    Args:
        ids: its tokens.
        ends: where they end in its UTF-8 bytes.
        width: tokens of text in a window.
        step: tokens of text from the start of one window to that of the next.
    """
    end_before = 0  # of the window before, in tokens
    for first in range(0, len(ids), step):
        last = min(first + width, len(ids))
        row = torch.tensor([*bos, *ids[first:last]])
        scored = min(last - end_before, len(row) - 1)
        if scored:
            size = ends[last - 1] - (ends[last - scored - 1] if last > scored else 0) if ends else 0
            yield _Window(row, document, len(row) - 1 - scored, size)
        end_before = last
        if last == len(ids):
            return


def window_losses(
    model: PreTrainedModel, windows: Windows, *, batch_size: int, progress: Callable[[int], None] = lambda count: None
) -> Tensor:
    """Negative log-likelihood of each window, summed over its scored tokens: float64 [window], nats.

    Windows of equal length go through the model together, so nothing is padded. Logits are widened to float32, sums are
    float64.

    Args:
        batch_size: windows in one forward pass.
        progress: called after each forward pass with the number of its windows.
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
    """Numbers of the windows in each forward pass: at most `batch_size`, all of one length.

    Example:
        >>> batches_of([torch.arange(n) for n in (4, 4, 2, 4)], batch_size=2)
        [[0, 1], [3], [2]]
    """
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    return [same[first : first + batch_size] for same in by_length.values() for first in range(0, len(same), batch_size)]
