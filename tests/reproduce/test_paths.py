"""The evaluator of the reproduction against the package's own verbs, and what it must find on a path that is known."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hf_moe_lmc
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe.reading import read_model
from tests import tiny


def paper_gpt(models: ModuleType, gating: str, seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "dense_size": 24, "expert_size": 12}
    config = models.PaperGPTConfig(
        vocab_size=tiny.VOCABULARY, max_position_embeddings=64, moe_layers=(1,), **sizes, **models.gated(gating, 4), **changes
    )
    model = models.PaperGPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def fresh_block(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model


@pytest.fixture(params=["dense", "sparse", "shared"])
def folders(request: pytest.FixtureRequest, reproduce: dict[str, ModuleType], tmp_path: Path) -> tuple[Path, Path]:
    """Two models of one gating that differ in one MoE block, with a tokenizer."""
    saved = []
    for seed in (1, 2):
        model = fresh_block(paper_gpt(reproduce["models"], request.param, 0), seed)
        reproduce["training"].save_model(model, tmp_path / f"model-{seed}")
        tiny.tokenizer().save_pretrained(tmp_path / f"model-{seed}")
        saved.append(tmp_path / f"model-{seed}")
    return saved[0], saved[1]


def test_the_evaluator_agrees_with_the_verb(
    folders: tuple[Path, Path], reproduce: dict[str, ModuleType], tmp_path: Path
) -> None:
    data, paths = reproduce["data"], reproduce["paths"]
    text = "The expert that answers is the one that the router picked. " * 9
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids = torch.tensor(tiny.tokenizer()(text, add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    told = data.Text(ids, windows, tiny.VOCABULARY, {}, {})
    report = hf_moe_lmc.barrier(
        *folders, tmp_path / "barrier", text=tmp_path / "text.txt", context=32, max_tokens=windows.numel(), routing=False
    )
    with paths.opened(*folders, "cpu") as pair:
        measured = paths.measure_pair(pair, told, False, 1e18)
    assert report.naive is not None
    for name, curve in (("naive", report.naive), ("default", report.aligned)):
        assert measured["paths"][name]["loss"] == pytest.approx(list(curve.nll), abs=2e-5)
        assert measured["paths"][name]["loss_barrier"] == pytest.approx(curve.barrier, abs=2e-5)


def test_a_planted_symmetry_is_undone(folders: tuple[Path, Path], reproduce: dict[str, ModuleType], tmp_path: Path) -> None:
    paths = reproduce["paths"]
    with Checkpoint.open(folders[0]) as checkpoint:
        planted = read_model(checkpoint).random(torch.Generator().manual_seed(0), scale=2.0)
    hf_moe_lmc.apply(planted, folders[0], tmp_path / "shuffled")
    told = reproduce["data"].Text(torch.zeros(1), torch.arange(256).view(8, 32), tiny.VOCABULARY, {}, {})
    with paths.opened(folders[0], tmp_path / "shuffled", "cpu") as pair:
        found = paths.measure_pair(pair, told, False, 1e18)["paths"]
    moved = {name: max(abs(loss - one["loss"][0]) for loss in one["loss"]) for name, one in found.items()}
    assert moved["naive"] > 1e-2 > 1e-5 > moved["default"]


def test_weights_outside_of_the_trained_blocks_count(folders: tuple[Path, Path], reproduce: dict[str, ModuleType]) -> None:
    paths = reproduce["paths"]
    assert paths.first_of(["model.layers.1.mlp.router.weight"]) == 1
    assert paths.first_of(["model.layers.1.mlp.router.weight", "head.weight"]) == 0
    assert paths.first_of(["model.layers.1.ln_1.weight"]) == 0


def test_blocks_that_add_nothing_are_the_base_of_their_worth(
    folders: tuple[Path, Path], reproduce: dict[str, ModuleType]
) -> None:
    paths = reproduce["paths"]
    told = reproduce["data"].Text(torch.zeros(1), torch.arange(256).view(8, 32), tiny.VOCABULARY, {}, {})
    with paths.opened(*folders, "cpu") as pair:
        evaluate = paths.Evaluator(pair.module, told, "cpu", 1)
        before = evaluate()
        without = paths.without_blocks(pair, evaluate)
        assert without != before[0] and evaluate() == before


def test_barriers_and_areas_of_known_curves(reproduce: dict[str, ModuleType]) -> None:
    paths = reproduce["paths"]
    assert paths.barrier_and_area([1.0, 3.0, 2.0], 1) == (1.5, 0.75)  # above the line by 1.5 in the middle
    assert paths.barrier_and_area([0.5, 0.25, 0.5], -1) == (0.25, 0.125)  # an accuracy that falls
    assert paths.barrier_and_area([1.0, 0.5, 1.0], 1) == (0.0, -0.25)  # a valley: no barrier, a negative area
