from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.endpoints import Point
from hf_moe_lmc.path.evaluation import Evaluator
from hf_moe_lmc.path.routing import RoutingObserver, _distribution
from hf_moe_lmc.perplexity.windows import Windows
from hf_moe_lmc.verbs.apply import apply
from tests.path.test_evaluation import ROWS, WINDOWS, drawn, miniatures, reference
from tests.verbs.test_alignment import random_symmetry, read

pytestmark = pytest.mark.filterwarnings("ignore")

# the usual signature with routers of each kind, no `mlp` around the router, numbers of experts that do not exist
CASES = (
    "mixtral qwen3_next deepseek_v3 deepseek_v4 kolibri1 gemma4 granitemoehybrid dbrx gpt_oss longcat_flash phimoe "
    "ernie4_5_vl_moe inkling_mm_model minimax_m3_vl nemotron_h afmoe lfm2_moe"
)
POINTS = [Point("aligned", 0.0), Point("aligned", 1.0), Point("naive", 1.0), Point("aligned", 0.5), Point("naive", 0.5)]


def routed(
    a: MoEModel, b: MoEModel, symmetries: Any, points: list[Point] = POINTS, windows: Windows = WINDOWS, **options: Any
) -> RoutingObserver:
    observer = RoutingObserver(a, points)
    options = {"model_class": language_model_class(a), "batch_size": 2, "resident": False} | options
    Evaluator(a, b, windows, EvaluationOptions(**options)).evaluate(symmetries, points, observers=[observer])
    return observer


def of(rows: list[dict[str, Any]], path: str, t: float) -> list[dict[str, Any]]:
    return [row for row in rows if (row["path"], row["t"]) == (path, t)]


@pytest.mark.parametrize("case", CASES.split())
def test_loads_are_those_of_the_plain_models(case: str, tmp_path: Path) -> None:
    a, b = miniatures(case, tmp_path)
    observer = routed(a, b, {"aligned": drawn(b), "naive": b.identity()})
    rows = observer.rows()
    assert observer.problem is None
    for model, t in ((a, 0.0), (b, 1.0)):
        plain = reference(language_model_class(a), Path(model.checkpoint.name))
        counts: dict[str, torch.Tensor] = {}

        def hook(module: Any, args: Any, counts: Any = counts) -> None:
            counts[module.name] = torch.bincount(args[1].flatten(), minlength=64)

        for name, module in plain.named_modules():
            if name.rpartition(".")[2] == "experts" and "vision" not in name:
                module.name = name
                module.register_forward_pre_hook(hook)
        with torch.no_grad():
            plain(input_ids=ROWS, use_cache=False)
        found = of(rows, "naive", t)
        assert len(found) == len(counts) > 0
        for row, expected in zip(found, counts.values(), strict=True):
            load = torch.tensor(row["load"])
            assert torch.allclose(load, expected[: len(load)] / expected.sum())
    for path in ("aligned", "naive"):
        assert [row["agreement_a"] for row in of(rows, path, 0.0)] == [1.0] * len(found)
        assert [row["agreement_b"] for row in of(rows, path, 1.0)] == [1.0] * len(found)
        assert [row["agreement_b"] for row in of(rows, path, 0.0)] == [row["agreement_a"] for row in of(rows, path, 1.0)]
        between = [row["agreement_a"] for row in of(rows, path, 0.5)]
        assert min(between) >= 0 and all(share < 1 or case == "deepseek_v4" for share in between)  # it has tables for some
    entropies_found = [row["entropy"] for row in rows]
    assert all(0 < entropy < torch.tensor(len(row["load"])).log() for entropy, row in zip(entropies_found, rows, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES.split() if case not in ("gemma4", "phimoe")])
def test_weights_of_the_chosen_experts_are_in_the_ratio_of_their_probabilities(case: str, tmp_path: Path) -> None:
    a, _ = miniatures(case, tmp_path)
    plain = reference(language_model_class(a), Path(a.checkpoint.name))
    observer = RoutingObserver(a, [Point("aligned", 0.0)])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(site: Any, chosen: torch.Tensor, logits: torch.Tensor) -> None:
        seen.append((chosen, _distribution(logits, a.layers[site.layer].router)))

    weights: list[torch.Tensor] = []
    observer._record = record  # type: ignore[method-assign]
    lists = [name for name, _ in plain.named_modules() if name.endswith((".layers", ".blocks")) and "vision" not in name]
    observer.begin(list(plain.get_submodule(lists[0]).children()), lambda: None)
    for name, module in plain.named_modules():
        if name.rpartition(".")[2] == "experts":
            module.register_forward_pre_hook(lambda module, args: weights.append(args[2]))
    with torch.no_grad():
        plain(input_ids=ROWS, use_cache=False)
    assert len(seen) == len(weights) > 0
    for (chosen, probabilities), of_chosen in zip(seen, weights, strict=True):
        share = probabilities.gather(1, chosen.clamp(min=0))
        share, expected = (values / values.sum(-1, keepdim=True) for values in (share, of_chosen.double()))
        assert torch.allclose(share, expected, atol=1e-5)


