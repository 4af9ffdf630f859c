"""Cost of `compare` on a pair of the size of DeepSeek-V3, and how often its statistic errs.

    python scripts/compare_bench.py -o scripts/compare_bench.json [--pairs 10000] [--folder DIR]

The two checkpoints have the shapes of DeepSeek-V3 in bfloat16. Their files are holes but for the router rows (213 MB each), so
that they take no room: B's are A's with noise, and shuffled in every second layer. `judge routers` is what the routers take;
`compare` is the whole verb, with its checks of all other verbs. Each runs in a process of its own, from the page cache. Times
are without imports, and stand beside those of the cores. Memory is the most that a process held, its libraries included.

False alarms: pairs of independent rows of several distributions, and how many of them the routers' test takes for relatives.
Recognition: how many relatives are recognised, with noise relative to the spread of the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.lineage.rows import DRAWS

LAYERS, DENSE, EXPERTS, HIDDEN, UNITS = 61, 3, 256, 7168, 2048
NOISE = 0.1
SHAPES = {(8, 64): 1.0, (16, 64): 1.0, (64, 128): 0.2, (128, 256): 0.05}  # experts and width: share of the pairs
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16", "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS, "first_k_dense_replace": DENSE, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "moe_intermediate_size": UNITS, "intermediate_size": 18432,
    "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280, "tie_word_embeddings": False, "scoring_func": "sigmoid",
}  # fmt: skip


def shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer."""
    prefix = f"model.layers.{layer}."
    found: dict[str, tuple[int, ...]] = {
        "self_attn.q_a_proj.weight": (1536, HIDDEN), "self_attn.q_a_layernorm.weight": (1536,),
        "self_attn.q_b_proj.weight": (128 * 192, 1536), "self_attn.kv_a_proj_with_mqa.weight": (576, HIDDEN),
        "self_attn.kv_a_layernorm.weight": (512,), "self_attn.kv_b_proj.weight": (128 * 256, 512),
        "self_attn.o_proj.weight": (HIDDEN, 128 * 128), "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }  # fmt: skip
    sizes = {"mlp.": 18432} if layer < DENSE else {"mlp.shared_experts.": UNITS}
    if layer >= DENSE:
        sizes |= {f"mlp.experts.{expert}.": UNITS for expert in range(EXPERTS)}
        found |= {"mlp.gate.weight": (EXPERTS, HIDDEN), "mlp.gate.e_score_correction_bias": (EXPERTS,)}
    for name, units in sizes.items():
        found |= {f"{name}{role}_proj.weight": (units, HIDDEN) for role in ("gate", "up")}
        found |= {f"{name}down_proj.weight": (HIDDEN, units)}
    return {prefix + name: shape for name, shape in found.items()}


def make(folder: Path, moved: bool) -> Path:
    """A checkpoint of the true size, of which nothing but the routers takes room."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map: dict[str, str] = {}
    outside: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (129280, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (129280, HIDDEN)
    }  # fmt: skip
    for layer in range(-1, LAYERS):
        tensors = outside if layer < 0 else shapes(layer)
        name = f"model-{layer + 2:05}-of-{LAYERS + 1:05}.safetensors"
        weight_map |= dict.fromkeys(tensors, name)
        entries: dict[str, Any] = {}
        at = 0
        for tensor, shape in tensors.items():
            size = 2 * torch.Size(shape).numel()
            entries[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        header = json.dumps(entries).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            start = file.tell()
            file.truncate(start + at)
            if layer >= DENSE:
                place = entries[f"model.layers.{layer}.mlp.gate.weight"]["data_offsets"][0]
                file.seek(start + place)
                file.write(_routers(layer, moved).view(torch.uint8).numpy().tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _routers(layer: int, moved: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer)
    scale = torch.arange(1, HIDDEN + 1) ** -0.25
    rows = torch.randn(EXPERTS, HIDDEN, generator=generator) * scale + 0.5 * scale
    if moved:
        rows += NOISE * scale * torch.randn(EXPERTS, HIDDEN, generator=generator)
        if layer % 2:
            groups = torch.randperm(8, generator=generator)
            rows = rows.view(8, 32, HIDDEN)[groups][:, torch.randperm(32, generator=generator)].reshape(EXPERTS, HIDDEN)
    return rows.bfloat16().contiguous()


def run(what: str, a: str, b: str) -> dict[str, Any]:
    """One measurement, in this process."""
    import hf_moe_lmc as lmc
    from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
    from hf_moe_lmc.lineage.judging import judge_all_routers
    from hf_moe_lmc.lineage.verdict import counted
    from hf_moe_lmc.moe.reading import read_model

    started, cpu = time.perf_counter(), time.process_time()
    if what == "compare":
        found = lmc.compare(a, b)
        counts = dict(counted(found.pairs[0].layers))
        facts: dict[str, Any] = {"sentence": found.sentence, "counts": counts}
        facts["moved"] = sum(layer.moved or 0 for layer in found.pairs[0].layers)
    else:
        with Checkpoint.open(a) as one, Checkpoint.open(b) as other:
            models = read_model(one), read_model(other)
            opened, started, cpu = time.perf_counter() - started, time.perf_counter(), time.process_time()
            findings = judge_all_routers(models)[0, 1]
            says = [finding.says for finding in findings.values()]
            facts = {"seconds_to_open": round(opened, 1), "says": {one: says.count(one) for one in sorted(set(says))}}
    spent = {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    return {**spent, "peak_bytes": bench.own_memory("VmHWM"), **facts}


def false_alarms(pairs: int) -> list[dict[str, Any]]:
    from hf_moe_lmc.lineage.routers import said_by
    from hf_moe_lmc.lineage.statistic import judged, whitened

    rows = []
    for shape, share in SHAPES.items():
        for number, (kind, draw) in enumerate(DRAWS.items()):
            generator = torch.Generator().manual_seed(number)
            count, least, alarms = max(1, int(pairs * share)), 0.0, 0
            for first in range(0, count, 500):
                some = min(500, count - first)
                a, b = (whitened(draw((some, *shape), generator)) for _ in range(2))
                assert a is not None and b is not None
                for cosines in (a @ b.mT).double():
                    found = judged(cosines, shape[1])
                    least = min(least, found.least_chance)
                    alarms += said_by(found, layers=1)[0] in ("in place", "shuffled")
            rows.append({"experts": shape[0], "width": shape[1], "kind": kind, "pairs": count, "alarms": alarms,
                         "least_log10_chance": round(least, 2)})  # fmt: skip
    return rows


def recognition(pairs: int = 100) -> list[dict[str, Any]]:
    from hf_moe_lmc.lineage.routers import judge_routers

    rows = []
    for shape in ((8, 256), (16, 256), (64, 256), (256, 512)):
        for noise in (0.02, 0.1, 0.3, 0.6):
            generator = torch.Generator().manual_seed(0)
            kept = {"in place": 0, "shuffled": 0}
            for _ in range(pairs if shape[0] < 256 else pairs // 10):
                a = DRAWS["a spectrum that falls slowly"](shape, generator)
                b = a + noise * a.square().mean().sqrt() * torch.randn(shape, generator=generator)
                order = torch.randperm(shape[0], generator=generator)
                for says, other in (("in place", b), ("shuffled", b[order])):
                    kept[says] += judge_routers({"": a}, {"": other}, layers=48).says == says
            count = pairs if shape[0] < 256 else pairs // 10
            shares = {says.replace(" ", "_"): round(number / count, 2) for says, number in kept.items()}
            rows.append({"experts": shape[0], "width": shape[1], "noise": noise, **shares})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints (default: the temporary folder)")
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "A", "B"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(*options.one)))
        return
    results: dict[str, Any] = {"threads": options.threads, "noise": NOISE}
    with tempfile.TemporaryDirectory(prefix="compare-bench-", dir=options.folder) as d:
        a, b = make(Path(d) / "a", False), make(Path(d) / "b", True)
        for what in ("judge routers", "compare"):
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive"}
            command = [sys.executable, __file__, "--one", what, str(a), str(b)]
            ran = subprocess.run(command, env=environment, cwd=d, stdout=subprocess.PIPE, text=True, check=True)
            results[what.replace(" ", "_")] = json.loads(ran.stdout.splitlines()[-1])
            print(what, results[what.replace(" ", "_")])
    torch.set_num_threads(1)
    results["recognition"] = recognition()
    results["false_alarms"] = false_alarms(options.pairs)
    bench.report(options.output, results)


if __name__ == "__main__":
    main()
