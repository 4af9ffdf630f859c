"""Repairs fitted on text, over families and layouts: against the evaluator, and against transformers on the written weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.endpoints import Point
from hf_moe_lmc.path.evaluation import Evaluator
from hf_moe_lmc.path.point_model import load_point
from hf_moe_lmc.perplexity.windows import Windows, window_losses
from hf_moe_lmc.repair import ridge_layer
from hf_moe_lmc.repair.block_map import BlockMap
from hf_moe_lmc.repair.calibrated_run import Calibrated, Calibration
from hf_moe_lmc.repair.choice import Choice
from hf_moe_lmc.repair.fitted import Fitted
from hf_moe_lmc.repair.halves import part_of
from hf_moe_lmc.repair.methods import ALIGNED, Method
from hf_moe_lmc.repair.sites import UnsuitedError
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.writing.results import ResultFolder
from hf_moe_lmc.writing.streams import interpolated
from tests import tiny
from tests.path.test_evaluation import WINDOWS, miniatures

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = torch.randint(3, 300, (12, 17), generator=torch.Generator().manual_seed(0))
TEXT = Windows(tuple(ROWS), tuple(range(12)), context=17, bos=False, tokens_read=12 * 17)
FIT, COMPARE = range(8), range(8, 12)
RIDGE, REGMEAN = Method(fit="ridge", strength=0.1), Method(fit="regmean")
T = 0.4


@dataclass
class Case:
    a: MoEModel
    b: MoEModel
    symmetry: ModelSymmetry
    windows: Windows
    options: EvaluationOptions

    def run(self, t: float = T) -> Calibrated:
        everything = frozenset(self.windows.text_of)
        calibration = Calibration(self.windows, (everything, everything))
        return Calibrated(self.a, self.b, self.symmetry, t, calibration, self.options, {})

    def aligned(self, t: float = T) -> Tensor:
        evaluator = Evaluator(self.a, self.b, self.windows, self.options)
        return evaluator.evaluate({"aligned": self.symmetry}, [Point("aligned", t)])[0][0]


def case_of(a: MoEModel, b: MoEModel, windows: Windows = TEXT) -> Case:
    symmetry = b.random(torch.Generator().manual_seed(0))
    return Case(a, b, symmetry, windows, EvaluationOptions(model_class=language_model_class(a), batch_size=3))


@pytest.fixture
def tiny_case(saved: Callable[..., Path]) -> Callable[[str, str], Case]:
    def get(family: str, layout: str) -> Case:
        return case_of(*(read_model(Checkpoint.open(saved(family, layout, seed))) for seed in (0, 1)))

    return get


@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
def test_fitted_weights_are_those_that_were_measured(
    tiny_case: Callable[[str, str], Case], tmp_path: Path, family: str, layout: str
) -> None:
    case = tiny_case(family, layout)
    run = case.run()
    methods = [ALIGNED, RIDGE, Method(fit="ridge", strength=1e7), REGMEAN]
    kept = {method: Fitted(ResultFolder(tmp_path / str(number))) for number, method in enumerate(methods)}
    found = run.run(methods, FIT, COMPARE, kept)
    torch.testing.assert_close(found.losses[0], case.aligned()[8:], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.losses[2], found.losses[0], rtol=1e-5, atol=0)  # lambda without end gives the start
    assert all(fit["after"] < fit["before"] for fit in found.fits[1])
    assert len(found.fits[1]) == len(case.a.layers)
    for number in (1, 3):
        stream = Choice(methods[number], True, None, kept[methods[number]]).stream(run)
        model = load_point(stream, dtype=torch.float32, device="cpu", offload_folder=tmp_path)
        losses = window_losses(model, part_of(case.windows, COMPARE), batch_size=3)
        torch.testing.assert_close(losses, found.losses[number], rtol=1e-5, atol=0)
        assert not torch.allclose(losses, found.losses[0], rtol=1e-5, atol=0)


# a factor behind the experts, a shared expert beside the block, biases and transposed matrices, a mean of routed and shared
# experts, tables of experts, layers without experts, another router, weighted inputs, experts in the layer itself
SUITED = "llama4_text gemma4_text hunyuan_v1_moe granitemoehybrid gpt_oss cohere2_moe[sigmoid] deepseek_v4 jamba phimoe"
REFUSED = {
    "axk1": "not the weighted sum",
    "longcat_flash": "no router",
    "nemotron_h": "no gated MLPs",
    "dbrx": "no module with a 3-D",
}


@pytest.mark.parametrize("name", SUITED.split())
def test_blocks_of_many_kinds_are_reproduced(tmp_path: Path, name: str) -> None:
    a, b = miniatures(name, tmp_path)
    case = Case(a, b, b.identity(), WINDOWS, EvaluationOptions(model_class=language_model_class(a), batch_size=3))
    found = case.run().run([ALIGNED, RIDGE], [0, 1], [2])
    torch.testing.assert_close(found.losses[0], case.aligned()[2:], rtol=1e-6, atol=0)
    assert found.fits[1] and all(fit["after"] < 0.2 * fit["before"] for fit in found.fits[1])


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_not_reproduced_is_refused_by_name(tmp_path: Path, name: str) -> None:
    a, b = miniatures(name, tmp_path)
    case = Case(a, b, b.identity(), WINDOWS, EvaluationOptions(model_class=language_model_class(a), batch_size=3))
    with pytest.raises(UnsuitedError, match=f"family {a.family.name} cannot be refitted on text: .*{REFUSED[name]}"):
        case.run().run([RIDGE], [0, 1], [2])


def test_routing_weights_that_are_not_those_of_the_block_are_noticed(
    tiny_case: Callable[[str, str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, routed = tiny_case("deepseek_v3", "fused"), BlockMap.routed
    monkeypatch.setattr(BlockMap, "routed", lambda self: 1.01 * routed(self))
    with pytest.raises(UnsuitedError, match="not the weighted sum"):
        case.run().run([RIDGE], FIT, COMPARE)


def test_a_layer_that_was_fitted_before_is_not_fitted_again(
    tiny_case: Callable[[str, str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, fitted = tiny_case("qwen2_moe", "per-expert"), Fitted(ResultFolder(tmp_path))
    first = case.run().run([RIDGE], FIT, COMPARE, {RIDGE: fitted})
    fitted.folder.path("layer-0002.safetensors").unlink()
    solved: list[int] = []
    ridge = ridge_layer.ridge

    def counted(*args: Any) -> Any:
        solved.append(1)
        return ridge(*args)

    monkeypatch.setattr(ridge_layer, "ridge", counted)
    again = case.run().run([RIDGE], FIT, COMPARE, {RIDGE: Fitted(ResultFolder(tmp_path))})
    assert len(solved) == 1
    torch.testing.assert_close(again.losses, first.losses, rtol=1e-7, atol=0)


def test_parents_are_watched_on_their_own_text(tiny_case: Callable[[str, str], Case]) -> None:
    case = tiny_case("mixtral", "fused")
    case.windows = Windows(tuple(ROWS), tuple(range(12)), 17, False, 12 * 17, texts=("prose",) * 4 + ("code",) * 8)
    domains = (frozenset({"prose"}), frozenset({"code"}))

    def losses(*domains: frozenset[str]) -> Tensor:
        calibration = Calibration(case.windows, (domains[0], domains[1]))
        run = Calibrated(case.a, case.b, case.symmetry, T, calibration, case.options, {})
        return run.run([REGMEAN], FIT, COMPARE).losses

    assert not torch.allclose(losses(*domains), losses(*domains[::-1]), rtol=1e-4)


def test_experts_that_no_token_reaches_are_averaged_and_named(tiny_case: Callable[[str, str], Case], tmp_path: Path) -> None:
    case, fitted = tiny_case("mixtral", "per-expert"), Fitted(ResultFolder(tmp_path))
    facts = case.run().run([REGMEAN], FIT, COMPARE).fits[0]
    assert not any("averaged_experts" in fact for fact in facts)
    case.windows = Windows((torch.tensor([5, 6]), torch.tensor([7, 8])), (0, 1), 17, False, 4)
    facts = case.run().run([REGMEAN], [0], [1], {REGMEAN: fitted}).fits[0]
    named = {fact["layer"]: fact["averaged_experts"] for fact in facts if "averaged_experts" in fact}
    assert named
    layer, experts = next(iter(named.items()))
    start = interpolated(case.a, case.b, case.symmetry.layers, T)
    for role in ("gate", "down"):
        value = fitted.value(layer, role, experts[0])
        assert value is not None
        (source,) = start.in_outputs(layer, [0])
        torch.testing.assert_close(value, source.stored(role, experts[0]), rtol=1e-5, atol=1e-6)
