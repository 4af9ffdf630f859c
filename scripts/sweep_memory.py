"""Peak memory of evaluating a path at the layer shapes of Mixtral-8x7B, with few layers, in bfloat16.

    python scripts/sweep_memory.py -o scripts/sweep_memory.json [--layers 2] [--folder DIR]

Two checkpoints have layers of 8 experts, hidden size 4096 and 14336 hidden units per expert: 2.9 GB a layer. They are evaluated
layer by layer on the naive and on an aligned path. What is measured is the anonymous memory of the process above what its
imports take; what does not depend on the number of layers is what a model of any depth needs.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench
import torch
from transformers import MixtralConfig

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.endpoints import Point
from hf_moe_lmc.path.evaluation import Evaluator
from hf_moe_lmc.perplexity.windows import Windows


def make(folder: Path, layers: int, seed: int) -> Path:
    """A checkpoint in the fused layout, one tensor at a time; values repeat every million, which changes no size."""
    config = MixtralConfig(num_hidden_layers=layers, dtype="bfloat16", architectures=["MixtralForCausalLM"])  # the 8x7B's sizes
    config.save_pretrained(folder)
    pattern = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        numel = math.prod(shape)
        return pattern.repeat(-(-numel // len(pattern)))[:numel].view(shape)

    tensors = bench.shapes(config).items()
    return bench.write_shards(
        folder, ((f"model-{i:05}.safetensors", {name: values(shape)}) for i, (name, shape) in enumerate(tensors))
    )


def measure(folder_a: Path, folder_b: Path, points: int) -> dict[str, Any]:
    rows = tuple(torch.randint(3, 30000, (2, 64), generator=torch.Generator().manual_seed(0)))
    windows = Windows(rows, (0, 1), context=64, bos=False, tokens_read=128)
    with Checkpoint.open(folder_a) as of_a, Checkpoint.open(folder_b) as of_b:
        a, b = read_model(of_a), read_model(of_b)
        shuffled = b.random(torch.Generator().manual_seed(0))
        paths = {"naive": b.identity(), "aligned": shuffled}
        grid = [Point(path, i / (points - 1)) for path in paths for i in range(points)]
        options = EvaluationOptions(model_class=language_model_class(a), dtype=torch.bfloat16, batch_size=2, resident=False)
        with bench.Watched() as watched:
            losses, cost = Evaluator(a, b, windows, options).evaluate(paths, grid)
        layer = next(iter(a.layers.values()))
        experts = sum(a.checkpoint.tensors[name].nbytes for name in layer.claims)
        return {
            "layers": a.num_layers,
            "checkpoint_bytes": a.checkpoint.nbytes,
            "expert_bytes_of_a_layer": experts,
            "points": len(grid),
            "peak_bytes": watched.peak_bytes,
            "peak_in_layers": watched.peak_bytes / experts,
            "seconds": watched.seconds,
            "mode": cost.mode,
            "finite": bool(losses.isfinite().all()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints (default: the temporary folder)")
    options = parser.parse_args()
    results = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory(prefix="sweep-memory-", dir=options.folder) as d:
            a, b = (make(Path(d) / name, layers, seed) for seed, name in enumerate("ab"))
            results.append(measure(a, b, options.points))
            print(results[-1], file=sys.stderr)
    bench.report(options.output, {"results": results})


if __name__ == "__main__":
    main()
