"""Model types under names that transformers does not know: read as the class that all of them fits, or refused."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

import hf_moe_lmc as lmc
from hf_moe_lmc.errors import CheckpointError, FamilyError, InputError, MoELMCWarning
from hf_moe_lmc.moe.registry import aliases
from hf_moe_lmc.proof.miniature import build
from hf_moe_lmc.proof.small_config import shrink
from tests import tiny, zoo

# What the configurations on the Hub say besides: (case of the zoo, keys)
REAL = {
    "kimi_k2": ("deepseek_v3", {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "seq_aux": True}),
    "hunyuan": (
        "hunyuan_v1_moe",
        {"use_cla": False, "use_mla": False, "num_shared_expert": [1, 1], "routed_scaling_factor": 1.0, "vit_type": None},
    ),
}


def saved_as(name: str, folder: Path, seed: int = 0) -> Path:
    case, keys = REAL[name]
    config = shrink(zoo.original(case))
    build(config, seed).save_pretrained(folder, save_original_format=True)
    tiny.tokenizer().save_pretrained(folder)
    tiny.edit_config(folder, model_type=name, auto_map={"AutoConfig": "code.Config"}, **keys)
    return folder


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
@pytest.mark.parametrize("name", REAL)
def test_what_fits_is_read_as_the_known_class_and_it_is_said(name: str, tmp_path: Path) -> None:
    a = saved_as(name, tmp_path / "a")
    with pytest.warns(MoELMCWarning, match=f"'{name}' is read as '{REAL[name][0]}'"):
        found = lmc.inspect(a)
    assert f"model type {name}, read as {REAL[name][0]}" in found.table()
    b = saved_as(name, tmp_path / "b", 1)
    with pytest.warns(MoELMCWarning, match="is read as"):
        lmc.merge(a, b, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == REAL[name][0] and "auto_map" not in written
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left to say
        assert lmc.inspect(tmp_path / "out").experts == found.experts


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("kimi_k2", "moe_layer_freq", 2, "moe_layer_freq is 2, expected 1"),
        ("kimi_k2", "scoring_func", "softmax", "scoring_func is 'softmax', expected 'sigmoid'"),
        ("kimi_k2", "attention_gate", True, "attention_gate is True, which DeepseekV3Config does not read"),
        ("hunyuan", "use_cla", True, "use_cla is True, expected False or None"),
        ("hunyuan", "moe_intermediate_size", [16, 99], "expected intermediate_size"),
    ],
)
def test_a_key_that_may_change_the_function_is_refused(
    name: str, key: str, value: object, message: str, tmp_path: Path
) -> None:
    folder = saved_as(name, tmp_path / "a")
    tiny.edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        lmc.inspect(folder)


@pytest.mark.parametrize("name", REAL)
def test_a_tensor_that_the_class_lacks_is_refused(name: str, tmp_path: Path) -> None:
    folder = saved_as(name, tmp_path / "a")
    tiny.edit(folder, lambda content: content.update({"model.layers.0.self_attn.gate.weight": torch.ones(2)}))
    with pytest.raises(FamilyError, match=r"self_attn\.gate\.weight: not in that class"):
        lmc.inspect(folder)
    tiny.edit(
        folder,
        lambda content: [content.pop(n) for n in list(content) if n.endswith(("self_attn.gate.weight", "model.norm.weight"))],
    )
    with pytest.raises(FamilyError, match=r"missing: model\.norm\.weight"):
        lmc.inspect(folder)


@pytest.mark.parametrize("name", [name for name, alias in aliases().items() if alias.known_as is None])
def test_what_has_no_counterpart_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_model("mixtral"), tmp_path / "a", "per-expert")
    tiny.edit_config(folder, model_type=name, auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(InputError, match="no class of transformers computes the same"):
        lmc.inspect(folder)
