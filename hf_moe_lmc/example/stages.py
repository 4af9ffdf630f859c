"""The stages of the demo: each leaves files and a record that it is finished, from which a stopped call continues."""

from __future__ import annotations

import copy
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MistralForCausalLM, MixtralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.example.domains import library_domains
from hf_moe_lmc.example.protocol import (
    Training,
    reinitialise,
    small_mixtral,
    token_stream,
    train,
    train_tokenizer,
)
from hf_moe_lmc.example.upcycling import dense_config, upcycle
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.perplexity.overlap import PASSAGE
from hf_moe_lmc.runtime.progress import bar, quiet_transformers
from hf_moe_lmc.runtime.tables import aligned
from hf_moe_lmc.verbs.apply import apply
from hf_moe_lmc.verbs.barrier import barrier
from hf_moe_lmc.verbs.merge import merge
from hf_moe_lmc.writing.location import DEMO
from hf_moe_lmc.writing.results import ResultFolder
from hf_moe_lmc.writing.workspace import PACKAGES, open_workspace

UPCYCLED = small_mixtral(hidden_size=64, layers=3, intermediate_size=256)
DENSE = Training(steps=400, learning_rate=4e-3)
APART = Training(steps=400, learning_rate=4e-3)
CONFIG = small_mixtral(hidden_size=64, layers=2, intermediate_size=512)
BASE = Training(steps=400, learning_rate=4e-3)
BLOCK = Training(steps=300, learning_rate=2e-3)
INIT_STD = 0.02
HELD_OUT_TOKENS = 8192  # of each text
CALIBRATION_TOKENS = 8192
CONTEXT = 64
DOMAINS = ("prose", "code")
PAIRS = ("upcycled", "independent", "shuffled")
PATHS = ("naive", "aligned")
WORDS = {  # models as `references` in report.json name them
    "a": "A", "b": "B", "naive": "merge, naive", "aligned": "merge, aligned", "repaired": "merge, repaired",
    "ensemble": "both models as an ensemble",
}  # fmt: skip

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
        prose, code = DOMAINS
        stages: list[tuple[str, Callable[[], list[str]]]] = [
            ("reading the documentation and source of Python, training a tokenizer", self.text),
            ("training a dense model on prose and code", self.dense),
            ("upcycling it to A, trained on prose", lambda: self.upcycled("upcycled-a", prose, seed=1)),
            ("upcycling it to B, trained on code", lambda: self.upcycled("upcycled-b", code, seed=2)),
            ("barrier of the upcycled pair", lambda: self.barrier("upcycled")),
            ("merge of the upcycled pair", self.merge),
            ("the paper's protocol: training the base", self.base),
            ("training A", lambda: self.variant("a", init_seed=1, data_seed=1)),
            ("training B, from another initialisation", lambda: self.variant("b-independent", init_seed=2, data_seed=2)),
            ("training B, from the initialisation of A on other data, and shuffling it", self.shuffled),
            ("barrier of the independent pair", lambda: self.barrier("independent")),
            ("barrier of the shuffled pair", lambda: self.barrier("shuffled")),
            ("figures of all pairs", self.summary),
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

    def held_out(self, part: str, domain: str) -> Path:
        """A part, `evaluation` or `calibration`, of a domain: a document in each line."""
        return self.root / "text" / part / f"{domain}.jsonl"

    def text(self) -> list[str]:
        domains = library_domains()
        tokenizer = train_tokenizer([text for domain in domains for text in domain.train])
        tokenizer.save_pretrained(self.root / "text")
        for domain in domains:
            for part in ("evaluation", "calibration"):
                lines = [json.dumps({"text": text}) for text in getattr(domain, part)]
                path = self.held_out(part, domain.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        streams = {domain.name: token_stream(tokenizer, domain.train) for domain in domains}
        self.records.write("streams", streams)
        counts = " and ".join(f"{len(tokens):,} of {name}" for name, tokens in streams.items())
        return [f"{counts} to train on, in tokens; no {PASSAGE} words of the text to evaluate on are among them"]

    def dense(self) -> list[str]:
        torch.manual_seed(0)
        model = MistralForCausalLM(dense_config(UPCYCLED))
        streams = self._streams()
        least = min(map(len, streams.values()))
        loss = self._train(model, torch.cat([tokens[:least] for tokens in streams.values()]), DENSE, seed=0)
        self._save(model, "dense")
        return [f"dense model: {_millions(model)} parameters, training loss {loss:.2f} nats per token"]

    def upcycled(self, name: str, domain: str, *, seed: int) -> list[str]:
        """An MoE made of the dense model, trained on one domain."""
        with quiet_transformers():
            dense = MistralForCausalLM.from_pretrained(self.checkpoint("dense"), dtype=torch.float32)
        model = upcycle(dense, UPCYCLED, seed=seed)
        loss = self._train(model, self._streams()[domain], APART, seed=seed)
        self._save(model, name)
        return [f"{name}: {_millions(model)} parameters, training loss {loss:.2f} nats per token of {domain}"]

    def merge(self) -> list[str]:
        """The merge of the upcycled pair, repaired with text of both domains, and all that it is to be compared with."""
        prose, code = DOMAINS
        merge(
            self.checkpoint("upcycled-a"),
            self.checkpoint("upcycled-b"),
            self.root / "merge",
            **self._measured(),
            ensemble=True,
            repair="auto",
            calibration_a=self.held_out("calibration", prose),
            calibration_b=self.held_out("calibration", code),
            calibration_tokens=CALIBRATION_TOKENS,
            overwrite=True,
        )
        report = json.loads((self.root / "merge" / "report.json").read_text(encoding="utf-8"))
        return [
            "merged at t = 0.5: merge",
            *(f"  {line}" for line in (*by_domain(report["references"]), *report["verdict"]["sentences"])),
        ]

    def base(self) -> list[str]:
        torch.manual_seed(0)
        model = MixtralForCausalLM(CONFIG)
        loss = self._train(model, self._streams()["prose"], BASE, seed=0)
        self._save(model, "base")
        return [f"base: {_millions(model)} parameters, training loss {loss:.2f} nats per token"]

    def variant(self, name: str, *, init_seed: int, data_seed: int) -> list[str]:
        """Another first block for the base, trained alone and saved with the tokenizer."""
        with quiet_transformers():
            base = MixtralForCausalLM.from_pretrained(self.checkpoint("base"), dtype=torch.float32)
        model = copy.deepcopy(base)
        reinitialise(model, [0], std=INIT_STD, seed=init_seed)
        loss = self._train(model, self._streams()["prose"], BLOCK, seed=data_seed, layers=[0])
        self._save(model, name)
        return [f"{name}: training loss {loss:.2f} nats per token"]

    def _streams(self) -> dict[str, Tensor]:
        """Tokens to train on, by domain."""
        streams = self.records.read("streams")
        return {domain: streams[domain] for domain in DOMAINS}

    def _train(
        self, model: PreTrainedModel, tokens: Tensor, recipe: Training, *, seed: int, layers: list[int] | None = None
    ) -> float:
        with bar(total=recipe.steps, desc="training", unit="step") as steps:
            return train(model, tokens, recipe, seed=seed, layers=layers, progress=lambda step: steps.update())

    def _save(self, model: PreTrainedModel, name: str) -> None:
        with quiet_transformers():  # a bar for each shard, of which there is one
            model.save_pretrained(self.checkpoint(name))
        PreTrainedTokenizerFast.from_pretrained(self.root / "text").save_pretrained(self.checkpoint(name))

    def _measured(self) -> dict[str, Any]:
        """On which texts the upcycled pair is measured."""
        texts = {domain: self.held_out("evaluation", domain) for domain in DOMAINS}
        return {"text": texts, "context": CONTEXT, "max_tokens": HELD_OUT_TOKENS}

    def shuffled(self) -> list[str]:
        """B moved by a random symmetry with signs and scales: the same function, far away as weights."""
        told = self.variant("b-sibling", init_seed=1, data_seed=3)
        generator = torch.Generator().manual_seed(0)
        with Checkpoint.open(self.checkpoint("b-sibling")) as checkpoint:
            symmetry = read_model(checkpoint).random(generator, scale=2.0)
        apply(symmetry, self.checkpoint("b-sibling"), self.checkpoint("b-shuffled"), overwrite=True)
        return told

    def barrier(self, pair: str) -> list[str]:
        upcycled = pair == "upcycled"
        measured = self._measured() if upcycled else {**self._measured(), "text": self.held_out("evaluation", "prose")}
        report = barrier(
            self.checkpoint("upcycled-a" if upcycled else "a"),
            self.checkpoint("upcycled-b" if upcycled else f"b-{pair}"),
            self.root / pair,
            **measured,
            overwrite=True,
        )
        said = report.verdict.sentences if upcycled else [report.sentence(path) for path in PATHS]
        return [f"{pair} pair", *(f"  {line}" for line in said)]

    def summary(self) -> list[str]:
        figures = {
            pair: {path: {key: report["paths"][path][key] for key in ("barrier", "area")} for path in PATHS}
            | {"aligned_percent_of_naive": report["summary"]["aligned_percent_of_naive"]}
            for pair, report in _reports(self.root).items()
        }
        merged = json.loads((self.root / "merge" / "report.json").read_text(encoding="utf-8"))
        figures["upcycled"]["references"] = merged["references"]
        (self.root / "summary.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        return [f"plots: {', '.join(f'{pair}/barrier.png' for pair in PAIRS)}; figures: summary.json"]


def by_domain(references: Mapping[str, Any]) -> list[str]:
    """A table of the losses at t = 0.5, from the `references` of report.json: models by domains, and the mean of these."""
    columns = {**references["texts"], "mean": references["mean"]}
    measured = [name for name in WORDS if references["mean"][name] is not None]
    rows = [(WORDS[name], *(f"{columns[text][name]:.3f}" for text in columns)) for name in measured]
    return aligned([("nats per token", *columns), *rows])


def _millions(model: PreTrainedModel) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M"


def _facts() -> dict[str, Any]:
    """What the models and figures depend on, besides the machine."""
    recipes = {
        "dense": asdict(DENSE),
        "apart": asdict(APART),
        "base": asdict(BASE),
        "block": asdict(BLOCK),
        "init_std": INIT_STD,
    }
    text = {
        "python": platform.python_version(),
        "context": CONTEXT,
        "tokens": HELD_OUT_TOKENS,
        "calibration_tokens": CALIBRATION_TOKENS,
    }
    return {"upcycled": UPCYCLED.to_dict(), "config": CONFIG.to_dict(), **recipes, **text}


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
