"""How fast two FP8 checkpoints are merged, against what the disk and the processors allow.

    python scripts/quantized_bench.py -o scripts/quantized_bench.json [--repeats 3] [--layers 3] [--work DIR]

Two checkpoints with the layers of Qwen3-30B-A3B-FP8 (128 experts of 768 x 2048, blocks of 128 x 128, float32 scales) and their
values rounded to bfloat16, about 2 GB in FP8. In every round each way runs once, in turn, with the page cache emptied before:

    disk_fp8, disk_bf16   read A, read B, write as much as the output holds, sync
    arithmetic            two decodes and one encode of as many values, in memory, on all cores
    fp8                   hf-moe-lmc merge --no-align
    bf16                  hf-moe-lmc merge --no-align --format bf16
    plain                 hf-moe-lmc merge --no-align of the two in bfloat16, which are twice as large

The bound is the larger of disk and arithmetic. Seconds are of whole processes; those of imports are taken off where a ratio
says so. Seconds of processors depend less on what else runs: those of a merge are set against those of disk and arithmetic
together. The peak is that of resident memory, beside that of a process that only imports torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench
import merge_bench

if TYPE_CHECKING:
    from torch import Tensor

WIDTH, UNIT, EXPERTS, HEADS, VOCAB = 2048, 768, 128, 16, 8192
QUANTIZED = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}


def shapes(layers: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Configuration and shapes of the plain checkpoint."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": WIDTH,
        "moe_intermediate_size": UNIT, "intermediate_size": 6144, "num_hidden_layers": layers, "num_experts": EXPERTS,
        "num_experts_per_tok": 8, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS,
        "vocab_size": VOCAB, "dtype": "bfloat16", "tie_word_embeddings": False, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True,
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        found |= {f"{stem}self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"}
        found |= {f"{stem}self_attn.{p}_norm.weight": (WIDTH // HEADS,) for p in "qk"}
        found |= {f"{stem}{norm}.weight": (WIDTH,) for norm in ("input_layernorm", "post_attention_layernorm")}
        found[f"{stem}mlp.gate.weight"] = (EXPERTS, WIDTH)
        for expert in range(EXPERTS):
            for p, shape in (("gate", (UNIT, WIDTH)), ("up", (UNIT, WIDTH)), ("down", (WIDTH, UNIT))):
                found[f"{stem}mlp.experts.{expert}.{p}_proj.weight"] = shape
    return config, found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def make(folder: Path, layers: int, seed: int, *, quantized: bool) -> None:
    """One checkpoint, a shard for each layer and one for the rest."""
    import json

    import torch

    from hf_moe_lmc.formats.fp8 import Float8
    from hf_moe_lmc.formats.protocol import CODES, SCALES

    config, names = shapes(layers)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **({"quantization_config": QUANTIZED} if quantized else {})}))
    generator = torch.Generator().manual_seed(seed)
    form, dtypes = Float8((128, 128)), {CODES: torch.float8_e4m3fn, SCALES: torch.float32}

    def shard(part: list[str]) -> dict[str, Tensor]:
        made = {}
        for name in part:
            values = torch.randn(names[name], generator=generator).mul_(0.02)
            if "proj" not in name:
                made[name] = values.bfloat16()
                continue
            parts = form.encode(values, dtypes, None)
            if quantized:
                made |= {name: parts[CODES], f"{name}_scale_inv": parts[SCALES]}
            else:
                made[name] = form.decode(parts, 0, values.shape[1]).bfloat16()
        return made

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for number in range(layers + 1):
            stem = f"model.layers.{number}."
            inside = [name for name in names if name.startswith(stem)]
            rest = [name for name in names if ".layers." not in name]
            yield f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors", shard(inside if number < layers else rest)

    bench.write_shards(folder, shards())


def arithmetic(layers: int) -> dict[str, float]:
    """Seconds of two decodes and one encode of all quantized values, an expert's matrix at a time, on all cores."""
    import torch

    from hf_moe_lmc.formats.fp8 import Float8
    from hf_moe_lmc.formats.protocol import CODES, SCALES

    _, names = shapes(layers)
    count = sum(shape[0] * shape[1] for name, shape in names.items() if "proj" in name) // (UNIT * WIDTH)
    form, dtypes = Float8((128, 128)), {CODES: torch.float8_e4m3fn, SCALES: torch.float32}
    pairs = [form.encode(torch.randn(UNIT, WIDTH), dtypes, None) for _ in range(2)]

    def one(_: int) -> None:
        torch.set_num_threads(1)
        values = [form.decode(parts, 0, WIDTH) for parts in pairs]
        form.encode(values[0], dtypes, None)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(one, range(8)))
        started, spent = time.perf_counter(), time.process_time()
        list(pool.map(one, range(count)))
        return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - spent}


