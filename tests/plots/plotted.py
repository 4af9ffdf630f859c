"""Values to plot, without a measurement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_moe_lmc.plots.values import Floats, Heading, Layers, Line, Losses, Routing

HEADING = Heading(title="the finding", models=("org/a", "org/b"), measured="held_out.txt, 800 tokens")
GRID = tuple(i / 24 for i in range(25))


def hump(height: float, t: Sequence[float] = GRID) -> list[float]:
    return [4 * height * x * (1 - x) for x in t]


def line(excess: Sequence[float], t: Sequence[float] = GRID, *, width: float | None = 0.1, fall: float = 0.0) -> Line:
    """A path of the given excess over a line that falls by `fall`; its band is `width` of the excess wide on both sides."""
    over = np.array(excess)
    barrier = max(over.max(), 0.0) if np.isfinite(over).all() else np.nan
    band = [] if width is None else [(x - abs(x) * width, x + abs(x) * width) for x in excess]
    interval = None if width is None else (barrier * (1 - width), barrier * (1 + width))
    nll = [2.5 - fall * x + rise for x, rise in zip(t, excess, strict=True)]
    return Line(t=t, nll=nll, excess=excess, band=band, barrier=float(barrier), interval=interval)


def losses(sure: str = "bands", **lines: Line) -> Losses:
    return Losses(heading=HEADING, lines=lines, sure=sure)


def layers(barriers: dict[tuple[int, int], float], whole: float = 0.3) -> Layers:
    intervals = {span: (0.5 * barrier, 1.5 * barrier) if barrier else None for span, barrier in barriers.items()}
    return Layers(heading=HEADING, barriers=barriers, intervals=intervals, t=(0, 0.5, 1), whole=whole, sure="error bars")


def routing(layer_count: int, experts: int, t: Sequence[float] = (0.0, 0.5, 1.0), load: Floats | None = None) -> Routing:
    generator = np.random.default_rng(0)
    if load is None:
        load = generator.dirichlet(np.ones(experts), (len(t), layer_count))
    share = generator.uniform(size=(len(t), layer_count))
    numbers = [2 * i + 1 for i in range(layer_count)]
    return Routing(heading=HEADING, path="naive", t=t, layers=numbers, to_a=share, to_b=1 - share, load=load)
