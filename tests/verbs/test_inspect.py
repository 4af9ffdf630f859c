"""What `inspect` says of parameters, and of what is unusual."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hf_moe_lmc as lmc
from tests import tiny
from tests.formats.published import LAYOUTS, plain
from tests.matching.test_ties import tie

IDLE = {"mixtral": 3 * 4 * 3 * 24 * 16, "qwen2_moe": 2 * 4 * 3 * 8 * 16, "deepseek_v3": 2 * 5 * 3 * 8 * 16}


@pytest.mark.parametrize("family", IDLE)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_parameters_are_those_that_transformers_counts(saved: Callable[..., Path], family: str, layout: str) -> None:
    model = tiny.load(saved(family, layout))
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if "correction_bias" in name)
    found = lmc.inspect(saved(family, layout)).parameters
    assert found.total == model.num_parameters() + buffers and found.multi_token_prediction == 0
    assert found.total - found.active == IDLE[family]
    assert found.input_embedding == tiny.VOCABULARY * 16


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v4", "gpt_oss", "int4"])
def test_parts_of_quantized_weights_count_as_what_they_stand_for(
    quantized: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    found = lmc.inspect(quantized(name))
    dequantized = lmc.inspect(plain(LAYOUTS[name], quantized(name), tmp_path / "plain"))
    assert found.parameters == dequantized.parameters and found.bytes < dequantized.bytes


def test_a_head_in_the_file_of_tied_embeddings(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_model("mixtral", tie_word_embeddings=True), tmp_path / "tied", "per-expert")
    tied = lmc.inspect(folder)
    assert tied.tied_embeddings and tied.redundant_head is None and "the head is the input embedding" in tied.table()

    def copied(content: dict[str, torch.Tensor]) -> None:
        content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()

    tiny.edit(folder, copied)
    equal = lmc.inspect(folder)
    assert equal.redundant_head == "equal" and equal.parameters == tied.parameters and "holds a copy" in equal.table()

    def changed(content: dict[str, torch.Tensor]) -> None:
        content["lm_head.weight"][0, 0] += 1

    tiny.edit(folder, changed)
    other = lmc.inspect(folder)
    assert other.redundant_head == "different" and "another head" in other.table()
    assert other.parameters.total == tied.parameters.total + tiny.VOCABULARY * 16


def test_buffers_that_no_model_reads_do_not_count(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral", "per-expert", 0)
    before = lmc.inspect(folder)
    assert not before.ignored_buffers and before.read_as is None and "no model reads" not in before.table()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tiny.edit(folder, lambda content: content.update({name: torch.ones(4)}))
    after = lmc.inspect(folder)
    assert after.ignored_buffers == (name,) and after.parameters == before.parameters
    assert "no model reads" in after.table()


def test_ties_between_router_rows_are_listed(tmp_path: Path) -> None:
    model = tie(tiny.make_model("mixtral"), [[1, 4], [0, 2, 5]])
    found = lmc.inspect(tiny.save(model, tmp_path / "b", "fused"))
    assert found.to_dict()["router_ties"] == {"1": [[0, 2, 5], [1, 4]]}
    assert "experts with equal rows in layer 1: 0 = 2 = 5; 1 = 4" in found.table()
    assert lmc.inspect(tiny.save(tiny.make_model("mixtral"), tmp_path / "a", "fused")).router_ties == {}