def disk(a: Path, b: Path, out: Path, written: int) -> dict[str, float]:
    """Reads both, writes zeros of the size of the output, syncs."""
    reading = f"cat {a}/*.safetensors {b}/*.safetensors > /dev/null"
    return merge_bench.timed(["sh", "-c", f"{reading} && head -c {written} /dev/zero > {out} && sync {out}"])


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def race(work: Path, layers: int, repeats: int, *, plain: bool) -> dict[str, Any]:
    ends = {kind: (work / f"{kind}-0", work / f"{kind}-1") for kind in (("fp8", "plain") if plain else ("fp8",))}
    for kind, pair in ends.items():
        for seed, folder in enumerate(pair):
            if not folder.exists():
                merge_bench.apart(make_one, folder, layers, seed, kind == "fp8")
    sizes = {kind: size(a) for kind, (a, _) in ends.items()}
    of_plain = sum(2 * shape[0] * (shape[1] if shape[1:] else 1) for shape in shapes(layers)[1].values())

    def ours(kind: str, *options: str) -> Callable[[Path], dict[str, float]]:
        a, b = map(str, ends[kind])
        command = [sys.executable, "-W", "ignore", "-m", "hf_moe_lmc", "merge", a, b, "--no-align", *options, "-o"]
        return lambda out: merge_bench.timed([*command, str(out)])

    ways: dict[str, Callable[[Path], dict[str, float]]] = {
        "disk_fp8": lambda out: disk(*ends["fp8"], out, sizes["fp8"]),
        "disk_bf16": lambda out: disk(*ends["fp8"], out, of_plain),
        "arithmetic": lambda out: merge_bench.apart(arithmetic, layers),
        "fp8": ours("fp8"),
        "bf16": ours("fp8", "--format", "bf16"),
    }
    if plain:
        ways["plain"] = ours("plain")
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    ways["fp8"](work / "out-first")  # after it, modules are compiled
    shutil.rmtree(work / "out-first")
    for number in range(repeats):
        for way, run in ways.items():
            out = work / f"out-{way}"
            bench.empty_cache(*(folder for pair in ends.values() for folder in pair))
            runs[way].append(run(out))
            print(number, way, {key: round(value, 2) for key, value in runs[way][-1].items()}, file=sys.stderr, flush=True)
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
    return summary(runs, sizes)


def make_one(folder: Path, layers: int, seed: int, quantized: bool) -> None:
    make(folder, layers, seed, quantized=quantized)


def summary(runs: dict[str, list[dict[str, float]]], sizes: dict[str, int]) -> dict[str, Any]:
    """Medians, and ratios of the same round."""
    imports = {name: cost for name, cost in merge_bench.imports(None).items() if name in ("torch_alone", "ours")}

    def ratio(way: str, bound: Callable[[dict[str, float]], float], *, whole: bool, key: str = "seconds") -> float:
        rounds = [{name: of_way[i][key] for name, of_way in runs.items()} for i in range(len(runs["fp8"]))]
        return statistics.median((one[way] - (0 if whole else imports["ours"][key])) / bound(one) for one in rounds)

    ratios = {}
    for way in ("fp8", "bf16"):

        def bound(one: dict[str, float], way: str = way) -> float:
            return max(one[f"disk_{way}"], one["arithmetic"])

        def both(one: dict[str, float], way: str = way) -> float:
            return one[f"disk_{way}"] + one["arithmetic"]

        ratios[way] = {
            "to_the_bound": ratio(way, bound, whole=True),
            "to_the_bound_without_imports": ratio(way, bound, whole=False),
            "cpu_to_disk_and_arithmetic_without_imports": ratio(way, both, whole=False, key="cpu_seconds"),
            **({"to_the_plain_merge": ratio(way, lambda one: one["plain"], whole=True)} if "plain" in runs else {}),
            "peak_above_torch": max(run["peak_bytes"] for run in runs[way]) - imports["torch_alone"]["peak_bytes"],
        }
    medians = {way: {key: statistics.median(run[key] for run in of_way) for key in of_way[0]} for way, of_way in runs.items()}
    return {"checkpoint_bytes": sizes, "imports": imports, "medians": medians, "ratios": ratios, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=3, help="of 620 MB each in FP8")
    parser.add_argument(
        "--work", type=Path, help="where the checkpoints are made, if they are not there, and stay (default: nowhere)"
    )
    parser.add_argument("--without-plain", action="store_true", help="leave out the merge of the two in bfloat16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantized-bench-") as d:
        found = race(options.work or Path(d), options.layers, options.repeats, plain=not options.without_plain)
    bench.report(options.output, {"cores": os.cpu_count(), "layers": options.layers, **found})


if __name__ == "__main__":
    main()
