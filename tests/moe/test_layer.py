from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.moe.action import ActedLayer
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.reading import read_model
from tests import tiny


def layers(folder: Path) -> dict[int, MoELayer]:
    return dict(read_model(Checkpoint.open(folder)).layers)


def expected_roles(layer: MoELayer) -> list[tuple[str, int | None]]:
    return [(r, e) for r in layer.roles for e in (range(layer.experts) if r in layer.expert_roles else [None])]


@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
def test_every_tensor_of_a_block_is_claimed_once_and_read_back_to_its_bytes(
    saved: Callable[..., Path], family: str, layout: str
) -> None:
    folder = saved(family, layout)
    stored = tiny.tensors(folder)
    claimed = []
    for layer in layers(folder).values():
        for name in layer.claims:
            claimed.append(name)
            values = torch.cat([layer.assemble(name, piece, layer) for piece in layer.pieces(name)])
            assert tiny.same_bytes(values.view(stored[name].shape), stored[name]), name
    in_blocks = [n for n in stored if ".experts" in n or ".gate.weight" in n or "shared_expert" in n or "correction" in n]
    assert sorted(claimed) == sorted(in_blocks)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_both_layouts_are_one_view(saved: Callable[..., Path], family: str) -> None:
    of_one, of_other = (layers(saved(family, layout)) for layout in tiny.LAYOUTS)
    for index, layer in of_one.items():
        for role, expert in expected_roles(layer):
            assert torch.equal(layer.stored(role, expert), of_other[index].stored(role, expert)), (role, expert)
        gate, down = layer.stored("gate", 0), layer.stored("down", 0)
        assert gate.shape == down.shape == (layer.sizes["unit"], layer.sizes["model"])


@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
def test_an_inverse_restores_the_bytes(saved: Callable[..., Path], family: str, layout: str) -> None:
    folder = saved(family, layout)
    model = read_model(Checkpoint.open(folder))
    generator = torch.Generator().manual_seed(1)
    for layer in model.layers.values():
        symmetry = layer.random(generator, groups=model.groups)
        there = ActedLayer(layer, symmetry, layer.units)
        back = ActedLayer(there, symmetry.inverse(), layer.units)
        moved = 0
        for role, expert in expected_roles(layer):
            assert torch.equal(back.stored(role, expert), layer.stored(role, expert))
            moved += not torch.equal(there.stored(role, expert), layer.stored(role, expert))
        assert moved > len(layer.expert_roles)  # the control: it did go somewhere


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(content: dict[str, torch.Tensor]) -> None:
        for name in [name for name in content if part in name]:
            del content[name]

    return change


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(content: dict[str, torch.Tensor]) -> None:
        for name in [name for name in content if old in name]:
            content[name.replace(old, new)] = content.pop(name)

    return change


def add(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda content: content.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("family", "layout", "change", "message"),
    [
        (
            "mixtral",
            "per-expert",
            drop("layers.1.block_sparse_moe.gate"),
            "missing: model.layers.1.block_sparse_moe.gate.weight",
        ),
        ("mixtral", "fused", drop("layers.2.mlp.gate"), "model.layers.2.mlp.gate.weight (router)"),
        ("mixtral", "per-expert", drop("layers.1.block_sparse_moe.experts.3.w2"), "experts.3.w2.weight"),
        ("mixtral", "fused", drop("layers.1.mlp.experts.down_proj"), "model.layers.1.mlp.experts.down_proj (down)"),
        (
            "mixtral",
            "per-expert",
            rename("layers.1.block_sparse_moe.experts.5.", "layers.1.block_sparse_moe.experts.17."),
            "17",
        ),
        ("mixtral", "per-expert", add("model.layers.1.block_sparse_moe.extra", 2), "not a tensor of an MoE block"),
        ("qwen2_moe", "per-expert", drop("layers.1.mlp.shared_expert_gate"), "shared_expert_gate.weight (shared_router)"),
        ("qwen3_moe", "fused", add("model.layers.1.mlp.experts.0.up_proj.weight", 16, 16), "up is given twice"),
        ("deepseek_v3", "per-expert", drop("layers.1.mlp.gate.e_score"), "e_score_correction_bias (correction_bias)"),
        ("deepseek_v3", "per-expert", add("model.layers.0.mlp.gate.weight", 8, 16), "makes layer 0 dense"),
        ("olmoe", "per-expert", add("model.layers.1.mlp.experts.06.up_proj.weight", 24, 16), "not a tensor of an MoE block"),
        ("olmoe", "per-expert", add("model.layers.1.mlp.gate.weight", 5, 16), "expected shape [6, 16]"),
    ],
)
def test_a_block_that_is_not_whole_is_refused_by_name(
    copy: Callable[..., Path], family: str, layout: str, change: Callable[..., None], message: str
) -> None:
    folder = copy(family, layout)
    tiny.edit(folder, change)
    with pytest.raises(FamilyError) as error:
        layers(folder)
    assert message in str(error.value)


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("count", [2, 4])
def test_layers_missing_or_in_excess_are_refused(copy: Callable[..., Path], family: str, count: int) -> None:
    folder = copy(family)
    tiny.edit_config(folder, num_hidden_layers=count, num_nextn_predict_layers=0, layer_types=None)
    with pytest.raises(FamilyError, match="layer 2 is one too many" if count == 2 else "layer 3 is missing"):
        layers(folder)
