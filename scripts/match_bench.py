"""Cost of `align`, matching included, against the rewrite alone, at the layer shapes of Mixtral-8x7B.

    python scripts/match_bench.py -o scripts/match_bench.json [--layers 2] [--experts 8] [--noise 0.03 0.5 inf] [--repeats 3]

Two synthetic checkpoints (bfloat16, one tensor per expert, one shard for every two experts): B is A with its experts and hidden
units shuffled, their signs flipped, and so much noise added, relative to the weights; `inf` is another draw.

In each round, `apply` of the symmetry that was found and `align` in full run in turn, each in a process of its own, from the
page cache.
Wall times are without imports, and mean something only as ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench
import torch
from transformers import MixtralConfig

HIDDEN, FFN, STD = 4096, 14336, 0.02
ROLES = ("w1", "w3", "w2")  # gate, up, down


def make(folder: Path, layers: int, experts: int, noise: float, device: str = "cpu") -> Path:
    """A (noise 0), or a B so far from it; `device` draws the numbers."""
    folder.mkdir()
    config = MixtralConfig(
        vocab_size=1024, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers, num_local_experts=experts,
        architectures=["MixtralForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    return bench.write_shards(folder, _shards(layers, experts, noise, device))


def _shards(layers: int, experts: int, noise: float, device: str) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    plan = torch.Generator().manual_seed(2)
    outside = {"model.embed_tokens.weight": (1024, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (1024, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q_proj", HIDDEN), ("k_proj", HIDDEN // 4), ("v_proj", HIDDEN // 4), ("o_proj", HIDDEN)):
            outside[f"{prefix}self_attn.{name}.weight"] = (rows, HIDDEN)
        outside |= {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    tensors = {name: drawn(shape, 1, i, noise, device) for i, (name, shape) in enumerate(outside.items())}
    for layer in range(layers):
        block = f"model.layers.{layer}.block_sparse_moe."
        order = torch.randperm(experts, generator=plan) if noise else torch.arange(experts)
        tensors[f"{block}gate.weight"] = drawn((experts, HIDDEN), 3, layer, noise, device)[order]
        for place, expert in enumerate(order.tolist()):
            units = torch.randperm(FFN, generator=plan)
            signs = (torch.randint(2, (FFN, 1), generator=plan) * 2 - 1).bfloat16()
            for number, role in enumerate(ROLES):
                values = drawn((FFN, HIDDEN), 10 + layer, 8 * expert + number, noise, device)
                if noise:
                    values = values[units] * (1 if role == "w1" else signs)
                tensors[f"{block}experts.{place}.{role}.weight"] = (values.T if role == "w2" else values).contiguous()
            if place % 2 or place == experts - 1:
                yield f"model-{layer:02}-{place // 2:02}.safetensors", tensors
                tensors = {}


def drawn(shape: tuple[int, ...], kind: int, number: int, noise: float, device: str = "cpu") -> torch.Tensor:
    """A's weights of this name, with noise added."""

    def draw(seed: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device) * STD

    seed = 1000 * kind + number
    values = draw(seed + 500_000) if math.isinf(noise) else draw(seed)
    return (values.add_(draw(seed + 900_000), alpha=noise) if 0 < noise < math.inf else values).bfloat16().cpu()


def run(verb: str, a: str, b: str, output: str) -> dict[str, Any]:
    import hf_moe_lmc as lmc

    started = time.perf_counter()
    if verb == "apply":
        lmc.apply(a, b, output)
        return {"seconds": time.perf_counter() - started}
    alignment = lmc.align(a, b, output)
    seconds = time.perf_counter() - started
    layers = alignment.to_dict()["layers"]
    keys = ("ways", "order_method", "order_decided", "order_margin", "expert_order", "distance_after_units", "norm", "seconds")
    return {"seconds": seconds, "layers": [{key: layer[key] for key in keys} for layer in layers]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.03, 0.5, math.inf])
    parser.add_argument("--repeats", type=int, default=3, help="rounds; of unrelated experts one")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints (default: the temporary folder)")
    parser.add_argument("--one", nargs=4, metavar=("VERB", "A", "B", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(*options.one)))
        return
    environment = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": str(options.threads),
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    results = []
    with tempfile.TemporaryDirectory(prefix="match-bench-", dir=options.folder) as d:
        folder = Path(d)
        a = make(folder / "a", options.layers, options.experts, 0.0)
        for noise in options.noise:
            b, found = make(folder / "b", options.layers, options.experts, noise), folder / "found"
            rounds = []
            for number in range(1 if math.isinf(noise) else options.repeats):
                aligned = bench.result_of(__file__, ("align", a, b, folder / "out"), environment)
                if not number:
                    shutil.copytree(folder / "out" / "alignment", found)
                shutil.rmtree(folder / "out")
                applied = bench.result_of(__file__, ("apply", found, b, folder / "out"), environment)
                shutil.rmtree(folder / "out")
                rounds.append({"align": aligned["seconds"], "apply": applied["seconds"]})
                print(noise, rounds[-1], file=sys.stderr, flush=True)
            for path in (b, found):
                shutil.rmtree(path)
            results.append(
                {
                    "noise": str(noise),
                    "ratio": statistics.median(one["align"] / one["apply"] for one in rounds),
                    "rounds": rounds,
                    "layers": aligned["layers"],
                }
            )
            print(results[-1], file=sys.stderr, flush=True)
    bench.report(options.output, {"threads": options.threads, "results": results})


if __name__ == "__main__":
    main()
