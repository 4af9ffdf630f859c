"""Quantized checkpoints: values as the reference has them, whole experts and signs moved in the bytes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.formats.decoded import decoded, storage_of
from hf_moe_lmc.formats.protocol import CODES, SCALES
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.proof.miniature import outputs
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.apply import apply
from tests import tiny
from tests.formats.published import LAYOUTS, Layout, Parts, numbers, plain, save
from tests.schemas import check_alignment

EXPERT = re.compile(r"experts\.(\d+)\.")


def read(folder: Path) -> MoEModel:
    return read_model(Checkpoint.open(folder))


def random_orders(model: MoEModel, seed: int = 0) -> ModelSymmetry:
    """A random order of the experts, which every format carries."""
    drawn, still = model.random(torch.Generator().manual_seed(seed)), model.identity()
    layers = {
        index: replace(
            still.layers[index],
            banks={
                name: replace(bank, expert_order=drawn.layers[index].banks[name].expert_order)
                for name, bank in still.layers[index].banks.items()
            },
        )
        for index in still.layers
    }
    return ModelSymmetry(drawn.family, drawn.groups, layers)


def load(folder: Path, **options: Any) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **{"dtype": torch.float32, **options})
    assert not any(info.values()), info
    return model.eval()


def computed(layout: Layout, folder: Path) -> Tensor:
    """What transformers computes with a checkpoint that it dequantizes by itself, or that was dequantized by hand."""
    if layout.loads:
        return outputs(load(folder))
    return outputs(load(plain(layout, folder, folder.with_name(f"{folder.name}-plain"))))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def same_bytes(a: Path, b: Path) -> bool:
    one, other = tiny.tensors(a), tiny.tensors(b)
    return one.keys() == other.keys() and all(torch.equal(as_bytes(one[name]), as_bytes(other[name])) for name in one)


def moved_by_hand(model: MoEModel, symmetry: ModelSymmetry) -> Parts:
    """The bytes of the MoE blocks after a move of whole experts, without the package's view of them."""
    stored, result = tiny.tensors(model.checkpoint.source.root), {}
    assert model.storage is not None
    for name in stored:
        layer = model.layer_of.get(model.storage.owner.get(name, name))
        if layer is None:
            continue
        order = symmetry.layers[layer.index].banks[FIRST].expert_order
        if match := EXPERT.search(name):
            source = f"{name[: match.start(1)]}{order[int(match[1])]}{name[match.end(1) :]}"
            result[name] = as_bytes(stored[source])
        elif name.endswith("tid2eid"):
            result[name] = as_bytes(order.argsort()[stored[name]])
        elif "share" in name:
            result[name] = as_bytes(stored[name])
        else:
            result[name] = torch.cat([as_bytes(stored[name][expert]) for expert in order])
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_experts_move_with_everything_that_belongs_to_them(
    quantized: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    layout, folder = LAYOUTS[name], quantized(name)
    model = read(folder)
    symmetry = random_orders(model)
    assert symmetry.is_lossless and symmetry != model.identity()
    apply(symmetry, folder, tmp_path / "moved")

    stored, written = tiny.tensors(folder), tiny.tensors(tmp_path / "moved")
    expected = moved_by_hand(model, symmetry)
    assert stored.keys() == written.keys() and expected
    for key, tensor in stored.items():
        assert (written[key].dtype, written[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(as_bytes(written[key]), expected.get(key, as_bytes(tensor))), key
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "moved" / "config.json").read_text())
    apply(symmetry, tmp_path / "moved", tmp_path / "back", inverse=True)
    assert same_bytes(folder, tmp_path / "back")

    before = computed(layout, folder)
    assert tiny.relative_difference(computed(layout, tmp_path / "moved"), before) < 1e-5
    # the controls: scales left behind, values left behind, routers left behind
    assert model.storage is not None
    weights = [weight for key, weight in model.storage.weights.items() if key in model.layer_of]
    scales = {weight.parts[SCALES].info.name for weight in weights}
    codes = {weight.parts[CODES].info.name for weight in weights}
    routers = {key for key in stored if key in expected} - {info.name for weight in weights for info in weight.infos}
    for number, left in enumerate((scales, codes, routers)):
        wrong = shutil.copytree(tmp_path / "moved", tmp_path / f"wrong-{number}")
        tiny.edit(wrong, lambda content, left=left: content.update({key: stored[key] for key in left}))  # type: ignore[misc]
        assert tiny.relative_difference(computed(layout, wrong), before) > 1e-3, number


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_are_those_of_the_reference_and_of_transformers(
    quantized: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    layout, folder = LAYOUTS[name], quantized(name)
    plain(layout, folder, tmp_path / "plain")
    expected = tiny.tensors(tmp_path / "plain")
    with decoded(Checkpoint.open(folder)) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys() and storage_of(checkpoint)
        for key, tensor in expected.items():
            info = checkpoint.tensors[key]
            assert info.shape == tensor.shape, key
            assert torch.equal(checkpoint.read(key).view(info.shape), tensor), key
            some = checkpoint.read(key, info.numel // 3, info.numel // 2)
            assert torch.equal(some, tensor.flatten()[info.numel // 3 :][: info.numel // 2])
    if layout.loads:
        ours, theirs = outputs(load(tmp_path / "plain")), outputs(load(folder))
        assert tiny.relative_difference(ours, theirs) < 1e-6


@pytest.mark.parametrize(
    ("name", "order"), [*((name, "expert") for name in LAYOUTS), ("deepseek_v3", "gate"), ("gpt_oss", "best")]
)
def test_align_recovers_a_planted_order(quantized: Callable[..., Path], tmp_path: Path, name: str, order: Any) -> None:
    a = quantized(name)
    planted = random_orders(read(a), seed=4)
    apply(planted, a, tmp_path / "b")
    alignment = align(a, tmp_path / "b", tmp_path / "out", order=order)
    assert alignment.symmetry == planted.inverse()
    assert same_bytes(a, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "alignment" / "alignment.json").read_text())
    check_alignment(report)
    assert report["totals"]["experts_moved"] > 0 == report["totals"]["units_moved"] == report["totals"]["signs"]
    assert report["totals"]["relative_distance_after_units"] == 0
    found = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert found["hidden_units_left_in_place"] == 0
    assert all(kind["requantized"] == 0 for kind in found["tensors"].values())


def test_two_layouts_of_quantized_experts_are_aligned(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """Blocks run on from gate to up in one and not in the other, so the weights differ a little."""
    a = quantized("fused")
    b = save(replace(LAYOUTS["fused"], hub=True), tmp_path / "b")
    planted = random_orders(read(b), seed=6)
    apply(planted, b, tmp_path / "moved")
    with pytest.warns(UserWarning, match="hidden units stay as B has them"):  # the scales of units differ a little
        alignment = align(a, tmp_path / "moved", tmp_path / "out", order="expert", units="scaled")
    found, back = alignment.symmetry.layers, planted.inverse().layers
    assert all(torch.equal(found[i].banks[FIRST].expert_order, back[i].banks[FIRST].expert_order) for i in back)
    assert 0 < alignment.totals()["relative_distance_after_units"] < 0.03
    assert same_bytes(b, tmp_path / "out")


def test_what_is_compared_are_values_and_not_codes(quantized: Callable[..., Path], tmp_path: Path) -> None:
    a = quantized("mixtral")
    planted = random_orders(read(a), seed=5)
    apply(planted, a, tmp_path / "b")

    def other_codes(content: Parts) -> None:
        for name in [name for name in content if f"{name}_scale_inv" in content and "experts.1." in name]:
            content[name] = (content[name].float() / 4).clamp(-448, 448).to(torch.float8_e4m3fn)
            content[f"{name}_scale_inv"] *= 4

    tiny.edit(tmp_path / "b", other_codes)
    alignment = align(a, tmp_path / "b", tmp_path / "out", order="expert")
    found, back = alignment.symmetry.layers, planted.inverse().layers
    assert all(torch.equal(found[i].banks[FIRST].expert_order, back[i].banks[FIRST].expert_order) for i in back)
    assert 0 < alignment.totals()["relative_distance_after_units"] < 0.01  # the smallest numbers lost a bit
    assert alignment.totals()["relative_distance_before"] > 0.5


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "int4"])
def test_align_finds_everything_and_writes_what_the_format_carries(
    quantized: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """Other weights, the same form: the function stays, whatever order comes out."""
    a, b = quantized(name), quantized(name, 1)
    with pytest.warns(UserWarning, match="the two models are unrelated"), pytest.warns(UserWarning, match="hidden units stay"):
        alignment = align(a, b, tmp_path / "out")
    assert alignment.totals()["units_moved"] > 0
    before = computed(LAYOUTS[name], b)
    assert tiny.relative_difference(computed(LAYOUTS[name], tmp_path / "out"), before) < 1e-5
    stored, written = tiny.tensors(b), tiny.tensors(tmp_path / "out")
    assert sorted(as_bytes(one).sum() for one in stored.values()) == sorted(as_bytes(one).sum() for one in written.values())
    # as plain numbers, all of it is written, and the function is the same but for one rounding
    with pytest.warns(UserWarning, match="the two models are unrelated"):
        align(a, b, tmp_path / "plain", format="bf16")
    assert not storage_of(read(tmp_path / "plain").checkpoint)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    apply(replace(alignment.symmetry, metadata={}), plain(LAYOUTS[name], b, tmp_path / "numbers"), tmp_path / "expected")
    written, expected = tiny.tensors(tmp_path / "plain"), tiny.tensors(tmp_path / "expected")
    assert all(torch.equal(tensor, expected[key].to(tensor.dtype)) for key, tensor in written.items())
    assert written.keys() == expected.keys()
    load(tmp_path / "plain")
    apply(alignment.symmetry, b, tmp_path / "again", format="bf16")
    assert same_bytes(tmp_path / "plain", tmp_path / "again")


@pytest.mark.parametrize("name", LAYOUTS)
def test_signs_are_written_in_the_codes(quantized: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = quantized(name)
    model = read(folder)
    drawn, orders = model.random(torch.Generator().manual_seed(3), scale=1.0), random_orders(model)
    layers = {
        index: LayerSymmetry(
            {
                bank: replace(element, unit_scale=drawn.layers[index].banks[bank].unit_scale)
                for bank, element in one.banks.items()
            },
            replace(one.shared, scale=drawn.layers[index].shared.scale),
        )
        for index, one in orders.layers.items()
    }
    symmetry = ModelSymmetry(drawn.family, drawn.groups, layers)
    apply(symmetry, folder, tmp_path / "out")
    apply(symmetry, plain(LAYOUTS[name], folder, tmp_path / "plain"), tmp_path / "expected")
    expected = tiny.tensors(tmp_path / "expected")
    for key, values in numbers(tiny.tensors(tmp_path / "out")).items():
        assert torch.equal(values, expected[key]), key
    assert json.loads((tmp_path / "out" / "quantization.json").read_text())["hidden_units_left_in_place"] == 0


def test_integers_with_the_lowest_code_keep_their_signs(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """One expert holds a code that has no negative: its units stay, those of the others change their signs."""
    folder = shutil.copytree(quantized("int4"), tmp_path / "b")
    key = "model.layers.1.mlp.experts.3.up_proj.weight_packed"

    def lowest(content: Parts) -> None:
        content[key][0, 0] &= -16  # the lowest four bits: code 0, which is -8

    tiny.edit(folder, lowest)
    model = read(folder)
    still = model.identity()
    layers = {
        index: replace(
            one, banks={bank: replace(element, unit_scale=-element.unit_scale) for bank, element in one.banks.items()}
        )
        for index, one in still.layers.items()
    }
    if not model.layers[1].banks[FIRST].kind.sign:
        pytest.skip("signs are no symmetry of these units")
    with pytest.warns(UserWarning, match="64 hidden units stay"):
        apply(ModelSymmetry(still.family, still.groups, layers), folder, tmp_path / "out")
    before, after = numbers(tiny.tensors(folder)), numbers(tiny.tensors(tmp_path / "out"))
    name = key.removesuffix("_packed")
    assert torch.equal(before[name], after[name])
    assert torch.equal(before[name.replace(".3.", ".2.")], -after[name.replace(".3.", ".2.")])
