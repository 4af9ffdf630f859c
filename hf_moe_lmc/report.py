"""What a barrier measurement leaves behind: report.json, a table, a plot, report.md.

report.json, version 1 (later versions add keys and keep these):

    version     1
    a, b        source; commit where it is a Hub repository; fingerprint
    evaluation  text, context, stride, bos, tokens_read, tokens_scored, windows, documents, dtype, device, implementations;
                mode, passes, bytes_of_both, weights, activations: what it took; refined_t: points that --refine added
    matching    the content of alignment.json, or {"symmetry": file} where one was given
    windows     tokens: scored tokens of each window; document: the document it comes from
    paths       naive (absent with --no-naive) and aligned, each with the lists t, nll (nats per token, token-weighted),
                perplexity, excess (nats over the straight line), the numbers barrier (nats), barrier_t, area, and
                window_nll: nats per token of each window, [point][window]
    summary     aligned_percent_of_naive (None where the naive barrier is no more than noise, or was not measured),
                endpoint_change: L(B') - L(B), nats, which alignment should leave at rounding level
    layerwise   null without --layerwise; else for each MoE layer: layer, and the lists t, nll and excess, the numbers barrier
                and barrier_t of the path on which this decoder layer alone leaves A (experts aligned), against the straight
                line between its own two ends
    routing     null with --no-routing, or where the model does not show it (evaluation.routing_unavailable says why); else one
                entry per path, grid point (t), layer and module (of the router's block within the layer): load, the share of
                each expert in the token-expert pairs; agreement_a, agreement_b, the mean share of a token's experts that
                A, or B of the same path, gives it as well (numbers of experts: the naive path has B's own); entropy, nats,
                mean over tokens, of the softmax over all experts, or of scores divided by their sum
    versions    of the packages that computed it
    seconds     of the whole measurement

null stands for a number that is not finite.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_moe_lmc.curve import BarrierCurve
from hf_moe_lmc.perplexity import Windows

REPORT_VERSION = 1
NEGLIGIBLE = 1e-3  # nats; a percentage of a smaller naive barrier would be a ratio of rounding errors
PACKAGES = ("hf_moe_lmc", "torch", "transformers", "safetensors", "accelerate")


@dataclass(frozen=True)
class BarrierReport:
    """The barrier between two models on the naive and on the aligned path.

    Attributes:
        a, b: origin of the two checkpoints.
        evaluation, matching: see the module's documentation.
        windows: what was evaluated on.
        losses: by path name, float64 [point, window], nats summed over each window.
        t: the grid.
    """

    a: dict[str, str]
    b: dict[str, str]
    evaluation: dict[str, Any]
    matching: dict[str, Any]
    windows: Windows
    losses: dict[str, Tensor]
    t: tuple[float, ...]
    seconds: float
    layerwise: list[dict[str, Any]] | None = None
    routing: list[dict[str, Any]] | None = None

    def curve(self, path: str) -> BarrierCurve:
        total = self.losses[path].sum(dim=1) / self.windows.scored.sum()
        return BarrierCurve(self.t, tuple(total.tolist()))

    @property
    def aligned(self) -> BarrierCurve:
        return self.curve("aligned")

    @property
    def naive(self) -> BarrierCurve | None:
        return self.curve("naive") if "naive" in self.losses else None

    @property
    def percent_of_naive(self) -> float | None:
        if self.naive is None or not self.naive.barrier >= NEGLIGIBLE:
            return None
        return 100 * self.aligned.barrier / self.naive.barrier

    @property
    def endpoint_change(self) -> float | None:
        """L(B') - L(B), nats per token."""
        return None if self.naive is None else self.aligned.nll[-1] - self.naive.nll[-1]

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": REPORT_VERSION,
            "a": self.a,
            "b": self.b,
            "evaluation": self.evaluation,
            "matching": self.matching,
            "windows": {"tokens": self.windows.scored.int().tolist(), "document": list(self.windows.documents)},
            "paths": {name: self._path(name) for name in self.losses},
            "summary": {"aligned_percent_of_naive": self.percent_of_naive, "endpoint_change": self.endpoint_change},
            "layerwise": self.layerwise,
            "routing": self.routing,
            "versions": {name: version(name) for name in PACKAGES},
            "seconds": self.seconds,
        }

    def _path(self, name: str) -> dict[str, Any]:
        curve = self.curve(name)
        return {
            "t": list(curve.t),
            "nll": list(curve.nll),
            "perplexity": list(curve.perplexity),
            "excess": list(curve.excess),
            "barrier": curve.barrier,
            "barrier_t": curve.barrier_t,
            "area": curve.area,
            "window_nll": (self.losses[name] / self.windows.scored).tolist(),
        }

    def to_json(self) -> str:
        return json.dumps(_without_nan(self.to_dict()), indent=2, allow_nan=False) + "\n"

    def table(self) -> str:
        """Losses along the path and the barriers, for a terminal."""
        curves = {name: self.curve(name) for name in self.losses}
        lines = ["     t" + "".join(f"{name + ' nll':>14}{'perplexity':>14}" for name in curves)]
        for i, t in enumerate(self.t):
            lines.append(f"{t:6.3f}" + "".join(f"{c.nll[i]:14.4f}{c.perplexity[i]:14.4f}" for c in curves.values()))
        lines.append("")
        lines += [self.sentence(name) for name in curves]
        return "\n".join(lines)

    def sentence(self, name: str) -> str:
        """One path's barrier in words."""
        curve = self.curve(name)
        text = f"barrier, {name} path: {curve.barrier:.4f} nats per token at t = {curve.barrier_t:.3g}; area {curve.area:+.4f}"
        if name == "aligned" and self.percent_of_naive is not None:
            text += f"; {self.percent_of_naive:.1f} % of the naive barrier"
        return text

    def to_markdown(self) -> str:
        evaluation = self.evaluation
        rows = "\n".join(
            f"| {name} | {c.barrier:.4f} | {c.barrier_t:.3g} | {c.area:+.4f} | {c.nll[0]:.4f} | {c.nll[-1]:.4f} |"
            for name, c in ((name, self.curve(name)) for name in reversed(self.losses))
        )
        parts = [
            f"# Perplexity barrier between {_short(self.a['source'])} and {_short(self.b['source'])}\n",
            "![loss along the path](barrier.png)\n",
            "| path | barrier, nats | at t | area | nll of A | nll of B |\n|---|---|---|---|---|---|\n" + rows + "\n",
        ]
        if self.percent_of_naive is not None:
            parts.append(f"The aligned barrier is {self.percent_of_naive:.1f} % of the naive one.\n")
        if self.endpoint_change is not None:
            parts.append(
                f"Alignment changed the loss of B itself by {self.endpoint_change:+.1e} nats (it should not beyond rounding).\n"
            )
        parts.append(
            "## What is measured\n\n"
            "The barrier is the largest rise of the loss, in nats per token, above the straight line between the losses of "
            "the two ends, over the points of the grid: max over t of L((1 - t) A + t B') - [(1 - t) L(A) + t L(B')]. "
            "The naive path takes B as it is, the aligned one takes B with its experts and hidden units moved to where A has "
            "theirs. "
            f"These are {len(self.t)} points on one text: {evaluation['tokens_scored']} predicted tokens in "
            f"{evaluation['windows']} windows of at most {evaluation['context']} tokens, "
            f"{'each opened by a BOS token' if evaluation['bos'] else 'without BOS'}, in {evaluation['dtype']}. "
            "A low barrier here says that the line between these two checkpoints is passable on this text; it does not prove "
            "that the models are connected in general.\n"
        )
        return "\n".join(parts)

    def plot(self, path: Path) -> None:
        """Draws the loss along both paths, and the straight lines between the ends, as a PNG file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.8, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        styles = {"naive": ("#D55E00", "o", "--"), "aligned": ("#0072B2", "s", "-")}
        for name in [name for name in styles if name in self.losses]:
            curve = self.curve(name)
            color, marker, line = styles[name]
            axes.plot(
                curve.t, curve.nll, line, marker=marker, markersize=4, color=color,
                label=f"{name}: barrier {curve.barrier:.3g} nats",
            )  # fmt: skip
        ends = self.aligned.nll[0], self.aligned.nll[-1]
        axes.plot((0, 1), ends, ":", color="0.4", linewidth=1, label="straight line between the ends")
        axes.plot((0, 1), ends, "D", color="black", markersize=6, zorder=3)
        axes.set_xlabel("t   (0 is A, 1 is B)")
        axes.set_ylabel("loss (nats per token)")
        axes.set_xlim(-0.03, 1.03)
        axes.set_title(f"{_short(self.a['source'])} to {_short(self.b['source'])}", fontsize="medium")
        axes.grid(alpha=0.25)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
        figure.savefig(path, dpi=160)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(source: str) -> str:
    """A Hub id as it is, a folder by its name."""
    return Path(source).resolve().name if Path(source).is_dir() else source
