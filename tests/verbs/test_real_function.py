"""Real pairs cut small, run for real: what comes out is held against transformers by itself, which knows nothing of us."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

import hf_moe_lmc as lmc
from hf_moe_lmc.moe.model_class import text_reader
from hf_moe_lmc.perplexity.windows import Windows
from tests import tiny
from tests.schemas import check_alignment, check_report
from tests.verbs.test_real_pairs import PAIRS, published

pytestmark = pytest.mark.filterwarnings("ignore")
ALWAYS = list(PAIRS)
MIDDLE = 0.5


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    made: dict[tuple[str, int], Path] = {}

    def get(name: str, seed: int) -> Path:
        if (name, seed) not in made:
            made[name, seed] = published(name, tmp_path_factory.mktemp("real") / f"{name}-{seed}", seed)
        return made[name, seed]

    return get


def loaded(folder: Path, config_of: Path | None = None) -> PreTrainedModel:
    """A model as transformers loads it, with the configuration of another one where that is given."""
    own = json.loads((folder / "config.json").read_text())
    config = AutoConfig.from_pretrained(_readable(config_of or folder))
    text, own_text = config.get_text_config(), own.get("text_config") or own
    for key in ("vocab_size", "tie_word_embeddings", "vocab_size_per_layer_input"):
        for part in (config, text):
            if hasattr(part, key) and key in {**own, **own_text}:
                setattr(part, key, {**own, **own_text}[key])
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model.eval()


def _readable(folder: Path) -> Path:
    return folder


def nll(model: PreTrainedModel, windows: Windows, common: int | None = None) -> float:
    """Nats per token over windows, over the first `common` ids."""
    total, count = 0.0, 0
    for row in windows.rows:
        with torch.no_grad():
            logits = text_reader(model)(row[None]).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits[:, :common], row[1:], reduction="sum"))
        count += len(row) - 1
    return total / count


@pytest.mark.parametrize("way", ["A x B", "B x A"])
@pytest.mark.parametrize("pair", ALWAYS)
def test_outputs_and_losses_are_those_of_transformers(
    pair: str, way: str, real: Callable[[str, int], Path], tmp_path: Path, text_file: Path, undrawn: None
) -> None:
    name_a, name_b, change = PAIRS[pair]
    one, other = real(name_a, 0), Path(shutil.copytree(real(name_b, 1), tmp_path / "b"))
    change(other)
    a, b = (one, other) if way == "A x B" else (other, one)
    report = lmc.barrier(a, b, tmp_path / "path", text=text_file, points=3, max_tokens=96, context=32)
    content = json.loads((tmp_path / "path" / "report.json").read_text())
    check_report(content)
    assert report.disagreement is None and report.naive is not None
    rows = [len(tiny_table(folder)) for folder in (a, b)]
    common = None if rows[0] == rows[1] else min(len(AutoTokenizer.from_pretrained(f)) for f in (a, b))
    alone = {"A": loaded(a), "B": loaded(b, a)}
    ends = {side: nll(model, report.windows, common) for side, model in alone.items()}
    assert report.naive.nll[0] == pytest.approx(ends["A"], abs=1e-4)
    assert report.naive.nll[-1] == pytest.approx(ends["B"], abs=1e-4)
    assert report.aligned.nll[-1] == pytest.approx(ends["B"], abs=1e-4)
    for side, folder in (("a", a), ("b", b)):
        if report.own and side in report.own:
            assert report.own[side]["nll"] == pytest.approx(nll(loaded(folder), report.windows), abs=1e-4)
    lmc.align(a, b, tmp_path / "aligned")
    assert nll(loaded(tmp_path / "aligned"), report.windows) == pytest.approx(nll(loaded(b), report.windows), abs=1e-4)
    for t, expected in ((0.0, ends["A"]), (MIDDLE, report.aligned.nll[1]), (1.0, ends["B"])):
        out = tmp_path / f"merged-{t}"
        lmc.merge(a, b, out, t)
        assert nll(loaded(out), report.windows, common) == pytest.approx(expected, abs=1e-4), t
    lmc.merge(a, b, tmp_path / "plain", MIDDLE, align=False)
    assert nll(loaded(tmp_path / "plain"), report.windows, common) == pytest.approx(report.naive.nll[1], abs=1e-4)


def tiny_table(folder: Path) -> torch.Tensor:
    return loaded(folder).get_input_embeddings().weight
