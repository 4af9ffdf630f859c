"""The embedded default: small models trained by the paper's protocol, their barriers, a merge. No network, no accelerator.

Two pairs of 2-layer Mixtral models from one base, everything but the first MoE block shared and frozen:

- independent: the block was reinitialised with two seeds. Alignment removes most of the barrier.
- shuffled: both blocks grew from one initialisation, and B was then moved by a random symmetry. Alignment undoes the
  shuffling and removes nearly all of the barrier.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MixtralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.example.protocol import (
    Training,
    reinitialise,
    small_mixtral,
    standard_library_text,
    token_stream,
    train,
    train_tokenizer,
)
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.perplexity.report import BarrierReport
from hf_moe_lmc.runtime.progress import bar
from hf_moe_lmc.verbs.apply import apply
from hf_moe_lmc.verbs.barrier import barrier
from hf_moe_lmc.verbs.merge import merge
from hf_moe_lmc.writing.workspace import check_output

CONFIG = small_mixtral(hidden_size=64, layers=2, intermediate_size=512)
BASE = Training(steps=400, learning_rate=4e-3)
BLOCK = Training(steps=300, learning_rate=2e-3)
INIT_STD = 0.02
HELD_OUT_TOKENS = 8192
CONTEXT = 64


@dataclass(frozen=True)
class _Trainer:
    """Trains variants of one base and saves them with their tokenizer."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    tokens: torch.Tensor
    root: Path

    def variant(self, name: str, *, init_seed: int, data_seed: int) -> None:
        model = copy.deepcopy(self.base)
        reinitialise(model, [0], std=INIT_STD, seed=init_seed)
        _train(model, self.tokens, BLOCK, seed=data_seed, layers=[0], name=f"training {name}")
        model.save_pretrained(self.root / name)
        self.tokenizer.save_pretrained(self.root / name)


def demo(output: str | os.PathLike[str], *, tell: Callable[[str], None] = lambda line: None) -> dict[str, BarrierReport]:
    """Trains, measures and merges. Takes two to four minutes on two cores.

    Args:
        output: a new or empty folder: checkpoints/, reports of both pairs, merge/ and summary.json.
        tell: called with lines that tell the story as it goes.

    Returns:
        The reports of the pairs `independent` and `shuffled`.

    Example:
        >>> reports = demo("demo", tell=print)  # doctest: +SKIP
        >>> reports["independent"].percent_of_naive  # doctest: +SKIP
        16.0...
    """
    check_output(output)
    root = Path(output)
    checkpoints = root / "checkpoints"
    corpus = standard_library_text()
    tokenizer = train_tokenizer(corpus.train)
    tokens = token_stream(tokenizer, corpus.train)
    checkpoints.mkdir(parents=True)
    text = checkpoints / "held_out.txt"
    text.write_text("\n\n".join(corpus.held_out), encoding="utf-8")

    torch.manual_seed(0)
    base = MixtralForCausalLM(CONFIG)
    loss = _train(base, tokens, BASE, seed=0, layers=None, name="training the base")
    tell(f"base: {sum(p.numel() for p in base.parameters()) / 1e6:.1f}M parameters, training loss {loss:.2f} nats per token")
    trainer = _Trainer(base, tokenizer, tokens, checkpoints)
    trainer.variant("a", init_seed=1, data_seed=1)
    trainer.variant("b-independent", init_seed=2, data_seed=2)
    trainer.variant("b-sibling", init_seed=1, data_seed=3)
    _shuffle(checkpoints / "b-sibling", checkpoints / "b-shuffled")

    reports: dict[str, BarrierReport] = {}
    for pair in ("independent", "shuffled"):
        reports[pair] = barrier(
            checkpoints / "a",
            checkpoints / f"b-{pair}",
            root / pair,
            text=[text],
            context=CONTEXT,
            max_tokens=HELD_OUT_TOKENS,
        )
        tell(f"\n{pair} pair")
        for path in ("naive", "aligned"):
            tell(f"  {reports[pair].sentence(path)}")
    merge(checkpoints / "a", checkpoints / "b-independent", root / "merge")
    summary = {
        pair: {path: {"barrier": report.curve(path).barrier, "area": report.curve(path).area} for path in report.losses}
        | {"aligned_percent_of_naive": report.percent_of_naive}
        for pair, report in reports.items()
    }
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    tell("\nmerged at t = 0.5: merge; plots: independent/barrier.png, shuffled/barrier.png; figures: summary.json")
    return reports


def _train(
    model: PreTrainedModel, tokens: torch.Tensor, recipe: Training, *, seed: int, layers: list[int] | None, name: str
) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain little from a second one, and lose much when a core is taken
    try:
        with bar(total=recipe.steps, desc=name, unit="step") as shown:
            return train(model, tokens, recipe, seed=seed, layers=layers, progress=lambda step: shown.update())
    finally:
        torch.set_num_threads(threads)


def _shuffle(source: Path, output: Path) -> None:
    """Writes `source` moved by a random symmetry with signs and scales: the same function, far away as weights."""
    generator = torch.Generator().manual_seed(0)
    with Checkpoint.open(source) as checkpoint:
        symmetry = read_model(checkpoint).random(generator, scale=2.0)
    apply(symmetry, source, output)
