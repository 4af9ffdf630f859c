"""What lies in a folder: two sets of weights, adapters, formats that are not read; each is answered with the next step."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_moe_lmc.checkpoints.checkpoint import INDEX, Checkpoint
from hf_moe_lmc.errors import CheckpointError, MoELMCWarning
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.merge import merge
from tests import tiny

SINGLE = "model.safetensors"


def refused(folder: Path, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint.open(folder)
    text = str(error.value)
    assert str(folder) in text and "None" not in text and "True" not in text
    return text


def sharded(saved: Callable[..., Path], folder: Path) -> Path:
    """A checkpoint in shards, and beside it the single file of another."""
    tiny.save(tiny.make_model("mixtral", 3), folder, "per-expert", "20KB")
    shutil.copy(saved("mixtral") / SINGLE, folder / SINGLE)
    return folder


def test_a_single_file_beside_shards_is_refused_as_transformers_would_take_it(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = sharded(saved, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.norm.weight"]
    assert torch.equal(loaded, tiny.load(saved("mixtral")).state_dict()["model.norm.weight"])  # the reason
    message = refused(folder, "stands beside")
    assert SINGLE in message and INDEX in message and "Delete" in message
    (folder / SINGLE).rename(tmp_path / "kept")
    with Checkpoint.open(folder) as checkpoint:  # either way out leads out
        assert len(checkpoint.shards) > 1
    for file in [folder / INDEX, *folder.glob("*.safetensors")]:
        file.unlink()
    (tmp_path / "kept").rename(folder / SINGLE)
    with Checkpoint.open(folder) as checkpoint:
        assert list(checkpoint.shards) == [SINGLE]


@pytest.mark.parametrize("lost", ["one", "all"])
def test_a_single_file_beside_an_index_whose_shards_are_missing_is_refused(
    saved: Callable[..., Path], tmp_path: Path, lost: str
) -> None:
    folder = sharded(saved, tmp_path / "m")
    shards = sorted(folder.glob("model-*.safetensors"))
    for shard in shards if lost == "all" else shards[:1]:
        shard.unlink()
    message = refused(folder, f"stands beside .*{len(shards) if lost == 'all' else 1} of these are missing")
    assert "faults" not in message  # the missing shards are not listed one by one


def test_an_index_of_a_part_only_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    """The single file is one of several shards: transformers would load it alone."""
    content = tiny.tensors(saved("mixtral"))
    folder = shutil.copytree(saved("mixtral"), tmp_path / "m")
    save_file({"lm_head.weight": content.pop("lm_head.weight")}, folder / "head.safetensors")
    save_file(content, folder / SINGLE, {"format": "pt"})
    weight_map = {**dict.fromkeys(content, SINGLE), "lm_head.weight": "head.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "stands beside")
    (folder / SINGLE).rename(folder / "rest.safetensors")  # the control
    (folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, **dict.fromkeys(content, "rest.safetensors")}}))
    Checkpoint.open(folder).close()


def test_files_that_transformers_passes_over_do_not_matter(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral")
    for file in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors", "m.gguf", "tf_model.h5"):
        (folder / file).write_bytes(b"junk")
    (folder / "model.safetensors.index.fp16.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"junk")
    with Checkpoint.open(folder) as checkpoint:
        assert list(checkpoint.shards) == [SINGLE]


def test_another_file_that_the_configuration_names_is_refused(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral")
    tiny.edit_config(folder, transformers_weights=SINGLE)
    Checkpoint.open(folder).close()
    tiny.edit_config(folder, transformers_weights="other.safetensors")
    refused(folder, "transformers_weights names other.safetensors, which transformers takes instead")


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
def test_an_adapter_beside_full_weights_is_left_behind(
    copy: Callable[..., Path], saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder, a = copy("mixtral", "per-expert", 1), saved("mixtral")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    clean = saved("mixtral", "per-expert", 1)
    for options in ({}, {"align": False}):
        with pytest.warns(MoELMCWarning, match=r"copy: adapter_config.json lies beside full weights"):
            merge(folder, a, tmp_path / "out", 0.3, **options)
        merge(clean, a, tmp_path / "expected", 0.3, **options)
        assert not list((tmp_path / "out").glob("adapter*"))
        one, other = tiny.tensors(tmp_path / "out"), tiny.tensors(tmp_path / "expected")
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        tiny.load(tmp_path / "out")
        for out in ("out", "expected"):
            shutil.rmtree(tmp_path / out)
    with pytest.warns(MoELMCWarning, match="adapter_config.json"):
        align(a, folder, tmp_path / "aligned")
    assert not list((tmp_path / "aligned").glob("adapter*"))


def only(*files: str) -> Callable[[Path], None]:
    """Leaves the configuration and tokenizer, and files of other formats."""

    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(b"x")

    return change


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model-Q4_K_M.gguf"], r"weights only as GGUF \(model-Q4_K_M.gguf\).*use the safetensors checkpoint"),
        (["Q8_0/model-00001-of-00002.gguf"], "weights only as GGUF"),
        (["consolidated.safetensors", "params.json"], r"makers' own format \(consolidated.safetensors\).*convert"),
        (["consolidated-00001-of-00005.safetensors", "consolidated.safetensors.index.json"], "makers' own format"),
        (["consolidated.00.pth", "params.json"], "only as pickles .*save_pretrained"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "only as pickles .*save_pretrained"),
        (["model.fp16.safetensors"], r"only as a variant \(model.fp16.safetensors\).*variant='fp16'"),
        (["model.safetensors.index.bf16.json", "model.bf16-00001-of-00001.safetensors"], r"variant='bf16'"),
        (["model-00001-of-00002.safetensors", "other.safetensors.index.json"], "other.safetensors.index.json is there"),
        (["checkpoint-500/model.safetensors"], "give the folder checkpoint-500 in it"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter only .*merge_and_unload"),
        (["adapter_config.json", "adapter_model.bin"], "holds an adapter only .*merge_and_unload"),
    ],
)
def test_other_formats_are_answered_with_the_next_step(copy: Callable[..., Path], files: list[str], message: str) -> None:
    folder = copy("mixtral")
    only(*files)(folder)
    refused(folder, message)


def test_a_folder_of_the_cache_points_at_its_snapshot(saved: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "hub" / "models--someone--model"
    for commit in ("aaaa", "bbbb"):
        shutil.copytree(saved("mixtral"), root / "snapshots" / commit)
    message = refused(root, re.escape(f"give {root}/snapshots/bbbb"))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("aaaa")
    message = refused(root, re.escape(f"give {root}/snapshots/aaaa"))
    Checkpoint.open(message.split("give ")[1]).close()  # the way out leads out
    refused(tmp_path / "hub", r"the Hub's cache \(models--someone--model, ...\).*give a Hub id \(someone/model")
    shutil.rmtree(root / "snapshots")
    refused(root, "without a snapshot; fetch the model again")
