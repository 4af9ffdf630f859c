"""Token ids of documents, of which no more is read than the ids need. Knows nothing of MoE."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase

from hf_moe_lmc.perplexity.documents import Document

CHARACTERS_PER_TOKEN = 8  # of the first attempt; a text may have more, then the next attempt reads twice as much
LEAST = 1 << 16  # characters: no document of this size is cut
SHORTER = 3 / 4  # of an attempt: what it is checked against
MARGIN = 64  # tokens on which both must agree behind the last one that is kept


@dataclass(frozen=True)
class Tokens:
    """Token ids of a document, or of its beginning.

    Attributes:
        text: what was read of the document.
        whole: whether that is all of it.
        ends: where the tokens end in the UTF-8 bytes of `text`; None: not known.
        left: whether `text` has more tokens than these.
    """

    text: str
    whole: bool
    ids: list[int]
    ends: list[int] | None
    left: bool = False

    def first(self, count: int) -> Tokens:
        ends = None if self.ends is None else self.ends[:count]
        return Tokens(self.text, self.whole, self.ids[:count], ends, len(self.ids) > count)


def first_tokens(document: Document, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Tokens:
    """The first `limit` tokens of a document, those that the whole document has; None: all.

    A longer text may change the last tokens of its beginning, and tokenizers do not say how many. So two beginnings are
    tokenized, one a quarter shorter. What they agree on counts, less a margin. Neither ends within white space or between
    a letter and its accents, where a change may reach far. With Unigram the shorter one does not end within a word.
    Otherwise twice as much is read, at last the whole document.
    """
    if limit is None:
        return _tokens(document.whole(), True, tokenizer)
    size = max(LEAST, CHARACTERS_PER_TOKEN * limit)
    while True:
        text, whole = document.head(size)
        found = _tokens(text, whole, tokenizer)
        if whole or (len(found.ids) > limit + MARGIN and _agrees(found, tokenizer, limit)):
            return found.first(limit)
        size *= 2


def _agrees(found: Tokens, tokenizer: PreTrainedTokenizerBase, limit: int) -> bool:
    """Whether a shorter text has the same first tokens, and enough others behind them."""
    shorter = _tokens(settled(found.text, int(SHORTER * len(found.text)), words=_has_ties(tokenizer)), False, tokenizer)
    count = limit + MARGIN
    if len(shorter.ids) < count + MARGIN or shorter.ids[:count] != found.ids[:count]:
        return False
    return shorter.ends is None or found.ends is None or shorter.ends[:count] == found.ends[:count]


def _has_ties(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether far letters of one word decide between equally good tokens: Unigram, and others that cannot be looked into."""
    return not tokenizer.is_fast or isinstance(tokenizer.backend_tokenizer.model, Unigram)


def settled(text: str, end: int, *, words: bool = False) -> str:
    """At most the first `end` characters: less white space at the end, and less a letter whose accents lie beyond.

    Args:
        words: less a word that may not be whole, too.

    Example:
        >>> settled("so many   words", 9), settled("cafe\u0301s", 4), settled("so many words", 9, words=True)
        ('so many', 'caf', 'so many')
    """
    while 0 < end < len(text) and unicodedata.combining(text[end]):
        end -= 1
    if words:
        while end > 0 and not text[end - 1].isspace():
            end -= 1
    return text[:end].rstrip()


def _tokens(text: str, whole: bool, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ends = byte_ends(text, encoding["offset_mapping"]) if tokenizer.is_fast else None
    return Tokens(text, whole, encoding["input_ids"], ends)


def byte_ends(document: str, offsets: Sequence[tuple[int, int]]) -> list[int] | None:
    """Where each token ends in the UTF-8 bytes of its document; None where the tokenizer's offsets are not plausible.

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
    """SHA-256 of what a tokenizer does, and of its special tokens.

    Of a fast tokenizer the whole definition counts, without truncation and padding, which are settings of the last call. Of
    another one class and vocabulary count.
    """
    if tokenizer.is_fast:
        definition: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        definition.update(truncation=None, padding=None)
    else:
        definition = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = sorted(tokenizer.special_tokens_map.items(), key=str)
    return hashlib.sha256(json.dumps([definition, special], sort_keys=True, default=str).encode()).hexdigest()


def own_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer puts one in front by itself, else []."""
    bos = tokenizer.bos_token_id
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    return [bos] if bos is not None and with_special[:1] == [bos] and without[:1] != [bos] else []
