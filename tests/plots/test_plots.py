from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hf_moe_lmc.perplexity.figures import Line

from hf_moe_lmc.perplexity import figures


def test_what_colour_says_is_said_once_more() -> None:
    styles = [*figures.STYLES.values(), figures.OTHER]
    for kind in zip(*styles, strict=True):  # colour, marker, line, hatching
        assert len(set(kind)) == len(styles)


@pytest.mark.parametrize("band", [None, (1.0, 3.0)])
@pytest.mark.parametrize("peak", [2.0, math.inf, math.nan])
def test_a_curve_is_drawn_whatever_is_known_of_it(tmp_path: Path, band: tuple[float, float] | None, peak: float) -> None:
    line = Line((0.0, 0.5, 1.0), (1.0, peak, 1.5), [band] * 3, peak - 1.25, band)
    figure = figures.curve({"naive": line, "aligned": line, "another": line}, "A to B")
    assert [axes.get_xlabel() for axes in figure.axes] == ["t   (0 is A, 1 is B)"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 4 and ("[1, 3]" in labels[0]) == (band is not None)
    figures.save(figure, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (tmp_path / "curve.svg").read_text()


@pytest.mark.parametrize("layers", [1, 5, 61])
def test_layers_and_routing_are_drawn_in_every_size(tmp_path: Path, layers: int) -> None:
    generator = np.random.default_rng(0)
    numbers = [2 * i + 1 for i in range(layers)]
    values = {(n, n): (0.1, 0.05, 0.2) if n % 3 else (0.0, math.nan, math.nan) for n in numbers}
    ranges = {(1, 2): (0.2, 0.1, 0.25), (1, 9): (math.nan, math.nan, math.nan)}
    bars = figures.layerwise({**values, **ranges}, "A to B", whole=0.3)
    assert len(bars.axes[0].patches) == layers
    assert [text.get_text() for text in bars.axes[0].texts] == ["1-2", "1-9"]
    labels = [text.get_text() for text in bars.legends[0].get_texts()]
    assert sorted(labels) == ["one layer", "the layers of a range together", "the whole model: 0.3"]
    t = sorted({*(i / 24 for i in range(25)), 0.51, 0.52}) if layers > 1 else [0.5]
    share = generator.uniform(size=(len(t), layers))
    share[0, 0] = math.nan
    maps = figures.agreement(t, numbers, share, 1 - share, "A to B")
    load = generator.dirichlet(np.ones(4), layers)
    load[0, 3] = math.nan
    loads = figures.load({0.0: load, 1.0: load}, numbers, "A to B")
    for name, figure in (("bars", bars), ("maps", maps), ("loads", loads)):
        figures.save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.svg").exists()
    ticks = [text.get_text() for text in maps.axes[0].get_xticklabels()]
    assert ticks[0] == f"{t[0]:.3g}" and ticks[-1] == f"{t[-1]:.3g}" and len(ticks) <= 7
