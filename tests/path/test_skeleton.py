"""The contract with transformers' loader: what a skeleton is filled with is what from_pretrained loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.path.skeleton import Conversion, Skeleton
from tests import tiny
from tests.path.test_evaluation import miniatures

pytestmark = pytest.mark.filterwarnings("ignore")


def made(model: MoEModel, dtype: torch.dtype = torch.float32) -> tuple[Skeleton, Conversion]:
    skeleton = Skeleton(language_model_class(model), model.config, dtype=dtype, device=torch.device("cpu"))
    shapes = {name: info.shape for name, info in model.checkpoint.tensors.items() if not model.is_extra(name)}
    return skeleton, Conversion(skeleton, model.checkpoint.name, shapes)


def fill(skeleton: Skeleton, conversion: Conversion, model: MoEModel) -> None:
    tensors = model.checkpoint.tensors
    for group in conversion.groups:
        skeleton.place(conversion.convert(group, lambda key: model.checkpoint.read(key).view(tensors[key].shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "gpt_oss", "jamba", "llama4", "qwen3_5_moe", "nemotron_h", "zaya"])
def test_a_filled_skeleton_is_the_loaded_model(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = miniatures(case, tmp_path)
    skeleton, conversion = made(model, dtype)
    assert {value.device.type for value in skeleton.state.values()} == {"meta"}
    fill(skeleton, conversion, model)
    loaded = language_model_class(model).from_pretrained(tmp_path / "a", dtype=dtype)
    expected, found = loaded.state_dict(), skeleton.module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    buffers = dict(loaded.named_buffers())
    for name, buffer in skeleton.module.named_buffers():  # those that no checkpoint holds: rotary frequencies
        assert torch.equal(buffer, buffers[name]), name
    assert not skeleton.module.training


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_groups_take_every_tensor_once(saved: Callable[..., Path], layout: str) -> None:
    model = read_model(Checkpoint.open(saved("olmoe", layout)))
    skeleton, conversion = made(model)
    keys = [key for group in conversion.groups for key in group.keys]
    assert sorted(keys) == sorted(model.checkpoint.tensors) and conversion.unused == []
    assert conversion.group_of.keys() | skeleton.tied.keys() == skeleton.state.keys()
    experts = conversion.group_of["model.layers.0.mlp.experts.gate_up_proj"]
    assert len(experts.keys) == (12 if layout == "per-expert" else 1)


def test_what_is_cleared_fails_loudly_and_ties_follow(copy: Callable[..., Path]) -> None:
    folder = copy("qwen3_moe")
    tiny.edit_config(folder, tie_word_embeddings=True)
    tiny.edit(folder, lambda content: content.pop("lm_head.weight"))
    model = read_model(Checkpoint.open(folder))
    skeleton, conversion = made(model)
    assert skeleton.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    fill(skeleton, conversion, model)
    module = skeleton.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert torch.equal(tiny.logits(module), tiny.logits(tiny.load(folder)))
    skeleton.clear(["model.embed_tokens.weight"])
    assert module.lm_head.weight.is_meta and module.model.embed_tokens.weight.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        tiny.logits(module).sum().item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("model.norm.weight"), r"transformers finds no tensors .*\n.*model\.norm\.weight"),
        (
            lambda content: content.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight: \[3\] from the checkpoint",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    copy: Callable[..., Path], change: Callable[..., None], message: str
) -> None:
    folder = copy("mixtral")
    tiny.edit(folder, change)
    model = read_model(Checkpoint.open(folder))
    with pytest.raises(CheckpointError, match=message):
        made(model)


def test_tensors_without_a_use_are_known(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral")
    tiny.edit(folder, lambda content: content.update({"model.bonus.weight": torch.ones(3)}))
    assert made(read_model(Checkpoint.open(folder)))[1].unused == ["model.bonus.weight"]
