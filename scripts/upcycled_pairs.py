"""What scripts/upcycling.py measures of one pair of models, with the package's own matching and evaluation.

Losses are nats per token at t = 0.5, by domain and on the unweighted mean of the domains.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from repaired_pairs import HALF, MEAN, Texts, by_text, documents, ensemble, repaired
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_moe_lmc.errors import MoELMCWarning
from hf_moe_lmc.matching.alignment import Alignment, align_models
from hf_moe_lmc.matching.assignment import assign
from hf_moe_lmc.matching.options import OrderMethod, WeightMatching
from hf_moe_lmc.matching.units import UnitRows, match_units
from hf_moe_lmc.path.endpoints import Point
from hf_moe_lmc.runtime.progress import silenced
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.elements import BankSymmetry
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry
from hf_moe_lmc.verbs.inputs import Inputs, Pair
from hf_moe_lmc.verbs.measuring import Asked, Subject

ORACLE_TOKENS = 2048  # of each domain, on which the best order is looked for
ORACLE_EXPERTS = 4  # at most: all orders are tried


@dataclass(frozen=True)
class Job:
    """One pair, and on which text it is measured.

    Attributes:
        about: what the pair is, as in the result.
        texts, calibration: files by domain.
        domains: names of the texts that A, and that B, was trained on.
        orders: whether other orders of the experts are measured, and averages of some weights alone.
        oracle: whether the order of least loss is looked for.
    """

    about: Mapping[str, Any]
    a: Path
    b: Path
    texts: Mapping[str, Path]
    calibration: Mapping[str, Path]
    context: int
    tokens: int
    domains: tuple[Sequence[str], Sequence[str]]
    orders: bool
    oracle: bool

    @property
    def for_repairs(self) -> Texts:
        evaluation, calibration = (
            {name: documents(path) for name, path in files.items()} for files in (self.texts, self.calibration)
        )
        return Texts(evaluation, calibration, self.domains, self.context, self.tokens)

    def asked(self, tokens: int | None = None) -> Asked:
        return Asked.of(
            {
                "text": self.texts,
                "context": self.context,
                "max_tokens": tokens or self.tokens,
                "points": 2,
                "routing": False,
                "device": "cpu",
            }
        )


def measure(job: Job) -> dict[str, Any]:
    """Everything that is measured of a pair, ready for JSON."""
    with warnings.catch_warnings(), silenced():
        warnings.simplefilter("ignore", MoELMCWarning)  # of orders that are worse than none, which is measured here
        started = time.perf_counter()
        found = _measure(job)
        return {**job.about, **found, "seconds": round(time.perf_counter() - started, 1)}


def _measure(job: Job) -> dict[str, Any]:
    with ExitStack() as stack:
        pair = Inputs(stack).pair(job.a, job.b)
        aligned = align_models(pair.a, pair.b, WeightMatching())
        paths = {"aligned": aligned.symmetry, "naive": pair.b.identity()}
        if job.orders:
            paths |= orders(pair, aligned.symmetry)
        losses = Losses(Subject.of(pair, job.asked()))
        points = {"a": Point("naive", 0.0), "b": Point("naive", 1.0), **{path: Point(path, HALF) for path in paths}}
        found = losses.at(paths, points)
        if job.oracle:
            best = oracle_order(Losses(Subject.of(pair, job.asked(ORACLE_TOKENS))), aligned.symmetry)
            found |= losses.at({"best order": best}, {"best order": Point("best order", HALF)})
        if job.orders:
            found |= parts(job, set(pair.a.outside), aligned.symmetry)
        repairs, auto = repaired(pair, aligned.symmetry, job.for_repairs)
        found |= {**repairs, "ensemble": ensemble(pair, job.for_repairs)}
    return {"losses": found, "matching": distances(aligned), "auto": auto}


def orders(pair: Pair, symmetry: ModelSymmetry) -> dict[str, ModelSymmetry]:
    """Other orders of the experts than that of `best`."""
    methods: dict[str, OrderMethod] = {"gate order": "gate", "Gram order": "expert"}
    found = {name: align_models(pair.a, pair.b, WeightMatching(order=order)).symmetry for name, order in methods.items()}
    return {**found, "joint order": joint_order(pair, symmetry), "order only": without_units(symmetry)}


@dataclass(frozen=True)
class Losses:
    """Losses of one pair of models on their texts."""

    subject: Subject

    def at(self, symmetries: Mapping[str, ModelSymmetry], points: Mapping[str, Point]) -> dict[str, dict[str, float]]:
        """By the names of the points: the loss on each text and on their mean, nats per token."""
        sums, _ = self.subject.evaluator.evaluate(symmetries, list(points.values()))
        return {name: by_text(self.subject.evaluator.windows, row) for name, row in zip(points, sums, strict=True)}


def without_units(symmetry: ModelSymmetry) -> ModelSymmetry:
    """The order of the experts alone."""
    layers = {}
    for number, element in symmetry.layers.items():
        bank = element.banks[FIRST]
        units = BankSymmetry.identity(*bank.unit_order.shape)
        layers[number] = LayerSymmetry({FIRST: replace(units, expert_order=bank.expert_order)}, element.shared)
    return replace(symmetry, layers=layers)


def with_orders(pair: Pair, symmetry: ModelSymmetry, orders: Mapping[int, Tensor]) -> ModelSymmetry:
    """Experts in other orders in some layers, their units matched in these."""
    layers = dict(symmetry.layers)
    for number, order in orders.items():
        a, b = (model.layers[number].banks[FIRST] for model in (pair.a, pair.b))
        rows = [[UnitRows.of(bank, i, torch.device("cpu")) for i in range(bank.experts)] for bank in (a, b)]
        units = [match_units(rows[0][i], rows[1][int(j)], "scaled").symmetry for i, j in enumerate(order)]
        bank = BankSymmetry(order, torch.stack([u.order for u in units]), torch.stack([u.scale for u in units]))
        layers[number] = LayerSymmetry({FIRST: bank}, symmetry.layers[number].shared)
    return replace(symmetry, layers=layers)


def joint_order(pair: Pair, symmetry: ModelSymmetry) -> ModelSymmetry:
    """The orders of least distance once units are matched, from all pairs of experts."""
    orders = {}
    for number, layer in pair.a.layers.items():
        rows = [
            [UnitRows.of(own.banks[FIRST], i, torch.device("cpu")) for i in range(own.experts)]
            for own in (layer, pair.b.layers[number])
        ]
        cost = [[match_units(a, b, "scaled").squared_after for b in rows[1]] for a in rows[0]]
        orders[number] = assign(torch.tensor(cost, dtype=torch.float64))
    return with_orders(pair, symmetry, orders)


def oracle_order(losses: Losses, symmetry: ModelSymmetry) -> ModelSymmetry:
    """The orders of least loss at the midpoint, all tried in one layer after the other."""
    pair, best = losses.subject.pair, symmetry
    for number, element in symmetry.layers.items():
        experts = len(element.banks[FIRST].expert_order)
        tried = {
            " ".join(map(str, order)): with_orders(pair, best, {number: torch.tensor(order)})
            for order in permutations(range(experts))
        }
        found = losses.at(tried, {name: Point(name, HALF) for name in tried})
        best = tried[min(found, key=lambda name: found[name][MEAN])]
    return best


def parts(job: Job, outside: Collection[str], symmetry: ModelSymmetry) -> dict[str, dict[str, float]]:
    """Losses where only the MoE blocks are averaged, or only what is outside them; the other part is A's.

    Args:
        outside: names of the tensors outside the MoE blocks.
    """
    a, b = (load_file(path / "model.safetensors") for path in (job.a, job.b))
    found: dict[str, dict[str, float]] = {}
    for name, ends in (("blocks", a), ("outside", b)):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            moe = b if name == "blocks" else a
            mixed = {key: ends[key] if key in outside else moe[key] for key in a}
            save_file(mixed, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            for path in job.a.glob("*.json"):
                shutil.copy(path, folder)
            pair = Inputs(stack).pair(job.a, folder)
            symmetries = {"naive": pair.b.identity(), "aligned": symmetry}
            points = {f"{name} {path}": Point(path, HALF) for path in symmetries if name == "blocks" or path == "naive"}
            found |= Losses(Subject.of(pair, job.asked())).at(symmetries, points)
    return found


def distances(alignment: Alignment) -> dict[str, float]:
    """How far apart the models are, relative to A's norm, and what the alignment changes."""
    totals = alignment.totals()
    kept = ("experts_moved", "units_moved", "relative_distance_before", "relative_distance_after_order")
    found = {name: totals[name] for name in (*kept, "relative_distance_after_units")}
    return {**found, "relative_distance_outside": alignment.outside.relative_distance}
