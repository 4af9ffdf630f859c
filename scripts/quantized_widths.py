"""Quantized checkpoints whose layers have the widths of published models: seconds and peak memory of align, merge and barrier.

    python scripts/quantized_widths.py CONFIGS -o scripts/quantized_widths.json [--models gpt-oss ...] [--verbs barrier ...]

CONFIGS is a folder with the published config.json of each model, as OWNER--NAME.json. Layers, experts and the vocabulary are
cut to a few (the report says how many); hidden sizes, widths of experts, attention, names, dtypes and formats are the published
ones. Weights are random, so that every step of matching and storing runs, but no barrier means anything. The peak is that of
resident memory above that of a process that imports the package. A sweep of three points runs as where memory is short. Its
bytes read are fetched from storage, from a cold page cache, over those that both checkpoints hold. Rows of other models and
verbs stay in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench
import merge_bench

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VOCABULARY = 1024
POINTS = 3
VERBS = ("align", "merge", "merge_bf16", "merge_no_align", "barrier")


@dataclass(frozen=True)
class Model:
    """A published model and how it is cut.

    Attributes:
        config: name of its configuration.
        cut: keys of its text configuration, and what they become.
        quantized: which of its weights are.
        store: the parts of one of them.
        prefix: of the names of its text tower.
    """

    config: str
    cut: dict[str, Any]
    quantized: str
    store: Callable[[str, Tensor], dict[str, Tensor]]
    prefix: str = ""
    verbs: tuple[str, ...] = VERBS


def mxfp4(name: str, values: Tensor) -> dict[str, Tensor]:
    """Of gpt-oss: each expert's matrix transposed."""
    import torch

    from hf_moe_lmc.formats.fp4 import GROUP, Float4
    from hf_moe_lmc.formats.protocol import CODES, SCALES

    rows = values.transpose(1, 2).reshape(-1, values.shape[1])
    found = Float4().encode(rows, {CODES: torch.uint8, SCALES: torch.uint8}, None)
    experts, width, groups = len(values), values.shape[2], values.shape[1] // GROUP
    return {
        f"{name}_blocks": found[CODES].view(experts, width, groups, GROUP // 2),
        f"{name}_scales": found[SCALES].view(experts, width, groups),
    }


def int4(name: str, values: Tensor) -> dict[str, Tensor]:
    """Of Kimi-K2.5: groups of 32, scales in bfloat16."""
    import torch

    from hf_moe_lmc.formats.integers import Integers
    from hf_moe_lmc.formats.protocol import CODES, SCALES

    stem = name.removesuffix(".weight")
    found = Integers(4, 32).encode(values, {CODES: torch.int32, SCALES: torch.bfloat16}, None)
    return {
        f"{stem}.weight_packed": found[CODES],
        f"{stem}.weight_scale": found[SCALES],
        f"{stem}.weight_shape": torch.tensor(values.shape, dtype=torch.int32),
    }


def deepseek_v4(name: str, values: Tensor) -> dict[str, Tensor]:
    """Routed experts in FP4, all else in FP8 by blocks; exponents as scales."""
    import torch

    from hf_moe_lmc.formats.fp4 import Float4
    from hf_moe_lmc.formats.fp8 import Float8
    from hf_moe_lmc.formats.protocol import CODES, SCALES

    routed = re.search(r"ffn\.experts\.", name) is not None
    dtypes = {CODES: torch.int8 if routed else torch.float8_e4m3fn, SCALES: torch.float8_e8m0fnu}
    found = (Float4() if routed else Float8((128, 128), powers=True)).encode(values, dtypes, None)
    return {name: found[CODES], f"{name.removesuffix('.weight')}.scale": found[SCALES]}


def fp8(name: str, values: Tensor) -> dict[str, Tensor]:
    """In blocks of 128 x 128, float32 scales."""
    import torch

    from hf_moe_lmc.formats.fp8 import Float8
    from hf_moe_lmc.formats.protocol import CODES, SCALES

    found = Float8((128, 128)).encode(values, {CODES: torch.float8_e4m3fn, SCALES: torch.float32}, None)
    return {name: found[CODES], f"{name}_scale_inv": found[SCALES]}


MODELS = {
    "gpt-oss": Model(
        "openai--gpt-oss-20b", {"num_hidden_layers": 2, "num_local_experts": 8}, r"experts\.(gate_up|down)_proj$", mxfp4
    ),
    "kimi-k2.5": Model(
        "moonshotai--Kimi-K2.5",
        {"num_hidden_layers": 2, "n_routed_experts": 8},
        r"mlp\.experts\.\d+\.\w+\.weight$",
        int4,
        prefix="language_model.",
    ),
    "deepseek-v3": Model(
        "deepseek-ai--DeepSeek-V3",
        {"num_hidden_layers": 2, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
        | {"num_nextn_predict_layers": 0},
        r"(mlp\.\S*\w+_proj|self_attn\.\w+_proj\w*)\.weight$",
        fp8,
        verbs=("barrier",),
    ),
    "deepseek-v4": Model(
        "deepseek-ai--DeepSeek-V4-Flash",
        {"num_hidden_layers": 2, "n_routed_experts": 8, "num_hash_layers": 0, "num_nextn_predict_layers": 0},
        r"ffn\.(shared_)?experts\.\S*w\d\.weight$|attn\.w\w+\.weight$",
        deepseek_v4,
    ),
    "qwen3-fp8": Model(
        "Qwen--Qwen3-30B-A3B-FP8",
        {"num_hidden_layers": 2, "num_experts": 128},
        r"(experts\.\d+\.\w+|self_attn\.\w_proj)\.weight$",
        fp8,
        verbs=("barrier",),
    ),
}


def cut_config(model: Model, configs: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((configs / f"{model.config}.json").read_text())
    text = config.get("text_config", config)
    text.update(model.cut, vocab_size=VOCABULARY)
    for key in ("layer_types", "compress_ratios", "mlp_layer_types"):
        if text.get(key):
            text[key] = text[key][: model.cut["num_hidden_layers"]]
    for part in (config, text):
        part.update({key: 0 for key in ("bos_token_id", "eos_token_id", "pad_token_id") if part.get(key) is not None})
    return config


def shapes(config: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors of the text tower as they are named on the Hub; none is made."""
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    text = {
        key: value for key, value in config.get("text_config", config).items() if key not in ("quantization_config", "auto_map")
    }
    with tempfile.TemporaryDirectory() as folder:
        text["model_type"] = {"kimi_k2": "deepseek_v3"}.get(text["model_type"], text["model_type"])
        (Path(folder) / "config.json").write_text(json.dumps(text))
        read = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(read, dtype=torch.bfloat16)
    model._weight_conversions = get_model_conversion_mapping(model)
    found = revert_weight_conversion(model, dict(model.state_dict()))
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}


def make(folder: Path, model: Model, configs: Path, seed: int) -> None:
    """A checkpoint, a tensor at a time, a shard for each layer and one for the rest."""
    import torch

    config = cut_config(model, configs)
    named = shapes(config)
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))

    def stored(name: str) -> dict[str, Tensor]:
        shape, dtype = named[name]
        if not dtype.is_floating_point:
            return {model.prefix + name: torch.zeros(shape, dtype=dtype)}
        values = torch.randn(shape, generator=generator).mul_(0.02)
        if re.search(model.quantized, name):
            return model.store(model.prefix + name, values)
        return {model.prefix + name: (values + 1 if "norm" in name else values).to(dtype)}

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        of_shard: dict[str, list[str]] = {}
        for name in named:
            layer = re.search(r"layers\.(\d+)\.", name)
            of_shard.setdefault(f"model-{layer[1] if layer else 'rest'}.safetensors", []).append(name)
        for file, names in of_shard.items():
            yield file, {part: tensor for name in names for part, tensor in stored(name).items()}

    bench.write_shards(folder, shards())


def tokenizer(folder: Path) -> None:
    """One word for each id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1", eos_token="w0").save_pretrained(folder)


def barrier(a: Path, b: Path, text: Path, out: Path) -> dict[str, Any]:
    """Bytes read and memory of a sweep, in a process of its own, above what imports take.

    The second path goes to B under a symmetry drawn at random: the work is that of a found one.
    """
    import torch

    import hf_moe_lmc.verbs.barrier
    from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
    from hf_moe_lmc.moe.reading import read_model
    from hf_moe_lmc.path import cost, sweep  # noqa: F401  # with transformers' model classes

    cost.SHARE = 0.01  # of the memory that is free: as where the two models do not fit into it, layer by layer
    bench.empty_cache(a, b)
    with Checkpoint.open(b) as checkpoint:
        symmetry = read_model(checkpoint).random(torch.Generator().manual_seed(0))
    before, started, spent = read_so_far(), time.perf_counter(), time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hf_moe_lmc.barrier(a, b, out, symmetry=symmetry, text={"text": text}, points=POINTS, context=128, dtype="bfloat16")
    stored = sum(file.stat().st_size for folder in (a, b) for file in folder.glob("*.safetensors"))
    report = json.loads((out / "report.json").read_text())
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - spent,
        "peak_above_imports": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024,
        "bytes_read_over_stored": (read_so_far() - before) / stored,
        "evaluation": {key: report["evaluation"][key] for key in ("mode", "weights", "activations")},
    }


def read_so_far() -> int:
    """Bytes that were fetched from storage for this process."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def measure(model: Model, configs: Path, work: Path, verbs: Sequence[str]) -> dict[str, Any]:
    a, b = work / "a", work / "b"
    for seed, folder in enumerate((a, b)):
        merge_bench.apart(make, folder, model, configs, seed)
        merge_bench.apart(tokenizer, folder)
    text = work / "text.txt"
    text.write_text(" ".join(f"w{i * 7919 % VOCABULARY}" for i in range(512)))
    command = [sys.executable, "-W", "ignore", "-m", "hf_moe_lmc"]
    ways = {
        "align": ["align", a, b],
        "merge": ["merge", a, b],
        "merge_bf16": ["merge", a, b, "--format", "bf16"],
        "merge_no_align": ["merge", a, b, "--no-align"],
    }
    imported = merge_bench.timed([sys.executable, "-c", "import hf_moe_lmc.verbs.barrier, hf_moe_lmc.cli, transformers"])
    found: dict[str, Any] = {}
    for verb in (verb for verb in model.verbs if verb in verbs):
        out = work / "out"
        if verb == "barrier":
            found[verb] = merge_bench.apart(barrier, a, b, text, out)
        else:
            run = merge_bench.timed([*command, *map(str, ways[verb]), "-o", str(out)])
            found[verb] = {
                "seconds": run["seconds"], "cpu_seconds": run["cpu_seconds"],
                "peak_above_imports": run["peak_bytes"] - imported["peak_bytes"],
            }  # fmt: skip
        print(model.config, verb, found[verb], file=sys.stderr, flush=True)
        shutil.rmtree(out)
    size = sum(file.stat().st_size for file in a.glob("*.safetensors"))
    return {"config": model.config, "cut": {**model.cut, "vocab_size": VOCABULARY}, "checkpoint_bytes": size, "verbs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--work", type=Path, help="where the checkpoints are made (default: a temporary folder)")
    options = parser.parse_args()
    models = json.loads(options.output.read_text())["models"] if options.output.exists() else {}
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="quantized-widths-", dir=options.work) as d:
            found = measure(MODELS[name], options.configs, Path(d), options.verbs)
        verbs = {**models.get(name, {}).get("verbs", {}), **found["verbs"]}
        models[name] = {**found, "verbs": {verb: verbs[verb] for verb in VERBS if verb in verbs}}
        facts = {"cores": os.cpu_count(), "points_of_a_barrier": POINTS, "models": models}
        bench.report(options.output, facts, ["CONFIGS", "-o", "scripts/quantized_widths.json"])


if __name__ == "__main__":
    main()
