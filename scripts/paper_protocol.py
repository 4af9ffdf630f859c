"""The paper's protocol (Sec. 6.2) on small Mixtral models, three pairs per setting: how much of the barrier is left?

    python scripts/paper_protocol.py -o scripts/paper_protocol.json --models DIR

trains a base, reinitialises the MoE block of the first, the last or all layers with three seeds, trains each with
everything else frozen, and measures every pair on held-out text: naive, aligned by default, and aligned with plain units
in the paper's two orders. Also reported for each trained layer: how far the chosen order is from the joint optimum over
orders of the unit-matched distance, which two stages do not promise to find. Models in DIR are kept and reused. About
fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import MixtralForCausalLM, PreTrainedModel

from hf_moe_lmc import BarrierReport, barrier
from hf_moe_lmc.example.protocol import (
    Training,
    reinitialise,
    small_mixtral,
    standard_library_text,
    token_stream,
    train,
    train_tokenizer,
)
from hf_moe_lmc.matching.assignment import assign
from hf_moe_lmc.matching.units import UnitRows, match_units
from hf_moe_lmc.verbs.inputs import Inputs

CONFIG = small_mixtral(hidden_size=128, layers=3, intermediate_size=256)
BASE = Training(steps=1000, learning_rate=2e-3)
BLOCK = Training(steps=400, learning_rate=1e-3)
INIT_STD = 0.02
SETTINGS = {"first": [0], "last": [2], "all": [0, 1, 2]}
SEEDS = (1, 2, 3)
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain_gate": {"units": "plain", "order": "gate"},
    "plain_expert": {"units": "plain", "order": "expert"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--models", type=Path, required=True, help="folder of the trained models; what is there is reused")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens to evaluate on")
    options = parser.parse_args()
    started = time.perf_counter()
    options.models.mkdir(parents=True, exist_ok=True)
    train_models(options.models, options.settings)
    settings = {name: measure(options.models, name, options.points, options.tokens) for name in options.settings}
    result = {
        "command": "python scripts/paper_protocol.py -o scripts/paper_protocol.json --models DIR",
        "protocol": {
            "config": {key: CONFIG.to_dict()[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size")}
            | {"num_local_experts": CONFIG.num_local_experts, "num_experts_per_tok": CONFIG.num_experts_per_tok},
            "base": asdict(BASE),
            "block": asdict(BLOCK),
            "init_std": INIT_STD,
            "seeds": SEEDS,
            "text": f"documentation strings of Python {platform.python_version()}'s standard library",
            "points": options.points,
            "held_out_tokens": options.tokens,
        },
        "settings": settings,
        "seconds": time.perf_counter() - started,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, setting in settings.items():
        shares = "  ".join(f"{method} {setting['mean_percent_of_naive'][method]:.1f} %" for method in METHODS)
        print(f"{name:6} naive {setting['mean_naive_barrier']:.3f} nats; left: {shares}")


def train_models(root: Path, settings: list[str]) -> None:
    corpus = standard_library_text()
    tokenizer = train_tokenizer(corpus.train)
    tokens = token_stream(tokenizer, corpus.train)
    (root / "held_out.txt").write_text("\n\n".join(corpus.held_out), encoding="utf-8")

    def trained(name: str, model: PreTrainedModel, recipe: Training, seed: int, layers: list[int] | None) -> None:
        with tqdm(total=recipe.steps, desc=f"training {name}", unit="step") as bar:
            train(model, tokens, recipe, seed=seed, layers=layers, progress=lambda step: bar.update(1))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)

    if not (root / "base" / "tokenizer.json").exists():
        torch.manual_seed(0)
        trained("base", MixtralForCausalLM(CONFIG), BASE, 0, None)
    base = MixtralForCausalLM.from_pretrained(root / "base")
    for setting in settings:
        for seed in SEEDS:
            name = f"{setting}-{seed}"
            if not (root / name / "tokenizer.json").exists():
                model = copy.deepcopy(base)
                reinitialise(model, SETTINGS[setting], std=INIT_STD, seed=seed)
                trained(name, model, BLOCK, seed, SETTINGS[setting])


def measure(root: Path, setting: str, points: int, tokens: int) -> dict[str, Any]:
    pairs: list[dict[str, Any]] = []
    for one, other in combinations(SEEDS, 2):
        a, b = root / f"{setting}-{one}", root / f"{setting}-{other}"
        reports: dict[str, BarrierReport] = {}
        for method, options in METHODS.items():
            with tempfile.TemporaryDirectory() as folder:
                reports[method] = barrier(
                    a,
                    b,
                    folder,
                    text=[root / "held_out.txt"],
                    context=64,
                    max_tokens=tokens,
                    points=points,
                    naive=method == "default",
                    **options,
                )
        naive = reports["default"].naive
        assert naive is not None
        pairs.append(
            {
                "seeds": [one, other],
                "losses_at_the_ends": [naive.nll[0], naive.nll[-1]],
                "naive_barrier": naive.barrier,
                "barrier": {method: report.aligned.barrier for method, report in reports.items()},
                "percent_of_naive": {
                    method: 100 * report.aligned.barrier / naive.barrier for method, report in reports.items()
                },
                "endpoint_change": reports["default"].endpoint_change,
                "order_gap": order_gaps(a, b, SETTINGS[setting], reports["default"]),
            }
        )
    return {
        "layers": SETTINGS[setting],
        "pairs": pairs,
        "mean_naive_barrier": mean(pair["naive_barrier"] for pair in pairs),
        "mean_percent_of_naive": {
            method: 100 * mean(pair["barrier"][method] for pair in pairs) / mean(pair["naive_barrier"] for pair in pairs)
            for method in METHODS
        },
    }


def order_gaps(a: Path, b: Path, layers: list[int], report: BarrierReport) -> list[dict[str, float]]:
    """Distance after the units under the chosen order, relative to the best of all orders (n^2 unit assignments)."""
    gaps = []
    chosen = {layer["layer"]: layer["distance_after_units"] for layer in report.matching["layers"]}
    with ExitStack() as stack:
        pair = Inputs(stack).pair(a, b)
        for index in layers:
            of_a, of_b = pair.a.layers[index], pair.b.layers[index]
            rows = [
                [UnitRows.of(layer.banks[""], i, torch.device("cpu")) for i in range(layer.experts)] for layer in (of_a, of_b)
            ]
            squared = torch.tensor(
                [[match_units(x, y, "scaled").squared_after for y in rows[1]] for x in rows[0]], dtype=torch.float64
            )
            order = assign(squared.clone())
            joint = float(squared[torch.arange(len(order)), order].sum()) ** 0.5
            gaps.append({"layer": index, "chosen": chosen[index], "joint_optimum": joint, "ratio": chosen[index] / joint})
    return gaps


if __name__ == "__main__":
    main()
