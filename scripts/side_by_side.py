"""Time and memory of merge, align and barrier at another commit and at this one, side by side.

    python scripts/side_by_side.py REVISION -o scripts/side_by_side.json [--rounds 5]

Two Mixtral checkpoints of about 0.8 GB are made once: bfloat16, several shards; B is A with its experts shuffled, and noise. In
each round each verb runs at both commits, one after the other, each in a fresh interpreter, in alternating order. Times are of
whole processes, imports included; what counts is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
CONFIG = MixtralConfig(
    vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
    num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=512,
)  # fmt: skip
VERBS = {
    "merge --no-align": ["merge", "A", "B", "-o", "OUT", "--no-align"],
    "align": ["align", "A", "B", "-o", "OUT"],
    "merge": ["merge", "A", "B", "-o", "OUT"],
    "barrier": ["barrier", "A", "B", "-o", "OUT", "--text", "TEXT", "--points", "5", "--max-tokens", "1024", "--no-routing"],
}


def make(folder: Path) -> dict[str, str]:
    """The inputs of all verbs."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    model: Any = MixtralForCausalLM(CONFIG)
    model.to(torch.bfloat16)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for name in "ab":
        model.save_pretrained(folder / name, max_shard_size="200MB")
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                if key.endswith(("gate_up_proj", "down_proj")):
                    tensor.copy_(tensor[torch.randperm(len(tensor))])
                tensor.add_(0.002 * torch.randn_like(tensor))
    (folder / "text.txt").write_text("The expert that answers is the one the router picked. " * 40, encoding="utf-8")
    return {"A": str(folder / "a"), "B": str(folder / "b"), "TEXT": str(folder / "text.txt"), "OUT": str(folder / "out")}


def run(tree: Path, words: list[str], output: Path) -> dict[str, float]:
    """Seconds and peak memory (MB) of one verb at one commit."""
    shutil.rmtree(output, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_moe_lmc", *words], cwd=tree, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed at {tree}")
    return {"seconds": time.perf_counter() - started, "peak_mb": usage.ru_maxrss / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, Any] = {verb: {"before": [], "after": []} for verb in VERBS}
    with tempfile.TemporaryDirectory(prefix="hf_moe_lmc-") as d:
        before = Path(d) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", str(before), options.revision], cwd=ROOT, check=True)
        try:
            places = make(Path(d))
            for number in range(options.rounds + 1):  # the first warms the page cache
                for verb, words in VERBS.items():
                    sides = [("before", before), ("after", ROOT)]
                    for side, tree in sides if number % 2 else reversed(sides):
                        figures = run(tree, [places.get(word, word) for word in words], Path(places["OUT"]))
                        if number:
                            found[verb][side].append(figures)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)
    for verb, sides in found.items():
        for what in ("seconds", "peak_mb"):
            pairs = zip(sides["after"], sides["before"], strict=True)
            sides[f"ratio_{what}"] = statistics.median(after[what] / before[what] for after, before in pairs)
        print(f"{verb}: time {sides['ratio_seconds']:.3f}, memory {sides['ratio_peak_mb']:.3f}")
    revision = subprocess.run(["git", "rev-parse", options.revision], cwd=ROOT, capture_output=True, text=True, check=True)
    report = {"before": revision.stdout.strip(), "rounds": options.rounds, "cores": os.cpu_count(), "verbs": found}
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
