"""Repaired merges of a pair and the ensemble of both, for the scripts beside this one: with the package's own functions."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.ensemble import Ensemble
from hf_moe_lmc.path.point_model import load_point
from hf_moe_lmc.path.tokenizer import common_tokenizer
from hf_moe_lmc.perplexity.by_text import TextMeans
from hf_moe_lmc.perplexity.windows import Windows, cut_texts, window_losses
from hf_moe_lmc.repair.calibrated_run import Calibrated, Calibration
from hf_moe_lmc.repair.choice import choose
from hf_moe_lmc.repair.data_free import starts
from hf_moe_lmc.repair.halves import cut, part_of
from hf_moe_lmc.repair.methods import ALIGNED, methods_of
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.inputs import Pair
from hf_moe_lmc.writing.results import ResultFolder

HALF = 0.5
MEAN = "mean"
FOR = "calibration "  # before the name of a text
BATCH = 64  # windows


@dataclass(frozen=True)
class Texts:
    """Documents by the name of the text.

    Attributes:
        domains: names of the texts that A, and that B, was trained on.
        tokens: to read of each text.
    """

    evaluation: Mapping[str, Sequence[str]]
    calibration: Mapping[str, Sequence[str]]
    domains: tuple[Sequence[str], Sequence[str]]
    context: int
    tokens: int

    def windows(self, pair: Pair, *, calibration: bool, evaluation: bool) -> Windows:
        """Of both kinds of text, or of one; those for calibration are named `calibration NAME`."""
        wanted = {f"{FOR}{name}": documents for name, documents in self.calibration.items() if calibration}
        wanted |= {name: documents for name, documents in self.evaluation.items() if evaluation}
        return cut_texts(
            [iter(documents) for documents in wanted.values()],
            common_tokenizer(pair.a, pair.b),
            context=self.context,
            max_tokens=self.tokens,
            names=tuple(wanted),
        )

    def run(self, pair: Pair, symmetry: ModelSymmetry, windows: Windows) -> Calibrated:
        own_of_a, own_of_b = (frozenset(f"{FOR}{name}" for name in own) for own in self.domains)
        options = EvaluationOptions(model_class=language_model_class(pair.a), batch_size=BATCH, device="cpu")
        made = starts(pair.a, pair.b, symmetry.layers, HALF)
        return Calibrated(pair.a, pair.b, symmetry, HALF, Calibration(windows, (own_of_a, own_of_b)), options, made)


def repaired(pair: Pair, symmetry: ModelSymmetry, texts: Texts) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Losses at t = 0.5 by method, on each evaluation text and on their mean; and what `auto` chose.

    A method alone is fitted on one half of the calibration text, and its lambda chosen on the other. `auto` is what
    `merge --repair auto` does.
    """
    windows = texts.windows(pair, calibration=True, evaluation=True)
    names = windows.text_of
    for_calibration = [i for i, name in enumerate(names) if name.startswith(FOR)]
    evaluated = [i for i, name in enumerate(names) if not name.startswith(FOR)]
    fit, compare = cut(windows, for_calibration)
    methods = [ALIGNED, *methods_of("auto")]
    losses = texts.run(pair, symmetry, windows).run(methods, fit, [*compare, *evaluated]).losses
    chosen_on = TextMeans(part_of(windows, compare)).of(None, losses[:, : len(compare)].numpy())
    best: dict[str, int] = {}
    for number in range(1, len(methods)):
        name = methods[number].name
        if name not in best or chosen_on[number] < chosen_on[best[name]]:
            best[name] = number
    own = part_of(windows, evaluated)
    found = {name: by_text(own, losses[number, len(compare) :]) for name, number in best.items()}
    auto, record = _auto(pair, symmetry, texts)
    return found | {"auto": auto}, record


def _auto(pair: Pair, symmetry: ModelSymmetry, texts: Texts) -> tuple[dict[str, float], dict[str, Any]]:
    run = texts.run(pair, symmetry, texts.windows(pair, calibration=True, evaluation=False))
    own = texts.windows(pair, calibration=False, evaluation=True)
    with tempfile.TemporaryDirectory() as folder:
        choice = choose(run, "auto", ResultFolder(Path(folder)))
        model = load_point(choice.stream(run), dtype=torch.float32, device="cpu", offload_folder=Path(folder))
        losses = window_losses(model, own, batch_size=BATCH)
    return by_text(own, losses), {"chosen": str(choice.method), "accepted": choice.accepted}


def ensemble(pair: Pair, texts: Texts) -> dict[str, float]:
    """The better of both kinds of ensemble on the mean of the texts."""
    own = texts.windows(pair, calibration=False, evaluation=True)
    options = EvaluationOptions(model_class=language_model_class(pair.a), batch_size=BATCH, device="cpu")
    scores = Ensemble(*pair.alone, own, options).score([HALF])[HALF]
    return min((by_text(own, found.losses[0]) for found in scores.values()), key=lambda losses: losses[MEAN])


def by_text(windows: Windows, losses: Tensor) -> dict[str, float]:
    """Mean losses on each text and the mean of these, nats per token.

    Args:
        losses: float64 [window], nats, summed over each window.
    """
    means = TextMeans(windows)
    row = losses[None].numpy()
    return {**{name: float(means.of(name, row)[0]) for name in means.names}, MEAN: float(means.of(None, row)[0])}


def documents(lines: Path) -> list[str]:
    """The texts of a .jsonl file."""
    return [json.loads(line)["text"] for line in lines.read_text(encoding="utf-8").splitlines()]
