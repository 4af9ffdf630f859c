"""The stages of the demo: each leaves files and a record that it is finished, from which a stopped call continues."""

from __future__ import annotations

import copy
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
from hf_moe_lmc.runtime.progress import bar, quiet_transformers
from hf_moe_lmc.verbs.apply import apply
from hf_moe_lmc.verbs.barrier import barrier
from hf_moe_lmc.verbs.merge import merge
from hf_moe_lmc.writing.location import DEMO
from hf_moe_lmc.writing.results import ResultFolder
from hf_moe_lmc.writing.workspace import PACKAGES, open_workspace

CONFIG = small_mixtral(hidden_size=64, layers=2, intermediate_size=512)
BASE = Training(steps=400, learning_rate=4e-3)
BLOCK = Training(steps=300, learning_rate=2e-3)
INIT_STD = 0.02
HELD_OUT_TOKENS = 8192
CONTEXT = 64
PAIRS = ("independent", "shuffled")
PATHS = ("naive", "aligned")
TOKENS = "tokens"

Tell = Callable[[str], None]


def run(output: str | os.PathLike[str], *, resume: bool, overwrite: bool, tell: Tell) -> dict[str, dict[str, Any]]:
    """See `demo`."""
    root = Path(output)
    if resume and not overwrite and (told := _finished(root)) is not None:
        tell(f"{root} holds this demo already, finished by an earlier call; --overwrite makes it anew")
        for line in told:
            tell(line)
        return _reports(root)
    facts = _facts()
    with open_workspace(output, resume=resume, overwrite=overwrite) as workspace:
        results = workspace.output_folder(facts)
        stages = _Stages(results.folder, workspace.results("stages", facts))
        lines = list(stages.run(tell))
        with results.new(DEMO) as path:
            path.write_text(json.dumps({**_made_by(), "told": lines}, indent=2) + "\n", encoding="utf-8")
        workspace.publish(results, last=DEMO)
    return _reports(root)


