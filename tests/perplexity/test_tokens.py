"""The first tokens of a document are those of the whole document, of which hardly more is read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from hf_moe_lmc.perplexity import tokens
from hf_moe_lmc.perplexity.documents import Document, joined
from hf_moe_lmc.perplexity.tokens import first_tokens, settled
from hf_moe_lmc.perplexity.windows import cut_texts, cut_windows
from tests import tiny

SIZE = 20_000  # characters of a text
LEAST = 2048  # of a beginning, here
WORDS = [
    "the",
    "expert",
    "that",
    "answers",
    "is",
    "one",
    "of",
    "many;",
    "a",
    "router",
    "picked",
    "it,",
    "didn't",
    "it?",
    "12,345",
    "times",
    "—",
    "größer,",
    "naïve",
]
NORMALIZED = [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]


def spread(make: Callable[[random.Random], str]) -> str:
    generator, made, size = random.Random(0), [], 0
    while size < SIZE:
        made.append(make(generator))
        size += len(made[-1])
    return "".join(made)[:SIZE]


PROSE = spread(lambda r: r.choice(WORDS) + r.choice([" ", " ", " ", ", ", "\n", "\n\n", "  "]))
LETTERS = spread(lambda r: r.choice(["aab", "aba", "abab", "b"]))
TEXTS = {
    "prose": PROSE,
    "leading spaces": " " * 9000 + PROSE,
    "leading lines": "\n" * 300 + PROSE,
    "no spaces": LETTERS,
    "one letter": "a" * SIZE,
    "two letters": "ab" * (SIZE // 2),
    "chinese": spread(lambda r: chr(0x4E00 + r.randrange(400)) + ("。" if r.random() < 0.05 else "")),
    "chinese without a stop": spread(lambda r: chr(0x4E00 + r.randrange(60))),
    "hangul in parts": spread(lambda r: chr(0x1100 + r.randrange(19)) + chr(0x1161 + r.randrange(21))),
    "accents apart": spread(lambda r: r.choice("aeo u") + "".join(chr(0x300 + r.randrange(40)) for _ in range(r.randrange(5)))),
    "a tower of accents": PROSE[:1500] + "a" + "\u0301\u0316" * 2000 + PROSE,
    "runs of spaces": spread(lambda r: r.choice(WORDS) + " " * r.choice([1, 1, 1, 2, 7, 500, 1600])),
    "special tokens": spread(lambda r: r.choice([*WORDS, "<mask>", "<sep>", "<two words>"]) + r.choice([" ", "", "   "])),
    "spaces before a special token": PROSE[:1400] + " " * 3000 + "<mask>" + PROSE,
    "parts of special tokens": spread(lambda r: r.choice(["<ma", "sk>", "<two", " words>", " ", "<s"])),
    "emoji": spread(lambda r: r.choice(["👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", " ", "é"])),
    "unknown letters": spread(lambda r: chr(0x10400 + r.randrange(40)) * r.choice([1, 1, 3000])),
    "line ends": spread(lambda r: r.choice(WORDS) + r.choice([" \n", "\n \n", "\t", " \n\n\n"])),
    "long words": spread(lambda r: "ab" * r.randrange(1, 200) + " "),
    "short": "the expert",
    "empty": "",
}


def _trained(backend: Tokenizer, trainer: trainers.Trainer) -> PreTrainedTokenizerFast:
    backend.train_from_iterator([PROSE[:4000], LETTERS[:2000], TEXTS["chinese"][:500], "    \n\n  aaaa"], trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    added = [AddedToken("<mask>", lstrip=True), AddedToken("<sep>", rstrip=True), AddedToken("<two words>")]
    found.add_tokens(added, special_tokens=False)
    return found


def byte_level(**options: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    return _trained(backend, trainers.BpeTrainer(vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))


def whole_text_bpe(split: bool) -> PreTrainedTokenizerFast:
    """As Llama's: spaces are letters; without `split` nothing ends a word."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    backend.decoder = decoders.Metaspace()
    return _trained(backend, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], max_token_length=12))


