"""The models of scripts/upcycling.py: texts, tokenizer, dense models and the MoEs upcycled from them, below one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from batched_mixtral import Recipe, Stack, stack, train_stack, unstack
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from hf_moe_lmc.example.domains import library_domains
from hf_moe_lmc.example.protocol import small_mixtral, token_stream, train_tokenizer
from hf_moe_lmc.example.upcycling import dense_config, upcycle
from hf_moe_lmc.runtime.progress import bar as progress_bar
from hf_moe_lmc.runtime.progress import quiet_transformers

METHODS = {"upcycling": 0.0, "drop": 0.5}  # share of the units that are drawn anew
MIXES = {"same": ("mix", "mix"), "different": ("prose", "code")}  # what A and B are trained on
SIDES = "ab"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        library: folder of the modules whose text is used; None: the standard library.
        pairs_at_once: whose models are trained as one; None: 20 on a GPU, 1 on a CPU.
    """

    hidden_size: int = 64
    layers: int = 3
    units: int = 256
    experts: tuple[int, ...] = (4, 8)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    dense: Recipe = field(default_factory=lambda: Recipe((400,), 4e-3))
    upcycled: Recipe = field(default_factory=lambda: Recipe((300, 600, 2000), 4e-3))
    tokens: int = 8192
    context: int = 64
    library: Path | None = None
    pairs_at_once: int | None = None

    def config(self, experts: int) -> MixtralConfig:
        config = small_mixtral(hidden_size=self.hidden_size, layers=self.layers, intermediate_size=self.units)
        config.num_local_experts = experts
        return config


@dataclass(frozen=True)
class Setting:
    """What a pair of models is made of."""

    method: str
    mix: str
    experts: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.mix}-e{self.experts}-s{self.seed}"


Done = Callable[[Setting, int], bool]


@dataclass(frozen=True)
class Models:
    """The models under a root; what is there is not made again."""

    root: Path
    scale: Scale
    device: str

    def settings(self, experts: int) -> list[Setting]:
        """All pairs of a seed before those of the next, so that a stopped call has all settings."""
        return [Setting(method, mix, experts, seed) for seed, method, mix in product(self.scale.seeds, METHODS, MIXES)]

    def checkpoint(self, setting: Setting, side: str, steps: int) -> Path:
        return self.root / "models" / f"{setting.name}-{side}-{steps}"

    def text(self, part: str, domain: str) -> Path:
        """A part, `evaluation` or `calibration`, of a domain: a document in each line."""
        return self.root / part / f"{domain}.jsonl"

    def prepare(self) -> None:
        """Texts, tokenizer and token streams. What `library_domains` returns has been proved to be apart."""
        if (self.root / TOKENIZER).exists():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        domains = library_domains(self.scale.library)
        tokenizer = train_tokenizer([text for domain in domains for text in domain.train])
        rows = {domain.name: token_stream(tokenizer, domain.train) for domain in domains}
        least = min(map(len, rows.values()))
        rows["mix"] = torch.cat([rows[domain.name][:least] for domain in domains])
        save_file(rows, self.root / "streams.safetensors")
        for domain in domains:
            for part in ("evaluation", "calibration"):
                path = self.text(part, domain.name)
                path.parent.mkdir(exist_ok=True)
                lines = [json.dumps({"text": text}) for text in getattr(domain, part)]
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(self.root)

    def streams(self) -> dict[str, Tensor]:
        return load_file(self.root / "streams.safetensors")

    def train_dense(self, check: Callable[[], object]) -> None:
        """A dense model for each seed, trained on both domains."""
        if all(self._dense(seed).exists() for seed in self.scale.seeds):
            return
        config, states = dense_config(self.scale.config(1)), []
        for seed in self.scale.seeds:
            torch.manual_seed(seed)
            states.append(MistralForCausalLM(config).state_dict())

        def keep(steps: int, models: Stack) -> None:
            for i, seed in enumerate(self.scale.seeds):
                save_file(unstack(models, i), self._dense(seed))

        mix = [self.streams()["mix"]] * len(states)
        self._train("dense models", stack(states), config, mix, list(self.scale.seeds), self.scale.dense, keep, check)

    def _dense(self, seed: int) -> Path:
        return self.root / f"dense-{seed}.safetensors"

    def train_upcycled(self, experts: int, done: Done, check: Callable[[], object]) -> Iterator[tuple[Setting, int]]:
        """Upcycles and trains what is missing; yields each pair at each number of steps when it is there.

        Args:
            done: whether a pair at a number of steps is not needed any more; it is then neither trained nor yielded.
        """
        pairs = [pair for pair in product(self.settings(experts), self.scale.upcycled.kept) if not done(*pair)]
        missing = [pair for pair in pairs if not all(self._trained(pair[0], side, pair[1]) for side in SIDES)]
        yield from (pair for pair in pairs if pair not in missing)
        settings = list(dict.fromkeys(setting for setting, _ in missing))
        at_once = self.scale.pairs_at_once or (20 if self.device.startswith("cuda") else 1)
        for first in range(0, len(settings), at_once):
            some = settings[first : first + at_once]
            self._train_some(experts, list(product(some, SIDES)), check)
            yield from (pair for pair in missing if pair[0] in some)

    def _trained(self, setting: Setting, side: str, steps: int) -> bool:
        return (self.checkpoint(setting, side, steps) / TOKENIZER).exists()

    def _train_some(self, experts: int, wanted: Sequence[tuple[Setting, str]], check: Callable[[], object]) -> None:
        config, streams = self.scale.config(experts), self.streams()
        states, rows, seeds = [], [], []
        for setting, side in wanted:
            dense = MistralForCausalLM(dense_config(config))
            dense.load_state_dict(load_file(self._dense(setting.seed)))
            seed = 1000 * (setting.seed + 1) + SIDES.index(side)
            states.append(upcycle(dense, config, seed=seed, redrawn=METHODS[setting.method]).state_dict())
            rows.append(streams[MIXES[setting.mix][SIDES.index(side)]])
            seeds.append(seed)
        template = MixtralForCausalLM(config)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.root)

        def keep(steps: int, models: Stack) -> None:
            for i, (setting, side) in enumerate(wanted):
                folder = self.checkpoint(setting, side, steps)
                template.load_state_dict(unstack(models, i))
                with quiet_transformers():
                    template.save_pretrained(folder)
                tokenizer.save_pretrained(folder)

        words = f"{len(wanted)} models of {experts} experts"
        self._train(words, stack(states), config, rows, seeds, self.scale.upcycled, keep, check)

    def _train(self, words: str, states: Stack, config, streams, seeds, recipe, keep, check) -> None:  # type: ignore[no-untyped-def]
        with progress_bar(total=recipe.steps, desc=f"training {words}", unit="step") as bar:

            def progress() -> None:
                bar.update()
                check()

            train_stack(states, config, streams, seeds, recipe, device=self.device, keep=keep, progress=progress)
