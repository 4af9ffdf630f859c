"""The results in the form of the paper's tables: from the JSON of a run to Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from hf_moe_lmc.runtime import tables as text_tables

from .paper import TABLE_2

Cell = dict[str, Any]
LEAST = 1e-3  # nats; a share of less is not formed
ALIGNED = {"gate": "gate order", "expert": "Gram order", "default": "by default"}
GATINGS = {"dense": "dense", "sparse": "sparse, top-2", "shared": "sparse and shared"}
KINDS = {
    "mixtral_dense": "Mixtral, all of 4 experts",
    "mixtral": "Mixtral, 2 of 4",
    "qwen2_moe": "Qwen2-MoE, 2 of 8 and shared",
    "deepseek_v3": "DeepSeek-V3, 2 of 8 and shared, sigmoid",
}


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; where a run left no row for it, a sentence that says so."""
    return text_tables.markdown_table(heads, rows) if rows else "This run measured nothing of it.\n"


@dataclass(frozen=True)
class Results:
    """What a run left."""

    found: dict[str, Any]

    def cells(self, table: str) -> list[Cell]:
        return [self.found["cells"][name] for name in self.found["tables"][table]]


def values(cell: Cell, path: str, figure: str) -> list[float]:
    """A figure of one path of each pair of a setting."""
    return [pair["paths"][path][figure] for pair in cell["pairs"]]


def spread(numbers: Sequence[float], digits: int = 3) -> str:
    """The mean, and the standard deviation where there are several."""
    text = f"{mean(numbers):.{digits}f}"
    return f"{text} ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else text


def percent(shares: Sequence[float | None]) -> str:
    """Mean and deviation of the shares that are any; a dash where none is."""
    known = [one for one in shares if one is not None]
    return f"{spread(known, 2)} %" if known else "-"


def share(cell: Cell, path: str, figure: str = "loss_barrier") -> str:
    """The mean of a figure along one path as a percentage of the naive one; a dash where the naive one is nothing."""
    naive = mean(values(cell, "naive", figure))
    return f"{100 * mean(values(cell, path, figure)) / naive:.0f} %" if naive >= LEAST else "-"


def of_block(cell: Cell, path: str) -> str:
    """The mean barrier as a percentage of what the trained blocks contribute to the loss."""
    gains = [pair["without_blocks"] - mean((p := pair["paths"]["naive"]["loss"])[:: len(p) - 1]) for pair in cell["pairs"]]
    return f"{100 * mean(values(cell, path, 'loss_barrier')) / mean(gains):.1f} %" if mean(gains) >= LEAST else "-"


def model(cell: Cell) -> str:
    return GATINGS[cell["gating"]] if cell["kind"] == "paper" else KINDS[cell["kind"]]


def barriers(results: Results) -> str:
    """Tables 1 and 5: the barrier of the loss."""
    rows = [
        (
            cell["data"],
            model(cell),
            cell["place"],
            spread(values(cell, "naive", "loss_barrier")),
            *(spread(values(cell, path, "loss_barrier")) for path in ALIGNED),
            share(cell, "default"),
            of_block(cell, "default"),
        )
        for cell in results.cells("places")
    ]
    heads = ("data", "gating", "MoE", "naive", *ALIGNED.values(), "left", "of the worth")
    return markdown_table(heads, rows)


def areas(results: Results) -> str:
    """Tables 1 and 5: the area of the loss, and barrier and area of the accuracy."""
    rows = []
    for cell in results.cells("places"):
        row = [cell["data"], model(cell), cell["place"]]
        for figure, scale, digits in (("loss_area", 1, 3), ("accuracy_barrier", 100, 1), ("accuracy_area", 100, 1)):
            for path in ("naive", "default"):
                row.append(spread([scale * value for value in values(cell, path, figure)], digits))
        rows.append(row)
    figures = ("loss area", "accuracy barrier", "accuracy area")
    heads = ("data", "gating", "MoE", *(f"{what}, {path}" for what in figures for path in ("naive", "aligned")))
    return markdown_table(heads, rows)


def ranks_of(cell: Cell, method: str) -> list[tuple[int, float | None, float, float]]:
    """Of each pair: the rank of the order that a method chose among all, L in percent, its barrier, that of the best order.

    L is None where the naive barrier is not above that of the best order by LEAST: it would be a ratio of noise.
    """
    found = []
    for pair in cell["pairs"]:
        (order,) = pair["chosen"][method].values()
        own, best = pair["orders"][" ".join(map(str, order))], min(pair["orders"].values())
        naive = pair["paths"]["naive"]["loss_barrier"]
        rank = 1 + sum(other < own - 1e-9 for other in pair["orders"].values())
        part = 100 * (own - best) / (naive - best) if naive - best >= LEAST else None
        found.append((rank, part, own, best))
    return found


def table_2(results: Results) -> str:
    """Table 2, with the absolute barriers that L cannot show; the paper's rank and L of CIFAR-10 and CIFAR-100 beside it."""
    rows = []
    for cell in results.cells("ranks"):
        layer = cell["moe"][0] + 1
        theirs = [TABLE_2.get((data, layer)) for data in ("CIFAR-10", "CIFAR-100")]
        for number, (method, words) in enumerate((("expert", "Gram"), ("gate", "gate"))):
            rank, part, own, best = zip(*ranks_of(cell, method), strict=True)
            paper = [_of_paper(one[number]) if one else "-" for one in theirs]
            rows.append(
                (
                    cell["data"], f"{layer} of {cell['layers']}", words, spread(rank, 1), percent(part),
                    spread(values(cell, "naive", "loss_barrier")), spread(own), spread(best), *paper,
                )
            )  # fmt: skip
    heads = (
        "data", "layer", "order by", "rank of 24", "L", "naive", "chosen order", "best order",
        "paper, CIFAR-10: rank, L", "CIFAR-100",
    )  # fmt: skip
    return markdown_table(heads, rows)


