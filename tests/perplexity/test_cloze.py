"""Questions of the cloze task: what follows, what does not, and that nothing but the text decides them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.cloze import BEGINNING, CHOICES, CONTINUATION, cloze_of
from hf_moe_lmc.perplexity.windows import Windows, cut_texts
from tests import tiny


def windows(lengths: tuple[int, ...], *, context: int = 64, bos: bool = False, stride: int | None = None) -> Windows:
    """Documents of different token ids, counted on; the first of a window may be a BOS, 0."""
    rows, owners, first, width = [], [], 1, context - bos
    for number, length in enumerate(lengths):
        for start in range(0, length, stride or width):
            end = min(start + width, length)
            rows.append(torch.tensor([0] * bos + list(range(first + start, first + end))))
            owners.append(number)
            if end == length:
                break
        first += length
    return Windows(tuple(rows), tuple(owners), context, bos, sum(lengths), stride=stride)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [None, 20, 62])
def test_the_first_continuation_follows_and_the_others_do_not(bos: bool, stride: int | None) -> None:
    text = windows((900, 41, 300), bos=bos, stride=stride)
    cloze = cloze_of(text, 1000)
    size = BEGINNING + CONTINUATION
    assert len(cloze.rows.rows) == CHOICES * (900 // size + 41 // size + 300 // size) and cloze.beginning == BEGINNING
    rows = [row.tolist()[bos:] for row in cloze.rows.rows]
    used: dict[int, int] = {}
    for number in range(0, len(rows), CHOICES):
        own, *others = rows[number : number + CHOICES]
        assert own == list(range(own[0], own[0] + size))
        for other in others:
            assert other[:BEGINNING] == own[:BEGINNING] and other[BEGINNING:] != own[BEGINNING:]
            used[other[BEGINNING]] = used.get(other[BEGINNING], 0) + 1
    assert set(used.values()) == {CHOICES - 1} and len(used) == len(rows) // CHOICES  # each is wrong as often
    assert cloze.rows.scored.tolist() == [CONTINUATION] * len(rows)
    assert cloze.windows.scored.tolist() == [1] * len(used) and len(cloze.windows.rows) == len(used)


def test_questions_are_spread_and_the_same_each_time() -> None:
    text = windows((4000,))
    some, same = cloze_of(text, 10), cloze_of(text, 10)
    starts = [int(row[0]) for row in some.rows.rows[::CHOICES]]
    assert len(cloze_of(text, 1).windows.rows) == 1 and len(cloze_of(text, 1).rows.rows) == CHOICES
    assert len(starts) == 10 and min(b - a for a, b in pairwise(starts)) >= 400
    assert all(torch.equal(one, other) for one, other in zip(some.rows.rows, same.rows.rows, strict=True))


def test_who_knows_the_text_is_right_and_who_looks_at_continuations_alone_is_right_in_one_of_four() -> None:
    cloze = cloze_of(windows((8000,)), 1000)
    follows = torch.tensor([float(row[BEGINNING] != row[BEGINNING - 1] + 1) for row in cloze.rows.rows])
    assert cloze.right(follows).mean() == 1
    generator = torch.Generator().manual_seed(0)
    of_continuation = {int(row[-1]): float(torch.rand((), generator=generator)) for row in cloze.rows.rows}
    blind = torch.tensor([of_continuation[int(row[-1])] for row in cloze.rows.rows])
    assert 0.15 < cloze.right(blind).mean() < 0.35
    assert cloze.right(torch.zeros(3, len(blind))).sum() == 0  # no difference is no answer


def test_short_windows_and_uniform_text_are_refused_in_words() -> None:
    with pytest.raises(InputError, match="context 15: a cloze task needs at least 16 tokens"):
        cloze_of(windows((400,), context=15), 10)
    with pytest.raises(InputError, match="the text text gives no cloze task: it takes 4 pieces of 16 tokens"):
        cloze_of(windows((50,)), 10)
    text = windows((640,))
    uniform = replace(text, rows=tuple(torch.ones_like(row) for row in text.rows))
    with pytest.raises(InputError, match="end in different ones, and it has 10 pieces"):
        cloze_of(uniform, 10)


def test_each_text_has_its_own_questions() -> None:
    documents = (
        ["alpha beta gamma " * 30 + str(number) for number in range(9)],
        [f"x{number} = {number}\n" for number in range(99)],
    )
    cut = cut_texts([documents[0], ["".join(documents[1])]], tiny.tokenizer(), context=48, names=("prose", "code"))
    cloze = cloze_of(cut, 12)
    assert cloze.describe()["questions"] == {"prose": 12, "code": 12}
    code = {int(i) for row, name in zip(cut.rows, cut.text_of, strict=True) if name == "code" for i in row}
    for row, name in zip(cloze.rows.rows, cloze.rows.text_of, strict=True):
        assert name == "prose" or set(row.tolist()) <= code
