"""The ensemble against what it stands for: both models loaded by transformers, their predictions averaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.model_class import language_model_class, text_reader
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.path import ensemble
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.endpoints import Point
from hf_moe_lmc.path.ensemble import Ensemble, combined
from hf_moe_lmc.path.evaluation import Evaluator
from hf_moe_lmc.path.sweep import Sweep
from hf_moe_lmc.perplexity.references import KINDS
from hf_moe_lmc.perplexity.windows import Windows
from hf_moe_lmc.proof.miniature import build, shrink
from hf_moe_lmc.writing.workspace import Workspace
from tests import zoo
from tests.path.test_evaluation import reference

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = tuple(torch.arange(5 * 17).view(5, 17) * 7 % 90 + 3)
WINDOWS = Windows(ROWS, (0, 0, 0, 1, 1), context=17, bos=False, tokens_read=85)
OVERLAPPING = replace(WINDOWS, context_only=(0, 8, 8, 0, 8))
WEIGHTS = (0.0, 0.3, 0.5, 1.0)


def pair(case: str, folder: Path, changed: dict[str, Any]) -> tuple[MoEModel, MoEModel]:
    """Two miniatures; the configuration of the second is changed."""
    config = shrink(zoo.original(case))
    for seed, name in enumerate("ab"):
        model = build(config, seed)
        model.save_pretrained(folder / name, save_original_format=True)
    if changed:
        file = folder / "b" / "config.json"
        known = json.loads(file.read_text())
        assert changed.keys() <= known.keys()
        file.write_text(json.dumps(known | changed))
    return read_model(Checkpoint.open(folder / "a")), read_model(Checkpoint.open(folder / "b"))


def logits_of(model: MoEModel, folder: Path) -> list[Tensor]:
    loaded = text_reader(reference(language_model_class(model), folder))
    with torch.inference_mode():
        return [loaded(input_ids=row[None], use_cache=False).logits[0, :-1].double() for row in ROWS]


def expected(a: list[Tensor], b: list[Tensor], t: float, windows: Windows) -> dict[str, Tensor]:
    """Loss and right tokens of each window, [window, 2]."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for number, row in enumerate(windows.rows):
        first = windows.context_only[number] if windows.context_only else 0
        means = {
            "logits": ((1 - t) * a[number] + t * b[number]).softmax(-1),
            "probabilities": (1 - t) * a[number].softmax(-1) + t * b[number].softmax(-1),
        }
        for kind, p in means.items():
            own = p[torch.arange(len(p)), row[1:]]
            right = (p.argmax(-1) == row[1:]).double()
            found[kind].append(torch.stack([-own.log()[first:].sum(), right[first:].sum()]))
    return {kind: torch.stack(values) for kind, values in found.items()}


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("mixtral", {}),
        ("qwen2_moe", {"num_experts_per_tok": 1}),
        ("qwen3_next", {}),
        ("jetmoe", {}),
        ("deepseek_v2[groups]", {}),
        ("llama4", {}),
    ],
)
def test_both_means_are_those_of_the_parents_as_transformers_runs_them(
    case: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    a, b = pair(case, tmp_path, changed)
    logits = [logits_of(model, tmp_path / name) for model, name in ((a, "a"), (b, "b"))]
    options = EvaluationOptions(model_class=language_model_class(a), batch_size=2, resident=False)
    for windows in (WINDOWS, OVERLAPPING):
        by_layer = Ensemble(a, b, windows, options).score(WEIGHTS)
        at_once = Ensemble(a, b, windows, replace(options, resident=True)).score(WEIGHTS)
        for t in WEIGHTS:
            wanted = expected(*logits, t, windows)
            for kind in KINDS:
                found = by_layer[t][kind]
                assert torch.equal(found.losses, at_once[t][kind].losses) and torch.equal(found.right, at_once[t][kind].right)
                assert torch.allclose(found.losses[0], wanted[kind][:, 0], rtol=1e-5)
                assert torch.equal(found.right[0], wanted[kind][:, 1])
    assert not torch.allclose(by_layer[0.5]["logits"].losses, by_layer[0.3]["logits"].losses, rtol=1e-5)
    assert not torch.allclose(by_layer[0.5]["logits"].losses, by_layer[0.5]["probabilities"].losses, rtol=1e-5)


def test_at_the_ends_the_ensemble_is_a_parent_as_the_path_has_it(tmp_path: Path) -> None:
    a, b = pair("mixtral", tmp_path, {})
    options = EvaluationOptions(model_class=language_model_class(a), batch_size=2)
    of_path, _ = Evaluator(a, b, WINDOWS, options).evaluate({"naive": b.identity()}, [Point("naive", t) for t in (0.0, 1.0)])
    found = Ensemble(a, b, WINDOWS, options).score((0.0, 1.0))
    for number, t in enumerate((0.0, 1.0)):
        assert torch.equal(found[t]["logits"].losses[0], of_path[number])
        assert torch.allclose(found[t]["probabilities"].losses[0], of_path[number], rtol=1e-6)


def test_ids_that_one_model_lacks_have_no_part_in_the_mean_of_logits_and_no_probability_in_that_model() -> None:
    a, b = torch.randn(1, 3, 7), torch.randn(1, 3, 9)
    common = torch.tensor([True] * 5 + [False] * 4)  # A has a row for id 5, but no token
    targets = torch.tensor([[0, 4, 2]])
    found = combined(a, b, targets, [0.25], common)
    logits = (0.75 * a[..., :5] + 0.25 * b[..., :5]).log_softmax(-1)
    mean = 0.75 * torch.cat([a.softmax(-1), torch.zeros(1, 3, 2)], -1) + 0.25 * b.softmax(-1)
    for number, logs in enumerate((logits, mean.log())):
        assert torch.allclose(found[number, 0], -logs.gather(2, targets[..., None])[..., 0].double(), rtol=1e-5)


def test_logits_are_widened_a_part_at_a_time_and_none_outlives_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair("mixtral", tmp_path, {})
    options = EvaluationOptions(model_class=language_model_class(a), batch_size=2, resident=False)
    whole = Ensemble(a, b, WINDOWS, options).score((0.5,))
    monkeypatch.setattr(ensemble, "AT_ONCE", 300)
    held: list[int] = []
    advance = Sweep.advance

    def watched(sweep: Sweep, lane: Any, expected: int | None) -> None:
        advance(sweep, lane, expected)
        held.append(sum(isinstance(one.result, Tensor) for one in sweep._lanes))

    monkeypatch.setattr(Sweep, "advance", watched)
    found = Ensemble(a, b, WINDOWS, options).score((0.5,))
    assert max(held) == 1 and len(held) > 6
    for kind in KINDS:
        assert torch.allclose(found[0.5][kind].losses, whole[0.5][kind].losses, rtol=1e-6)


@pytest.mark.parametrize("resident", [True, False])
def test_a_stopped_call_goes_on_from_the_batches_that_it_had_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    a, b = pair("mixtral", tmp_path, {})
    options = EvaluationOptions(
        model_class=language_model_class(a), batch_size=1, resident=resident, activation_memory=None if resident else 1
    )
    monkeypatch.setattr(ensemble, "ROUND", 1)
    whole = Ensemble(a, b, WINDOWS, options).score((0.5,))
    done: list[int] = []
    real = Ensemble._combined

    def counted(of: Ensemble, *given: Any) -> Tensor:
        if stop and len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(of, *given)

    monkeypatch.setattr(Ensemble, "_combined", counted)
    for stop in (True, False):
        workspace = Workspace(tmp_path / "out", tmp_path / "kept")
        if stop:
            with pytest.raises(KeyboardInterrupt):
                Ensemble(a, b, WINDOWS, options).score((0.5,), workspace)
        else:
            found = Ensemble(a, b, WINDOWS, options).score((0.5,), workspace)
    assert len(done) == len(ROWS)
    for kind in KINDS:
        assert torch.equal(found[0.5][kind].losses, whole[0.5][kind].losses)
