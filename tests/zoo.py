"""Every MoE architecture of transformers: model types and the settings that make other blocks of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_moe_lmc.moe.reading import model_type
from hf_moe_lmc.moe.registry import first_releases, get_family
from hf_moe_lmc.proof.small_config import shrink

# the class default where nothing is given
TOWERS = """
    afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_ocr2_text deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 diffusion_gemma_text dots1 dots3_note_text ernie4_5_moe ernie4_5_vl_moe_text exaone_moe flex_olmo flint
    glm4_moe glm4_moe_lite glm4v_moe_text glm5_next_text glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2_text inkling_text jamba jetmoe kimi_linear kolibri1 laguna lfm2_moe
    llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mistral4 mistral_large4_text mixtral
    muse_spark_text nemotron_h olmoe openai_privacy_filter phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next
    qwen3_omni_moe_text qwen3_vl_moe_text qwen4_exp_text solar_open step3p5 switch_transformers unlimited_ocr_text zaya
"""
REFUSED = ("doge", "nllb-moe")
GEMMA = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
GROUPED = {"n_group": 8, "topk_group": 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text": ("gemma4_text", GEMMA),
    "nemotron_h[latent]": ("nemotron_h", {"moe_latent_size": 1024}),
    "nemotron_h[groups]": ("nemotron_h", GROUPED),
    "cohere2_moe[sigmoid]": ("cohere2_moe", {"expert_selection_fn": "sigmoid", "num_shared_experts": 4}),
    "granitemoeshared[shared]": ("granitemoeshared", {"shared_intermediate_size": 1024}),
    "qwen2_moe[every second]": ("qwen2_moe", {"decoder_sparse_step": 2}),
    "deepseek_v2[groups]": ("deepseek_v2", {**GROUPED, "topk_method": "group_limited_greedy", "num_experts_per_tok": 6}),
    "glm4_moe[groups]": ("glm4_moe", {**GROUPED, "n_routed_experts": 128}),
    "mistral4[groups]": ("mistral4", GROUPED),
    "deepseek_v3[no groups]": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "phimoe[no jitter]": ("phimoe", {"router_jitter_noise": 0.0}),
    "gemma4": ("gemma4", {"text_config": GEMMA}),
}
# composite models, whose text tower is one of the above
WRAPPERS = """
    aria deepseek_ocr2 diffusion_gemma dots3_note ernie4_5_vl_moe glm4v_moe glm5_next inkling2 inkling_mm_model
    llama4 minimax_m3_vl mistral_large4 muse_spark qwen3_5_moe qwen3_omni_moe qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp
    step3p7 unlimited_ocr
"""
# those of them whose tower has another place or another layout than it has alone
TOWERS_ELSEWHERE = ("aria", "llama4", "qwen3_omni_moe")
ALL: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in (TOWERS + WRAPPERS).split()} | VARIANTS


def is_installed(model_type: str) -> bool:
    """Whether the installed release of transformers has a model type, by the data of the families."""
    return Version(transformers.__version__).release >= Version(first_releases().get(model_type, "5")).release


def needs(model_type: str) -> None:
    """Skips the test that calls it where the installed release is older than the model type."""
    if not is_installed(model_type):
        pytest.skip(f"{model_type} came with transformers {first_releases()[model_type]}")


# without what came with later releases of transformers than the installed one
CASES = {name: case for name, case in ALL.items() if is_installed(case[0])}


def original(case: str) -> PreTrainedConfig:
    """The configuration of a case at its full size."""
    model_type, values = ALL[case]
    needs(model_type)
    return CONFIG_MAPPING[model_type](**copy.deepcopy(values))


@cache
def notation(case: str) -> tuple[str, frozenset[Any]]:
    """The family of a case, and what its blocks show of the family's notation: axes, routers, units, groups, options."""
    config = shrink(original(case))
    family, text = get_family(model_type(config), case), config.get_text_config()
    shown: set[Any] = {"groups"} if family.number(family.groups, text) > 1 else set()
    for stack in family.stacks:
        for layer in range(family.number(stack.layers, text)):
            if family.evaluate(stack.moe_layers, text, layer=layer):
                facts = family.at(text, layer)
                shown |= {facts.router, *facts.when.items()} | {axis for axis, size in facts.sizes.items() if size}
                shown |= {(bank, kind.name) for bank, kind in facts.units.items()}
    return family.name, frozenset(shown)


def covering(cases: Iterable[str]) -> list[str]:
    """The first case of each family, each further one whose blocks show more of it, and TOWERS_ELSEWHERE."""
    seen: dict[str, set[Any]] = {}
    chosen = []
    for case in cases:
        family, shown = notation(case)
        if family not in seen or shown - seen[family] or case in TOWERS_ELSEWHERE:
            chosen.append(case)
        seen.setdefault(family, set()).update(shown)
    return chosen


def to_prove() -> list[str]:
    """The cases for the expensive tests: all where the environment asks for it, see scripts/check.sh."""
    return list(CASES) if os.environ.get("HF_MOE_LMC_TEST_ALL") else covering(CASES)
