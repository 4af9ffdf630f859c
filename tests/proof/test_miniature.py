"""Miniatures of every MoE architecture of transformers: they exist, compute, and keep the original's switches."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_moe_lmc.errors import FamilyError, ForeignError
from hf_moe_lmc.proof.miniature import build, outputs
from hf_moe_lmc.proof.sizes import EXPERTS, WIDTH
from hf_moe_lmc.proof.small_config import shrink
from tests.zoo import CASES, GEMMA, original

GROUPED = """
    axk1 axk2 bailing_hybrid beam deepseek_ocr2_text deepseek_v2 deepseek_v3 deepseek_v32 dots1 dots3_note_text exaone_moe
    glm4_moe glm4_moe_lite glm4v_moe_text glm5_next_text glm_moe_dsa hy_v4 kimi_linear mimo_v2_flash mistral4
    mistral_large4_text nemotron_h solar_open unlimited_ocr_text
"""


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_has_a_miniature(case: str) -> None:
    config = original(case)
    before = config.to_dict()
    small = shrink(config)
    assert config.to_dict() == before
    assert type(small) is type(config)
    model = build(small)
    assert not model.training
    assert sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) < 3e6
    result = outputs(model)
    assert result.shape[:2] == (4, 48)
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    assert result.std() > 1e-2
    # every axis of length 12 counts experts
    assert not [name for name, tensor in model.state_dict().items() if list(tensor.shape).count(EXPERTS) > 1]


@pytest.mark.parametrize("groups, top, kept", [(8, 4, (4, 2)), (8, 3, (4, 2)), (8, 8, (4, 4)), (1, 1, (1, 1))])
@pytest.mark.parametrize("family", GROUPED.split())
def test_groups_bind_where_they_did(family: str, groups: int, top: int, kept: tuple[int, int]) -> None:
    config = original(family)
    name = "num_expert_group" if "num_expert_group" in vars(config) else "n_group"
    experts = "n_routed_experts" if "n_routed_experts" in vars(config) else "num_experts"
    small = shrink(CONFIG_MAPPING[family](**{name: groups, "topk_group": top, experts: 256}))
    assert (getattr(small, name), small.topk_group, getattr(small, experts)) == (*kept, EXPERTS)


@pytest.mark.parametrize("layout", ["original", "in memory"])
@pytest.mark.parametrize("case", ["deepseek_v4", "dbrx", "inkling_text", "jamba", "longcat_flash", "step3p7", "zaya"])
def test_a_saved_miniature_is_read_back(case: str, layout: str, tmp_path: Path) -> None:
    model = build(shrink(original(case)))
    model.save_pretrained(tmp_path, save_original_format=layout == "original")
    again, info = type(model).from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    torch.testing.assert_close(outputs(again.eval()), outputs(model), rtol=0, atol=1e-5)


def test_kinds_of_layers_occur_once_and_moe_layers_twice() -> None:
    blocks = ["linear_attention", "moe", "full_attention", "moe"]
    hybrid = shrink(CONFIG_MAPPING["nemotron_h"](layers_block_type=blocks * 10))
    assert hybrid.layers_block_type == blocks
    hashed = shrink(original("deepseek_v4"))
    assert set(hashed.mlp_layer_types) == {"hash_moe", "moe"}
    assert set(hashed.layer_types) == set(original("deepseek_v4").layer_types)
    first_dense = shrink(CONFIG_MAPPING["deepseek_v3"]())
    assert (first_dense.first_k_dense_replace, first_dense.num_hidden_layers) == (1, 3)
    llama = shrink(CONFIG_MAPPING["llama4_text"](interleave_moe_layer_step=2))
    assert 0 not in llama.moe_layers
    assert len(llama.moe_layers) == 2
    shared = shrink(CONFIG_MAPPING["gemma4_text"](**GEMMA, num_kv_shared_layers=10))
    assert (shared.num_kv_shared_layers, shared.layer_types) == (2, ["sliding_attention", "full_attention"] * 2)


def test_hub_fields() -> None:
    config = CONFIG_MAPPING["hunyuan_v1_moe"](
        num_hidden_layers=32, num_experts=64, moe_topk=[8] * 32, moe_intermediate_size=[3072] * 32, head_dim=128
    )
    small = shrink(config)
    assert small.moe_topk == [3, 3]
    # the class reads `intermediate_size` whatever else a checkpoint says
    assert small.intermediate_size == 24
    quantized = CONFIG_MAPPING["deepseek_v3"](
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}, eos_token_id=[100001, 100002]
    )
    small = shrink(quantized)
    assert not hasattr(small, "quantization_config")
    assert small.eos_token_id == [127, 126]


def test_a_miniature_is_its_own_miniature() -> None:
    for case in ("mixtral", "deepseek_v3", "jamba", "qwen3_vl_moe"):
        small = shrink(original(case))
        assert shrink(small).to_dict() == small.to_dict()


def test_seeds() -> None:
    config = shrink(original("mixtral"))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, other = build(config), build(config), build(config, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(outputs(first), outputs(second))
    assert not torch.allclose(outputs(first), outputs(other))
    tokens = torch.tensor([[5, 6, 7]])
    assert outputs(first, tokens).shape == (1, 3, 128)


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "gpt_oss", "gemma4_text", "muse_spark_text", "zaya"])
def test_most_experts_are_used(case: str) -> None:
    config = shrink(original(case))
    model = build(config)
    changed = 0
    experts = [tensor for name, tensor in model.state_dict().items() if name.endswith("experts.down_proj")]
    assert len(experts) == 2
    reference = outputs(model)
    for expert in range(EXPERTS):
        kept = experts[0][expert].clone()
        experts[0][expert] = 0
        changed += not torch.equal(outputs(model), reference)
        experts[0][expert] = kept
    assert changed >= 10


def test_dense_models_are_refused() -> None:
    for config in (CONFIG_MAPPING["llama"](), CONFIG_MAPPING["gemma4_text"](), CONFIG_MAPPING["doge"]()):
        with pytest.raises(FamilyError, match="has no experts"):
            shrink(config)
    with pytest.raises(FamilyError, match="no layer that uses them"):
        shrink(CONFIG_MAPPING["deepseek_v3"](first_k_dense_replace=61))


def test_what_cannot_be_built_is_named() -> None:
    with pytest.raises(ForeignError, match=rf"Lfm2MoeForCausalLM of transformers {version('transformers')} .*cannot be built"):
        build(CONFIG_MAPPING["lfm2_moe"](hidden_size=WIDTH, vocab_size=128, num_hidden_layers=1))
