from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hf_moe_lmc.example import domains
from hf_moe_lmc.example.domains import Domain, apart, check_apart, library_domains, passages
from hf_moe_lmc.perplexity.overlap import PASSAGE

ASYNCIO = Path(asyncio.__file__).parent
SHARED = " ".join(f"word{i}" for i in range(PASSAGE))
LONG = " ".join(f"other{i}" for i in range(40))


def test_no_twelve_words_of_evaluation_text_are_trained_on_or_calibrated_on() -> None:
    prose, code = library_domains(ASYNCIO)
    assert (prose.name, code.name) == ("prose", "code")
    held_out = passages([*prose.evaluation, *code.evaluation])
    assert len(held_out) > 300
    for domain in (prose, code):
        assert domain.train and domain.calibration and domain.evaluation
        for text in (*domain.train, *domain.calibration):
            assert not passages([text]) & held_out
    assert any("Return" in text for text in prose.train) and not any("def " in text for text in prose.evaluation)
    assert any("def " in text for text in code.train) and not any("Return " in text for text in code.evaluation)


def test_without_the_cut_boilerplate_is_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains, "apart", lambda text, held_out: [text])
    with pytest.raises(ValueError, match="passages of evaluation text, 12 words long"):
        library_domains(ASYNCIO)


def test_what_is_shared_is_cut_out_and_short_pieces_are_dropped() -> None:
    held_out = passages([f"x {SHARED} y"])
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
    with pytest.raises(ValueError, match=f"code: passages of evaluation text, 12 words long, in {kind} text: 1, such as word0"):
        check_apart([Domain("code", **parts)])
