"""Time and peak memory of a ridge repair of one layer with the shapes of Mixtral-8x7B, in the dual form, in bfloat16.

    python scripts/repair_bench.py -o scripts/repair_bench.json [--tokens 1024 2048] [--device cuda]

Two checkpoints of random weights have one layer of 8 experts, hidden size 4096 and 14336 hidden units per expert: 2.8 GB each,
114,688 hidden units against 1,024 to 2,048 calibration tokens. They go through the very run that `merge --repair ridge` makes.
What is measured is the anonymous memory of the process above what its imports take, in a process of its own for each number of
tokens. On two cores a row takes some minutes, and the checkpoints take 7 GB of disk, which are freed at the end.
"""

from __future__ import annotations

import argparse
import json
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
from hf_moe_lmc.perplexity.windows import Windows
from hf_moe_lmc.repair.calibrated_run import Calibrated, Calibration
from hf_moe_lmc.repair.methods import ALIGNED, Method

STRENGTH = 0.1
CONTEXT = 256
COMPARED = 2  # windows that are not fitted on


def make(folder: Path, seed: int) -> Path:
    """A checkpoint of one layer in the fused layout, written one tensor at a time."""
    config = MixtralConfig(num_hidden_layers=1, dtype="bfloat16", architectures=["MixtralForCausalLM"])  # the 8x7B's sizes
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    tensors = bench.shapes(config).items()
    return bench.write_shards(
        folder, ((f"model-{i:05}.safetensors", {name: values(name, shape)}) for i, (name, shape) in enumerate(tensors))
    )


def measure(folder_a: Path, folder_b: Path, tokens: int, device: str) -> dict[str, Any]:
    """One run with `tokens` calibration tokens."""
    count = tokens // CONTEXT + COMPARED
    rows = torch.randint(3, 30000, (count, CONTEXT), generator=torch.Generator().manual_seed(0))
    windows = Windows(tuple(rows), tuple(range(count)), context=CONTEXT, bos=False, tokens_read=count * CONTEXT)
    with Checkpoint.open(folder_a) as of_a, Checkpoint.open(folder_b) as of_b:
        a, b = read_model(of_a), read_model(of_b)
        everything = frozenset(windows.text_of)
        options = EvaluationOptions(
            model_class=language_model_class(a), dtype=torch.bfloat16, device=device, batch_size=2, resident=False
        )
        with bench.Watched() as watched:
            run = Calibrated(a, b, b.identity(), 0.5, Calibration(windows, (everything, everything)), options, {})
            found = run.run([ALIGNED, Method(fit="ridge", strength=STRENGTH)], range(COMPARED, count), range(COMPARED))
        (fit,) = found.fits[1]
        layer = next(iter(a.layers.values()))
        experts = sum(a.checkpoint.tensors[name].nbytes for name in layer.claims)
        return {
            "tokens": tokens,
            "hidden_units": layer.experts * layer.sizes["unit"],
            "expert_bytes_of_a_layer": experts,
            "peak_bytes": watched.peak_bytes,
            "peak_in_layers": watched.peak_bytes / experts,
            "gpu_peak_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else None,
            "seconds": watched.seconds,
            "residual_before": fit["before"],
            "residual_after": fit["after"],
            "finite": bool(found.losses.isfinite().all()) and math.isfinite(fit["after"]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "TOKENS", "DEVICE"), help="one run on checkpoints that are there")
    options = parser.parse_args()
    if options.one:
        folder, tokens, device = options.one
        print(json.dumps(measure(Path(folder) / "a", Path(folder) / "b", int(tokens), device)))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="repair-bench-") as folder:
        for seed, name in enumerate("ab"):
            make(Path(folder) / name, seed)
        for tokens in options.tokens:
            rows.append(bench.result_of(__file__, [folder, tokens, options.device], {}))
            print(rows[-1], file=sys.stderr, flush=True)
    bench.report(options.output, {"strength": STRENGTH, "device": options.device, "results": rows})


if __name__ == "__main__":
    main()
