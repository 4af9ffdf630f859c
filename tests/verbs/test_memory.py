"""Matching and rewriting stay within a few experts, whatever the size of the model, a shard, or a fused layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig

from tests.interpreter import Interpreter

# One layer's experts are 3 times the allowance, all in one shard; matching keeps nothing of a layer for the next.
EXPERTS, UNITS, WIDTH, LAYERS = 80, 512, 512, 1
EXPERT_BYTES = 3 * UNITS * WIDTH * 4
# Over the same work on two experts; eight experts of Gram matrices, two experts, fixed scratch. About 32 MiB are seen when the
# machine is idle, up to 66 when it is busy.
ALLOWANCE = 80 << 20
LAYER_BYTES = EXPERTS * EXPERT_BYTES

MEASURE = """
import json, sys, threading, time
import torch
torch.set_num_threads(1)
from hf_moe_lmc import align, merge

def anonymous():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.005)

warm, a, b, out = sys.argv[1:]
align(warm, warm, out + "/warm-align")  # imports and the pools of the libraries, on two experts of the same size
merge(warm, warm, out + "/warm-merge", [0.3, 0.7])
base = anonymous()
threading.Thread(target=watch, daemon=True).start()
align(a, b, out + "/aligned")
merge(a, b, out + "/merged", [0.3, 0.7], symmetry=out + "/aligned")
done.set()
print(json.dumps({"base": base, "peak": peak}))
"""


def write_checkpoint(folder: Path, layout: str, experts: int, units: int, noise: float = 0.0) -> Path:
    """A Mixtral checkpoint with hardly anything but experts; written directly, no model is built."""
    generator = torch.Generator().manual_seed(0)
    prefix = "model.layers.{}.block_sparse_moe." if layout == "per-expert" else "model.layers.{}.mlp."
    tensors = {"model.embed_tokens.weight": torch.randn(64, WIDTH, generator=generator)}
    for layer in range(LAYERS):
        block = prefix.format(layer)
        tensors[block + "gate.weight"] = torch.randn(experts, WIDTH, generator=generator)
        if layout == "fused":
            tensors[block + "experts.gate_up_proj"] = torch.randn(experts, 2 * units, WIDTH, generator=generator)
            tensors[block + "experts.down_proj"] = torch.randn(experts, WIDTH, units, generator=generator)
        else:
            for expert in range(experts):
                for name, shape in (("w1", (units, WIDTH)), ("w3", (units, WIDTH)), ("w2", (WIDTH, units))):
                    tensors[f"{block}experts.{expert}.{name}.weight"] = torch.randn(shape, generator=generator)
    for values in tensors.values():
        values += noise * torch.randn(values.shape, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    MixtralConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=units,
        num_hidden_layers=LAYERS,
        num_local_experts=experts,
        tie_word_embeddings=True,
        architectures=["MixtralForCausalLM"],
    ).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's account of anonymous memory")
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_peak_memory_is_a_few_experts(tmp_path: Path, interpreter: Interpreter, layout: str) -> None:
    warm = write_checkpoint(tmp_path / "warm", layout, 2, UNITS)
    a, b = (write_checkpoint(tmp_path / name, layout, EXPERTS, UNITS, noise) for name, noise in (("a", 0.0), ("b", 0.1)))
    assert LAYER_BYTES >= 3 * ALLOWANCE and (a / "model.safetensors").stat().st_size >= 3 * ALLOWANCE
    found = interpreter.run(MEASURE, warm, a, b, tmp_path)
    assert found.code == 0, found.errors
    measured = json.loads(found.output.splitlines()[-1])
    used = measured["peak"] - measured["base"]
    assert 0 < used < ALLOWANCE, f"{used / 2**20:.0f} MiB"
