"""Multi-token prediction: layers of the view wherever they stand, and absent from either model."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from hf_moe_lmc import ModelSymmetry, align, apply, merge
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.mtp import COUNTS, has_own_prefix
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.proof.miniature import build
from hf_moe_lmc.proof.small_config import shrink
from tests import tiny, zoo
from tests.verbs.test_alignment import random_symmetry


@dataclass(frozen=True)
class Place:
    """Where a family keeps its layers for multi-token prediction, and what it calls their number.

    Attributes:
        layer: what stands before the keys of the first one; "" for the one that follows the last layer.
        rest: further tensors of it.
        dense: it has no experts.
    """

    layer: str
    rest: tuple[str, ...]
    count: str | None
    dense: bool = False


FOLLOWING = Place(
    "",
    (
        "eh_proj.weight",
        "enorm.weight",
        "hnorm.weight",
        "shared_head.norm.weight",
        "shared_head.head.weight",
        "embed_tokens.weight",
    ),
    "num_nextn_predict_layers",
)
APART = ("mtp.fc.weight", "mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")
PLACES = {
    "deepseek_v3": FOLLOWING,
    "glm4_moe": FOLLOWING,
    "glm_moe_dsa": FOLLOWING,
    "qwen3_next": Place("mtp.layers.0.", APART, None),
    "qwen3_5_moe": Place("mtp.layers.0.", APART, "mtp_num_hidden_layers"),
    "qwen3_5_moe_text": Place("mtp.layers.0.", APART, "mtp_num_hidden_layers"),
    "mimo_v2_flash": Place("model.mtp.layers.0.", ("model.mtp.layers.0.eh_proj.weight",), None, dense=True),
    "exaone_moe": Place("mtp.layers.0.", APART, "num_nextn_predict_layers"),
    "nemotron_h": Place("mtp.layers.1.", ("mtp.layers.0.eh_proj.weight",), "num_nextn_predict_layers"),
    "deepseek_v4": Place("mtp.0.", ("mtp.0.e_proj.weight", "mtp.0.h_proj.weight"), "num_nextn_predict_layers"),
    "ernie4_5_moe": Place("model.mtp_block.0.", ("model.mtp_linear_proj.0.weight",), "num_nextn_predict_layers"),
}


def read(folder: Path) -> MoEModel:
    return read_model(Checkpoint.open(folder))


def base(case: str, folder: Path, layout: str = "per-expert") -> Path:
    """A miniature, saved as transformers does: its configuration counts layers that the files lack."""
    build(shrink(zoo.original(case)), 0).save_pretrained(folder, save_original_format=layout == "per-expert")
    tiny.tokenizer().save_pretrained(folder)
    if PLACES[case].count:
        text = json.loads((folder / "config.json").read_text()).get("text_config")
        counted = {PLACES[case].count: 1}
        tiny.edit_config(folder, **({"text_config": {**text, **counted}} if text else counted))
    return folder


def with_mtp(case: str, folder: Path, seed: int = 0) -> list[str]:
    """Adds the tensors for multi-token prediction; their names."""
    model, place = read(folder), PLACES[case]
    last = max(index for index in model.layers if index < model.num_layers)
    prefix = model.towers[0] + model.family.stacks[0].stem
    source = prefix.format(layer=last)
    target = place.layer or prefix.format(layer=model.num_layers)
    added: dict[str, torch.Tensor] = {}

    def change(content: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name in [name for name in content if name.startswith(source)]:
            if not (place.dense and name in model.layer_of):
                values = content[name]
                drawn = torch.randn(values.shape, generator=generator).to(values.dtype)
                added[target + name.removeprefix(source)] = drawn if values.is_floating_point() else values
        for name in place.rest:
            added[name if place.layer else target + name] = torch.randn(6, 4, generator=generator)
        content.update(added)

    tiny.edit(folder, change)
    return list(added)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "layout"),
    [*((case, "per-expert") for case in PLACES), *((case, "fused") for case in ("deepseek_v3", "qwen3_next", "qwen3_5_moe"))],
)
def test_planted_symmetries_are_found_where_both_have_them(case: str, layout: str, tmp_path: Path) -> None:
    a = base(case, tmp_path / "a", layout)
    before = read(a)
    names = with_mtp(case, a)
    model = read(a)
    assert all(model.is_extra(name) for name in names) and not any(map(before.is_extra, before.checkpoint.tensors))
    assert not model.experts_outside and model.num_layers == before.num_layers
    assert bool(model.extra_layers) != PLACES[case].dense and min(model.extra_layers, default=99) >= model.num_layers
    planted = random_symmetry(model)
    apply(planted, a, tmp_path / "b")
    if model.extra_layers:  # the plant is visible
        moved, stored = tiny.tensors(tmp_path / "b"), tiny.tensors(a)
        assert any(not torch.equal(moved[name], stored[name]) for name in names)
    alignment = align(a, tmp_path / "b", tmp_path / "out")
    assert set(alignment.symmetry.layers) == set(model.layers)
    back, stored = tiny.tensors(tmp_path / "out"), tiny.tensors(a)
    for name in stored:
        assert torch.allclose(back[name].float(), stored[name].float(), atol=1e-4), name
    merge(a, tmp_path / "b", tmp_path / "merged", 0.5)
    merged = tiny.tensors(tmp_path / "merged")
    assert all(torch.allclose(merged[name].float(), stored[name].float(), atol=1e-4) for name in stored)


def loads(folder: Path) -> bool:
    """Whether transformers finds all it needs in a folder, and uses all of it but multi-token prediction."""
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    _, info = kind.from_pretrained(folder, output_loading_info=True)
    return not info["missing_keys"] and not info["mismatched_keys"]


def counted(folder: Path) -> list[int]:
    config = json.loads((folder / "config.json").read_text())
    return [part[key] for part in (config, config.get("text_config") or {}) for key in COUNTS if key in part]


@pytest.mark.parametrize(
    ("case", "layout", "plain"),
    [
        *((case, "per-expert", False) for case in PLACES),
        *((case, layout, True) for case, layout in zip(PLACES, tiny.LAYOUTS * len(PLACES), strict=False)),
        ("deepseek_v3", "fused", False),
        ("qwen3_next", "fused", False),
    ],
)
def test_either_model_may_lack_them(case: str, layout: str, plain: bool, tmp_path: Path) -> None:
    without = base(case, tmp_path / "without", layout)
    having = Path(shutil.copytree(without, tmp_path / "having"))
    names = with_mtp(case, having)
    tiny.edit(without, lambda content: content.update({n: v * 1.01 for n, v in content.items() if n.endswith("k_proj.weight")}))
    stored = tiny.tensors(having)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merge(having, without, tmp_path / "kept", 0.3, align=not plain)
    assert any("B lacks the multi-token-prediction" in str(one.message) for one in said)
    kept = tiny.tensors(tmp_path / "kept")
    assert kept.keys() == stored.keys() and all(tiny.same_bytes(kept[name], stored[name]) for name in names)
    assert counted(tmp_path / "kept") == counted(having) and loads(tmp_path / "kept")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merge(without, having, tmp_path / "dropped", 0.3, align=not plain)
    assert any("A lacks the multi-token-prediction" in str(one.message) for one in said)
    assert tiny.tensors(tmp_path / "dropped").keys() == tiny.tensors(without).keys()
    assert not any(counted(tmp_path / "dropped")) and loads(tmp_path / "dropped")
    if PLACES[case].count:
        assert counted(tmp_path / "dropped") and any(counted(without))
    if plain:
        return

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        align(without, having, tmp_path / "aligned")
        align(having, without, tmp_path / "other")
    aligned = tiny.tensors(tmp_path / "aligned")
    assert all(tiny.same_bytes(aligned[name], stored[name]) for name in names)
    assert tiny.tensors(tmp_path / "other").keys() == tiny.tensors(without).keys()


def test_a_pair_without_any_keeps_what_its_configuration_says(tmp_path: Path) -> None:
    a = base("deepseek_v3", tmp_path / "a")
    with pytest.warns(UserWarning, match="same weights"):
        merge(a, a, tmp_path / "out")
    assert counted(tmp_path / "out") == counted(a) == [1]


@pytest.mark.filterwarnings("ignore")
def test_symmetries_that_were_saved_without_them_are_still_read(tmp_path: Path) -> None:
    a = base("qwen3_next", tmp_path / "a")
    old = random_symmetry(read(a))
    old.save(tmp_path / "old.safetensors")
    names = with_mtp("qwen3_next", a)
    apply(tmp_path / "old.safetensors", a, tmp_path / "moved")
    stored, moved = tiny.tensors(a), tiny.tensors(tmp_path / "moved")
    assert all(tiny.same_bytes(stored[name], moved[name]) for name in names)
    assert any(not torch.equal(stored[name], moved[name]) for name in stored)
    apply(tmp_path / "old.safetensors", tmp_path / "moved", tmp_path / "back", inverse=True)
    back = tiny.tensors(tmp_path / "back")
    assert all(torch.allclose(stored[name], back[name], atol=1e-4) for name in stored)
    new = random_symmetry(read(a))
    new.save(tmp_path / "new.safetensors")
    loaded = ModelSymmetry.load(tmp_path / "new.safetensors")
    assert loaded.isclose(new) and max(loaded.layers) == read(a).num_layers


def test_a_last_layer_is_not_taken_for_one(copy: Callable[..., Path]) -> None:
    folder = copy("deepseek_v3")
    tiny.edit_config(folder, num_hidden_layers=2, num_nextn_predict_layers=1)
    with pytest.raises(FamilyError, match=r"layer 2 is one too many, as it holds nothing"):
        read(folder)
    tiny.edit(folder, lambda content: content.update({"model.layers.2.enorm.weight": torch.ones(16)}))
    assert read(folder).extra_layers == (2,)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mtp.fc.weight", True),
        ("model.mtp.layers.0.mlp.gate.weight", True),
        ("model.language_model.mtp.norm.weight", True),
        ("model.mtp_block.0.mlp.up_proj.weight", True),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("model.layers.0.smtp.weight", False),
        ("mtp", False),
    ],
)
def test_prefixes(name: str, expected: bool) -> None:
    assert has_own_prefix(name) is expected


def test_blocks_of_one_number_under_two_prefixes_are_two(tmp_path: Path) -> None:
    a = base("qwen3_next", tmp_path / "a")
    names = with_mtp("qwen3_next", a)
    before = read(a)
    inner = "mtp.layers.0.transformer_block."

    def add(content: dict[str, torch.Tensor]) -> None:
        for name in (one for one in names if one.startswith("mtp.layers.0.")):
            content[name.replace("mtp.layers.0.", inner)] = content[name].clone()
            content[f"model.{name}"] = content[name].clone()

    tiny.edit(a, add)
    model = read(a)
    assert len(model.extra_layers) == 3 * len(before.extra_layers) == 3
    assert {name for name in tiny.tensors(a) if "mtp" in name and ".experts." in name} <= model.layer_of.keys()
    apply(random_symmetry(model), a, tmp_path / "b")
    align(a, tmp_path / "b", tmp_path / "out")
    back, stored = tiny.tensors(tmp_path / "out"), tiny.tensors(a)
    assert all(torch.allclose(back[name].float(), stored[name].float(), atol=1e-4) for name in stored)


@pytest.mark.filterwarnings("ignore")
def test_a_symmetry_with_more_layers_than_both_models_acts_on_those_they_have(tmp_path: Path) -> None:
    a = base("deepseek_v3", tmp_path / "a")
    b = Path(shutil.copytree(a, tmp_path / "b"))
    with_mtp("deepseek_v3", b)
    align(a, b, tmp_path / "aligned")
    merge(a, b, tmp_path / "out", symmetry=tmp_path / "aligned")
    assert tiny.tensors(tmp_path / "out").keys() == tiny.tensors(a).keys()


@pytest.mark.filterwarnings("ignore")
def test_the_plain_merge_takes_no_last_layer_for_one(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy("deepseek_v3")
    tiny.edit_config(folder, num_hidden_layers=2, num_nextn_predict_layers=1)
    with pytest.raises(FamilyError, match=r"layer 2 is one too many, as it holds nothing"):
        merge(folder, folder, tmp_path / "out", align=False)
    tiny.edit(folder, lambda content: content.update({"model.layers.2.enorm.weight": torch.ones(16)}))
    merge(folder, folder, tmp_path / "out", align=False)