def unigram(split: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(NORMALIZED)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trained = _trained(backend, trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>"))
    trained.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    return trained


def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _trained(backend, trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<unk>"]))


MADE: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": tiny.tokenizer,
    "byte-level BPE": lambda: byte_level(add_prefix_space=False),
    "byte-level BPE with a space in front": lambda: byte_level(add_prefix_space=True),
    "byte-level BPE without words": lambda: byte_level(add_prefix_space=False, use_regex=False),
    "BPE of words": lambda: whole_text_bpe(split=True),
    "BPE of the whole text": lambda: whole_text_bpe(split=False),
    "Unigram of words": lambda: unigram(split=True),
    "Unigram of the whole text": lambda: unigram(split=False),
    "WordPiece": word_piece,
}


@pytest.fixture(scope="module", params=MADE)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return MADE[request.param]()


def blocks(text: str, size: int = 1000) -> Iterator[str]:
    return (text[at : at + size] for at in range(0, len(text), size))


@pytest.mark.parametrize("kind", TEXTS)
def test_the_first_tokens_are_those_of_the_whole_document(
    tokenizer: PreTrainedTokenizerFast, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "LEAST", LEAST)
    text = TEXTS[kind]
    whole = first_tokens(Document([text]), tokenizer, None)
    assert whole.ids == tokenizer(text, add_special_tokens=False)["input_ids"] and whole.whole and not whole.left
    for limit in (1, 50, 333, len(whole.ids), len(whole.ids) + 1):
        found = first_tokens(Document(blocks(text)), tokenizer, limit)
        assert found.ids == whole.ids[:limit]
        assert found.ends == (whole.ends and whole.ends[:limit])
        assert found.left == (len(whole.ids) > limit) and text.startswith(found.text)


def test_no_more_is_read_than_the_tokens_need(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "LEAST", LEAST)
    unigram = isinstance(tokenizer.backend_tokenizer.model, models.Unigram)  # reads to the end of a word
    for kind in ("prose", "accents apart", "line ends", *(() if unigram else ("chinese",))):
        unread = blocks(TEXTS[kind] * 3)
        found = first_tokens(Document(unread), tokenizer, 50)
        assert not found.whole and len(found.text) <= 4 * LEAST and next(unread, None), kind
        assert found.text in TEXTS[kind] * 3
    assert first_tokens(Document([PROSE[:LEAST]]), tokenizer, 50).whole  # a short document is never read in part


def test_a_beginning_alone_would_have_other_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """The control: some beginning of some text ends in tokens that the whole text has not."""
    found = 0
    for text in (PROSE, TEXTS["special tokens"]):
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        for end in range(500, 600):
            ids = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
            found += ids != whole[: len(ids)]
    assert bool(found) == (tokenizer.vocab_size != tiny.tokenizer().vocab_size)


def test_a_beginning_does_not_end_where_a_change_would_reach_far() -> None:
    for text, end, expected in (
        ("so many   words", 9, "so many"),
        ("so many   words", 13, "so many   wor"),
        ("cafe\u0301s", 4, "caf"),
        ("a\u0301\u0301", 2, ""),
        ("   ", 2, ""),
        ("words", 5, "words"),
    ):
        assert settled(text, end) == expected


def test_documents_are_read_as_far_as_they_are_asked_for() -> None:
    unread = iter(["ab", "", "cd", "ef", "gh"])
    document = Document(unread)
    assert document.head(1) == ("a", False) and document.head(3) == ("abc", False) and next(unread) == "ef"
    assert document.head(6) == ("abcdgh", True) and document.whole() == "abcdgh"
    assert Document([]).head(0) == ("", True) and Document(["ab"]).head(2) == ("ab", True)
    assert "".join(joined(["a", "", "b"], "\n\n")) == "\n\n".join(["a", "", "b"]) and list(joined([], "-")) == []


def test_the_text_hash_covers_what_was_read_and_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "LEAST", LEAST)
    options = {"context": 16}
    whole = cut_windows([PROSE], tiny.tokenizer(), **options)
    part = cut_windows([PROSE], tiny.tokenizer(), max_tokens=100, **options)
    assert "read_in_part" not in whole.describe() and part.describe()["read_in_part"] == 1
    assert part.text_hash == cut_windows([PROSE[:LEAST]], tiny.tokenizer(), **options).text_hash != whole.text_hash
    other = cut_windows([PROSE[:LEAST] + "another end" * 99], tiny.tokenizer(), max_tokens=100, **options)
    assert other.convention_hash == part.convention_hash  # the same tokens in the same contexts
    short = cut_windows(["x" + PROSE[1:]], tiny.tokenizer(), max_tokens=100, **options)
    assert short.convention_hash != part.convention_hash


def test_a_budget_counts_for_each_text() -> None:
    texts, tokenizer = [["abcdef", "ghij"], ["klmnop"], ["qr", "st", "uvw"]], tiny.tokenizer()
    windows = cut_texts(texts, tokenizer, context=3, max_tokens=4)
    assert [tokenizer.decode(row) for row in windows.rows] == ["abc", "klm", "qr", "st"]
    assert windows.documents == (0, 1, 2, 3) and windows.tokens_read == 12
    together = cut_windows([document for text in texts for document in text], tokenizer, context=3)
    assert cut_texts(texts, tokenizer, context=3).convention_hash == together.convention_hash
    assert cut_texts(texts, tokenizer, context=3, max_tokens=99).convention_hash == together.convention_hash
    # 5 + 5 tokens and 8 + 2 tokens of the same two documents
    each = cut_texts([["abcdefgh"], ["ijklmnop"]], tokenizer, context=3, max_tokens=5)
    first = cut_texts([["abcdefgh", "ijklmnop"]], tokenizer, context=3, max_tokens=10)
    assert (each.text_hash, each.tokens_read) == (first.text_hash, first.tokens_read)
    assert each.convention_hash != first.convention_hash and each.ended == ((0, 5),) and first.ended == ()