@dataclass(frozen=True)
class _Stages:
    """The stages one after the other.

    Attributes:
        root: where the output grows.
        records: of finished stages: what each had to tell, and the tokens to train on.
    """

    root: Path
    records: ResultFolder

    def run(self, tell: Tell) -> Iterator[str]:
        """Runs what is left, and yields what there is to tell of the results."""
        stages: list[tuple[str, Callable[[], list[str]]]] = [
            ("reading the documentation of Python, training a tokenizer", self.text),
            ("training the base", self.base),
            ("training A", lambda: self.variant("a", init_seed=1, data_seed=1)),
            ("training B, from another initialisation", lambda: self.variant("b-independent", init_seed=2, data_seed=2)),
            ("training B, from the initialisation of A on other data, and shuffling it", self.shuffled),
            ("barrier of the independent pair", lambda: self.barrier("independent")),
            ("barrier of the shuffled pair", lambda: self.barrier("shuffled")),
            ("merge of the independent pair", self.merge),
        ]
        for number, (name, work) in enumerate(stages, 1):
            record = f"{number}.json"
            done = record in self.records.files()
            tell(f"{number} of {len(stages)}: {name}" + (" (done by an earlier call)" if done else ""))
            if not done:
                found = work()
                with self.records.new(record) as path:
                    path.write_text(json.dumps(found), encoding="utf-8")
            for line in json.loads(self.records.path(record).read_text(encoding="utf-8")):
                tell(f"  {line}")
                yield line

    def checkpoint(self, name: str) -> Path:
        return self.root / "checkpoints" / name

    @property
    def held_out(self) -> Path:
        return self.checkpoint("held_out.txt")

    def text(self) -> list[str]:
        corpus = standard_library_text()
        tokenizer = train_tokenizer(corpus.train)
        tokenizer.save_pretrained(self.checkpoint("base"))
        self.held_out.write_text("\n\n".join(corpus.held_out), encoding="utf-8")
        tokens = token_stream(tokenizer, corpus.train)
        self.records.write(TOKENS, {TOKENS: tokens})
        return [f"{len(tokens):,} tokens to train on"]

    def base(self) -> list[str]:
        torch.manual_seed(0)
        model = MixtralForCausalLM(CONFIG)
        loss = self._train(model, BASE, seed=0, layers=None)
        self._save(model, "base")
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        return [f"base: {size:.1f}M parameters, training loss {loss:.2f} nats per token"]

    def variant(self, name: str, *, init_seed: int, data_seed: int) -> list[str]:
        """Another first block for the base, trained alone and saved with the tokenizer."""
        with quiet_transformers():
            base = MixtralForCausalLM.from_pretrained(self.checkpoint("base"), dtype=torch.float32)
        model = copy.deepcopy(base)
        reinitialise(model, [0], std=INIT_STD, seed=init_seed)
        loss = self._train(model, BLOCK, seed=data_seed, layers=[0])
        self._save(model, name)
        PreTrainedTokenizerFast.from_pretrained(self.checkpoint("base")).save_pretrained(self.checkpoint(name))
        return [f"{name}: training loss {loss:.2f} nats per token"]

    def _save(self, model: PreTrainedModel, name: str) -> None:
        with quiet_transformers():  # a bar for each shard, of which there is one
            model.save_pretrained(self.checkpoint(name))

    def _train(self, model: PreTrainedModel, recipe: Training, *, seed: int, layers: list[int] | None) -> float:
        tokens = self.records.read(TOKENS)[TOKENS]
        with bar(total=recipe.steps, desc="training", unit="step") as steps:
            return train(model, tokens, recipe, seed=seed, layers=layers, progress=lambda step: steps.update())

    def shuffled(self) -> list[str]:
        """B moved by a random symmetry with signs and scales: the same function, far away as weights."""
        told = self.variant("b-sibling", init_seed=1, data_seed=3)
        generator = torch.Generator().manual_seed(0)
        with Checkpoint.open(self.checkpoint("b-sibling")) as checkpoint:
            symmetry = read_model(checkpoint).random(generator, scale=2.0)
        apply(symmetry, self.checkpoint("b-sibling"), self.checkpoint("b-shuffled"), overwrite=True)
        return told

    def barrier(self, pair: str) -> list[str]:
        report = barrier(
            self.checkpoint("a"),
            self.checkpoint(f"b-{pair}"),
            self.root / pair,
            text=[self.held_out],
            context=CONTEXT,
            max_tokens=HELD_OUT_TOKENS,
            overwrite=True,
        )
        return [f"{pair} pair", *(f"  {report.sentence(path)}" for path in PATHS)]

    def merge(self) -> list[str]:
        merge(self.checkpoint("a"), self.checkpoint("b-independent"), self.root / "merge", overwrite=True)
        summary = {
            pair: {path: {key: report["paths"][path][key] for key in ("barrier", "area")} for path in PATHS}
            | {"aligned_percent_of_naive": report["summary"]["aligned_percent_of_naive"]}
            for pair, report in _reports(self.root).items()
        }
        (self.root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        return ["merged at t = 0.5: merge; plots: independent/barrier.png, shuffled/barrier.png; figures: summary.json"]


def _facts() -> dict[str, Any]:
    """What the models and figures depend on, besides the machine."""
    recipes = {"base": asdict(BASE), "block": asdict(BLOCK), "init_std": INIT_STD}
    text = {"python": platform.python_version(), "context": CONTEXT, "tokens": HELD_OUT_TOKENS}
    return {"config": CONFIG.to_dict(), **recipes, **text}


def _made_by() -> dict[str, Any]:
    """The facts with the releases, as JSON has them."""
    made_by = {"facts": _facts(), "versions": {name: version(name) for name in PACKAGES}}
    found: dict[str, Any] = json.loads(json.dumps(made_by))
    return found


def _finished(root: Path) -> list[str] | None:
    """What a finished demo of the same kind had to tell; None: there is none."""
    path = root / DEMO
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    told: list[str] = found.pop("told", [])
    return told if found == _made_by() else None


def _reports(root: Path) -> dict[str, dict[str, Any]]:
    return {pair: json.loads((root / pair / "report.json").read_text(encoding="utf-8")) for pair in PAIRS}
