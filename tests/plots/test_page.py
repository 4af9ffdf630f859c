"""The page, in a real browser where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.plots import options
from hf_moe_lmc.plots.options import PlotOptions
from hf_moe_lmc.plots.page import render_page
from hf_moe_lmc.plots.style import LOAD_COLOURS
from hf_moe_lmc.plots.values import Heading
from tests.plots.plotted import hump, layers, line, losses, routing

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROBE = """<script>
const ids = [...document.querySelectorAll(".js-plotly-plot")].map(plot => plot.id);
const load = document.getElementById("load-naive-plot"), steps = load.layout.sliders[0].steps;
const facts = {ids, foreign: performance.getEntriesByType("resource").map(entry => entry.name)};
const shown = () => [load._fullData[0].z[0].slice(0, 3), load._fullData[0].customdata[0].slice(0, 3)];
facts.first = shown();
facts.curves = document.querySelectorAll("#loss-plot .scatterlayer .trace").length;
facts.bars = document.querySelectorAll("#layerwise-plot .barlayer .point path").length;
facts.maps = document.querySelectorAll("#routing-naive-plot .heatmaplayer image").length;
Plotly.restyle(load, ...steps[steps.length - 1].args).then(() => {
  facts.last = shown();
  document.body.dataset.facts = JSON.stringify(facts);
});
</script></body>"""


@pytest.fixture(scope="module")
def page() -> str:
    load = np.array([[[0.1, 0.31, 0.59], [0.5, 0.5, np.nan]], [[0.3, 0.3, 0.4], [0.2, 0.8, np.nan]]])
    curves = losses(aligned=line(hump(0.2)), naive=line(hump(0.9), width=None))
    return render_page(curves, layers({(0, 0): 0.0, (1, 1): 0.1, (0, 1): 0.2}), [routing(2, 3, (0.0, 1.0), load)])


def test_the_page_needs_nothing_else(page: str) -> None:
    assert page.count("<!DOCTYPE html>") == 1 and len(page) > 3_000_000  # Plotly's own code, once
    assert len(re.findall(r"<script[^>]*\bsrc=", page)) == len(re.findall(r"<link\b", page)) == 0
    assert page.count("plotly.js v") == 1 and len(page) < 8_000_000


def test_equal_plots_give_equal_pages(page: str) -> None:
    curves = losses(aligned=line(hump(0.2)))
    assert render_page(curves, None, []) == render_page(curves, None, []) != page


def test_what_weakens_the_intervals_is_a_part_of_its_own() -> None:
    assert "<p>Nats per token; bands; few documents.</p>" in render_page(
        losses("bands\nfew documents", aligned=line(hump(0.2))), None, []
    )


def test_names_cannot_be_markup() -> None:
    name = "</h1><script>alert(1)</script>"
    heading = Heading(title=name, models=(name, "b"), measured=name)
    made = render_page(replace(losses(aligned=line(hump(0.2))), heading=heading), None, [])
    assert name not in made and made.count(html.escape(name)) >= 3


def test_a_browser_draws_it_and_the_slider_moves_along_t(page: str, tmp_path: Path) -> None:
    facts = in_browser(page, tmp_path)
    assert facts["ids"] == ["loss-plot", "layerwise-plot", "routing-naive-plot", "load-naive-plot"]
    assert facts["foreign"] == []
    assert facts["curves"] == 6  # two paths in both panels, a band, and the line between the ends
    assert (facts["bars"], facts["maps"]) == (3, 2)
    assert facts["first"][1] == [0.3, 0.93, 1.77] and facts["last"][1] == [0.9, 0.9, 1.2]
    assert facts["first"][0] == [1, 4, 6] and all(step < len(LOAD_COLOURS) for step in facts["last"][0])


def test_a_broken_page_is_seen(page: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="has not drawn"):
        in_browser(page.replace("Plotly.newPlot", "Plotly.newPlott"), tmp_path)


def in_browser(page: str, folder: Path) -> dict[str, Any]:
    """What a browser without a network makes of the page."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    file = folder / "page.html"
    file.write_text(page.replace("</body>", PROBE), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=20000",
    ]
    command = [found, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    facts = re.search(r'data-facts="([^"]*)"', ran.stdout)
    assert facts, f"the browser has not drawn the page: {ran.stderr[-500:]}"
    return json.loads(html.unescape(facts[1]))


def test_without_plotly_the_option_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PlotOptions(plot="interactive").plot == "interactive"
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    assert PlotOptions().plot == "static"
    with pytest.raises(InputError, match=r"Plotly is not installed.*pip install 'hf_moe_lmc\[interactive\]'"):
        PlotOptions(plot="interactive")


def test_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="plot animated: expected one of static, interactive"):
        PlotOptions(plot="animated")  # type: ignore[arg-type]
