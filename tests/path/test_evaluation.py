"""The evaluator against what it stands for: each point written as a checkpoint, loaded and run by transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from greenlet import greenlet
from torch import nn
from transformers import PreTrainedModel

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import CheckpointError, ForeignError, InputError
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.model_class import language_model_class, text_reader
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.path import cost as costs
from hf_moe_lmc.path import evaluation
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.endpoints import Endpoints, Point, conversions
from hf_moe_lmc.path.evaluation import Evaluator, check_points
from hf_moe_lmc.path.skeleton import Skeleton
from hf_moe_lmc.path.sweep import Lane
from hf_moe_lmc.perplexity.windows import Windows, window_losses
from hf_moe_lmc.proof.checks import write
from hf_moe_lmc.proof.miniature import build, shrink
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.writing.streams import interpolated
from tests import zoo
from tests.verbs.test_alignment import random_symmetry, read

pytestmark = pytest.mark.filterwarnings("ignore")

# a state-space or linear attention, odd stacks of layers, tables of integers, towers for images, odd routers
CASES = (
    "jamba nemotron_h granitemoehybrid qwen3_next kimi_linear bailing_hybrid lfm2_moe minimax zaya gemma4 deepseek_v4 "
    "longcat_flash qwen3_vl_moe llama4 glm4v_moe inkling_mm_model ernie4_5_vl_moe mixtral deepseek_v2[groups] gpt_oss dbrx "
    "jetmoe phimoe hunyuan_v1_moe aria step3p7"
)
ROWS = torch.arange(3 * 17).view(3, 17) * 7 % 90 + 3
WINDOWS = Windows(tuple(ROWS), (0, 0, 0), context=17, bos=False, tokens_read=51)
POINTS = [Point(path, t) for path, at in (("aligned", (0.0, 0.5, 1.0)), ("naive", (0.5, 1.0))) for t in at]


def miniatures(case: str, folder: Path) -> tuple[MoEModel, MoEModel]:
    config = shrink(zoo.original(case))
    built = [build(config, seed) for seed in (0, 1)]
    of_a = built[0].state_dict()
    for name, table in built[1].state_dict().items():
        if name.endswith("tid2eid"):  # nothing lies between two different tables of experts
            table.copy_(of_a[name])
    for model, name in zip(built, "ab", strict=True):
        model.save_pretrained(folder / name, save_original_format=True)
    return read_model(Checkpoint.open(folder / "a")), read_model(Checkpoint.open(folder / "b"))


def drawn(b: MoEModel) -> ModelSymmetry:
    """A random symmetry; where a table tells the experts of each token, they stay."""
    found = b.random(torch.Generator().manual_seed(0), scale=2.0)
    tables = [number for number, layer in b.layers.items() if any(name.endswith("tid2eid") for name in layer.claims)]
    still = {
        i: found.layers[i].with_bank(
            FIRST, replace(found.layers[i].banks[FIRST], expert_order=torch.arange(b.layers[i].experts))
        )
        for i in tables
    }
    return replace(found, layers={**found.layers, **still})


def reference(model_class: Any, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = model_class.from_pretrained(folder, dtype=dtype).eval()
    # loaded weights may lie in a memory map at any address; kernels on the CPU take another way there, and differ by 1e-6
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("case", CASES.split())
def test_the_loss_at_a_point_is_that_of_the_written_merge_to_the_bit(case: str, tmp_path: Path) -> None:
    a, b = miniatures(case, tmp_path)
    symmetries = {"aligned": drawn(b), "naive": b.identity()}
    # as the reference runs, whatever is here: other kernels round otherwise
    options = EvaluationOptions(model_class=language_model_class(a), batch_size=2, resident=False, device="cpu")
    losses, cost = Evaluator(a, b, WINDOWS, options).evaluate(symmetries, POINTS)
    assert losses.dtype == torch.float64 and losses.isfinite().all() and cost.mode == "layers"
    at_once, cost = Evaluator(a, b, WINDOWS, replace(options, resident=True)).evaluate(symmetries, POINTS)
    assert torch.equal(losses, at_once) and cost.mode == "resident"
    for point, found in list(zip(POINTS, losses, strict=True))[:3]:  # the other path differs in its symmetry alone
        merged = write(interpolated(a, b, symmetries[point.path].layers, point.t), tmp_path / f"{point.t}")
        expected = window_losses(text_reader(reference(options.model_class, merged)), WINDOWS, batch_size=2)
        assert torch.equal(found, expected), point


@pytest.fixture(scope="module")
def pair(saved: Callable[..., Path]) -> tuple[MoEModel, MoEModel]:
    return read(saved("qwen2_moe", "per-expert", 0)), read(saved("qwen2_moe", "per-expert", 1))


@pytest.fixture(scope="module")
def symmetries(pair: tuple[MoEModel, MoEModel]) -> dict[str, Any]:
    return {"aligned": random_symmetry(pair[1]), "naive": pair[1].identity()}


@pytest.fixture
def run(pair: tuple[MoEModel, MoEModel], symmetries: dict[str, Any]) -> Callable[..., Any]:
    def run(points: list[Point] = POINTS, windows: Windows = WINDOWS, **options: Any) -> Any:
        a, b = pair
        more = {name: options.pop(name) for name in ("inspect_model", "observers", "progress") if name in options}
        options = {"model_class": language_model_class(a), "batch_size": 2, "resident": False} | options
        return Evaluator(a, b, windows, EvaluationOptions(**options)).evaluate(symmetries, points, **more)

    return run


def test_in_bfloat16_as_well(pair: tuple[MoEModel, MoEModel], run: Callable[..., Any], tmp_path: Path) -> None:
    a, b = pair
    losses, _ = run(dtype=torch.bfloat16, device="cpu")
    assert torch.equal(losses, run(dtype=torch.bfloat16, resident=True, device="cpu")[0])
    # what is written keeps the dtype of the checkpoint, float32: the cast comes last in both
    merged = write(interpolated(a, b, b.identity().layers, 0.5), tmp_path / "merge")
    expected = window_losses(reference(language_model_class(a), merged, torch.bfloat16), WINDOWS, batch_size=2)
    assert torch.equal(losses[POINTS.index(Point("naive", 0.5))], expected)


class Reads:
    """Counts bytes that are read of each checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: dict[str, int] = {}
        original = Checkpoint.read

        def read(checkpoint: Checkpoint, name: str, first: int = 0, count: int | None = None) -> torch.Tensor:
            values = original(checkpoint, name, first, count)
            self.bytes[checkpoint.name] = self.bytes.get(checkpoint.name, 0) + values.nbytes
            return values

        monkeypatch.setattr(Checkpoint, "read", read)

    def taken(self, model: MoEModel) -> int:
        return self.bytes.pop(model.checkpoint.name, 0)


