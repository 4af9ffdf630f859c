"""Which plots are written: a value that checks itself."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

from hf_moe_lmc.errors import InputError

PlotKind = Literal["static", "interactive"]
INSTALL = "pip install 'hf_moe_lmc[interactive]'"


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Which plots are written.

    Attributes:
        plot: `static`, pictures as PNG and SVG; `interactive`, a page of HTML as well, which needs Plotly.

    Raises:
        InputError: another kind, or Plotly is not installed.

    Example:
        >>> PlotOptions().plot
        'static'
    """

    plot: PlotKind = "static"

    def __post_init__(self) -> None:
        if self.plot not in get_args(PlotKind):
            raise InputError(f"plot {self.plot}: expected one of {', '.join(get_args(PlotKind))}")
        if self.plot == "interactive" and find_spec("plotly") is None:
            raise InputError(f"plot interactive: Plotly is not installed; install it with: {INSTALL}")
