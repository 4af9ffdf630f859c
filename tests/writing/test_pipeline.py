from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_moe_lmc import align, apply, merge
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import CheckpointError, OutputError, WriteError
from hf_moe_lmc.matching import alignment
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.writing import output, shard_file
from hf_moe_lmc.writing.pipeline import pending
from tests import tiny

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PATIENCE = 30  # seconds until what should happen has not


@pytest.fixture
def model(saved: Callable[..., Path]) -> MoEModel:
    return read_model(Checkpoint.open(saved("mixtral")))


def test_a_layer_is_read_when_its_element_has_come_and_fails_when_it_will_not(model: MoEModel) -> None:
    elements = pending(model.layers)
    symmetry = model.random(torch.Generator().manual_seed(0))
    layers, expected = model.acted(elements), model.acted(symmetry.layers)
    with ThreadPoolExecutor(2) as pool:
        reads = {index: pool.submit(layers[index].stored, "up", 0) for index in (0, 1)}
        time.sleep(0.05)
        assert not any(read.done() for read in reads.values())
        elements[0].set_result(symmetry.layers[0])
        assert torch.equal(reads[0].result(PATIENCE), expected[0].stored("up", 0))
        time.sleep(0.05)
        assert not reads[1].done()  # the control: it waits for its own element
        elements[1].cancel()
        with pytest.raises(CancelledError):
            reads[1].result(PATIENCE)
    assert torch.equal(layers[0].stored("down", 3), expected[0].stored("down", 3))
    with pytest.raises(KeyError):
        model.acted({0: symmetry.layers[0]})


def in_two_shards(folder: Path) -> Path:
    """Rewrites a checkpoint of three layers in two shards: the first layer and the rest, and the other two layers."""
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, values in tiny.tensors(folder).items():
        parts[name.startswith(("model.layers.1.", "model.layers.2."))][name] = values
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part, file in zip(parts, SHARDS, strict=True):
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def pair(copy: Callable[..., Path]) -> tuple[Path, Path]:
    a, b = (in_two_shards(copy("mixtral", "per-expert", seed, name=name)) for seed, name in enumerate("ab"))
    return a, b


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
def test_a_layer_is_written_while_the_next_one_is_matched(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    match, seen = alignment.match_layer, []

    def patient(*arguments: object, **options: object) -> object:
        if len(seen) == 1:
            folder, deadline = tmp_path / ".out.progress", time.monotonic() + PATIENCE
            while not list(folder.glob(f"output-*/{SHARDS[0]}")) and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(sorted(path.name for path in folder.glob("output-*/*.safetensors")))
        seen.append("matched")
        return match(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(alignment, "match_layer", patient)
    found = align(*pair, tmp_path / "out")
    assert seen == ["matched", [SHARDS[0]], "matched", "matched"]
    monkeypatch.undo()
    apply(found.symmetry, pair[1], tmp_path / "again")
    for shard in sorted((tmp_path / "again").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
@pytest.mark.parametrize("verb", [align, merge])
def test_what_ends_the_writing_ends_the_matching(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Callable[..., object]
) -> None:
    match, matched, failed = alignment.match_layer, [], threading.Event()

    def full(*_: object) -> None:
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    def patient(*arguments: object, **options: object) -> object:
        assert failed.wait(PATIENCE)
        time.sleep(0.2)
        matched.append(arguments)
        return match(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_file, "_write_all", full)
    monkeypatch.setattr(alignment, "match_layer", patient)
    with pytest.raises(WriteError, match="No space left"):
        verb(*pair, tmp_path / "out")
    assert len(matched) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
@pytest.mark.parametrize("verb", [align, merge])
def test_what_ends_the_matching_ends_the_writing(pair: tuple[Path, Path], tmp_path: Path, verb: Callable[..., object]) -> None:
    before = threading.active_count()
    tiny.edit(
        pair[1], lambda tensors: tensors["model.layers.1.block_sparse_moe.experts.0.w1.weight"].fill_(torch.nan), SHARDS[1]
    )
    with pytest.raises(CheckpointError, match=r"layers\.1\.|layer 1"):
        verb(*pair, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.progress").exists()
    assert threading.active_count() <= before + 1  # the pool of rows may stay


def test_a_disk_that_is_too_small_is_refused_before_anything_is_matched(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "match_layer", lambda *_, **__: pytest.fail("matched"))
    monkeypatch.setattr(output, "SPARE", 1 << 60)
    with pytest.raises(OutputError, match="are free there"):
        align(*pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()
