"""How fast two checkpoints are merged, against what the disk allows and against other ways to do it.

    python scripts/merge_bench.py -o scripts/merge_bench.json [--repeats 3] [--mergekit PATH/TO/mergekit-yaml] [--work DIR]

Two pairs: `large`, Mixtral-like, 2 GB a checkpoint in 4 shards; `many`, with the 18,867 tensors of Qwen3-30B-A3B in 16 shards,
each of them small. In every round each way runs once, in turn, with the page cache emptied before:

    floor      read A, copy B, sync: what a merge cannot avoid
    cp         copy B, sync
    pread      one thread: a piece of A, a piece of B, their mean, written; sync
    torch      the tensors of A and B through safetensors, one by one, torch.lerp, save_file; sync
    mergekit   mergekit's linear merge, in its own environment; sync
    ours       hf-moe-lmc merge --no-align

Seconds are of whole processes; those of interpreter and imports are reported apart (`import_seconds`), as is the peak of
resident memory, beside that of a process that only imports torch. Wall times mean something only as ratios in one run.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench

if TYPE_CHECKING:
    import torch

PIECE = 8 << 20

TORCH_LOOP = """
import json, sys
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import save_file
a, b, out = map(Path, sys.argv[1:])
out.mkdir()
for shard in sorted(a.glob("*.safetensors")):
    with safe_open(shard, "pt") as of_a, safe_open(b / shard.name, "pt") as of_b:
        save_file({k: torch.lerp(of_a.get_tensor(k), of_b.get_tensor(k), 0.5) for k in of_a.keys()}, out / shard.name)
"""
PREAD_LOOP = """
import os, sys
from pathlib import Path
import torch
a, b, out = map(Path, sys.argv[1:])
out.mkdir()
x, y = (torch.empty({piece}, dtype=torch.uint8) for _ in range(2))
for shard in sorted(a.glob("*.safetensors")):
    size = shard.stat().st_size
    head = 8 + int.from_bytes(shard.open("rb").read(8), "little")
    of_a, of_b = (os.open(p / shard.name, os.O_RDONLY) for p in (a, b))
    to = os.open(out / shard.name, os.O_WRONLY | os.O_CREAT, 0o644)
    os.pwrite(to, os.pread(of_a, head, 0), 0)
    for at in range(head, size, {piece}):
        n = min({piece}, size - at)
        os.preadv(of_a, [x[:n].numpy().data], at)
        os.preadv(of_b, [y[:n].numpy().data], at)
        u = x[:n].view(torch.bfloat16)
        os.pwrite(to, u.lerp_(y[:n].view(torch.bfloat16), 0.5).view(torch.uint8).numpy().data, at)
"""


def make(folder: Path, shapes: dict[str, tuple[int, ...]], shards: int, seed: int, config: dict[str, Any]) -> Path:
    """A checkpoint of random bfloat16 weights, shard by shard."""
    import torch

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    names = list(shapes)
    step = -(-len(names) // shards)

    def drawn(part: list[str]) -> dict[str, torch.Tensor]:
        return {name: torch.randn(shapes[name], generator=generator).mul_(0.02).bfloat16() for name in part}

    parts = (names[i * step : (i + 1) * step] for i in range(shards))
    return bench.write_shards(
        folder, ((f"model-{i:05d}-of-{shards:05d}.safetensors", drawn(part)) for i, part in enumerate(parts, 1))
    )


def mixtral(layers: int, experts: int, width: int, unit: int, heads: int, vocab: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and shapes of a Mixtral checkpoint."""
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": width, "intermediate_size": unit,
        "num_hidden_layers": layers, "num_local_experts": experts, "num_experts_per_tok": 2, "num_attention_heads": heads,
        "num_key_value_heads": heads, "vocab_size": vocab, "dtype": "bfloat16", "tie_word_embeddings": False,
        "head_dim": width // heads,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        shapes |= {f"{stem}self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        shapes |= {f"{stem}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{stem}block_sparse_moe.gate.weight"] = (experts, width)
        for expert in range(experts):
            for w, shape in (("w1", (unit, width)), ("w2", (width, unit)), ("w3", (unit, width))):
                shapes[f"{stem}block_sparse_moe.experts.{expert}.{w}.weight"] = shape
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    return config, shapes


