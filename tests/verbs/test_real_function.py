"""Real pairs cut small, run for real: what comes out is held against transformers by itself, which knows nothing of us."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

import hf_moe_lmc as lmc
from hf_moe_lmc.moe.model_class import text_reader
from hf_moe_lmc.moe.registry import aliases
from hf_moe_lmc.perplexity.windows import Windows
from tests.schemas import check_alignment, check_report
from tests.verbs.test_real_pairs import PAIRS

pytestmark = pytest.mark.filterwarnings("ignore")
WAYS = ("A x B", "B x A")
# another eos, a grown vocabulary, an alias, and MTP behind the last layer and under a prefix, in either
ALWAYS = (
    ("Qwen3-30B-A3B x Instruct", "A x B"),
    ("Mixtral x ChatML", "B x A"),
    ("Kimi-K2", "A x B"),
    ("GLM-4.5, MTP in B", "B x A"),
    ("Qwen3.5, MTP in B", "A x B"),
)
CHOSEN = [(pair, way) for pair in PAIRS for way in WAYS] if os.environ.get("HF_MOE_LMC_TEST_ALL") else ALWAYS
# Settings that follow from the tensors of a file, whoever's configuration it is loaded under.
OF_TENSORS = ("vocab_size", "tie_word_embeddings", "vocab_size_per_layer_input")
CLOSE = 1e-4  # nats per token


def loaded(folder: Path, config_of: Path | None = None) -> PreTrainedModel:
    """A model as transformers loads it, under the configuration of another one where that is given."""
    config = AutoConfig.from_pretrained(_known(config_of or folder))
    written = json.loads((folder / "config.json").read_text())
    written |= written.get("text_config") or {}
    for part in (config, config.get_text_config()):
        for key in OF_TENSORS:
            if hasattr(part, key) and key in written:
                setattr(part, key, written[key])
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model.eval()


def _known(folder: Path) -> Path:
    """A folder whose configuration transformers reads: one published under an alias, under the name that it knows."""
    written = json.loads((folder / "config.json").read_text())
    if written["model_type"] in CONFIG_MAPPING:
        return folder
    other = folder.with_name(f"{folder.name}-known")
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text(json.dumps({**written, "model_type": aliases()[written["model_type"]].known_as}))
    return other


def nll(model: PreTrainedModel, windows: Windows, common: int | None = None) -> float:
    """Nats per token over windows, over the first `common` ids."""
    total, count = 0.0, 0
    for row in windows.rows:
        with torch.no_grad():
            logits = text_reader(model)(row[None]).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits[:, :common], row[1:], reduction="sum"))
        count += len(row) - 1
    return total / count


def say_the_end(folder: Path) -> None:
    """Has every file say what the tokenizer says of the end of a text."""
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config") or {}):
        part |= {"eos_token_id": end} if "eos_token_id" in part else {}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))


def check_output(folder: Path, rows: int) -> None:
    """What belongs together is of one model: configuration, tokenizer, generation; every row is accounted for."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config") or config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert text["vocab_size"] == rows >= len(tokenizer)
    generation = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None
    for eos in (config.get("eos_token_id"), text.get("eos_token_id"), generation and generation.eos_token_id):
        assert eos is None or tokenizer.eos_token_id in (eos if isinstance(eos, list) else [eos])
    recorded = folder / "alignment" / "alignment.json"
    if recorded.exists():
        content = json.loads(recorded.read_text())
        check_alignment(content)
        account = content.get("vocabulary")
        assert account is None or account.pop("rows") == rows == sum(account.values())
        assert account is None or f"| all | {rows} |" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("pair", "way"), CHOSEN)
def test_losses_and_outputs_are_those_of_transformers(
    pair: str, way: str, real: Callable[[str, int], Path], tmp_path: Path, text_file: Path, undrawn: None
) -> None:
    name_a, name_b, change = PAIRS[pair]
    one, other = (Path(shutil.copytree(real(name, i), tmp_path / "ab"[i])) for i, name in enumerate((name_a, name_b)))
    change(other)
    for folder in (one, other):
        say_the_end(folder)
    a, b = (one, other) if way == WAYS[0] else (other, one)
    report = lmc.barrier(a, b, tmp_path / "path", text=text_file, points=3, max_tokens=96, context=32, routing=False)
    check_report(json.loads((tmp_path / "path" / "report.json").read_text()))
    assert report.disagreement is None and report.naive is not None

    alone = [loaded(a), loaded(b, a)]
    tables = [len(model.get_input_embeddings().weight) for model in alone]
    tokens = [len(AutoTokenizer.from_pretrained(folder)) for folder in (a, b)]
    common = None if tables[0] == tables[1] and tokens[0] == tokens[1] else min(tokens)
    at_a, at_b = (nll(model, report.windows, common) for model in alone)
    assert abs(at_a - at_b) > 100 * CLOSE  # the control: the two ends are told apart
    assert report.naive.nll[0] == pytest.approx(at_a, abs=CLOSE)
    assert [report.naive.nll[-1], report.aligned.nll[-1]] == pytest.approx([at_b, at_b], abs=CLOSE)
    own_b = nll(loaded(b), report.windows)
    for side, found in (report.own or {}).items():
        assert found["nll"] == pytest.approx(own_b if side == "b" else nll(alone[0], report.windows), abs=CLOSE)

    lmc.align(a, b, tmp_path / "aligned")
    assert nll(loaded(tmp_path / "aligned"), report.windows) == pytest.approx(own_b, abs=CLOSE)
    for t, expected in ((0.0, at_a), (0.5, report.aligned.nll[1]), (1.0, at_b)):
        lmc.merge(a, b, tmp_path / f"merged-{t}", t, symmetry=tmp_path / "aligned" if t == 1 else None)
        assert nll(loaded(tmp_path / f"merged-{t}"), report.windows, common) == pytest.approx(expected, abs=CLOSE), t
        check_output(tmp_path / f"merged-{t}", max(tables))
    lmc.merge(a, b, tmp_path / "plain", align=False, tokenizer="b")
    assert nll(loaded(tmp_path / "plain"), report.windows, common) == pytest.approx(report.naive.nll[1], abs=CLOSE)
    check_output(tmp_path / "plain", max(tables))
