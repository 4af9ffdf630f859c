"""What is declared of quantization, and what the tensors say: these decide."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.configuration import with_changes
from hf_moe_lmc.errors import CheckpointError, FamilyError, InputError, MoELMCWarning
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.verbs.merge import merge, plan_merge
from tests import tiny, zoo
from tests.formats.published import LAYOUTS, plain


def read(folder: Path) -> MoEModel:
    return read_model(Checkpoint.open(folder))


def same_bytes(a: Path, b: Path) -> bool:
    one, other = tiny.tensors(a), tiny.tensors(b)
    return one.keys() == other.keys() and all(tiny.same_bytes(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_quantized_weights_that_are_not_declared_are_refused(quantized: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(quantized(name), tmp_path / "undeclared")
    tiny.edit_config(folder, quantization_config=None)
    with pytest.raises(FamilyError, match=r"declares no quantization, but these are quantized:\n.*\n(.*\n)*Restore"):
        read(folder)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_declaration_without_quantized_weights_is_passed_over(
    quantized: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    plain(LAYOUTS[name], quantized(name), tmp_path / "plain")
    tiny.edit_config(tmp_path / "plain", quantization_config=LAYOUTS[name].declared)
    with pytest.warns(MoELMCWarning, match="declares quantized weights .*, but no tensor is quantized"):
        model = read(tmp_path / "plain")
    assert model.storage is None and not hasattr(model.config, "quantization_config")


OTHERS = pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},  # no groups
        {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"a": {"weights": {"num_bits": 4}}}},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": 128},
        {"load_in_8bit": True},
    ],
)


@OTHERS
@pytest.mark.parametrize("nested", [False, True])
def test_other_methods_are_refused(quantized: Callable[..., Path], tmp_path: Path, declared: Any, nested: bool) -> None:
    folder = shutil.copytree(quantized("qwen3_moe"), tmp_path / "other")
    text = {"text_config": {"quantization_config": declared}, "quantization_config": None}
    tiny.edit_config(folder, **(text if nested else {"quantization_config": declared}))
    with pytest.raises(CheckpointError, match=r"declares quantized weights .*Use the model that it was quantized from"):
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
    # what ModelOpt writes beside the weights, of a method that is not read
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ"}}
    (b / "hf_quant_config.json").write_text(json.dumps(described))
    for align_too in (True, False):
        with pytest.raises(InputError, match=r"hf_quant_config.json declares quantized weights .*quant_algo 'W4A16_AWQ'"):
            plan_merge(a, b, tmp_path / "out", align=align_too)


def test_a_declaration_beside_the_configuration_is_one(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """ModelOpt's hf_quant_config.json alone: read, and written with the output."""
    a = shutil.copytree(quantized("nvfp4, modelopt"), tmp_path / "a")
    tiny.edit_config(a, quantization_config=None)
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (a / "hf_quant_config.json").write_text(json.dumps(described))
    merge(a, quantized("nvfp4, modelopt", 1), tmp_path / "out", 0.5, align=False)
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()) == described
    assert read(tmp_path / "out").storage
    merge(a, quantized("nvfp4, modelopt", 1), tmp_path / "plain", 0.5, align=False, format="bf16")
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists() and read(tmp_path / "plain").storage is None


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "int4", "nvfp4, packed"])
@pytest.mark.parametrize("declared", ["qwen3_moe", "gpt_oss", "int4", "nvfp4, packed"])
def test_another_format_than_declared_is_named(
    quantized: Callable[..., Path], tmp_path: Path, name: str, declared: str
) -> None:
    folder = shutil.copytree(quantized(name), tmp_path / "other")
    tiny.edit_config(folder, quantization_config=LAYOUTS[declared].declared)
    if name == declared:
        assert read(folder).storage
    elif (name, declared) == ("qwen3_moe", "gpt_oss"):
        with pytest.raises(FamilyError, match=r"quantized in another way than config.json declares \(mxfp4\)"):
            read(folder)
    else:
        with pytest.raises(FamilyError, match="quantized weights are not whole, or not as declared"):
            read(folder)


def test_integers_that_are_no_codes_pass(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral")
    numbers = {"a.tid2eid": torch.ones(4, 2, dtype=torch.int32), "b.attn.bias": torch.ones(1, 2, 2, dtype=torch.uint8)}
    tiny.edit(folder, lambda held: held.update({**numbers, "c.k_scale": torch.ones(1), "d.router.scale": torch.ones(3)}))
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}')
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.quantization is None and not checkpoint.changes


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
def test_kimi_k25_is_read_in_its_text_tower(quantized: Callable[..., Path], tmp_path: Path) -> None:
    """As on the Hub: a tower of DeepSeek-V3 under another name, INT4 declared inside, images beside it."""
    zoo.needs("kimi_k25")

    def composite(seed: int) -> Path:
        folder = shutil.copytree(quantized("int4", seed), tmp_path / str(seed))
        text = json.loads((folder / "config.json").read_text())

        def rename(content: dict[str, Tensor]) -> None:
            for name in list(content):
                content[f"language_model.{name}"] = content.pop(name)
            content["vision_tower.patch_embed.proj.weight"] = torch.ones(2, 2)

        tiny.edit(folder, rename)
        config = {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
            "model_type": "kimi_k25",
            "text_config": {**text, "model_type": "kimi_k2"},
            "vision_config": {"vt_hidden_size": 8},
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    a, b = composite(0), composite(1)
    model, like = read(a), read(quantized("int4"))
    assert model.family.name == "deepseek_v3" and model.layers.keys() == like.layers.keys()
    assert model.storage is not None and like.storage is not None and model.storage.kind == like.storage.kind
    merge(a, b, tmp_path / "out", 0.5)
    merge(quantized("int4"), quantized("int4", 1), tmp_path / "alone", 0.5)
    written, alone = tiny.tensors(tmp_path / "out"), tiny.tensors(tmp_path / "alone")
    assert written.keys() == {"vision_tower.patch_embed.proj.weight", *(f"language_model.{name}" for name in alone)}
    assert all(tiny.same_bytes(written[f"language_model.{name}"], values) for name, values in alone.items())
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["quantization_config"] == LAYOUTS["int4"].declared
