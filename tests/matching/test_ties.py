"""Ties between router rows: where top-k goes by places, no order but B's own keeps the function."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from hf_moe_lmc import MoELMCWarning, align, apply, barrier, merge
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import SymmetryError
from hf_moe_lmc.matching.alignment import align_models
from hf_moe_lmc.matching.blocks import match_layer
from hf_moe_lmc.matching.options import WeightMatching
from hf_moe_lmc.matching.result import Matching
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.moe.ties import bound_orders, router_ties
from hf_moe_lmc.moe.view import BlockView
from hf_moe_lmc.proof.checks import restricted, write
from hf_moe_lmc.proof.miniature import build, shrink
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.writing.streams import rewritten
from tests import tiny, zoo
from tests.schemas import check_alignment

pytestmark = pytest.mark.filterwarnings("ignore:outside the MoE blocks", "ignore:.*router rows are tied")
LAYER = 1  # the tied one
WHERE = f"model.layers.{LAYER}.mlp."
# experts that are tied; those of a group of routing are neighbours: two in tiny's grouped families
PLANTED: dict[str, list[list[int]]] = {
    "two": [[1, 4]],
    "three": [[0, 2, 5]],
    "two ties": [[0, 3], [2, 5]],
    "all": [[0, 1, 2, 3, 4, 5, 6, 7]],
}


def made(family: str, seed: int) -> PreTrainedModel:
    """Of eight experts: of six, torch computes the logits of equal rows in two ways, and rounding decides in place of ties."""
    return tiny.make_model(family, seed, **({"num_local_experts": 8} if family == "mixtral" else {}))


def tie(model: PreTrainedModel, ties: Sequence[Sequence[int]], equal: bool = False, where: str = WHERE) -> PreTrainedModel:
    """Gives the experts of each tie the router row of its first one, and with `equal` its weights."""
    state = model.state_dict()
    names = ["gate.weight", "gate.e_score_correction_bias"]
    names += ["experts.gate_up_proj", "experts.down_proj"] if equal else []
    for name in [where + name for name in names if where + name in state]:
        for first, *others in ties:
            state[name][others] = state[name][first].clone()
    return model


def opened(folder: Path) -> MoEModel:
    return read_model(Checkpoint.open(folder))


def pair(tmp_path: Path, family: str, ties: Sequence[Sequence[int]], equal: bool = False) -> tuple[MoEModel, MoEModel]:
    a = tiny.save(made(family, 0), tmp_path / "a", "fused")
    b = tiny.save(tie(made(family, 1), ties, equal), tmp_path / "b", "fused")
    return opened(a), opened(b)


def moved(model: MoEModel, symmetry: ModelSymmetry, folder: Path) -> float:
    """How far the logits of a model change where a symmetry acts on it."""
    before = tiny.logits(tiny.load(Path(model.checkpoint.folder)))
    written = write(rewritten(model, symmetry.layers), folder)
    return tiny.relative_difference(tiny.logits(tiny.load(written)), before)


def orders_alone(model: MoEModel, seed: int = 3) -> ModelSymmetry:
    """A random order of the experts of every layer."""
    identity, drawn = model.identity(), model.random(torch.Generator().manual_seed(seed))
    layers = {index: restricted("expert order", drawn.layers[index], layer) for index, layer in identity.layers.items()}
    return replace(identity, layers=layers)


def test_topk_breaks_ties_by_the_places_of_all_entries() -> None:
    """Why the tied experts may not stay while the others move."""
    scores = torch.rand(300, 16, generator=torch.Generator().manual_seed(0))
    scores[:, 5] = scores[:, 11]
    kept = torch.tensor([i if i in (5, 11) else 15 - i if 15 - i not in (5, 11) else i for i in range(16)])
    assert sorted(kept.tolist()) == list(range(16)) and kept[5] == 5 and kept[11] == 11

    def chosen(values: torch.Tensor, k: int) -> torch.Tensor:
        return values.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values

    changed = 0
    for k in (2, 4, 6, 8):
        changed += int((chosen(scores, k) != kept[chosen(scores[:, kept], k)].sort(dim=-1).values).any(dim=-1).sum())
    assert changed > 0
    apart = scores.clone()
    apart[:, 5] += 1e-3  # the control: without the tie, any order gives the same choice
    assert torch.equal(chosen(apart, 4), kept[chosen(apart[:, kept], 4)].sort(dim=-1).values)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("planted", PLANTED)
def test_a_tied_layer_keeps_its_order_and_the_function(tmp_path: Path, family: str, planted: str) -> None:
    """Softmax; softmax in groups; sigmoid with a correction bias, in groups."""
    a, b = pair(tmp_path, family, PLANTED[planted])
    alignment = align_models(a, b, WeightMatching())
    tied = alignment.layers[LAYER].first
    assert tied.order_decided == tied.order_method == "tied" and [*map(list, tied.tied)] == PLANTED[planted]
    assert torch.equal(tied.symmetry.expert_order, torch.arange(b.sizes["expert"]))
    assert tied.distance_after_units < tied.distance_before  # the units are matched
    assert alignment.layers[2].first.order_decided != "tied" and not alignment.layers[2].first.tied
    assert alignment.totals()["experts_moved"] > 0
    assert moved(b, alignment.symmetry, tmp_path / "aligned") < 1e-4
    if planted == "all":  # the control: another order changes it
        assert moved(b, orders_alone(b), tmp_path / "moved") > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_tied_experts_that_are_equal_move(tmp_path: Path, family: str) -> None:
    ties = [[0, 1]]  # of one group
    a, b = pair(tmp_path, family, ties, equal=True)
    assert not b.bound and router_ties(b.layers[LAYER]) == [((FIRST, 0), (FIRST, 1))]
    alignment = align_models(a, b, WeightMatching())
    assert alignment.layers[LAYER].first.order_decided != "tied"
    assert moved(b, alignment.symmetry, tmp_path / "aligned") < 1e-4
    assert moved(b, orders_alone(b), tmp_path / "moved") < 1e-4


def test_equal_experts_in_two_groups_of_routing_bind(tmp_path: Path) -> None:
    """Their groups may be tied, and hold other experts besides."""
    model = tiny.save(tie(made("deepseek_v3", 0), [[0, 2]], equal=True), tmp_path / "b", "fused")
    b = opened(model)
    assert b.groups == 4 and b.bound == {LAYER: {FIRST: ((0, 2),)}}
    assert bound_orders(b.layers[LAYER]) == {}  # the control: no groups


@pytest.mark.parametrize("order", ["gate", "expert", "best"])
@pytest.mark.parametrize("wide", [False, True])
def test_every_order_keeps_that_of_a_tied_layer(
    tmp_path: Path, order: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr("hf_moe_lmc.matching.units.SMALL", 0)
    a, b = pair(tmp_path, "mixtral", [[1, 4]])
    for matching in (
        match_layer(a.layers[LAYER], b.layers[LAYER], WeightMatching(order=order)),  # type: ignore[arg-type]
        align_models(a, b, WeightMatching(order=order)).layers[LAYER],  # type: ignore[arg-type]
    ):
        assert matching.first.expert_cost_form is None and set(matching.first.candidates) == {"tied"}
        assert torch.equal(matching.symmetry.banks[FIRST].expert_order, torch.arange(8))
        again = Matching.of_numbers({FIRST: matching.numbers(FIRST)}, matching.symmetry)
        assert again.first.tied == ((1, 4),)


def test_a_tie_is_equality_in_all_that_the_selection_sees(tmp_path: Path) -> None:
    def ties(change: Callable[[dict[str, torch.Tensor]], None], top_k: int | None = None) -> tuple[int, int]:
        model = tie(made("deepseek_v3", 0), [[0, 1]])
        change(model.state_dict())
        with Checkpoint.open(tiny.save(model, tmp_path / str(len(list(tmp_path.iterdir()))), "fused")) as checkpoint:
            layer = read_model(checkpoint).layers[LAYER]
            return len(router_ties(layer)), len(bound_orders(layer, 4, top_k))

    def signed_zeros(state: dict[str, torch.Tensor]) -> None:
        state[WHERE + "gate.weight"][0], state[WHERE + "gate.weight"][1] = 0.0, -0.0

    def another_bias(state: dict[str, torch.Tensor]) -> None:
        state[WHERE + "gate.e_score_correction_bias"][0] += 1

    def another_row(state: dict[str, torch.Tensor]) -> None:
        state[WHERE + "gate.weight"][0, -1] += 1

    assert ties(lambda state: None) == ties(signed_zeros) == ties(lambda state: None, top_k=7) == (1, 1)
    assert ties(lambda state: None, top_k=8) == (1, 0)  # all are chosen
    assert ties(another_bias) == ties(another_row) == (0, 0)


def test_banks_that_share_one_choice_are_bound_together(tmp_path: Path) -> None:
    zoo.needs("longcat_flash")

    def bound(*pairs: tuple[int, int]) -> dict[str, object]:
        model = build(shrink(CONFIG_MAPPING["longcat_flash"]()))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model.save_pretrained(folder, save_original_format=False)

        def change(content: dict[str, torch.Tensor]) -> None:
            for name in (n for n in content if "layers.0.mlp.router" in n):
                for one, other in pairs:
                    content[name][other] = content[name][one]

        tiny.edit(folder, change)
        with Checkpoint.open(folder) as checkpoint:
            layer = read_model(checkpoint).layers[0]
            assert bound_orders(read_model(checkpoint).layers[1]) == {}
            return {**bound_orders(layer)}

    with Checkpoint.open(_saved_longcat(tmp_path / "longcat")) as checkpoint:
        layer = read_model(checkpoint).layers[0]
        experts, zeros = layer.experts, layer.banks["zero"].experts
    assert bound() == bound((experts, experts + zeros - 1)) == {}  # experts that return their input are equal
    assert bound((1, experts + 2)) == {FIRST: ((1,),), "zero": ((2,),)}
    assert bound((1, 2)) == {FIRST: ((1, 2),), "zero": ()}


def _saved_longcat(folder: Path) -> Path:
    zoo.needs("longcat_flash")
    build(shrink(CONFIG_MAPPING["longcat_flash"]())).save_pretrained(folder, save_original_format=False)
    return folder


def test_layers_that_look_their_experts_up_have_no_ties(tmp_path: Path) -> None:
    build(shrink(CONFIG_MAPPING["deepseek_v4"]())).save_pretrained(tmp_path, save_original_format=False)

    def change(content: dict[str, torch.Tensor]) -> None:
        for name in (n for n in content if "mlp.gate.weight" in n or "correction_bias" in n):
            content[name][:] = content[name][:1].clone()

    tiny.edit(tmp_path, change)
    model = opened(tmp_path)
    tables = {index for index, layer in model.layers.items() if "expert_table" in layer.roles}
    assert tables and set(model.bound) == set(model.layers) - tables != set()


def test_experts_are_read_only_where_there_is_a_tie(
    tmp_path: Path, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int | None]] = []
    real = BlockView.stored

    def counted(self: BlockView, role: str, expert: int | None = None) -> torch.Tensor:
        read.append((role, expert))
        return real(self, role, expert)

    monkeypatch.setattr(BlockView, "stored", counted)
    assert not opened(saved("deepseek_v3")).bound
    assert {role for role, _ in read} == {"router", "correction_bias"}
    _, b = pair(tmp_path, "mixtral", [[1, 4]])
    assert b.bound and {expert for role, expert in read if role in ("gate", "up", "down")} == {1, 4}


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    pair(tmp_path, "mixtral", [[1, 4]])
    yield tmp_path / "a", tmp_path / "b"


def test_align_says_so(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.warns(MoELMCWarning, match=r"in layers \[1\] of B router rows are tied .*layer 1: experts 1, 4"):
        align(*folders, tmp_path / "aligned")
    content = json.loads((tmp_path / "aligned" / "alignment" / "alignment.json").read_text())
    check_alignment(content)
    assert [layer.get("tied") for layer in content["layers"]] == [None, [[1, 4]], None]
    assert any("tied" in warning for warning in content["warnings"])
    after = tiny.logits(tiny.load(tmp_path / "aligned"))
    assert tiny.relative_difference(after, tiny.logits(tiny.load(folders[1]))) < 1e-4
    merge(*folders, tmp_path / "end", 1.0, symmetry=tmp_path / "aligned")  # its own symmetry is accepted


def test_a_given_symmetry_that_moves_tied_experts_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, text_file: Path
) -> None:
    b = opened(folders[1])
    moving = orders_alone(b)
    output = tmp_path / "out"
    calls = (
        lambda: apply(moving, folders[1], output),
        lambda: apply(moving, folders[1], output, inverse=True),
        lambda: apply.plan(moving, folders[1], output),
        lambda: merge(*folders, output, symmetry=moving),
        lambda: barrier(*folders, output, text=text_file, symmetry=moving),
    )
    for call in calls:
        with pytest.raises(SymmetryError, match=r"layer 1: experts 1, 4[^$]*Align again"):
            call()
    assert not output.exists()
    units = b.random(torch.Generator().manual_seed(0))
    at_rest = {
        index: restricted("order of hidden units", units.layers[index], layer) for index, layer in b.identity().layers.items()
    }
    elsewhere = {**moving.layers, LAYER: at_rest[LAYER]}
    apply(replace(moving, layers=elsewhere), folders[1], output)
    assert tiny.relative_difference(tiny.logits(tiny.load(output)), tiny.logits(tiny.load(folders[1]))) < 1e-4


def test_equal_experts_change_places_beside_a_tie(tmp_path: Path) -> None:
    model = tie(tie(made("mixtral", 0), [[1, 4]]), [[2, 3]], equal=True)
    b = opened(tiny.save(model, tmp_path / "b", "fused"))
    identity = b.identity()
    bank = identity.layers[LAYER].banks[FIRST]

    def swapped(one: int, other: int) -> ModelSymmetry:
        order = torch.arange(8)
        order[[one, other]] = order[[other, one]]
        changed = identity.layers[LAYER].with_bank(FIRST, replace(bank, expert_order=order))
        return replace(identity, layers={**identity.layers, LAYER: changed})

    b.check_ties(swapped(2, 3))
    for pair_of_others in ((1, 4), (0, 5), (2, 0)):
        with pytest.raises(SymmetryError, match="router rows are tied"):
            b.check_ties(swapped(*pair_of_others))