@pytest.mark.parametrize("case", ["llama4", "jetmoe", "zaya"])
def test_routers_of_their_own_kind(case: str, tmp_path: Path) -> None:
    a, b = miniatures(case, tmp_path)
    observer = routed(a, b, {"aligned": drawn(b), "naive": b.identity()})
    assert observer.problem is None
    rows = observer.rows()
    assert {row["layer"] for row in rows} == set(a.layers)
    if case == "jetmoe":
        assert {row["module"] for row in rows} == {"mlp", "self_attention.experts"}
    for row in rows:
        assert sum(row["load"]) == pytest.approx(1) or (case == "zaya" and sum(row["load"]) < 1)  # some tokens skip its blocks
        assert row["agreement_a"] == 1 or row["t"] > 0
    entropies = [row["entropy"] for row in of(rows, "aligned", 0.0)]
    assert min(entropies) > 0
    # the same experts under other numbers
    for one, other in zip(of(rows, "aligned", 1.0), of(rows, "naive", 1.0), strict=True):
        assert sorted(one["load"]) == pytest.approx(sorted(other["load"]))
        assert one["entropy"] == pytest.approx(other["entropy"], rel=1e-4)


@pytest.fixture(scope="module")
def relabelled(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[MoEModel, MoEModel, Any]:
    a = saved("qwen2_moe")
    folder = tmp_path_factory.mktemp("relabelled") / "b"
    symmetry = random_symmetry(read(a), seed=3)
    apply(symmetry, a, folder)
    b = read(folder)
    return read(a), b, {"aligned": symmetry.inverse(), "naive": b.identity()}


@pytest.mark.parametrize("options", [{}, {"resident": True}, {"activation_memory": 1, "batch_size": 1}])
def test_a_relabelled_copy_agrees_on_the_aligned_path_alone(
    relabelled: tuple[MoEModel, MoEModel, Any], options: dict[str, Any]
) -> None:
    observer = routed(*relabelled, **options)
    rows = observer.rows()
    assert all(row["agreement_a"] == row["agreement_b"] == 1 for row in rows if row["path"] == "aligned")
    assert all(row["agreement_a"] < 1 for row in rows if row["path"] == "naive" and row["t"] > 0)
    assert {tally.tokens for tally in observer.tallies.values()} == {ROWS.numel()}
    assert not observer._references
    assert [(row["path"], row["t"]) for row in rows[::2]] == [
        ("aligned", 0.0), ("aligned", 0.5), ("aligned", 1.0), ("naive", 0.0), ("naive", 0.5), ("naive", 1.0),
    ]  # fmt: skip


def test_points_of_single_layers_are_not_recorded(relabelled: tuple[MoEModel, MoEModel, Any]) -> None:
    a, b, symmetries = relabelled
    single = [Point("aligned", 0.5, frozenset({1}))]
    assert routed(a, b, symmetries, POINTS + single).rows() == routed(a, b, symmetries).rows()
    without_end = routed(a, b, symmetries, [Point("naive", 0.0)]).rows()
    assert {row["agreement_b"] for row in without_end} == {None}


def test_windows_that_others_watched_are_taken_in(relabelled: tuple[MoEModel, MoEModel, Any]) -> None:
    parts = [Windows((row,), (0,), context=17, bos=False, tokens_read=17) for row in ROWS]
    first, *others = [routed(*relabelled, windows=part) for part in parts]
    for other in others:
        first.add(other.tallies)
    for found, expected in zip(first.rows(), routed(*relabelled, batch_size=1).rows(), strict=True):
        for key, value in expected.items():
            assert found[key] == (value if isinstance(value, (str, int)) else pytest.approx(value))


def test_points_in_another_order_are_refused(relabelled: tuple[MoEModel, MoEModel, Any]) -> None:
    a = relabelled[0]
    inner, single = Point("aligned", 0.5), Point("aligned", 0.5, frozenset({1}))
    for points in ([], POINTS[1:], [POINTS[0], inner, POINTS[1]], [single, *POINTS]):
        with pytest.raises(ValueError, match="come"):
            RoutingObserver(a, points)


def test_a_model_whose_routing_does_not_show_says_so(
    relabelled: tuple[MoEModel, MoEModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_moe_lmc.path.routing.ROUTERS", ("elsewhere",))
    observer = routed(*relabelled)
    assert observer.rows() == []
    assert observer.problem is not None and "layer 1 of Qwen2MoeConfig shows neither" in observer.problem
