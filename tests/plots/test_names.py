from __future__ import annotations

import pytest

from hf_moe_lmc.plots.names import MARK, WIDTH, short_names, shorten

LONG = "some-organisation/Mixture-of-Experts-8x7B-Instruct-v0.1-{}-continued-pretraining-on-code"


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("width", [10, 20, WIDTH])
def test_long_names_are_shortened_and_stay_apart(place: str, width: int) -> None:
    a, b = (
        {"first": f"{side}-{LONG}", "middle": LONG.format(side), "last": f"{LONG}-{side}"}[place] for side in ("seed1", "seed2")
    )
    short = short_names(a, b, width)
    assert short[0] != short[1] and all(MARK in name and len(name) <= width + 3 for name in short)
    if place == "middle" and width == WIDTH:  # both ends alone would be equal
        assert shorten(a, width) == shorten(b, width) and "1" in short[0] and "2" in short[1]


def test_equal_names_are_equal_and_short_ones_as_they_are() -> None:
    assert short_names(LONG, LONG)[0] == short_names(LONG, LONG)[1] == shorten(LONG, WIDTH)
    assert short_names("org/a", "org/b") == ("org/a", "org/b")
