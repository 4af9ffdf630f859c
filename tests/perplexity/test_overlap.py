"""Passages that two texts share are found wherever they stand, and texts that share none are let through."""

from __future__ import annotations

import random

import pytest

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity import overlap as module
from hf_moe_lmc.perplexity.overlap import PASSAGE, Overlap, check_apart, overlap
from hf_moe_lmc.perplexity.windows import cut_texts
from tests import tiny


def prose(words: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [f"w{generator.randrange(5000)}" for _ in range(words)]


PLANTED = [f"planted{number}" for number in range(PASSAGE)]


@pytest.mark.parametrize("at_once", [5, 40, module.AT_ONCE])
@pytest.mark.parametrize("place", [0, 63, 64, 250, 388])
def test_a_planted_passage_is_found_and_one_word_less_is_not(place: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    one, two = prose(400, 0), prose(900, 1)
    assert not overlap([[" ".join(one)]], [" ".join(two)])
    for length, found in ((PASSAGE, 1), (PASSAGE - 1, 0)):
        first, second = list(one), list(two)
        first[place : place + length] = PLANTED[:length]
        second[700 : 700 + length] = [word.upper() for word in PLANTED[:length]]
        pieces = [" ".join(first[i : i + 40]) + " " for i in range(0, 400, 40)]
        shared = overlap([pieces[:4], pieces[4:]], [" ".join(two), ",\n".join(second)])
        # a passage that goes on in another document is none
        torn = place < 160 < place + length
        assert shared.passages == (0 if torn else found) and shared.total == 10
        if shared:
            assert shared.pieces == (place // 40,) and (shared.example or "").split(",\n") == [w.upper() for w in PLANTED]


def test_every_piece_with_a_shared_passage_counts() -> None:
    same = " ".join(PLANTED)
    shared = overlap([[same], ["other"], [f"{same} ", same]], [f"before {same} after"])
    assert shared == Overlap((0, 2, 3), 4, 1, same)


def test_characters_without_spaces_are_words() -> None:
    assert overlap([["我们今天去公园散步看花很开心"]], ["昨天我们今天去公园散步看花很开心。"])
    assert not overlap([["我们今天去公园散步看花很开心"]], ["他们明天在家里读书写字也很快乐"])


@pytest.mark.parametrize("stride", [None, 24])
def test_windows_that_hold_calibration_text_are_named(stride: int | None) -> None:
    tokenizer, header = tiny.tokenizer(), "licensed to anyone who wants it under the terms of the licence that stands below. "
    one, two = " ".join(prose(60, 2)), " ".join(prose(200, 3))

    def cut(*documents: str) -> object:
        return cut_texts([documents], tokenizer, context=64, stride=stride)

    check_apart(cut(one, two), cut(" ".join(prose(300, 4))), tokenizer)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"[12] of \d+ windows of the evaluation share 12 words in a row with the .*licensed"):
        check_apart(cut(header + one, two), cut(header + " ".join(prose(300, 4))), tokenizer)  # type: ignore[arg-type]


def test_a_long_text_is_compared_in_little_memory_and_time() -> None:
    long = " ".join(prose(200_000, 5))
    assert not overlap([[" ".join(prose(20_000, 6))]], [long])
    assert len(overlap([[long[1000:3000]]], [long]).pieces) == 1
