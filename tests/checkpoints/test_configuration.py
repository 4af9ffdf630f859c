"""config.json: read without switches to foreign code, and held against the tensors in the plain merge."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.sizes import check_sizes
from hf_moe_lmc.errors import CheckpointError, FamilyError, InputError
from hf_moe_lmc.moe.reading import read_config
from hf_moe_lmc.verbs.merge import plan_merge
from tests import tiny

KERNEL = "someone/kernel"


def read(folder: Path) -> dict[str, Any]:
    with Checkpoint.open(folder) as checkpoint:
        return dict(read_config(checkpoint).to_dict())


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_configuration_is_read_as_transformers_reads_it(saved: Callable[..., Path], family: str) -> None:
    for layout in tiny.LAYOUTS:
        folder = saved(family, layout)
        expected = AutoConfig.from_pretrained(folder)
        with Checkpoint.open(folder) as checkpoint:
            found = read_config(checkpoint)
        assert type(found) is type(expected) and found.to_dict() == expected.to_dict()
        assert found.name_or_path == expected.name_or_path == str(folder)


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation", "use_kernels"]
)
def test_switches_to_foreign_code_are_not_honoured(copy: Callable[..., Path], key: str) -> None:
    folder = copy("mixtral")
    clean = read(folder)
    tiny.edit_config(folder, **{key: KERNEL, "auto_map": {"AutoConfig": "configuration_x.X"}})
    raw = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if key == "_attn_implementation":  # the control: transformers would honour it
        assert KERNEL in (raw._attn_implementation, raw._attn_implementation_internal)
    with Checkpoint.open(folder) as checkpoint:
        config = read_config(checkpoint)
    assert config.to_dict() == clean
    assert KERNEL not in str(vars(config)) and "auto_map" not in vars(config)


def test_switches_inside_a_text_configuration_are_not_honoured(saved: Callable[..., Path], tmp_path: Path) -> None:
    config = transformers.Qwen3VLMoeConfig().to_dict()
    config["text_config"]["_attn_implementation"] = KERNEL
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((saved("mixtral") / "model.safetensors").read_bytes())
    with Checkpoint.open(tmp_path) as checkpoint:
        found = read_config(checkpoint)
    assert KERNEL not in str(vars(found)) + str(vars(found.text_config))


def test_an_error_names_the_model_and_no_other_folder(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral")
    tiny.edit_config(folder, model_type=None)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match="transformers cannot read it") as error:
        read_config(checkpoint)
    said = str(error.value)
    assert said.count(str(folder)) == 2 and tempfile.gettempdir() not in said.replace(str(folder), "")


def rows(count: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(content: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            content[name] = torch.zeros(count, content[name].shape[1])

    return change


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 319}, r"embed_tokens.weight: shape \[320, 16\], but vocab_size is 319"),
        ({"hidden_size": 32}, r"embed_tokens.weight: shape \[320, 16\], but hidden_size is 32"),
        ({"num_local_experts": 8}, "experts.N: 6 experts, but num_local_experts is 8"),
        ({"num_hidden_layers": 2}, "layer 2 is one too many"),
        ({"num_hidden_layers": 4}, "layer 3 is missing"),
    ],
)
@pytest.mark.parametrize("both", [False, True])
def test_sizes_are_checked_in_the_plain_merge(
    saved: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path, values: dict[str, Any], message: str, both: bool
) -> None:
    b = copy("mixtral", "per-expert", 1)
    tiny.edit_config(b, **values)
    a = b if both else saved("mixtral")
    with pytest.raises(InputError, match=message) as error:
        plan_merge(a, b, tmp_path / "out", align=False)
    assert str(b) in str(error.value) and "config.json" in str(error.value)


def test_rows_of_the_embeddings_that_the_configuration_does_not_state(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral")
    tiny.edit(folder, rows(321))
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(FamilyError, match=r"(?s)embed_tokens.*lm_head.*vocab_size is 320"),
    ):
        check_sizes(checkpoint)
    tiny.edit_config(folder, vocab_size=321)
    with Checkpoint.open(folder) as checkpoint:
        check_sizes(checkpoint)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_sizes_that_agree_pass(saved: Callable[..., Path], family: str) -> None:
    for layout in tiny.LAYOUTS:
        with Checkpoint.open(saved(family, layout)) as checkpoint:
            check_sizes(checkpoint)
