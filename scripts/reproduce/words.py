"""What the figures of a run come to, in sentences: each is computed, and is left out or turned where the figures say so."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

from .tables import KINDS, Cell, Results, best, model, ranks_of, values

NEAR = 0.01  # nats; a barrier below it is called small
PLACES = ("first", "last", "all")


def average(cell: Cell, path: str, figure: str = "loss_barrier") -> float:
    return mean(values(cell, path, figure))


def left(cell: Cell, path: str = "default") -> float:
    """What alignment leaves of the naive barrier, percent."""
    return 100 * average(cell, path) / average(cell, "naive")


def to_align(cells: list[Cell]) -> list[Cell]:
    """Those with a naive barrier that is more than small."""
    return [cell for cell in cells if average(cell, "naive") >= NEAR]


def ran(results: Results) -> str:
    """What ran, where."""
    found = results.found
    machine, run = found["machine"], found["run"]
    count = len(run["seeds"]) * (len(run["seeds"]) - 1) // 2
    pairs = "one pair of each, so without a spread" if count == 1 else f"{count} pairs of each. ± is their standard deviation"
    where = machine["processor"] + ("" if machine["device"] == "cpu" else f", {machine['device']}")
    missing = f"{len(found['missing'])} settings are missing: the run was stopped."
    return (
        f"`{found['command']}` trained and measured {len(found['cells'])} settings with {len(run['seeds'])} seeds, {pairs}. It "
        f"took {found['cpu_seconds']['all'] / 60:.0f} minutes of CPU ({where}). Python {machine['python']}, torch "
        f"{machine['torch']}, transformers {machine['transformers']}. {missing if found['missing'] else 'Nothing is missing.'}"
    )


def short(results: Results) -> Iterator[str]:
    """The result in brief."""
    cells = results.cells("places")
    if not cells:
        return
    lower = sum(average(cell, "default") < average(cell, "naive") for cell in cells)
    shares = [left(cell) for cell in to_align(cells)]
    yield f"Alignment lowers the barrier in {lower} of {len(cells)} settings of data, gating and place." + (
        f" Where the naive one is {NEAR:g} nats or more, {min(shares):.0f} to {max(shares):.0f} % of it is left."
        if shares
        else ""
    )
    small = sum(average(cell, "default") < NEAR for cell in cells)
    highest = max(average(cell, "default") for cell in cells)
    yield f"The aligned barrier is below {NEAR:g} nats in {small} of them. The highest is {highest:.3f} nats."
    claims = list(results.found["claims"].values())
    if claims:
        worst = max(abs(value) for one in claims for value in one["claims"].values())
        least = min(abs(value) for one in claims for value in one["controls"].values())
        yield (
            f"What is a symmetry moves the loss by at most {worst:.0e} nats, in {len(claims)} models. With a part "
            "left out, the loss "
            f"moves by {least:.0e} nats at least."
        )


def table_2(results: Results) -> Iterator[str]:
    """What Table 2 comes to."""
    cells = results.cells("ranks")
    found = [one for cell in cells for method in ("expert", "gate") for one in ranks_of(cell, method)]
    if found:
        ranks, own, lowest = [one[0] for one in found], [one[2] for one in found], [one[3] for one in found]
        shares = [one[1] for one in found if one[1] is not None]
        yield f"Over layers, methods and pairs our mean rank is {mean(ranks):.1f} of 24. A random order has 12.5."
        if shares:
            yield f"The mean L is {mean(shares):.1f} %."
        yield (
            f"The chosen orders leave {min(own):.3f} to {max(own):.3f} nats, and the best orders {min(lowest):.3f} to "
            f"{max(lowest):.3f}."
        )


def table_10(results: Results) -> Iterator[str]:
    """What skipping the order costs, against the better of the paper's two orders."""
    cells = results.cells("places")
    for data in dict.fromkeys(cell["data"] for cell in cells):
        costs = [average(cell, "order_skipped") - best(cell) for cell in cells if cell["data"] == data]
        higher = sum(cost > 0 for cost in costs)
        yield (
            f"On {data}, skipping the order gives a higher barrier in {higher} of {len(costs)} settings. It costs "
            f"{mean(costs):.3f} "
            f"nats on average, from {min(costs):+.3f} to {max(costs):+.3f}."
        )


