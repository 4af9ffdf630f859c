"""Merges with the experts of both models: in transformers each expert computes what both compute, weighted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import InputError
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.repair.widened import CannotWidenError, Widening
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.barrier import barrier
from hf_moe_lmc.verbs.merge import merge, plan_merge
from tests import tiny
from tests.schemas import check_report

pytestmark = [
    pytest.mark.filterwarnings("ignore:outside the MoE blocks", "ignore:A and B hold"),
    pytest.mark.usefixtures("undrawn"),
]


def blocks(folder: Path) -> dict[str, tuple[nn.Module, nn.Module | None]]:
    """By name of the module of the routed experts: it, and the shared expert beside it."""
    model = tiny.load(folder)
    return {
        name: (module, next((child for key, child in model.named_modules() if key in shared_names(name)), None))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    }


def shared_names(experts: str) -> set[str]:
    block = experts.rpartition(".")[0]
    return {f"{block}.shared_expert", f"{block}.shared_experts"}


def outputs(experts: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Of each expert by itself."""
    count = len(experts.down_proj)
    ones = torch.ones(len(inputs), 1)
    return [experts(inputs, torch.full((len(inputs), 1), number), ones) for number in range(count)]


@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
def test_each_expert_computes_the_weighted_sum(saved: Callable[..., Path], tmp_path: Path, family: str, layout: str) -> None:
    a, b, t = saved(family, layout, 0), saved(family, "fused", 1), 0.3
    align(a, b, tmp_path / "b", order="gate")
    merge(a, b, tmp_path / "wide", t, widen=True)
    inputs = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    found = [blocks(folder) for folder in (a, tmp_path / "b", tmp_path / "wide")]
    assert found[0].keys() == found[2].keys()
    with torch.no_grad():
        for name, (experts, shared) in found[2].items():
            every = [outputs(one[name][0], inputs) for one in found[:2]]
            for of_a, of_b, wide in zip(*every, outputs(experts, inputs), strict=True):
                torch.testing.assert_close(wide, (1 - t) * of_a + t * of_b)
                assert not torch.allclose(wide, of_a)
            if shared is not None:
                of_a, of_b = (one[name][1](inputs) for one in found[:2])  # type: ignore[misc]
                torch.testing.assert_close(shared(inputs), (1 - t) * of_a + t * of_b)
    wide_shapes, narrow = tiny.tensors(tmp_path / "wide"), tiny.tensors(a)
    assert wide_shapes.keys() == narrow.keys()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_at_an_end_the_function_is_the_parents(saved: Callable[..., Path], tmp_path: Path, family: str) -> None:
    a, b = saved(family, "per-expert", 0), saved(family, "per-expert", 1)
    merge(a, b, tmp_path / "wide", [0.0, 1.0], widen=True)
    for t, parent in (("t0", a), ("t1", b)):
        found = tiny.logits(tiny.load(tmp_path / "wide" / t))
        assert tiny.relative_difference(found, tiny.logits(tiny.load(parent))) < 1e-5


def test_what_is_written_is_what_was_measured(saved: Callable[..., Path], tmp_path: Path) -> None:
    a, b = saved("qwen2_moe", "per-expert", 0), saved("qwen2_moe", "fused", 1)
    (tmp_path / "text.txt").write_text("The expert that answers is the one the router picked. " * 6)
    merge(a, b, tmp_path / "out", 0.3, widen=True, text=tmp_path / "text.txt", context=32)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    check_report(found)
    itself = barrier(tmp_path / "out", tmp_path / "out", tmp_path / "x", text=tmp_path / "text.txt", context=32, points=2)
    assert found["references"]["mean"]["repaired"] == pytest.approx(itself.aligned.nll[0], abs=1e-5)
    assert found["merge"]["path"] == "repaired" and found["repair"]["asked"] == "widen"


def test_growth_is_planned_and_said(saved: Callable[..., Path], tmp_path: Path) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    plans = [plan_merge(a, b, tmp_path / "x", widen=widen) for widen in (False, True)]
    merge(a, b, tmp_path / "wide", widen=True)
    written = sum(path.stat().st_size for path in (tmp_path / "wide").glob("*.safetensors"))
    assert plans[1].bytes_to_write == written > 1.4 * plans[0].bytes_to_write
    card = (tmp_path / "wide" / "README.md").read_text()
    assert "grows by 60%" in card and "--widen" in card


def test_a_size_that_dense_layers_share_is_refused_by_name(tmp_path: Path) -> None:
    import transformers

    config = transformers.JambaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
        attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tiny.save(model, tmp_path / "jamba", "per-expert")
    opened = read_model(Checkpoint.open(tmp_path / "jamba"))
    with pytest.raises(CannotWidenError, match=r"intermediate_size in config.json sets the size of its experts and of other"):
        Widening.of(opened, opened, "a")


def test_quantized_experts_are_written_as_plain_numbers_alone(quantized: Callable[..., Path], tmp_path: Path) -> None:
    name = "mixtral"
    a, b = quantized(name, 0), quantized(name, 1)
    with pytest.raises(CannotWidenError, match="take --format bf16"):
        plan_merge(a, b, tmp_path / "x", widen=True)
    merge(a, b, tmp_path / "wide", widen=True, format="bf16")
    assert all(
        not tensor.dtype.is_floating_point or tensor.dtype.itemsize > 1 for tensor in tiny.tensors(tmp_path / "wide").values()
    )
    tiny.load(tmp_path / "wide")


def test_a_repair_beside_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    a = saved("mixtral", "per-expert", 0)
    with pytest.raises(InputError, match="nothing to repair"):
        merge(a, a, tmp_path / "x", widen=True, repair="norms")
