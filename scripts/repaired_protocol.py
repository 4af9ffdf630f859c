"""Repairs on pairs of the paper's protocol: how much of the naive gap is left at t = 0.5?

    python scripts/repaired_protocol.py -o scripts/repaired_protocol.json --models DIR

trains a Mixtral and a Qwen2-MoE on prose, reinitialises one MoE block with three seeds, trains each with everything else
frozen, and measures all three pairs of each setting: aligned, each repair, what `--repair auto` takes, widened. In the *lazy*
setting the block was reinitialised with so large weights that it hardly learns. Calibration text shares no 12 words in a row
with evaluation text. What is in DIR is kept and used again. Widened merges alone are measured on all pairs of twice as many
seeds, in other orders of the experts and with the plain average of both routers, too. About ten minutes on 16 cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from repaired_pairs import BATCH, HALF, Texts, by_text, documents, ensemble, repaired
from safetensors.torch import load_file, save_file
from scipy.stats import t as student
from transformers import (
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from upcycled_models import TOKENIZER, Models, Scale
from upcycling import quick_scale, rounded, share_of, with_interval, workers

from hf_moe_lmc import merge
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.example.protocol import Training, reinitialise, small_mixtral, train
from hf_moe_lmc.matching.alignment import align_models
from hf_moe_lmc.matching.options import OrderMethod, WeightMatching
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.endpoints import Point
from hf_moe_lmc.path.evaluation import Evaluator
from hf_moe_lmc.runtime.progress import silenced
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.inputs import Inputs, Pair

COMMAND = "python scripts/repaired_protocol.py -o scripts/repaired_protocol.json --models DIR"
PROSE = ("prose",)
WIDENED_ORDERS: tuple[OrderMethod, ...] = ("gate", "expert", "best")  # the first one is what `--widen` takes
SETTINGS: dict[str, tuple[str, int, float]] = {  # model type, layer from the last one, standard deviation
    "last": ("mixtral", -1, 0.02),
    "first": ("mixtral", 0, 0.02),
    "qwen2_moe last": ("qwen2_moe", -1, 0.02),
    "lazy": ("mixtral", -1, 0.1),
}


@dataclass(frozen=True)
class Protocol:
    """Sizes and recipes."""

    hidden_size: int = 128
    layers: int = 3
    units: int = 256
    base: Training = field(default_factory=lambda: Training(steps=500, learning_rate=2e-3))
    block: Training = field(default_factory=lambda: Training(steps=400, learning_rate=1e-3))
    seeds: tuple[int, ...] = (1, 2, 3)
    widened_seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    settings: tuple[str, ...] = tuple(SETTINGS)
    tokens: int = 16384
    context: int = 64

    def model(self, kind: str) -> PreTrainedModel:
        mixtral = small_mixtral(hidden_size=self.hidden_size, layers=self.layers, intermediate_size=self.units)
        if kind == "mixtral":
            return MixtralForCausalLM(mixtral)
        names = (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings", "bos_token_id", "eos_token_id", "tie_word_embeddings",
        )  # fmt: skip
        sizes: dict[str, Any] = {name: getattr(mixtral, name) for name in names}
        sizes |= {"moe_intermediate_size": self.units // 2, "shared_expert_intermediate_size": self.units}
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts=8, num_experts_per_tok=2))


@dataclass(frozen=True)
class Block:
    """One training: of a base, or with a setting and a seed of one block of it."""

    root: Path
    protocol: Protocol
    kind: str
    setting: str | None = None
    seed: int = 0

    @property
    def path(self) -> Path:
        return self.root / "protocol" / (f"base-{self.kind}" if self.setting is None else f"{self.setting}-{self.seed}")


def trained(job: Block) -> Path:
    """Trains and saves a model, unless it is there."""
    if (job.path / TOKENIZER).exists():
        return job.path
    torch.manual_seed(0)
    model, layers, recipe = job.protocol.model(job.kind), None, job.protocol.base
    if job.setting is not None:
        base = type(model).from_pretrained(Block(job.root, job.protocol, job.kind).path, dtype=torch.float32)
        _, layer, std = SETTINGS[job.setting]
        model, layers, recipe = copy.deepcopy(base), [layer % job.protocol.layers], job.protocol.block
        reinitialise(model, layers, std=std, seed=job.seed)
    train(model, Models(job.root, Scale(), "cpu").streams()["prose"], recipe, seed=job.seed, layers=layers)
    model.save_pretrained(job.path)
    PreTrainedTokenizerFast.from_pretrained(job.root).save_pretrained(job.path)
    return job.path


def measure(job: tuple[Block, Block]) -> dict[str, Any]:
    """Losses at t = 0.5 of everything that can be made of a pair."""
    one, other = job
    models, protocol = Models(one.root, Scale(), "cpu"), one.protocol
    texts = Texts(
        {"prose": documents(models.text("evaluation", "prose"))},
        {"prose": documents(models.text("calibration", "prose"))},
        (PROSE, PROSE),
        protocol.context,
        protocol.tokens,
    )
    with silenced(), ExitStack() as stack:
        pair = Inputs(stack).pair(one.path, other.path)
        aligned = align_models(pair.a, pair.b, WeightMatching()).symmetry
        found = straight(pair, texts, {"aligned": aligned})
        repairs, auto = repaired(pair, aligned, texts)
        found |= {**repairs, "ensemble": ensemble(pair, texts)}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        merge(one.path, other.path, folder / "widened", widen=True)
        found["widened"] = loss_of(folder / "widened", pair, texts)
    losses = {name: row["prose"] for name, row in found.items()}
    return {"setting": one.setting, "seeds": [one.seed, other.seed], "losses": losses, "auto": auto}


def straight(pair: Pair, texts: Texts, symmetries: Mapping[str, ModelSymmetry]) -> dict[str, dict[str, float]]:
    """Losses of both parents, of the naive merge, and of merges by the names of their symmetries."""
    windows, options = texts.windows(pair, calibration=False, evaluation=True), options_of(pair)
    paths = {"naive": pair.b.identity(), **symmetries}
    points = {"a": Point("naive", 0.0), "b": Point("naive", 1.0), **{path: Point(path, HALF) for path in paths}}
    sums, _ = Evaluator(pair.a, pair.b, windows, options).evaluate(paths, list(points.values()))
    return {name: by_text(windows, row) for name, row in zip(points, sums, strict=True)}


def loss_of(folder: Path, pair: Pair, texts: Texts) -> dict[str, float]:
    """Losses of a merge that has been written."""
    windows = texts.windows(pair, calibration=False, evaluation=True)
    with Checkpoint.open(folder) as checkpoint:
        model = read_model(checkpoint)
        evaluator = Evaluator(model, model, windows, options_of(pair))
        sums, _ = evaluator.evaluate({"naive": model.identity()}, [Point("naive", 0.0)])
    return by_text(windows, sums[0])


def options_of(pair: Pair) -> EvaluationOptions:
    return EvaluationOptions(model_class=language_model_class(pair.a), batch_size=BATCH, device="cpu")


def measure_widened(job: tuple[Block, Block]) -> dict[str, Any]:
    """Losses of widened merges of a pair: in each order of the experts, each with both routers. `widened` is the default."""
    one, other = job
    models, protocol = Models(one.root, Scale(), "cpu"), one.protocol
    texts = Texts(
        {"prose": documents(models.text("evaluation", "prose"))}, {}, (PROSE, PROSE), protocol.context, protocol.tokens
    )
    with silenced(), ExitStack() as stack:
        pair = Inputs(stack).pair(one.path, other.path)
        found = straight(pair, texts, {})
        for order in WIDENED_ORDERS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            merge(one.path, other.path, folder / "wide", widen=True, order=order)
            merge(one.path, other.path, folder / "aligned", order=order)
            found[f"{order} order"] = loss_of(folder / "wide", pair, texts)
            plain = load_file(folder / "aligned" / "model.safetensors")
            wide = load_file(folder / "wide" / "model.safetensors")
            save_file(
                {name: plain[name] if plain[name].shape == value.shape else value for name, value in wide.items()},
                folder / "wide" / "model.safetensors",
                {"format": "pt"},
            )
            found[f"{order} order, averaged router"] = loss_of(folder / "wide", pair, texts)
    losses = {name: row["prose"] for name, row in found.items()}
    return {"setting": one.setting, "seeds": [one.seed, other.seed], "losses": losses}


def widened_summary(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all pairs of some models in one setting: shares of the naive gap, and differences from the default, in percent of it.

    Intervals are by the jackknife over models: pairs that share one are not independent.
    """
    seeds = sorted({seed for pair in pairs for seed in pair["seeds"]})
    gaps = [
        {
            name: loss - mean(pair["losses"][side] for side in "ab")
            for name, loss in pair["losses"].items()
            if name not in ("a", "b")
        }
        for pair in pairs
    ]

    def share(values: Sequence[float]) -> dict[str, float | None]:
        def over(without: int | None) -> float:
            some = [i for i, pair in enumerate(pairs) if without not in pair["seeds"]]
            return 100 * sum(values[i] for i in some) / sum(gaps[i]["naive"] for i in some)

        if len(seeds) < 4:  # of three, two are left without any of them: one pair
            return {"mean": over(None), "width": None}
        left_out = [over(seed) for seed in seeds]
        error = ((len(seeds) - 1) / len(seeds) * sum((one - mean(left_out)) ** 2 for one in left_out)) ** 0.5
        return {"mean": over(None), "width": float(student.ppf(0.975, len(seeds) - 1)) * error}

    names = [name for name in gaps[0] if name != "naive"]
    return {
        "setting": pairs[0]["setting"],
        "pairs": len(pairs),
        "models": len(seeds),
        "percent_of_naive": {name: share([gap[name] for gap in gaps]) for name in names},
        "more_than_default": {name: share([gap[name] - gap[names[0]] for gap in gaps]) for name in names[1:]},
    }