def experts(results: Results) -> Iterator[str]:
    """What the number of experts changes."""
    cells = sorted(results.cells("sweep"), key=lambda cell: cell["experts"])
    for data, gating in dict.fromkeys((cell["data"], cell["gating"]) for cell in cells):
        of_one = [cell for cell in cells if (cell["data"], cell["gating"]) == (data, gating)]
        if len(of_one) > 1 and all(average(cell, "naive") >= NEAR for cell in of_one):
            few, many = of_one[0], of_one[-1]
            yield (
                f"On {data}, {model(few)}: {few['experts']} experts leave {left(few):.0f} % of the naive barrier, "
                f"{many['experts']} "
                f"leave {left(many):.0f} %."
            )


def differences(results: Results) -> Iterator[str]:
    """Where ours differ from what the paper says, each with the figures that show it."""
    yield from _places(results)
    yield from _remains(results)
    yield from _causes(results)
    yield (
        "Our models are far smaller than the paper's, and trained on little data. How much of a difference comes from that, "
        "this run cannot tell."
    )


def _places(results: Results) -> Iterator[str]:
    cells = results.cells("places")
    for data in dict.fromkeys(cell["data"] for cell in cells):
        naive = {
            place: mean(average(cell, "naive") for cell in found)
            for place in PLACES
            if (found := [cell for cell in cells if cell["data"] == data and cell["place"] == place])
        }
        if {"first", "last"} <= naive.keys():
            agrees = "as in the paper" if naive["last"] < naive["first"] else "which the paper finds the other way round"
            order = "least" if naive["last"] < naive["first"] else "more"
            yield (
                f"On {data} the last layer tells {order}: its naive barrier is {naive['last']:.3f} nats on average, "
                "that of the "
                f"first {naive['first']:.3f}, {agrees}."
            )


def _remains(results: Results) -> Iterator[str]:
    cells = results.cells("places")
    remains = [cell for cell in cells if average(cell, "default") >= NEAR]
    if remains:
        worst = max(remains, key=lambda cell: average(cell, "default"))
        yield (
            f"The paper finds barriers near nothing everywhere. In {len(remains)} of our {len(cells)} settings "
            f"{NEAR:g} nats or more "
            f"remain. The most is left on {worst['data']}, {model(worst)} gating, {worst['place']}: "
            f"{average(worst, 'default'):.3f} "
            f"of {average(worst, 'naive'):.3f} nats."
        )
    classes = [cell for cell in results.cells("classes") if average(cell, "default") >= NEAR]
    for cell in classes:
        yield f"{KINDS[cell['kind']]} keeps {average(cell, 'default'):.3f} of {average(cell, 'naive'):.3f} nats."


def _causes(results: Results) -> Iterator[str]:
    cells = results.cells("ranks")
    if cells:
        lowest = [one[3] for cell in cells for one in ranks_of(cell, "expert")]
        yield (
            f"A wrong order is not what remains in the 12-layer ViT: the best of all 24 leaves {min(lowest):.3f} to "
            f"{max(lowest):.3f} nats. L subtracts that, so that a small L does not say that two models are connected."
        )
    cells = to_align(results.cells("places"))
    if cells:
        skipped, both = (mean(left(cell, path) for cell in cells) for path in ("order_skipped", "expert"))
        yield (
            "Hidden units do most of the work. Matched in the order that the experts have, they leave "
            f"{skipped:.0f} % of the naive "
            f"barrier on average; with the Gram order, {both:.0f} %."
            if skipped < 50
            else f"Hidden units alone leave {skipped:.0f} % of the naive barrier on average; with the Gram order, {both:.0f} %."
        )
    from_gate = [
        one for cell in results.cells("places") for one in cell["pairs"] if one["chosen"]["gate"] != one["chosen"]["expert"]
    ]
    pairs = sum(len(cell["pairs"]) for cell in results.cells("places"))
    if pairs:
        yield f"The paper's two methods choose different orders in some layer of {len(from_gate)} of {pairs} pairs."
