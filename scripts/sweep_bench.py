"""Cost of evaluating N points of a path: the layer-major sweep against what one would do without it.

    python scripts/sweep_bench.py -o scripts/sweep_bench.json [--layers 8] [--width 512] [--points 5 25] [--repeats 3]

Every way runs in a process of its own, with the page cache emptied before. Bytes read are those that the kernel fetched from
storage for the process (read_bytes of /proc/self/io); bytes of the block device are recorded beside them. Wall times are
without imports, and mean something only as ratios within one run.

    sweep      layer by layer; resident: the same with all weights in memory at once
    merges     a merged checkpoint written and loaded for each point
    in_place   one resident model, whose parameters torch.lerp writes over for each point from both checkpoints in memory
    offload    one model per point, loaded by transformers with a device map that puts the decoder layers on disk

`outside_seconds` is what a way takes besides the forwards: its seconds less those that the in_place model, whose forwards wait
for nothing, spends in them for as many points.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import torch
from transformers import MixtralConfig

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.endpoints import Endpoints, Point, conversions
from hf_moe_lmc.path.evaluation import Evaluator
from hf_moe_lmc.path.skeleton import Skeleton
from hf_moe_lmc.perplexity.windows import Windows, window_losses
from hf_moe_lmc.proof.checks import write
from hf_moe_lmc.writing.streams import interpolated

WAYS = ("sweep", "resident", "merges", "in_place", "offload")
WINDOWS, LENGTH = 4, 64
# Of all ways; huge pages as the command line sets them.
ENVIRONMENT = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}


def make(folder: Path, layers: int, width: int, seed: int) -> Path:
    """A Mixtral checkpoint of 8 experts with random weights, one shard per layer, nothing of it in memory for long."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_local_experts=8,
        num_attention_heads=8, num_key_value_heads=4, architectures=["MixtralForCausalLM"], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in bench.shapes(config).items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(part, {})[name] = shape
    drawn = ({name: torch.randn(shape) * 0.03 for name, shape in shapes.items()} for shapes in shards.values())
    return bench.write_shards(folder, zip((f"model-{part}.safetensors" for part in shards), drawn, strict=True))


