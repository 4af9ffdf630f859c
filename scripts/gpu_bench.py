"""What a GPU does for matching and for the path: agreement with the CPU, seconds, memory, at the layer shapes of Mixtral-8x7B.

    python scripts/gpu_bench.py -o scripts/gpu_bench.json [--layers 1] [--experts 8] [--noise 0.03 0.5] [--points 25]

Synthetic checkpoints (bfloat16): B is A shuffled, with noise. Each way runs in a process of its own,
from the page cache, once, since this is about factors. Wall times are without imports, and mean something only as ratios
within one run.

    matching     all layers, on the device that accelerate chooses, and with ACCELERATE_USE_CPU
    resident     the path, naive and aligned, with the weights of both ends on the GPU all the time
    layers       the same, layer by layer; the ends wait on the GPU
    from_cpu     the same, but the ends wait in the CPU's memory, and each point crosses over to the GPU
    cpu          without a GPU, at fewer points
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import match_bench
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.matching.alignment import align_models
from hf_moe_lmc.matching.options import WeightMatching
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.path import evaluation
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.endpoints import Point
from hf_moe_lmc.perplexity.windows import Windows
from hf_moe_lmc.runtime.memory import CPU
from hf_moe_lmc.writing.interpolation import interpolate_into

WAYS = ("resident", "layers", "from_cpu", "cpu")
WINDOWS, LENGTH = 16, 512
POINTS_ON_CPU = 3


def matched(a: str, b: str) -> dict[str, Any]:
    """Seconds of the matching, and what it found."""
    with Checkpoint.open(Path(a)) as of_a, Checkpoint.open(Path(b)) as of_b:
        model_a, model_b = read_model(of_a), read_model(of_b)
        started = time.perf_counter()
        alignment = align_models(model_a, model_b, WeightMatching())
        seconds = time.perf_counter() - started
    totals = alignment.totals()
    return {
        "seconds": seconds,
        "relative_distance_after_units": totals["relative_distance_after_units"],
        "orders": [layer["expert_order"] for layer in alignment.to_dict()["layers"]],
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def evaluated(way: str, a: str, b: str, points: int, dtype: str) -> dict[str, Any]:
    """Losses on two paths: B as it is, and B with its experts in another order."""
    if way == "from_cpu":
        evaluation.home_of = lambda device, plan: CPU
    grid = [i / (points - 1) for i in range(points)]
    rows = torch.randint(3, 1000, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    windows = Windows(tuple(rows), (0,) * WINDOWS, context=LENGTH, bos=False, tokens_read=rows.numel())
    with Checkpoint.open(Path(a)) as of_a, Checkpoint.open(Path(b)) as of_b:
        model_a, model_b = read_model(of_a), read_model(of_b)
        options = EvaluationOptions(
            model_class=language_model_class(model_a),
            batch_size=4,
            dtype=getattr(torch, dtype),
            device="cpu" if way == "cpu" else "cuda",
            resident=way in ("resident", "cpu"),
        )
        evaluator = evaluation.Evaluator(model_a, model_b, windows, options)
        symmetries = {"aligned": model_b.random(torch.Generator().manual_seed(0)), "naive": model_b.identity()}
        at = [Point("aligned", 0.0), *(Point(path, t) for path in symmetries for t in grid if t)]
        started = time.perf_counter()
        losses, cost = evaluator.evaluate(symmetries, at)
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "points": len(at),
        "tokens": WINDOWS * (LENGTH - 1),
        "mode": cost.mode,
        "passes": cost.passes,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if way != "cpu" else 0,
        "losses": {
            f"{point.path} {point.t:g}": float(loss.sum()) / WINDOWS / (LENGTH - 1)
            for point, loss in zip(at, losses, strict=True)
        },
    }


def same_bits() -> dict[str, float]:
    """The share of interpolated values that the GPU rounds to other bits than the CPU, by dtype."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
        other = 0
        for t in (0.1, 0.3, 0.5, 0.7, 0.9):
            here, there = torch.empty_like(a), torch.empty_like(a, device="cuda")
            interpolate_into(here, a, b, t)
            interpolate_into(there, a.cuda(), b.cuda(), t)
            other += int((here != there.cpu()).sum())
        found[str(dtype).removeprefix("torch.")] = other / (5 * a.numel())
    return found


def one(kind: str, *arguments: str) -> dict[str, Any]:
    if kind == "matching":
        return matched(*arguments)
    way, a, b, points, dtype = arguments
    return evaluated(way, a, b, int(points), dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.03, 0.5])
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one)))
        return
    matching: list[dict[str, Any]] = []
    path: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> dict[str, Any]:
        print({key: value for key, value in row.items() if key not in ("losses", "orders")}, file=sys.stderr, flush=True)
        return row

    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as d:
        a = match_bench.make(Path(d) / "a", options.layers, options.experts, 0.0, "cuda")
        for noise in options.noise:
            b = match_bench.make(Path(d) / f"b-{noise}", options.layers, options.experts, noise, "cuda")
            for device, environment in (("cuda", {}), ("cpu", {"ACCELERATE_USE_CPU": "true"})):
                found = bench.result_of(__file__, ("matching", a, b), environment)
                matching.append(tell({"noise": str(noise), "device": device, **found}))
        for dtype in ("bfloat16", "float32"):
            for way in WAYS:
                points = POINTS_ON_CPU if way == "cpu" else options.points
                found = bench.result_of(__file__, ("path", way, a, b, points, dtype), {})
                path.append(tell({"way": way, "dtype": dtype, **found}))
    for dtype in ("bfloat16", "float32"):
        rows = {row["way"]: row for row in path if row["dtype"] == dtype}
        for row in rows.values():
            shared = row["losses"].keys() & rows["cpu"]["losses"].keys()
            row["largest_difference_from_cpu"] = max(abs(row["losses"][key] - rows["cpu"]["losses"][key]) for key in shared)
    bench.report(
        options.output,
        {
            "gpu": torch.cuda.get_device_name(),
            "cpu_cores": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
            "checkpoint_layers": options.layers,
            "experts": options.experts,
            "interpolated_to_other_bits": same_bits(),
            "matching": matching,
            "path": [{key: value for key, value in row.items() if key != "losses"} for row in path],
        },
    )


if __name__ == "__main__":
    main()
