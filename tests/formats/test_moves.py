"""Quantized checkpoints: whole experts move byte for byte with everything that belongs to them, and nothing else does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.configuration import with_changes
from hf_moe_lmc.errors import CheckpointError, FamilyError, InputError, MismatchError, MoELMCWarning, SymmetryError
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.proof.miniature import build, outputs, shrink
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.apply import apply
from hf_moe_lmc.verbs.barrier import barrier
from hf_moe_lmc.verbs.merge import merge, plan_merge
from hf_moe_lmc.writing.spans import Copied
from hf_moe_lmc.writing.streams import ModelStream
from tests import tiny
from tests.schemas import check_alignment
from tests.verbs.test_alignment import Forgetful, write

BLOCK = (16, 16)
BLOCKS = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
WHOLE = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
EXPONENTS = {**BLOCKS, "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
NOTHING = "no such name"
RIGID = "quantized .*: whole experts change places with their scales; hidden units keep theirs"
EXPERT = re.compile(r"experts\.(\d+)\.")

Parts = dict[str, Tensor]


# --- by hand ----------------------------------------------------------------------------------------------------------


def by_blocks(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Each block of a matrix times its scale, block by block."""
    result = weight.clone()
    for i, row in enumerate(scales.tolist()):
        for j, scale in enumerate(row):
            result[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scale
    return result


def float8(weight: Tensor, block: tuple[int, int] | None, *, powers: bool = False) -> tuple[Tensor, Tensor]:
    """A matrix (or a stack of them) in float8, and a scale per block, the last blocks cut short; a power of 2 with `powers`."""
    if weight.ndim > 2:
        values, scales = zip(*(float8(one, block, powers=powers) for one in weight), strict=True)
        return torch.stack(values), torch.stack(scales)
    rows, columns = block or weight.shape
    largest = [[part.abs().max() / 448 for part in row.split(columns, dim=1)] for row in weight.split(rows)]
    scales = torch.tensor(largest)
    if powers:
        scales = scales.log2().ceil().exp2()
    return by_blocks(weight, 1 / scales, (rows, columns)).to(torch.float8_e4m3fn), scales


def float4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as bytes with two FP4 values each, [rows, columns / 2], and exponents, [rows, columns / 32], from 127."""
    largest = weight.unflatten(-1, (-1, 32)).abs().amax(dim=-1)
    exponents = (largest / 6).log2().ceil()
    values = weight / exponents.exp2().repeat_interleave(32, dim=-1)
    known = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = (values.abs()[..., None] - known).abs().argmin(dim=-1) + 8 * (values < 0)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), (exponents + 127).to(torch.uint8)


def per_block(name: str, weight: Tensor) -> Parts:
    values, scales = float8(weight, BLOCK)
    return {name: values, f"{name}_scale_inv": scales}


def halves(name: str, weight: Tensor) -> Parts:
    """As per_block, with blocks that begin anew where the up rows do."""
    if "gate_up" not in name:
        return per_block(name, weight)
    parts = [float8(half, BLOCK) for half in weight.chunk(2, dim=1)]
    return {name: torch.cat([part[0] for part in parts], 1), f"{name}_scale_inv": torch.cat([part[1] for part in parts], 1)}


def per_tensor(name: str, weight: Tensor) -> Parts:
    values, scales = float8(weight, None)
    activation = torch.rand(())  # not used when transformers dequantizes
    stem = name.removesuffix(".weight")
    return {name: values, f"{name}_scale_inv": scales.view(()), f"{stem}.activation_scale": activation}


def per_tensor_fused(name: str, weight: Tensor) -> Parts:
    """As transformers writes them: one number for gate and one for up."""
    count = 2 if "gate_up" in name else 1
    parts = [float8(part, None) for part in weight.chunk(count, dim=1)]
    return {
        name: torch.cat([part[0] for part in parts], 1),
        f"{name}_scale_inv": torch.cat([part[1] for part in parts], 1),
        f"{name}_activation_scale": torch.rand(len(weight)),
    }


def vllm(name: str, weight: Tensor) -> Parts:
    values, scales = float8(weight, None)
    stem = name.removesuffix(".weight")
    return {name: values, f"{stem}.weight_scale": scales.view(1), f"{stem}.input_scale": torch.rand(1)}


def deepseek_v4(name: str, weight: Tensor) -> Parts:
    """Routed experts in FP4, the shared one in float8; exponents as scales."""
    stem = name.removesuffix(".weight")
    if "shared" in name:
        values, scales = float8(weight, BLOCK, powers=True)
        return {name: values, f"{stem}.scale": scales.to(torch.float8_e8m0fnu)}
    packed, exponents = float4(weight)
    return {name: packed.view(torch.int8), f"{stem}.scale": exponents.view(torch.float8_e8m0fnu)}


def mistral(name: str, weight: Tensor) -> Parts:
    values, scales = float8(weight, BLOCK)
    return {name: values, name.removesuffix("weight") + "qscale_weight": scales}


def inkling(name: str, weight: Tensor) -> Parts:
    values, scales = float8(weight, (1, 32), powers=True)
    return {name: values, f"{name}_scale": (scales.log2() + 127).to(torch.uint8)}


def mxfp4(name: str, weight: Tensor) -> Parts:
    packed, exponents = float4(weight.transpose(1, 2).contiguous())
    return {f"{name}_blocks": packed.unflatten(-1, (-1, 16)), f"{name}_scales": exponents}


@dataclass(frozen=True)
class Layout:
    """A way in which quantized experts lie on disk.

    Attributes:
        sizes: changes of the miniature's configuration.
        outside: ending of the names outside the MoE blocks that are quantized as well.
        hub: layout on the Hub, or as in memory.
        loads: transformers dequantizes it rightly without a GPU.
    """

    family: str
    quantize: Callable[[str, Tensor], Parts]
    declared: Mapping[str, Any]
    sizes: Mapping[str, int] = field(default_factory=dict)
    outside: str = "o_proj.weight"
    hub: bool = True
    loads: bool = True


LAYOUTS = {
    "qwen3_moe": Layout("qwen3_moe", per_block, BLOCKS, {"moe_intermediate_size": 48}),
    "deepseek_v3": Layout("deepseek_v3", per_block, BLOCKS, {"moe_intermediate_size": 16}),
    "mixtral": Layout("mixtral", per_block, BLOCKS, {"intermediate_size": 32}),
    "one scale per tensor": Layout("mixtral", per_tensor, WHOLE, {"intermediate_size": 24}),
    "deepseek_v4": Layout("deepseek_v4", deepseek_v4, EXPONENTS, {"moe_intermediate_size": 64}, NOTHING),
    "mistral_large4": Layout("mistral_large4", mistral, BLOCKS, {"moe_intermediate_size": 16}, "wo.weight"),
    "gpt_oss": Layout("gpt_oss", mxfp4, {"quant_method": "mxfp4"}, {"intermediate_size": 64}, NOTHING),
    # what follows, transformers 5.23 and 5.24 read without its scales or not at all, see `test_what_transformers_gets_wrong`
    "blocks cut short": Layout("qwen3_moe", per_block, BLOCKS, {"moe_intermediate_size": 40}, loads=False),
    "blocks cut short, two": Layout("deepseek_v3", per_block, BLOCKS, {"moe_intermediate_size": 24}, loads=False),
    "fused": Layout("qwen3_moe", per_block, BLOCKS, {"moe_intermediate_size": 24}, hub=False, loads=False),
    "fused, halves": Layout("qwen3_moe", halves, BLOCKS, {"moe_intermediate_size": 24}, hub=False, loads=False),
    "fused, one scale per tensor": Layout("qwen3_moe", per_tensor_fused, WHOLE, outside=NOTHING, hub=False, loads=False),
    "step3p7": Layout("step3p7", per_block, BLOCKS, {"moe_intermediate_size": 24}, loads=False),
    "inputs first": Layout("qwen3_vl_moe", per_block, BLOCKS, {"moe_intermediate_size": 24}, loads=False),
    "vllm": Layout("qwen3_moe", vllm, {"quant_method": "fp8"}, loads=False),
    "inkling2": Layout("inkling2", inkling, {}, {"moe_intermediate_size": 64}, NOTHING, loads=False),
}
LOADED = [name for name, layout in LAYOUTS.items() if layout.loads]
SCALES = ("_scale_inv", "_scale")


def save(layout: Layout, folder: Path, seed: int = 0) -> Path:
    config = shrink(transformers.CONFIG_MAPPING[layout.family]())
    for key, value in layout.sizes.items():
        setattr(config.get_text_config(), key, value)
    build(config, seed).save_pretrained(folder, save_original_format=layout.hub)

    def quantized(name: str, weight: Tensor) -> Parts:
        expert = re.search(r"expert|\.moe\.", name) and weight.ndim > 1 and not name.endswith(("gate.weight", "_bias"))
        if expert or name.endswith(layout.outside):
            return layout.quantize(name, weight)
        return {name: weight.bfloat16() if layout.quantize is mxfp4 else weight}

    def change(content: Parts) -> None:
        for name in list(content):
            content |= quantized(name, content.pop(name))

    tiny.edit(folder, change)
    # a configuration that transformers did not write is taken for the released Inkling 2, which declares nothing
    tiny.edit_config(
        folder, **({"quantization_config": layout.declared} if layout.declared else {"transformers_version": None})
    )
    return folder


def plain(layout: Layout, folder: Path, output: Path) -> Path:
    """The checkpoint dequantized by hand, for what transformers cannot read without a GPU."""
    content, result = tiny.tensors(folder), {}

    def value(name: str, weight: Tensor, scales: Tensor) -> Tensor:
        if weight.ndim > 2:
            return torch.stack([value(name, *pair) for pair in zip(weight, scales, strict=True)])
        if layout.quantize in (halves, per_tensor_fused) and "gate_up" in name:
            return torch.cat([value("", *pair) for pair in zip(weight.chunk(2), scales.chunk(2), strict=True)])
        if scales.numel() == 1:
            return weight * scales.view(())
        return by_blocks(weight, scales, (1, 32) if layout.quantize is inkling else BLOCK)

    used = set()
    for name, weight in content.items():
        if weight.dtype == torch.float8_e4m3fn:
            stem = name.removesuffix(".weight")
            beside = next(other for end in SCALES for other in (name + end, stem + end) if other in content)
            scales = content[beside].float()
            scales = (scales - 127).exp2() if content[beside].dtype == torch.uint8 else scales
            result[name] = value(name, weight.float(), scales)
            used.add(beside)
        elif not name.endswith(("activation_scale", "input_scale")):
            result[name] = weight
    result = {name: tensor for name, tensor in result.items() if name not in used}
    output.mkdir()
    save_file(result, output / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["transformers_version"] = transformers.__version__  # see `save`
    config.pop("quantization_config", None)
    (output / "config.json").write_text(json.dumps(config))
    return output


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved checkpoints by layout, each made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save(LAYOUTS[name], tmp_path_factory.mktemp("quantized") / "model")
        return made[name]

    return get


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
    for index, layer in model.layers.items():
        order = symmetry.layers[index].banks[FIRST].expert_order
        for name in layer.claims:
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


# --- what works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_experts_move_with_everything_that_belongs_to_them(
    quantized: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    layout, folder = LAYOUTS[name], quantized(name)
    model = read(folder)
    symmetry = random_orders(model)
    assert symmetry.is_lossless and symmetry != model.identity()
    apply(symmetry, folder, tmp_path / "moved")

    stored, written = tiny.tensors(folder), tiny.tensors(tmp_path / "moved")
    expected = moved_by_hand(model, symmetry)
    assert stored.keys() == written.keys() and expected.keys() == model.layer_of.keys()
    for key, tensor in stored.items():
        assert (written[key].dtype, written[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(as_bytes(written[key]), expected.get(key, as_bytes(tensor))), key
    apply(symmetry, tmp_path / "moved", tmp_path / "back", inverse=True)
    assert same_bytes(folder, tmp_path / "back")

    before = computed(layout, folder)
    assert tiny.relative_difference(computed(layout, tmp_path / "moved"), before) < 1e-5
    # the controls: scales left behind, values left behind, routers left behind
    acted = model.acted(symmetry.layers)
    for pattern in (".*_scales", "(gate|up|down|.*_blocks)", "router"):
        roles = tuple(role for layer in model.layers.values() for role in layer.roles if re.fullmatch(pattern, role))
        layers = {i: Forgetful(acted[i], model.layers[i], roles) for i in acted}
        wrong = write(ModelStream(model, layers, Copied(model.checkpoint)), tmp_path / f"without {roles[0]}")
        assert tiny.relative_difference(computed(layout, wrong), before) > 1e-3, roles


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_values_are_those_that_transformers_computes(quantized: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    layout, folder = LAYOUTS[name], quantized(name)
    model = read(folder)
    if layout.loads:
        load(folder).save_pretrained(tmp_path / "plain", save_original_format=False)
    else:
        plain(layout, folder, tmp_path / "plain")
    dequantized = read(tmp_path / "plain")
    assert dequantized.quantization is None and model.quantization is not None
    count = 0
    for index, layer in dequantized.layers.items():
        quantized_layer = model.layers[index]
        pairs = [(bank, quantized_layer.banks[name], range(bank.experts)) for name, bank in layer.banks.items()]
        for bank, other, _ in pairs:
            assert (bank.unit_count, bank.width) == (other.unit_count, other.width)
        assert layer.shared.unit_count == quantized_layer.shared.unit_count
        for experts, other, numbers in [*pairs, (layer.shared, quantized_layer.shared, [None])]:
            assert set(experts.roles) <= set(other.roles)
            for role in [role for role in ("gate", "up", "down") if role in experts.roles]:
                for expert in numbers:
                    assert torch.equal(experts.values(role, expert).float(), other.values(role, expert)), (index, role, expert)
                    count += 1
    assert count >= 12 * 3 * 2
    # orders found on one are good for the other
    symmetry = random_orders(model)
    apply(symmetry, tmp_path / "plain", tmp_path / "moved")


@pytest.mark.parametrize(
    ("name", "order"), [*((name, "expert") for name in LAYOUTS), ("deepseek_v3", "gate"), ("gpt_oss", "best")]
)
def test_align_recovers_a_planted_order(quantized: Callable[[str], Path], tmp_path: Path, name: str, order: Any) -> None:
    a = quantized(name)
    planted = random_orders(read(a), seed=4)
    apply(planted, a, tmp_path / "b")
    with pytest.warns(UserWarning, match=RIGID):
        alignment = align(a, tmp_path / "b", tmp_path / "out", order=order)
    assert alignment.symmetry == planted.inverse()
    assert same_bytes(a, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "alignment" / "alignment.json").read_text())
    check_alignment(report)
    assert report["totals"]["experts_moved"] > 0 == report["totals"]["units_moved"] == report["totals"]["signs"]
    assert re.search(RIGID, report["warnings"][0]) and report["lossless"]
    assert report["totals"]["relative_distance_after_units"] == 0


def test_two_layouts_of_quantized_experts_are_aligned(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """Blocks run on from gate to up in one and not in the other, so the weights differ a little."""
    a = quantized("fused")
    b = save(replace(LAYOUTS["fused"], hub=True), tmp_path / "b")
    planted = random_orders(read(b), seed=6)
    apply(planted, b, tmp_path / "moved")
    with pytest.warns(UserWarning, match=RIGID):
        alignment = align(a, tmp_path / "moved", tmp_path / "out", order="expert")
    assert alignment.symmetry == planted.inverse()
    assert 0 < alignment.totals()["relative_distance_after_units"] < 0.03
    assert same_bytes(b, tmp_path / "out")


def test_what_is_compared_are_values_and_not_codes(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    a = quantized("mixtral")
    planted = random_orders(read(a), seed=5)
    apply(planted, a, tmp_path / "b")

    def other_codes(content: Parts) -> None:
        for name in [name for name in content if f"{name}_scale_inv" in content and "experts.1." in name]:
            content[name] = (content[name].float() / 4).clamp(-448, 448).to(torch.float8_e4m3fn)
            content[f"{name}_scale_inv"] *= 4

    tiny.edit(tmp_path / "b", other_codes)
    with pytest.warns(UserWarning, match=RIGID):
        alignment = align(a, tmp_path / "b", tmp_path / "out", order="expert")
    assert alignment.symmetry == planted.inverse()
    assert 0 < alignment.totals()["relative_distance_after_units"] < 0.01  # the smallest numbers lost a bit
    assert alignment.totals()["relative_distance_before"] > 0.5


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_a_fine_tune_is_aligned_by_whole_experts_only(quantized: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Other weights, the same form: whatever order comes out, it is lossless and within the groups."""
    a = quantized(name)
    b = save(LAYOUTS[name], tmp_path / "b", seed=1)
    with pytest.warns(UserWarning, match=RIGID), pytest.warns(UserWarning, match="the two models are unrelated"):
        alignment = align(a, b, tmp_path / "out")
    model = read(b)
    model.check_symmetry(alignment.symmetry)
    assert alignment.symmetry.is_lossless and alignment.totals()["units_moved"] == 0
    assert tiny.relative_difference(outputs(load(tmp_path / "out")), outputs(load(b))) < 1e-5


def tensor_dtypes(model: MoEModel, role: str) -> set[torch.dtype]:
    """Of the tensors that hold a role."""
    claims = [claim for layer in model.layers.values() for claim in layer.claims.values()]
    return {model.checkpoint.tensors[claim.name].dtype for claim in claims if role in claim.roles}


@pytest.mark.parametrize(("name", "quantization"), [("deepseek_v3", FineGrainedFP8Config), ("gpt_oss", Mxfp4Config)])
def test_the_way_out_leads_out(quantized: Callable[[str], Path], tmp_path: Path, name: str, quantization: Any) -> None:
    folder = quantized(name)
    model = load(folder, dtype="bfloat16", quantization_config=quantization(dequantize=True))
    model.save_pretrained(tmp_path / "way", save_original_format=False)
    way = read(tmp_path / "way")
    assert way.quantization is None
    exact = load(folder)
    state = exact.state_dict()
    for key, tensor in tiny.tensors(tmp_path / "way").items():
        assert tensor.dtype in (torch.bfloat16, torch.float32) and torch.equal(tensor, state[key].to(tensor.dtype)), key
        state[key].copy_(tensor)
    assert tensor_dtypes(way, "down") == {torch.bfloat16}
    assert tiny.relative_difference(outputs(load(tmp_path / "way")), outputs(exact)) < 1e-6
    moved = way.random(torch.Generator().manual_seed(0), scale=1.0)
    assert not torch.equal(moved.layers[1].banks[FIRST].unit_order, way.identity().layers[1].banks[FIRST].unit_order)
    apply(moved, tmp_path / "way", tmp_path / "moved")
    merge(tmp_path / "way", tmp_path / "moved", tmp_path / "merged")


def test_what_transformers_gets_wrong(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    """If this fails, transformers has mended something: the way out is wider than its words say."""
    for name, folder in (("two", quantized("blocks cut short, two")), ("fused", quantized("fused"))):
        config = AutoConfig.from_pretrained(folder)
        found = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32)
        right = load(plain(LAYOUTS["fused" if name == "fused" else "blocks cut short, two"], folder, tmp_path / name))
        assert tiny.relative_difference(outputs(found), outputs(right)) > 1e-2
    with pytest.raises(RuntimeError, match="automatic conversion"):
        load(quantized("blocks cut short"))


def test_the_way_out_needs_the_layout_of_memory_before_transformers_5_24(
    quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whose later releases save a dequantized model in the layout of the Hub as well."""
    model = load(quantized("mixtral"))
    if Version(transformers.__version__) < Version("5.24"):
        with pytest.raises(ValueError, match="Undefined Operation"):
            model.save_pretrained(tmp_path / "again")
    else:
        model.save_pretrained(tmp_path / "again")
        assert read(tmp_path / "again").quantization is None
        assert torch.equal(outputs(load(tmp_path / "again")), outputs(model))


def test_the_values_agree_with_transformers_own_functions() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    own = Fp8Dequantize(None)
    for block in ((16, 32), (1, 32), (32, 64)):
        for powers in (False, True):
            values, scales = float8(weight, block, powers=powers)
            forms = [scales, *([scales.to(torch.float8_e8m0fnu), (scales.log2() + 127).to(torch.uint8)] if powers else [])]
            for form in forms:
                expected = own._dequantize_one(values, form, torch.float32)
                assert torch.equal(dequantize(values, form, block), expected)
    packed, exponents = float4(weight)
    expected = own._dequantize_one(packed.view(torch.int8), exponents, torch.float32)
    assert torch.equal(dequantize(packed.view(torch.int8), exponents.view(torch.float8_e8m0fnu), (1, 32)), expected)
    blocks = packed.unflatten(-1, (-1, 16))
    stacked = convert_moe_packed_tensors(blocks[None], exponents[None], dtype=torch.float32)
    assert torch.equal(dequantize(blocks, exponents, (1, 32)), stacked[0].T)
    assert torch.equal(stacked[0].T, expected) and (expected - weight).abs().max() < 1
    # every code, and scales at both ends
    codes = torch.arange(256, dtype=torch.uint8).view(8, 2, 16)
    ends = torch.tensor([[0, 254]] * 8, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(codes[None], ends[None], dtype=torch.float32)[0].T
    assert torch.equal(dequantize(codes, ends, (1, 32)), expected)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_whatever_would_need_new_scales_is_refused_with_a_way_out(
    quantized: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = quantized(name)
    load(folder).save_pretrained(tmp_path / "plain", save_original_format=False)
    finer = read(tmp_path / "plain").random(torch.Generator().manual_seed(0), scale=1.0)
    with pytest.raises(SymmetryError, match=r"(?s)is quantized .*hidden units change places.*dequantize=True") as refusal:
        apply(finer, folder, tmp_path / "out")
    assert "save_original_format=False" in str(refusal.value)
    still = {i: LayerSymmetry.identity(*layer.sizes.values()) for i, layer in finer.layers.items()}
    signs = {
        i: layer.with_bank(FIRST, replace(layer.banks[FIRST], unit_scale=-layer.banks[FIRST].unit_scale))
        for i, layer in still.items()
    }
    with pytest.raises(SymmetryError, match=r"would need new scales.*\n.*hidden units change sign"):
        apply(ModelSymmetry(finer.family, 1, signs), folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"cannot be interpolated; align and apply can.*dequantize=True"):
        merge(folder, folder, tmp_path / "out")
    (tmp_path / "text").write_text("text")
    with pytest.raises(CheckpointError, match=r"cannot be interpolated; align and apply can.*dequantize=True"):
        barrier(folder, folder, tmp_path / "out", text=tmp_path / "text")
    with pytest.raises(
        MismatchError, match=r"weights: A has (FP8 in blocks of 16 x 16|MXFP4), B has float32.*dequantize=True(.|\n)*memory"
    ):
        align(folder, tmp_path / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def drop(*patterns: str) -> Callable[[Parts], None]:
    def change(content: Parts) -> None:
        for name in [name for name in content if any(re.search(pattern, name) for pattern in patterns)]:
            del content[name]

    return change


def recast(pattern: str, dtype: torch.dtype) -> Callable[[Parts], None]:
    def change(content: Parts) -> None:
        content.update({name: tensor.to(dtype) for name, tensor in content.items() if re.search(pattern, name)})

    return change


def reshape(pattern: str, view: Callable[[Tensor], Tensor]) -> Callable[[Parts], None]:
    def change(content: Parts) -> None:
        content.update({name: view(tensor) for name, tensor in content.items() if re.search(pattern, name)})

    return change


def no_experts_weight(content: Parts) -> None:
    """One expert in bfloat16, without scales."""
    drop(r"layers\.1\..*experts\.3\..*_scale_inv")(content)
    recast(r"layers\.1\..*experts\.3\.", torch.bfloat16)(content)


DAMAGE: dict[str, tuple[str, Callable[[Parts], None], str]] = {
    "scales of one expert": (
        "qwen3_moe",
        drop(r"layers\.1\..*experts\.3\.up_proj\.weight_scale_inv"),
        r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight_scale_inv",
    ),
    "scales of the shared expert": (
        "deepseek_v3",
        drop(r"layers\.2\..*shared_experts\.up_proj\.weight_scale_inv"),
        r"missing: model\.layers\.2\.mlp\.shared_experts\.up_proj\.weight_scale_inv",
    ),
    "scales outside": (
        "qwen3_moe",
        drop(r"layers\.1\.self_attn\.o_proj\.weight_scale_inv"),
        r"missing: model\.layers\.1\.self_attn\.o_proj\.weight_scale_inv",
    ),
    "all scales": ("mixtral", drop("_scale_inv"), r"missing: .*experts\.0\.w1\.weight_scale_inv"),
    "values of one expert": (
        "qwen3_moe",
        drop(r"layers\.1\..*experts\.3\.up_proj\.weight$"),
        r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight \(the values",
    ),
    "a whole weight": (
        "qwen3_moe",
        drop(r"layers\.1\..*experts\.3\.up_proj"),
        r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight \(up\)",
    ),
    "scales of FP4": (
        "deepseek_v4",
        drop(r"layers\.1\.ffn\.experts\.2\.w3\.scale"),
        r"missing: model\.layers\.1\.ffn\.experts\.2\.w3\.weight_scale_inv",
    ),
    "mxfp4 scales": ("gpt_oss", drop(r"0\..*down_proj_scales"), r"missing: model\.layers\.0\.mlp\.experts\.down_proj_scales"),
    "mxfp4 blocks": ("gpt_oss", drop(r"0\..*down_proj_blocks"), r"missing: model\.layers\.0\.mlp\.experts\.down_proj_blocks"),
    "a fused weight's scales": (
        "fused",
        drop(r"0\..*gate_up_proj_scale"),
        r"missing: .*0\.mlp\.experts\.gate_up_proj_scale_inv",
    ),
    "an expert in bfloat16": (
        "qwen3_moe",
        no_experts_weight,
        r"of torch.float8_e4m3fn, but .* of torch.bfloat16; they cannot change places",
    ),
    "scales beside bfloat16": ("qwen3_moe", recast(r"experts.*weight$", torch.bfloat16), "which is not quantized"),
    "a quantized router": (
        "qwen3_moe",
        recast(r"mlp\.gate\.weight$", torch.float8_e4m3fn),
        r"missing: .*gate\.weight_scale_inv",
    ),
    "a scaled router": (
        "qwen3_moe",
        lambda content: content.update(per_block("model.layers.0.mlp.gate.weight", content["model.layers.0.mlp.gate.weight"])),
        "a quantized router: moving its rows would need new scales",
    ),
    "scales of other blocks": (
        "qwen3_moe",
        reshape(r"experts.*_scale_inv", lambda tensor: tensor[:1]),
        r"do not fit a weight .* in blocks of \[16, 16\]",
    ),
    "one expert's scale in another form": (
        "one scale per tensor",
        reshape(r"experts\.3\..*_scale_inv", lambda tensor: tensor.view(1)),
        r"\[1\] of torch.float32, but .*cannot change places",
    ),
    "an activation scale that others have": (
        "one scale per tensor",
        drop(r"experts\.3\.w1\.activation_scale"),
        r"expert 3 lacks what another has: .*w1\.activation_scale",
    ),
    "one scale for all experts": (
        "fused, one scale per tensor",
        reshape(r"_scale_inv", lambda tensor: tensor.view(-1)[:1]),
        r"expected one for each of the 12 experts",
    ),
    "scales in integers": ("qwen3_moe", recast("_scale_inv", torch.int32), "expected floats, or exponents in uint8"),
    "an int8 tensor that is not FP4": (
        "qwen3_moe",
        recast(r"layers\.0\..*experts\.3\.up_proj\.weight$", torch.int8),
        r"\[48, 32\] of torch.int8 an expert, expected bytes \[48, 16\]",
    ),
    "scales of a bias": (
        "deepseek_v3",
        lambda content: content.update({"model.layers.1.mlp.gate.e_score_correction_bias_scale_inv": torch.ones(12)}),
        r"e_score_correction_bias_scale_inv: not a tensor of an MoE block",
    ),
    "scales of a router in float32": (
        "deepseek_v3",
        lambda content: content.update({"model.layers.1.mlp.gate.scale": torch.ones(12)}),
        r"mlp\.gate\.scale: not a tensor of an MoE block",
    ),
    "an unknown companion": (
        "qwen3_moe",
        lambda content: content.update({"model.layers.0.mlp.experts.0.up_proj.zero_point": torch.zeros(1)}),
        r"up_proj\.zero_point: not a tensor of an MoE block",
    ),
    "two kinds of scales": (
        "qwen3_moe",
        lambda content: content.update({"model.layers.0.mlp.experts.0.up_proj.scale": torch.ones(3, 2)}),
        "up_scales is given twice",
    ),
    "float8 under mxfp4": ("gpt_oss", recast("down_proj_bias", torch.float8_e4m3fn), "config.json declares mxfp4"),
    "a float8 bias": ("deepseek_v3", recast("correction_bias", torch.float8_e4m3fn), "expected floats of 16 bits or more"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(quantized: Callable[[str], Path], tmp_path: Path, damage: str) -> None:
    name, change, message = DAMAGE[damage]
    folder = shutil.copytree(quantized(name), tmp_path / "damaged")
    tiny.edit(folder, change)
    with pytest.raises(FamilyError, match=message):
        apply(random_orders(read(quantized(name))), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_quantized_weights_that_are_not_declared_are_refused(
    quantized: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(quantized(name), tmp_path / "undeclared")
    tiny.edit_config(folder, quantization_config=None)
    with pytest.raises(FamilyError, match=r"declares no quantization, but these are quantized:\n.*\n(.*\n)*Restore"):
        read(folder)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_declaration_without_quantized_weights_is_passed_over(
    quantized: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    load(quantized(name)).save_pretrained(tmp_path / "plain", save_original_format=False)
    tiny.edit_config(tmp_path / "plain", quantization_config=LAYOUTS[name].declared)
    with pytest.warns(MoELMCWarning, match="declares quantized weights .*, but no tensor is quantized"):
        model = read(tmp_path / "plain")
    assert model.quantization is None and not hasattr(model.config, "quantization_config")


def test_outside_the_experts_scales_are_missed_and_declared_as_well(quantized: Callable[[str], Path]) -> None:
    with Checkpoint.open(quantized("qwen3_moe")) as checkpoint:
        name = "model.layers.0.self_attn.o_proj.weight"
        check_scales(checkpoint, checkpoint.quantization, list(checkpoint.tensors))
        with pytest.raises(FamilyError, match=rf"declares no quantization.*\n  {name}\n"):
            check_scales(checkpoint, None, [name])
        del checkpoint.tensors[f"{name}_scale_inv"]
        with pytest.raises(FamilyError, match=f"missing: {name}_scale_inv"):
            check_scales(checkpoint, checkpoint.quantization, [name])


OTHERS = pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": 128},
        {"load_in_8bit": True},
    ],
)


@OTHERS
@pytest.mark.parametrize("nested", [False, True])
def test_other_methods_are_refused(quantized: Callable[[str], Path], tmp_path: Path, declared: Any, nested: bool) -> None:
    folder = shutil.copytree(quantized("qwen3_moe"), tmp_path / "other")
    text = {"text_config": {"quantization_config": declared}, "quantization_config": None}
    tiny.edit_config(folder, **(text if nested else {"quantization_config": declared}))
    with pytest.raises(CheckpointError, match=r"declares quanti[sz]ed weights .*Use the model that it was quanti[sz]ed from"):
        Checkpoint.open(folder)


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
@OTHERS
@pytest.mark.parametrize("nested", [False, True])
def test_the_tensors_decide_and_an_output_drops_the_entry(
    saved: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path, declared: Any, nested: bool
) -> None:
    a, b = copy("mixtral"), saved("mixtral", "per-expert", 1)
    tiny.edit_config(a, **({"text_config": {"quantization_config": declared}} if nested else {"quantization_config": declared}))
    if nested:  # a configuration of one tower cannot be read with another inside
        with pytest.warns(MoELMCWarning, match="no tensor is quantized"), Checkpoint.open(a) as checkpoint:
            assert with_changes(checkpoint.config, checkpoint.changes)["text_config"] == {}
        return
    for align_too in (True, False):
        with pytest.warns(MoELMCWarning, match="copy: config.json declares quantized weights .*no tensor is quantized"):
            merge(a, b, tmp_path / "out", 0.5, align=align_too)
        merge(saved("mixtral"), b, tmp_path / "expected", 0.5, align=align_too)
        assert same_bytes(tmp_path / "out", tmp_path / "expected")
        written = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("out", "expected")]
        assert "quantization_config" not in written[0]
        assert written[0] == {key: value for key, value in written[1].items() if value is not None}
        tiny.load(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "expected")


QUERY = "model.layers.0.self_attn.q_proj"
PACKED: dict[str, tuple[dict[str, Tensor], str]] = {
    "GPTQ": ({f"{QUERY}.qweight": torch.ones(2, 16, dtype=torch.int32)}, "GPTQ or AWQ"),
    "bitsandbytes, 4 bits": (
        {f"{QUERY}.weight": torch.ones(128, 1, dtype=torch.uint8), f"{QUERY}.weight.absmax": torch.ones(4)},
        "bitsandbytes",
    ),
    "bitsandbytes, 8 bits": (
        {f"{QUERY}.weight": torch.ones(16, 16, dtype=torch.int8), f"{QUERY}.SCB": torch.ones(16)},
        "bitsandbytes",
    ),
    "compressed-tensors": ({f"{QUERY}.weight_packed": torch.ones(16, 2, dtype=torch.int32)}, "compressed-tensors"),
    "FP8": ({f"{QUERY}.weight": torch.ones(16, 16).to(torch.float8_e4m3fn)}, "declares no quantization, but these are"),
    "FP8, E5M2": ({f"{QUERY}.weight": torch.ones(16, 16).to(torch.float8_e5m2)}, "declares no quantization, but these are"),
    "INT8": ({f"{QUERY}.weight": torch.ones(16, 16, dtype=torch.int8)}, "declares no quantization, but these are"),
    "scales left behind": ({f"{QUERY}.weight_scale_inv": torch.ones(1, 1)}, "declares no quantization, but these are"),
}


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("case", PACKED)
def test_what_the_tensors_show_is_refused_before_any_work(
    saved: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path, case: str, both: bool
) -> None:
    content, message = PACKED[case]
    b = copy("mixtral", "per-expert", 1)
    tiny.edit(b, lambda held: held.update(content))
    a = shutil.copytree(b, tmp_path / "a") if both else saved("mixtral")
    for align_too in (True, False):
        with pytest.raises(InputError, match=message):
            plan_merge(a, b, tmp_path / "out", align=align_too)
    # what ModelOpt writes beside the weights
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (b / "hf_quant_config.json").write_text(json.dumps(described))
    for align_too in (True, False):
        with pytest.raises(InputError, match=r"hf_quant_config.json declares quantized weights .*ModelOpt, quant_algo 'NVFP4'"):
            plan_merge(a, b, tmp_path / "out", align=align_too)


def test_integers_that_are_no_codes_pass(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral")
    numbers = {"a.tid2eid": torch.ones(4, 2, dtype=torch.int32), "b.attn.bias": torch.ones(1, 2, 2, dtype=torch.uint8)}
    tiny.edit(folder, lambda held: held.update({**numbers, "c.k_scale": torch.ones(1), "d.router.scale": torch.ones(3)}))
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}')
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.quantization is None and not checkpoint.changes


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_plain_merge_of_quantized_weights_says_the_way_out(
    quantized: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = quantized(name)
    with pytest.raises(CheckpointError, match=r"cannot be interpolated.*dequantize=True.*about .*B of memory") as error:
        plan_merge(folder, folder, tmp_path / "out", align=False)
    assert "None" not in str(error.value) and "Quantization(" not in str(error.value)