def _of_paper(figures: tuple[float, float, float, float]) -> str:
    rank, rank_spread, part, part_spread = figures
    return f"{rank:.1f} ± {rank_spread:.1f}, {part:.2f} ± {part_spread:.2f} %"


def depths(results: Results) -> str:
    """Tables 3 and 11 to 13: what is left of barrier and area, by number of layers and position."""
    rows = [
        (
            cell["data"],
            model(cell),
            str(cell["layers"]),
            str(cell["moe"][0] + 1),
            spread(values(cell, "naive", "loss_barrier")),
            spread(values(cell, "default", "loss_barrier")),
            *(share(cell, "default", figure) for figure in ("loss_barrier", "loss_area", "accuracy_barrier", "accuracy_area")),
        )
        for cell in results.cells("depths")
    ]
    heads = (
        "data", "gating", "layers", "MoE in layer", "naive", "aligned", "left: loss barrier", "loss area", "accuracy barrier",
        "accuracy area",
    )  # fmt: skip
    return markdown_table(heads, rows)


def skipped(results: Results) -> str:
    """Table 10: stage 2 without stage 1."""
    rows = [
        (
            cell["data"],
            model(cell),
            cell["place"],
            *(spread(values(cell, path, "loss_barrier")) for path in ("naive", "order_skipped", "gate", "expert")),
            f"{mean(values(cell, 'order_skipped', 'loss_barrier')) - best(cell):+.3f}",
        )
        for cell in results.cells("places")
    ]
    heads = ("data", "gating", "MoE", "naive", "order skipped", "both stages, gate", "both stages, Gram", "skipping costs")
    return markdown_table(heads, rows)


def best(cell: Cell) -> float:
    """The lower of the paper's two methods, means over the pairs."""
    return min(mean(values(cell, path, "loss_barrier")) for path in ("gate", "expert"))


def sweep(results: Results) -> str:
    """The number of experts."""
    return _plain(
        results.cells("sweep"), ("data", "gating", "experts"), lambda cell: (cell["data"], model(cell), str(cell["experts"]))
    )


def classes(results: Results) -> str:
    """Classes of transformers."""
    return _plain(results.cells("classes"), ("model", "MoE drawn anew"), lambda cell: (model(cell), cell["place"]))


def _plain(cells: Iterable[Cell], heads: tuple[str, ...], words: Callable[[Cell], tuple[str, ...]]) -> str:
    rows = [
        (
            *words(cell),
            *(spread(values(cell, path, "loss_barrier")) for path in ("naive", "order_skipped", *ALIGNED)),
            share(cell, "default"),
        )
        for cell in cells
    ]
    return markdown_table((*heads, "naive", "order skipped", *ALIGNED.values(), "left"), rows)


def claims(results: Results) -> str:
    """What each change of the weights does to the loss: the least and the largest change over all models."""
    found = list(results.found["claims"].values())
    rows = []
    for kind, words in (("claims", "stays"), ("controls", "changes")):
        names = dict.fromkeys(name for one in found for name in one[kind])
        for name in names:
            changes = [abs(one[kind][name]) for one in found if name in one[kind]]
            where = "sigmoid gates" if kind == "controls" and name.startswith("all router") else "all"
            if kind == "claims" and name.startswith("all router"):
                where = "softmax gates"
            rows.append((name, words, where, str(len(changes)), _change(min(changes)), _change(max(changes))))
    for name, expected in _top_1(found):
        changes = [abs(value) for one in found for key, value in one.get("top_1", {}).items() if key == name]
        reach = _change(min(changes)), _change(max(changes))
        rows.append((f"top-1 gate: {name}", expected, "paper's models", str(len(changes)), *reach))
    return markdown_table(("change of every MoE layer", "the loss", "of", "models", "least change, nats", "largest"), rows)


def _top_1(found: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    names = dict.fromkeys(name for one in found for name in one.get("top_1", {}))
    return [(name, "stays" if name.startswith("k = 1") and "-" not in name else "changes") for name in names]


def _change(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}" if value < 1e-4 else f"{value:.4f}"


def translated(results: Results) -> str:
    """Prop. D.1: the barrier with B's router rows translated."""
    rows = []
    for one in results.found["claims"].values():
        words = GATINGS[one["gating"]] if one["kind"] == "paper" else KINDS[one["kind"]]
        barrier = one["barrier"]
        rows.append(
            (
                one["data"], words, one["router"], f"{barrier['aligned']:.5f}", f"{barrier['aligned_and_translated']:.5f}",
                _change(barrier["largest_difference_on_the_curve"]),
            )
        )  # fmt: skip
    return markdown_table(("data", "gating", "router", "barrier", "translated", "largest difference on the curve"), rows)


def data(results: Results) -> str:
    rows = []
    for name, one in results.found["data"].items():
        if "proof" in one:
            proof = one["proof"]
            sizes = f"{one['train_tokens']:,} tokens", f"{one['test_tokens']:,} tokens"
            apart = (
                f"{proof['shared_windows']} of {proof['test_windows']:,} windows of {proof['window']} tokens are shared; "
                f"{proof['training_tokens_cut_out']:,} training tokens were cut out"
            )
        else:
            sizes = f"{one['train_images']:,} images", f"{one['test_images']:,} images"
            apart = f"no image is in both; {one['training_images_left_out_because_tested']} were left out"
        rows.append((name, one["source"], *sizes, apart))
    return markdown_table(("data", "source", "trained on", "evaluated on", "apart"), rows)