def summary(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the pairs of one setting: the naive gap, and what each merge leaves of it in percent, with intervals over pairs."""
    gaps = {
        name: [pair["losses"][name] - mean(pair["losses"][side] for side in "ab") for pair in pairs]
        for name in pairs[0]["losses"]
        if name not in ("a", "b")
    }
    return {
        "setting": pairs[0]["setting"],
        "pairs": len(pairs),
        "naive_gap": with_interval(gaps["naive"]),
        "percent_of_naive": {name: share_of(values, gaps["naive"]) for name, values in gaps.items() if name != "naive"},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--models", type=Path, required=True, help="folder of texts and models; what is there is reused")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings and measurements at once")
    parser.add_argument("--quick", action="store_true", help="a minute's trial of everything at a tiny size")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    scale, protocol = (quick_scale(), quick_protocol()) if options.quick else (Scale(), Protocol())
    Models(options.models, scale, "cpu").prepare()
    kinds = dict.fromkeys(SETTINGS[name][0] for name in protocol.settings)
    seeds = sorted({*protocol.seeds, *protocol.widened_seeds})
    blocks = [
        {seed: Block(options.models, protocol, SETTINGS[name][0], name, seed) for seed in seeds} for name in protocol.settings
    ]
    with workers(options.jobs) as pool:
        each(pool, trained, [Block(options.models, protocol, kind) for kind in kinds])
        each(pool, trained, [block for some in blocks for block in some.values()])
        found = each(pool, measure, pairs_of(blocks, protocol.seeds))
        widened = each(pool, measure_widened, pairs_of(blocks, protocol.widened_seeds))
    of_setting, of_widened = (
        [[pair for pair in some if pair["setting"] == name] for name in protocol.settings] for some in (found, widened)
    )
    result = {
        "command": COMMAND,
        "protocol": {"hidden_size": protocol.hidden_size, "layers": protocol.layers, "units": protocol.units}
        | {"base": vars(protocol.base), "block": vars(protocol.block), "tokens": protocol.tokens},
        "settings": rounded([summary(pairs) for pairs in of_setting]),
        "pairs": rounded(found),
        "widened": rounded([widened_summary(pairs) for pairs in of_widened]),
        "widened_pairs": rounded(widened),
        "seconds": round(time.perf_counter() - started),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def pairs_of(blocks: Iterable[Mapping[int, Block]], seeds: Sequence[int]) -> list[tuple[Block, Block]]:
    """All pairs of each setting, of some seeds."""
    return [pair for some in blocks for pair in combinations([some[seed] for seed in seeds], 2)]


def quick_protocol() -> Protocol:
    """Everything at a size that says nothing but that it runs."""
    short = Training(steps=4, learning_rate=2e-3, batch=4, warmup=2)
    return Protocol(
        hidden_size=32, layers=2, units=32, base=short, block=short, seeds=(1, 2), widened_seeds=(1, 2), tokens=300, context=16
    )


def each(pool: ProcessPoolExecutor | None, work: Callable[[Any], Any], jobs: Iterable[Any]) -> list[Any]:
    return list(map(work, jobs) if pool is None else pool.map(work, jobs))


if __name__ == "__main__":
    main()
