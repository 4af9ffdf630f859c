"""Calibration text cut in two by document."""

from __future__ import annotations

import pytest
import torch

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.windows import Windows
from hf_moe_lmc.repair.halves import cut, deciding, halves_of, part_of


def windows(*documents: int, texts: tuple[str, ...] = ()) -> Windows:
    return Windows(tuple(torch.arange(5) for _ in documents), documents, 5, False, 5 * len(documents), texts=texts)


@pytest.mark.parametrize("share", [0.5, 2 / 3])
@pytest.mark.parametrize("documents", [(0, 1), (0, 0, 0, 1), tuple(i // 3 for i in range(40)), (0, *range(1, 9))])
def test_halves_share_no_document_and_leave_nothing_out(documents: tuple[int, ...], share: float) -> None:
    text = windows(*documents)
    first, second = cut(text, range(len(documents)), share)
    assert first and second
    assert sorted(first + second) == list(range(len(documents)))
    assert not {documents[i] for i in first} & {documents[i] for i in second}


def test_parts_have_about_their_share() -> None:
    text = windows(*(i // 2 for i in range(120)))
    for share in (0.5, 2 / 3):
        assert len(cut(text, range(120), share)[0]) == pytest.approx(120 * share, abs=4)


def test_a_single_document_is_cut_at_its_middle() -> None:
    assert cut(windows(0, 0, 0, 0), range(4)) == ([0, 1], [2, 3])


def test_each_text_is_cut_for_itself() -> None:
    text = windows(0, 0, 1, 2, 3, texts=("a", "a", "b", "b", "b"))
    first, second = cut(text, range(5))
    assert [{text.text_of[i] for i in half} for half in (first, second)] == [{"a", "b"}] * 2
    assert part_of(text, second).text_of == tuple(text.text_of[i] for i in second)


def test_one_window_cannot_be_cut() -> None:
    with pytest.raises(InputError, match="cannot be cut in two"):
        cut(windows(0, 0, 1, texts=("a", "a", "b")), range(3))


@pytest.mark.parametrize(("documents", "found"), [(tuple(range(8)), 4), ((0,) * 8, 4), ((0,) * 9 + (1,), 1)])
def test_halves_that_can_decide_nothing_are_refused(documents: tuple[int, ...], found: int) -> None:
    with pytest.raises(InputError, match=f"second half has {found} windows of 5 tokens, and 5 are needed"):
        halves_of(windows(*documents))
    assert all(len(half) >= 5 for half in halves_of(windows(*range(12))))


def test_windows_are_resampled_where_documents_are_few() -> None:
    text = windows(*(0,) * 6, *(1,) * 6, *range(2, 8), texts=("long",) * 12 + ("short",) * 6)
    part, few = deciding(text, range(18))
    assert few == ["long"]
    assert part.documents[12:] == text.documents[12:]
    assert len(set(part.documents)) == 18
