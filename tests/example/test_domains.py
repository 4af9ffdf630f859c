from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hf_moe_lmc.example import domains
from hf_moe_lmc.example.domains import NGRAM, Domain, apart, check_apart, library_domains, ngrams

ASYNCIO = Path(asyncio.__file__).parent
SHARED = " ".join(f"word{i}" for i in range(NGRAM))
LONG = " ".join(f"other{i}" for i in range(40))


def test_no_twelve_words_of_evaluation_text_are_trained_on_or_calibrated_on() -> None:
    prose, code = library_domains(ASYNCIO)
    assert (prose.name, code.name) == ("prose", "code")
    held_out = ngrams([*prose.evaluation, *code.evaluation])
    assert len(held_out) > 300
    for domain in (prose, code):
        assert domain.train and domain.calibration and domain.evaluation
        for text in (*domain.train, *domain.calibration):
            assert not ngrams([text]) & held_out
    assert any("Return" in text for text in prose.train) and not any("def " in text for text in prose.evaluation)
    assert any("def " in text for text in code.train) and not any("Return " in text for text in code.evaluation)


def test_without_the_cut_boilerplate_is_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains, "apart", lambda text, held_out: [text])
    with pytest.raises(ValueError, match="12 words of evaluation text"):
        library_domains(ASYNCIO)


def test_what_is_shared_is_cut_out_and_short_pieces_are_dropped() -> None:
    held_out = ngrams([f"x {SHARED} y"])
    text = f"{LONG} {SHARED} {LONG} {SHARED} short"
    pieces = list(apart(text, held_out))
    assert [piece.strip() for piece in pieces] == [LONG, LONG]
    assert list(apart(LONG, held_out)) == [LONG] and list(apart("short", held_out)) == []
    twice = f"{LONG} {SHARED} {SHARED.upper()} {LONG}"  # next to each other, in another case
    assert [piece.strip() for piece in apart(twice, held_out)] == [LONG, LONG]


@pytest.mark.parametrize(("kind", "part"), [("training", "train"), ("calibration", "calibration")])
def test_a_shared_sequence_is_an_error(kind: str, part: str) -> None:
    parts = {"train": (LONG,), "calibration": (LONG,), "evaluation": (f"x {SHARED} y",)}
    check_apart([Domain("code", **parts)])
    parts[part] = (f"{LONG} {SHARED}",)
    with pytest.raises(ValueError, match=f"code: 1 sequence of 12 words of evaluation text is in {kind} text: word0"):
        check_apart([Domain("code", **parts)])