def test_bytes_read_do_not_depend_on_the_number_of_points(
    pair: tuple[MoEModel, MoEModel], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    reads = Reads(monkeypatch)
    few, cost = run()
    assert cost.passes == 1 and cost.bytes_of_both == a.checkpoint.nbytes + b.checkpoint.nbytes
    of_a, of_b = reads.taken(a), reads.taken(b)
    assert of_a == a.checkpoint.nbytes
    # experts stand elsewhere on each path, so that B's are read for each
    moved = sum(b.checkpoint.tensors[name].nbytes for name in b.layer_of)
    assert b.checkpoint.nbytes <= of_b <= b.checkpoint.nbytes + moved
    run([Point(path, i / 10) for path in ("aligned", "naive") for i in range(11)])
    assert (reads.taken(a), reads.taken(b)) == (of_a, of_b)
    again, cost = run(activation_memory=1, batch_size=1)
    assert cost.passes == len(WINDOWS.rows)
    assert torch.allclose(again, few, rtol=1e-6)  # batches of another size
    assert (reads.taken(a), reads.taken(b)) == (3 * of_a, 3 * of_b)


def test_passes_do_not_change_the_losses(run: Callable[..., Any]) -> None:
    one, _ = run(batch_size=1)
    per_token = costs.IN_FLIGHT * 16 * 4
    several, cost = run(batch_size=1, activation_memory=len(POINTS) * 17 * per_token * 2)
    assert cost.passes == 2 and cost.activations <= len(POINTS) * 17 * per_token * 2
    assert torch.equal(one, several)


def test_points_that_share_weights_share_their_places(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[tuple[str, float]] = []
    original = Endpoints.place

    def place(ends: Endpoints, names: Any, path: str, t: float, **options: Any) -> None:
        filled.append((path, t))
        original(ends, names, path, t, **options)

    monkeypatch.setattr(Endpoints, "place", place)
    points = [Point("naive", 0.0), Point("aligned", 0.0), *(Point("aligned", 0.5, frozenset({i})) for i in range(3))]
    losses, _ = run(points)
    assert torch.equal(losses[0], losses[1])
    # layers 0 to 2: A once and the one that leaves it; what surrounds the layers stays A, before and with the last
    assert len(filled) == 1 + 2 + 2 + 2 * 2
    whole, _ = run([Point("aligned", 0.5)])
    assert not torch.equal(whole[0], losses[2])


def test_one_layer_alone_is_interpolated(
    pair: tuple[MoEModel, MoEModel], symmetries: dict[str, Any], run: Callable[..., Any]
) -> None:
    a, b = pair
    losses, _ = run([Point("aligned", 0.5, frozenset({1}))], device="cpu")
    model_class = language_model_class(a)
    folder, other = (Path(model.checkpoint.name) for model in (a, b))
    expected = reference(model_class, folder)
    assert other != folder
    with torch.no_grad():
        stream = interpolated(a, b, symmetries["aligned"].layers, 0.5)
        skeleton = Skeleton(model_class, a.config, dtype=torch.float32, device=torch.device("cpu"))
        ends = Endpoints(a, b, symmetries, skeleton, conversions(skeleton, a, b))
        names = [name for name in ends.skeleton.state if name.startswith("model.layers.1.")]
        ends.load(names)
        ends.place(names, "aligned", 0.5)
        for name in names:
            expected.get_parameter(name).copy_(ends.skeleton.module.get_parameter(name))
    assert stream.model is a
    assert torch.equal(losses[0], window_losses(expected, WINDOWS, batch_size=2))


@pytest.mark.parametrize("resident", [False, True])
def test_weights_are_gone_afterwards(run: Callable[..., Any], resident: bool) -> None:
    seen: list[PreTrainedModel] = []
    run(resident=resident, inspect_model=seen.append)
    assert {parameter.device.type for parameter in seen[0].parameters()} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        seen[0](input_ids=ROWS).logits.sum().item()


def paused() -> int:
    """Greenlets that wait for somebody to switch to them."""
    gc.collect()
    return sum(type(found) is greenlet and bool(found) and found.parent is not None for found in gc.get_objects())


class Failing:
    """An observer whose hook raises in the middle of the model."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.ended, self.calls = error, False, 0
        self.handles: list[Any] = []

    def begin(self, layers: Any, running: Callable[[], Lane | None]) -> None:
        def hook(*_: Any) -> None:
            self.calls += 1
            if self.calls == 4:
                raise self.error

        self.handles = [layers[1].register_forward_hook(hook)]

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize(
    ("error", "comes_out"),
    [
        (
            ValueError("broken"),
            pytest.raises(ForeignError, match=r"transformers \d.* \(model type .*\) cannot run .*: broken"),
        ),
        (InputError("ours"), pytest.raises(InputError, match=r"^ours$")),
        (KeyboardInterrupt(), pytest.raises(KeyboardInterrupt)),
    ],
)
def test_what_a_forward_raises_comes_out_and_nothing_stays_behind(
    run: Callable[..., Any], error: BaseException, comes_out: AbstractContextManager[Any]
) -> None:
    before = paused()
    observer = Failing(error)
    seen: list[PreTrainedModel] = []
    with comes_out:
        run(observers=[observer], inspect_model=seen.append)
    assert observer.ended
    assert paused() == before
    hooks: list[nn.Module] = [module for module in seen[0].modules() if module._forward_pre_hooks]
    assert not hooks
    losses, _ = run()  # and the next evaluation is none the worse
    assert losses.isfinite().all()


def test_points_on_unknown_paths_are_refused(symmetries: dict[str, Any]) -> None:
    check_points(POINTS, symmetries)
    with pytest.raises(InputError, match="unknown path 'straight'; known: aligned, naive"):
        check_points([Point("straight", 0.5)], symmetries)


def test_the_mode_follows_the_memory_that_is_free(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run([POINTS[0]], resident=None)[1].mode == "resident"
    monkeypatch.setattr(costs, "available_memory", lambda: 100_000)
    losses, cost = run(resident=None, device="cpu")
    assert cost.mode == "layers" and cost.passes > 1
    assert torch.allclose(losses, run(device="cpu")[0], rtol=1e-6)
    assert costs.available_memory() == 100_000


@pytest.mark.parametrize(
    ("memory", "mode", "home"), [(10**9, "resident", "meta"), (5 * 10**5, "layers", "meta"), (10**5, "layers", "cpu")]
)
def test_an_accelerator_of_its_own_memory_decides(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, memory: int, mode: str, home: str
) -> None:
    """Where both ends wait, and whether all of them do; the CPU's memory has no say."""
    monkeypatch.setattr(costs, "available_memory", lambda: 1)
    monkeypatch.setattr(costs, "memory_on", lambda device: memory)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    waiting: list[torch.device] = []
    decide = costs.home_of

    def decided(device: torch.device, plan: costs.Cost) -> torch.device:
        waiting.append(decide(torch.device("meta"), plan))
        return torch.device("cpu")

    monkeypatch.setattr(evaluation, "home_of", decided)
    assert run(resident=None, device="cpu")[1].mode == mode and [str(one) for one in waiting] == [home]


@pytest.mark.parametrize(("order", "message"), [((0, 2), "layer 2 where 1 was"), ((2, 1, 0), "layer 2 where 0 was")])
def test_a_forward_that_takes_its_layers_in_another_order_is_refused(
    run: Callable[..., Any], order: tuple[int, ...], message: str
) -> None:
    def odd(model: Any) -> None:
        model.model.layers = nn.ModuleList([model.model.layers[i] for i in order])

    with pytest.raises(CheckpointError, match=message):
        run(inspect_model=odd)