def qwen3_like(width: int, unit: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of Qwen3-30B-A3B by name, 18,867 of them, each small."""
    layers, experts, vocab = 48, 128, 512
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": width,
        "moe_intermediate_size": unit, "intermediate_size": unit, "num_hidden_layers": layers, "num_experts": experts,
        "num_experts_per_tok": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": vocab,
        "dtype": "bfloat16", "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        shapes |= {f"{stem}self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        shapes |= {f"{stem}self_attn.{p}_norm.weight": (16,) for p in "qk"}
        shapes |= {f"{stem}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{stem}mlp.gate.weight"] = (experts, width)
        for expert in range(experts):
            for p, shape in (("gate", (unit, width)), ("up", (unit, width)), ("down", (width, unit))):
                shapes[f"{stem}mlp.experts.{expert}.{p}_proj.weight"] = shape
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    return config, shapes


@cache
def _compiled() -> str:
    """A folder for compiled modules, which is removed at the end."""
    folder = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def timed(command: list[str]) -> dict[str, float]:
    """Wall seconds of a process and a sync after it, and its own peak of resident memory.

    Python keeps compiled modules, as it does for users, even where this process was told not to.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"TQDM_DISABLE": "1", "PYTHONPYCACHEPREFIX": _compiled()}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    complaints = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]}: {complaints.decode()[-2000:]}")
    own = time.perf_counter() - started
    os.sync()
    return {
        "seconds": time.perf_counter() - started,
        "before_sync": own,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def floor(a: Path, b: Path, out: Path) -> dict[str, float]:
    """Reads A and throws it away, copies B, syncs."""
    return timed(["sh", "-c", f"cat {a}/*.safetensors > /dev/null && cp -r {b} {out} && sync"])


def ways(mergekit: str | None, folder: Path) -> dict[str, Callable[[Path, Path, Path], dict[str, float]]]:
    python = [sys.executable, "-W", "ignore"]

    def theirs(a: Path, b: Path, out: Path) -> dict[str, float]:
        recipe = folder / "recipe.yml"
        parts = [{"model": str(model), "parameters": {"weight": 0.5}} for model in (a, b)]
        recipe.write_text(json.dumps({"models": parts, "merge_method": "linear", "dtype": "bfloat16"}))
        assert mergekit is not None
        return timed([mergekit, str(recipe), str(out)])

    found: dict[str, Callable[[Path, Path, Path], dict[str, float]]] = {
        "floor": floor,
        "cp": lambda a, b, out: timed(["sh", "-c", f"cp -r {b} {out} && sync"]),
        "pread": lambda a, b, out: timed([*python, "-c", PREAD_LOOP.format(piece=PIECE), str(a), str(b), str(out)]),
        "torch": lambda a, b, out: timed([*python, "-c", TORCH_LOOP, str(a), str(b), str(out)]),
        "ours": lambda a, b, out: timed([*python, "-m", "hf_moe_lmc", "merge", str(a), str(b), "--no-align", "-o", str(out)]),
    }
    return {**found, "mergekit": theirs} if mergekit else found


def imports(mergekit: str | None) -> dict[str, dict[str, float]]:
    """Seconds until the interpreter of a way has imported what it needs; the second of two starts, which finds files cached."""
    code = {
        "torch_alone": "import torch",
        "ours": "import hf_moe_lmc.verbs.merge, hf_moe_lmc.cli; import sys; assert 'transformers' not in sys.modules",
        "torch": "import torch, safetensors.torch",
        "pread": "import torch",
    }
    commands = {name: [sys.executable, "-c", text] for name, text in code.items()}
    if mergekit:
        commands["mergekit"] = [str(Path(mergekit).with_name("python")), "-c", "import mergekit.scripts.run_yaml"]
    return {name: [timed(command) for _ in range(2)][-1] for name, command in commands.items()}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, called in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def same_values(folder: Path, other: Path) -> dict[str, float]:
    """Largest difference between two results, relative to the largest value of a tensor, over the keys that both have.

    mergekit writes experts under the fused names that transformers has in memory, so that only the rest can be compared.
    """
    from safetensors.torch import load_file

    def tensors(root: Path) -> dict[str, torch.Tensor]:
        return {k: v for file in root.glob("*.safetensors") for k, v in load_file(file).items()}

    of_one, of_other = tensors(folder), tensors(other)
    common = of_one.keys() & of_other.keys()
    largest = max(
        float((of_one[k].float() - of_other[k].float()).abs().max() / of_other[k].float().abs().max()) for k in common
    )
    return {"keys": len(of_one), "keys_compared": len(common), "largest_difference": largest}


def race(name: str, a: Path, b: Path, work: Path, repeats: int, mergekit: str | None) -> dict[str, Any]:
    started = {way: cost["seconds"] for way, cost in imports(mergekit).items()}
    runs: dict[str, list[dict[str, float]]] = {}
    worst = {}
    for number in range(repeats):
        for way, run in ways(mergekit, work).items():
            out = work / f"out-{way}"
            bench.empty_cache(a, b)
            runs.setdefault(way, []).append(run(a, b, out))
            print(name, number, way, {k: round(v, 2) for k, v in runs[way][-1].items()}, file=sys.stderr, flush=True)
            if number == 0 and way in ("torch", "mergekit", "ours"):
                worst[way] = out.rename(work / f"kept-{way}")
            shutil.rmtree(out, ignore_errors=True)
    differences = {way: apart(same_values, folder, worst["torch"]) for way, folder in worst.items() if way != "torch"}
    for folder in worst.values():
        shutil.rmtree(folder)
    medians = {way: {key: statistics.median(run[key] for run in of_way) for key in of_way[0]} for way, of_way in runs.items()}
    ratios = {
        way: statistics.median(
            ours["seconds"] / theirs["seconds"] for ours, theirs in zip(runs["ours"], runs[way], strict=True)
        )
        for way in runs
        if way != "ours"
    }
    beyond = {
        way: statistics.median(
            (ours["seconds"] - started["ours"]) / (theirs["seconds"] - started.get(way, 0))
            for ours, theirs in zip(runs["ours"], runs[way], strict=True)
        )
        for way in ratios
    }
    size = sum(file.stat().st_size for file in a.glob("*.safetensors"))
    return {
        "pair": name, "checkpoint_bytes": size, "medians": medians, "import_seconds": started,
        "ours_relative_to": ratios, "ours_relative_to_without_imports": beyond, "compared_with_torch": differences,
        "runs": runs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mergekit", help="the program mergekit-yaml of an environment with mergekit 0.1.5")
    parser.add_argument("--work", type=Path, help="where the checkpoints are made (default: a temporary folder)")
    parser.add_argument("--pairs", nargs="+", choices=("large", "many"), default=["large", "many"])
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="merge-bench-", dir=options.work) as d:
        for name in options.pairs:
            config, shapes = mixtral(6, 8, 1024, 6400, 8, 8000) if name == "large" else qwen3_like(64, 16)
            shards = 4 if name == "large" else 16
            a, b = (Path(d) / f"{name}-{i}" for i in range(2))
            for seed, path in enumerate((a, b)):  # elsewhere: what this process has held counts as its children's peak
                apart(make, path, shapes, shards, seed, config)
            found = race(name, a, b, Path(d), options.repeats, options.mergekit)
            results.append({**found, "tensors": len(shapes), "shards": shards})
            shutil.rmtree(a)
            shutil.rmtree(b)
    bench.report(
        options.output,
        {"cores": os.cpu_count(), "imports": imports(options.mergekit), "results": results},
        [Path(one).name if one == options.mergekit else one for one in sys.argv[1:]],
    )


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
