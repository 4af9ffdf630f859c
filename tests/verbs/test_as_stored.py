"""What the report of a merge says of it is what the written folder measures: rounded, quantized, in either layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.barrier import barrier
from hf_moe_lmc.verbs.merge import merge
from hf_moe_lmc.writing.formats import written_merge
from tests import tiny
from tests.formats.published import LAYOUTS, plain
from tests.schemas import check_report

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("undrawn")]
ON = {"context": 32}
READ = ("mixtral", "one scale per tensor", "fused, halves", "fused, one scale per tensor", "gpt_oss", "int4", "nvfp4, packed")
EXACT = 1e-7  # nats per token: what is measured is the same model, run in the same way


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without spaces, whose token the smallest models do not have."""
    path = tmp_path_factory.mktemp("text") / "code.jsonl"
    path.write_text("".join(json.dumps({"text": f"deff{i}(x):returnx+{i}*{i}-{i}"}) + "\n" for i in range(12)))
    return path


def narrow(content: dict[str, torch.Tensor]) -> None:
    content.update({name: one.bfloat16() for name, one in content.items() if one.is_floating_point()})


@pytest.fixture(scope="module")
def pairs(
    quantized: Callable[..., Path], saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """(name) -> two models, with tokenizers: of a quantized layout, or dequantized to bfloat16."""

    def half(name: str, seed: int) -> Path:
        folder = plain(LAYOUTS[name], quantized(name, seed), tmp_path_factory.mktemp("half") / "model")
        tiny.edit(folder, narrow)
        return folder

    def side(name: str, seed: int) -> Path:
        found = half(name.removesuffix(" in bfloat16"), seed) if name.endswith("bfloat16") else quantized(name, seed)
        folder = Path(shutil.copytree(found, tmp_path_factory.mktemp("pair") / "model"))
        tiny.tokenizer().save_pretrained(folder)
        return folder

    def layouts(seed: int) -> Path:
        folder = Path(
            shutil.copytree(saved("qwen2_moe", ("per-expert", "fused")[seed], seed), tmp_path_factory.mktemp("pair") / "model")
        )
        tiny.edit(folder, narrow)
        return folder

    def get(name: str) -> tuple[Path, Path]:
        if name == "two layouts in bfloat16":
            return layouts(0), layouts(1)
        names = name.split(" and ") * 2
        return side(names[0], 0), side(names[1], 1)

    return get


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    check_report(found)
    return found


def measured(folder: Path, output: Path, text: Path) -> tuple[float, float]:
    """Loss and accuracy of a folder."""
    found = barrier(folder, folder, output, text=text, points=2, routing=False, **ON).to_dict()["paths"]["naive"]
    return found["nll"][0], found["accuracy"][0]


@pytest.mark.parametrize(
    ("pair", "form", "t", "repair"),
    [
        ("two layouts in bfloat16", "b", 0.3, "crossover"),
        ("mixtral in bfloat16", "a", 0.3, None),
        ("mixtral in bfloat16 and mixtral", "b", 0.0, None),
        ("mixtral", "a", "best", "crossover"),
        ("gpt_oss", "a", 0.3, None),
        ("int4", "b", 1.0, None),
    ],
)
def test_the_report_is_of_what_was_written(
    pairs: Callable[[str], tuple[Path, Path]], tmp_path: Path, text: Path, pair: str, form: Any, t: Any, repair: Any
) -> None:
    a, b = pairs(pair)
    more = {"points": 3} if t == "best" else {}
    merge(a, b, tmp_path / "out", t, text=text, format=form, repair=repair, **more, **ON)
    found = content(tmp_path / "out")
    path, mean = found["merge"]["path"], found["references"]["mean"]
    loss, accuracy = measured(tmp_path / "out", tmp_path / "itself", text)
    assert path == ("repaired" if repair and 0 < found["merge"]["t"] < 1 else "aligned")
    assert mean[path] == pytest.approx(loss, abs=EXACT) and mean["accuracy"][path] == pytest.approx(accuracy)
    assert found["verdict"]["mean"][path] == mean[path]
    if path == "repaired":  # what stands beside it is as it would have been written, too
        at = found["merge"]["t"]
        merge(a, b, tmp_path / "straight", at, format=form)
        assert mean["aligned"] == pytest.approx(measured(tmp_path / "straight", tmp_path / "other", text)[0], abs=EXACT)
    else:
        merge(a, b, tmp_path / "naive", found["merge"]["t"], format=form, align=False)
        assert mean["naive"] == pytest.approx(measured(tmp_path / "naive", tmp_path / "third", text)[0], abs=EXACT)


def test_a_fitted_repair_and_a_refused_one_are_measured_as_they_are_written(
    pairs: Callable[[str], tuple[Path, Path]], tmp_path: Path, text: Path
) -> None:
    a, b = pairs("mixtral")
    rows = tmp_path / "calibration.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Theexpertnumber{i}wastheone,and{i + 1}followed."}) + "\n" for i in range(60)))
    for name, repair in (("fitted", "ridge"), ("refused", "norms")):
        merge(a, b, tmp_path / name, 0.5, text=text, repair=repair, calibration=rows, calibration_tokens=2000, **ON)
        found = content(tmp_path / name)
        loss, _ = measured(tmp_path / name, tmp_path / f"{name} itself", text)
        assert found["references"]["mean"]["repaired"] == pytest.approx(loss, abs=EXACT)
        assert found["references"]["mean"][found["merge"]["path"]] == pytest.approx(loss, abs=EXACT)


def test_what_is_measured_before_it_is_stored_is_another_loss(
    pairs: Callable[[str], tuple[Path, Path]], tmp_path: Path, text: Path
) -> None:
    """The control: in the formats above, storing a merge changes its loss by more than what they are compared with."""
    for number, pair in enumerate(("mixtral in bfloat16", "int4")):
        a, b = pairs(pair)
        merge(a, b, tmp_path / f"{number}", 0.5, text=text, **ON)
        before = barrier(a, b, tmp_path / f"path {number}", text=text, points=3, routing=False, **ON)
        of_line = before.aligned.nll[1]
        assert abs(content(tmp_path / f"{number}")["references"]["mean"]["aligned"] - of_line) > 20 * EXACT


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("form", ["a", "bf16"])
def test_a_merge_is_read_as_it_is_written(quantized: Callable[..., Path], tmp_path: Path, name: str, form: Any) -> None:
    a, b = quantized(name, 0), quantized(name, 1)
    merge(a, b, tmp_path / "out", 0.3, format=form)
    model_a, model_b, written = (read_model(Checkpoint.open(one)) for one in (a, b, tmp_path / "out"))
    elements = ModelSymmetry.load(tmp_path / "out" / "alignment").layers
    virtual = written_merge(model_a, model_b, elements, 0.3, form)
    assert virtual.checkpoint.tensors.keys() == written.checkpoint.tensors.keys()
    for key, info in written.checkpoint.tensors.items():
        values = written.checkpoint.read(key)
        assert torch.equal(virtual.checkpoint.read(key), values), key
        pieces = [(first, min(7, info.numel - first)) for first in range(0, info.numel, max(1, info.numel // 3))]
        for first, count in pieces:
            assert torch.equal(virtual.checkpoint.read(key, first, count), values[first : first + count]), key
