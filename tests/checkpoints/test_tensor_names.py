"""Names and shapes that tell of a model saved wrongly: refused by their name, in the aligned and in the plain path."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.checkpoints.sizes import check_headed
from hf_moe_lmc.checkpoints.tensor_names import check_names, check_whole
from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.verbs.inspect import inspect
from hf_moe_lmc.verbs.merge import plan_merge
from tests import tiny

Content = dict[str, Tensor]


def renamed(change: Callable[[str], str]) -> Callable[[Content], None]:
    def edit(content: Content) -> None:
        for name in list(content):
            content[change(name)] = content.pop(name)

    return edit


def hollow(content: Content) -> None:
    """As ZeRO-3 saves what it did not gather: all but small tensors."""
    for name, tensor in content.items():
        if tensor.ndim > 1:
            content[name] = torch.empty(0, dtype=tensor.dtype)


def adapted(content: Content) -> None:
    name = "model.layers.0.self_attn.q_proj"
    content[f"{name}.base_layer.weight"] = content.pop(f"{name}.weight")
    content |= {f"{name}.lora_A.default.weight": torch.ones(2, 16), f"{name}.lora_B.default.weight": torch.ones(16, 2)}


def inner(name: str) -> str:
    """Each layer compiled for itself."""
    parts = name.split(".")
    return ".".join([*parts[:3], "_orig_mod", *parts[3:]]) if parts[1] == "layers" else name


WRONG = {
    "compiled": (renamed(lambda name: f"_orig_mod.{name}"), r"'_orig_mod\.' in the name.*compiled.*save_pretrained"),
    "layers compiled": (renamed(inner), r"'_orig_mod\.' in the name"),
    "DDP": (renamed(lambda name: f"module.{name}"), r"'module\.' in the name.*DistributedDataParallel.*Save model.module"),
    "DDP, compiled": (renamed(lambda name: f"module._orig_mod.{name}"), r"[24] faults(.|\n)*_orig_mod(.|\n)*'module\.'"),
    "FSDP": (renamed(lambda name: f"_fsdp_wrapped_module.{name}"), "'_fsdp_wrapped_module.' in the name"),
    "base class": (
        renamed(lambda name: name.removeprefix("model.") if name.startswith("model.") else "score.weight"),
        r"lack 'model\.' \(.*AutoModelForCausalLM",
    ),
    "without the prefix": (renamed(lambda name: name.removeprefix("model.")), r"lack 'model\.' \(.*those of the base class"),
    "LoRA": (adapted, r"3 tensors \(.*not merged.*merge_and_unload"),
    "LoRA, whole": (renamed(lambda name: f"base_model.model.{name}"), "not merged.*merge_and_unload"),
    "ZeRO-3": (hollow, r"without elements \(shape \[0\]\).*zero_to_fp32"),
}


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_it_is_refused_by_its_name(
    saved: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path, case: str, both: bool
) -> None:
    change, message = WRONG[case]
    b = copy("mixtral", "per-expert", 1)
    tiny.edit(b, change)
    a = shutil.copytree(b, tmp_path / "a") if both else saved("mixtral")
    for align in (True, False):
        with pytest.raises(CheckpointError, match=message) as error:
            plan_merge(a, b, tmp_path / "out", align=align)
        count = (2 if case == "DDP, compiled" else 1) * (2 if both else 1)
        assert count == 1 or str(error.value).startswith(f"{count} faults")  # nothing that only follows from it
    with pytest.raises(CheckpointError, match=message):
        inspect(b)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_what_a_base_class_saves_is_told_from_the_whole(saved: Callable[..., Path], tmp_path: Path, family: str) -> None:
    AutoModel.from_config(tiny.CONFIGS[family]()).save_pretrained(tmp_path / "base")
    with Checkpoint.open(tmp_path / "base") as checkpoint:
        for check in (read_model, check_headed):
            with pytest.raises(CheckpointError, match="only the base class was saved"):
                check(checkpoint)
        (tmp_path / "base" / "modules.json").write_text("[]")  # an embedding model, which is meant to have no head
        check_headed(checkpoint)
    for layout in tiny.LAYOUTS:
        with Checkpoint.open(saved(family, layout)) as checkpoint:
            check_headed(checkpoint)


@pytest.mark.parametrize(
    "names",
    [
        ["model.module.layers.0.weight", "module.x"],  # not all of them
        ["layers.0.ffn.w1.weight", "embed.weight", "head.weight"],  # the makers' names of DeepSeek-V4
        ["model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.embed_tokens.weight"],
        ["h.0.attn.c_attn.weight", "wte.weight"],  # GPT-2, published so
        ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
        ["vision.lora_scale", "model.layers.0.mlp.original.weight"],
    ],
)
def test_names_that_only_look_alike_pass(names: list[str]) -> None:
    check_names("m", {name: TensorInfo(name, "s", torch.float32, (2,), 0, 8) for name in names})
    check_whole("m", names, [])
    check_names("m", {"a._extra_state": TensorInfo("a._extra_state", "s", torch.uint8, (0,), 0, 0)})