def run(way: str, folder_a: Path, folder_b: Path, points: int) -> dict[str, Any]:
    """Losses of all points by one way, its seconds, and its seconds inside forwards."""
    grid = [i / (points - 1) for i in range(points)]
    rows = torch.randint(3, 1000, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    windows = Windows(tuple(rows), (0,) * WINDOWS, context=LENGTH, bos=False, tokens_read=rows.numel())
    before, device_before = io(), device_bytes(folder_a)
    started = time.perf_counter()
    with (
        Checkpoint.open(folder_a) as of_a,
        Checkpoint.open(folder_b) as of_b,
        tempfile.TemporaryDirectory(dir=folder_a.parent) as d,
    ):
        a, b = read_model(of_a), read_model(of_b)
        model_class: Any = language_model_class(a)
        losses, forwards = [], 0.0

        def measured(model: Any) -> None:
            nonlocal forwards
            begun = time.perf_counter()
            losses.append(window_losses(model, windows, batch_size=WINDOWS))
            forwards += time.perf_counter() - begun

        if way in ("sweep", "resident"):
            options = EvaluationOptions(model_class=model_class, batch_size=WINDOWS, resident=way == "resident")
            evaluator = Evaluator(a, b, windows, options)
            found, _ = evaluator.evaluate({"naive": b.identity()}, [Point("naive", t) for t in grid])
            losses = list(found)
        elif way == "in_place":
            skeleton = Skeleton(model_class, a.config, dtype=torch.float32, device=torch.device("cpu"))
            ends = Endpoints(a, b, {"naive": b.identity()}, skeleton, conversions(skeleton, a, b))
            names = [name for name in skeleton.state if name not in skeleton.tied]
            ends.load(names)
            ends.place(names, "naive", 0.0)
            for t in grid:
                for name in names:
                    torch.lerp(ends.held[None, name], ends.held["naive", name], t, out=skeleton.value(name))
                measured(skeleton.module)
        else:
            for i, t in enumerate(grid):
                merged = write(interpolated(a, b, b.identity().layers, t), Path(d) / f"merge-{i}")
                placed: dict[str, Any] = {}
                if way == "offload":
                    on_disk = {f"model.layers.{layer}": "disk" for layer in range(a.num_layers)}
                    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
                    placed = {"device_map": places | on_disk, "offload_folder": str(Path(d) / f"offload-{i}")}
                model = model_class.from_pretrained(merged, dtype=torch.float32, **placed).eval()
                measured(model)
                del model
                shutil.rmtree(merged)
                shutil.rmtree(Path(d) / f"offload-{i}", ignore_errors=True)
    seconds = time.perf_counter() - started
    after = io()
    return {
        "seconds": seconds,
        "forward_seconds": forwards,
        "read_bytes": after["read_bytes"] - before["read_bytes"],
        "write_bytes": after["write_bytes"] - before["write_bytes"],
        "device_bytes": device_bytes(folder_a) - device_before,
        "peak_bytes": bench.own_memory("VmHWM"),
        "losses": [float(loss.sum()) for loss in losses],
    }


def io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


def device_bytes(folder: Path) -> int:
    """Bytes read so far from the block device that holds a folder, by anybody; 0 where it has no counter."""
    number = folder.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    return int(stat.read_text().split()[2]) * 512 if stat.exists() else 0


def summary(points: int, way: str, runs: list[dict[str, Any]], reference: list[float], size: int) -> dict[str, Any]:
    """Medians of the rounds, and the largest relative difference of a loss from those of the first way."""
    worst = max(abs(x - y) / abs(y) for one in runs for x, y in zip(one["losses"], reference, strict=True))
    medians = {key: statistics.median(one[key] for one in runs) for key in runs[0] if key != "losses"}
    return {"points": points, "way": way, **medians, "passes": medians["read_bytes"] / (2 * size), "worst_loss": worst}


def outside(results: list[dict[str, Any]]) -> None:
    """Adds `outside_seconds` where the in_place model tells what the forwards take."""
    forwards = {one["points"]: one["forward_seconds"] for one in results if one["way"] == "in_place"}
    for one in results:
        if one["points"] in forwards:
            one["outside_seconds"] = one["seconds"] - forwards[one["points"]]


def relative(results: list[dict[str, Any]], points: int) -> dict[str, float]:
    of_points = {one["way"]: one["seconds"] for one in results if one["points"] == points}
    return {way: seconds / of_points["sweep"] for way, seconds in of_points.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--points", type=int, nargs="+", default=[5, 25])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--one", nargs=4, metavar=("WAY", "A", "B", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, a, b, points = options.one
        torch.set_num_threads(1)
        print(json.dumps(run(way, Path(a), Path(b), int(points))))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sweep-bench-") as d:
        a, b = (make(Path(d) / name, options.layers, options.width, seed) for seed, name in enumerate("ab"))
        size = sum(file.stat().st_size for file in a.iterdir())
        for points in options.points:
            measured: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
            for _ in range(options.repeats):  # side by side: each round runs every way once
                for way in options.ways:
                    bench.empty_cache(a, b)
                    measured[way].append(bench.result_of(__file__, (way, a, b, points), ENVIRONMENT))
                    print(
                        points, way, {k: v for k, v in measured[way][-1].items() if k != "losses"}, file=sys.stderr, flush=True
                    )
            results += [
                summary(points, way, runs, measured[options.ways[0]][0]["losses"], size) for way, runs in measured.items()
            ]
        outside(results)
    bench.report(
        options.output,
        {
            "checkpoint_bytes": size,
            "results": results,
            "seconds_relative_to_sweep": {str(points): relative(results, points) for points in options.points},
        },
    )


if __name__ == "__main__":
    main()
