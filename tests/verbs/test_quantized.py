"""Merges and barriers of quantized checkpoints: to the last bit what a reference makes of the same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.formats import reading
from hf_moe_lmc.formats.protocol import StoredWeight
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.verbs.apply import apply
from hf_moe_lmc.verbs.barrier import barrier
from hf_moe_lmc.verbs.inspect import inspect
from hf_moe_lmc.verbs.merge import merge, plan_merge
from hf_moe_lmc.writing.output import FolderWriter
from tests import tiny
from tests.formats.published import LAYOUTS, Parts, numbers, plain, save, stored_anew, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:outside the MoE blocks", "ignore:.*expect a barrier")


def expected_merge(a: Path, b: Path, t: float, form: str) -> Parts:
    """(1 - t) A + t B by the reference, stored as `form` says."""
    in_a, in_b = tiny.tensors(a), tiny.tensors(b)
    of_a, of_b = numbers(in_a), numbers(in_b)
    like = in_b if form == "b" else in_a
    result: Parts = {}
    weights = {weight.name: weight for weight in weights_of(like)}
    for name, one in of_a.items():
        other = of_b[name]
        value = one if t == 0 else other if t == 1 else torch.lerp(one.float(), other.float(), t)
        value = value.float() if one.dtype.is_floating_point else one
        weight = weights.get(name)
        if weight is None:
            result[name] = value.to((of_b if form == "b" else of_a)[name].dtype)
        elif form == "bf16":
            result[name] = value.bfloat16()
        elif (form == "a" and (t == 0 or torch.equal(one, other))) or (form == "b" and t == 1):
            result |= {part: like[part] for part in (weight.codes, weight.scales, weight.above) if part}
        else:
            result |= stored_anew(weight, value, like)
    if form != "bf16":
        for name in [beside for weight in weights.values() for beside in weight.beside]:
            pick = torch.minimum if name.endswith("global_scale") else torch.maximum
            sides = {("a", 0): (in_a,), ("b", 1): (in_b,)}.get((form, t), (like, in_a, in_b))
            both = [content[name] for content in sides if name in content]
            result[name] = both[0]
            for one in both[1:] if not name.endswith("_shape") else []:
                result[name] = pick(result[name], one)
    return result


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def check(folder: Path, expected: Parts) -> None:
    found = tiny.tensors(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(as_bytes(found[name]), as_bytes(tensor)), name


@pytest.mark.parametrize("form", ["a", "b", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_merge_is_what_the_reference_makes(quantized: Callable[..., Path], tmp_path: Path, name: str, form: str) -> None:
    a, b = quantized(name), quantized(name, 1)
    for t, align in ((0.3, False), (0.75, True)):
        out = tmp_path / f"{t}"
        if align:
            still = read_model(Checkpoint.open(b)).identity()
            merge(a, b, out, t, symmetry=still, format=form)  # type: ignore[arg-type]
        else:
            merge(a, b, out, t, align=False, format=form)  # type: ignore[arg-type]
        check(out, expected_merge(a, b, t, form))
        config = json.loads((out / "config.json").read_text())
        assert ("quantization_config" in config) == (form != "bf16" and name != "inkling2")
        if LAYOUTS[name].loads or form == "bf16":
            found = getattr(transformers, config["architectures"][0]).from_pretrained(out, output_loading_info=True)
            assert not any(found[1].values()), found[1]
    if form != "bf16":
        report = json.loads((tmp_path / "0.3" / "quantization.json").read_text())
        assert report["format"] and all(0 < kind["relative_error"] < 0.2 for kind in report["tensors"].values())
        assert all(kind["requantized"] > 0 == kind["kept"] for kind in report["tensors"].values())


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "int4"])
def test_several_points_are_the_merges_of_each(quantized: Callable[..., Path], tmp_path: Path, name: str, align: bool) -> None:
    a, b = quantized(name), quantized(name, 1)
    merge(a, b, tmp_path / "several", [0.0, 0.3, 1.0], align=align)
    for t in (0.0, 0.3, 1.0):
        merge(a, b, tmp_path / f"t{t:g}", t, align=align)
        for file in ("config.json", "quantization.json"):
            assert (tmp_path / "several" / f"t{t:g}" / file).read_text() == (tmp_path / f"t{t:g}" / file).read_text()
        check(tmp_path / "several" / f"t{t:g}", tiny.tensors(tmp_path / f"t{t:g}"))
    (first, _, last) = (tiny.tensors(tmp_path / "several" / place) for place in ("t0", "t0.3", "t1"))
    assert any(not torch.equal(as_bytes(first[key]), as_bytes(last[key])) for key in first), "the control: points differ"


@pytest.mark.parametrize("form", ["a", "bf16"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_several_points_read_and_decode_once(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    decoded: list[str] = []
    real = reading.read_rows

    def counted(checkpoint: Checkpoint, weight: StoredWeight, *range_: int) -> Tensor:
        decoded.append(f"{checkpoint.name}: {weight.name}: {range_}")
        return real(checkpoint, weight, *range_)

    monkeypatch.setattr(reading, "read_rows", counted)
    counts = []
    for number, points in enumerate([0.25, [0.25, 0.5, 0.75]]):
        decoded.clear()
        still = read_model(Checkpoint.open(quantized(name, 1))).identity()
        merge(quantized(name), quantized(name, 1), tmp_path / str(number), points, symmetry=still, format=form)  # type: ignore[arg-type]
        counts.append(len(decoded))
    assert 0 < counts[0] <= counts[1] < 1.5 * counts[0]  # a thread that writes scales may come first


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nvfp4, modelopt"])
def test_a_call_that_continues_reports_on_all_that_was_rounded(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    a, b = quantized(name), quantized(name, 1)
    merge(a, b, tmp_path / "whole", [0.3, 0.6], align=False)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FolderWriter, "write_checkpoint_files", stop)
        merge(a, b, tmp_path / "stopped", [0.3, 0.6], align=False)
    merge(a, b, tmp_path / "stopped", [0.3, 0.6], align=False)
    for t in ("t0.3", "t0.6"):
        found, expected = ((tmp_path / one / t / "quantization.json").read_text() for one in ("stopped", "whole"))
        assert found == expected and json.loads(found)["tensors"]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "int4", "fused, halves", "nvfp4, modelopt", "vllm"])
def test_bytes_stay_where_nothing_changes(quantized: Callable[..., Path], tmp_path: Path, name: str) -> None:
    a, b = quantized(name), quantized(name, 1)
    planted = read_model(Checkpoint.open(b)).random(torch.Generator().manual_seed(0), scale=1.0)
    for number, (t, form, symmetry) in enumerate([(0.0, "a", planted), (0.0, "a", None), (1.0, "b", None)]):
        out = tmp_path / str(number)
        if symmetry:
            merge(a, b, out, t, symmetry=symmetry, format=form)  # type: ignore[arg-type]
        else:
            merge(a, b, out, t, align=False, format=form)  # type: ignore[arg-type]
        check(out, tiny.tensors(a if form == "a" else b))
    # one expert differs: all others keep their bytes
    other = shutil.copytree(a, tmp_path / "other")
    key = next(weight.scales for weight in weights_of(tiny.tensors(a)) if "expert" in weight.name)

    def change(content: Parts) -> None:
        if content[key].dtype.is_floating_point and content[key].dtype.itemsize > 1:
            content[key] *= 2
        else:
            content[key].view(torch.uint8).view(-1)[0] += 1 if content[key].dtype == torch.uint8 else 8  # a factor of 2

    tiny.edit(other, change)
    merge(a, other, tmp_path / "edited", 0.5, align=False)
    before, after = tiny.tensors(a), tiny.tensors(tmp_path / "edited")
    differing = {name for name in before if not torch.equal(as_bytes(before[name]), as_bytes(after[name]))}
    weight = next(weight for weight in weights_of(before) if weight.scales == key)
    assert differing and differing <= {weight.codes, weight.scales, weight.above}


@pytest.mark.parametrize("name", ["qwen3_moe", "mxfp4, packed", "gpt_oss", "int4"])
def test_experts_that_moved_keep_the_bytes_of_b(quantized: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """t = 1 in the format of B: what an order of experts and signs do is in the bytes; what more does, is stored anew."""
    a, b = quantized(name), quantized(name, 1)
    model = read_model(Checkpoint.open(b))
    drawn = model.random(torch.Generator().manual_seed(5), scale=1.0)
    merge(a, b, tmp_path / "out", 1.0, symmetry=drawn, format="b")
    apply(drawn, plain(LAYOUTS[name], b, tmp_path / "plain"), tmp_path / "moved")
    moved, content = tiny.tensors(tmp_path / "moved"), tiny.tensors(b)
    outside = {name for name in moved if name not in model.layer_of}
    written = tiny.tensors(tmp_path / "out")
    for weight in weights_of(content):
        parts = [part for part in (weight.codes, weight.scales, weight.above) if part]
        expected = content if weight.name in outside else stored_anew(weight, moved[weight.name].float(), content)
        if weight.name in outside:
            assert all(torch.equal(written[part].view(torch.uint8), content[part].view(torch.uint8)) for part in parts)
        else:
            for part in parts:
                assert torch.equal(written[part].view(torch.uint8), expected[part].view(torch.uint8)), part


MIXED = {
    "FP8 and plain": ("qwen3_moe", "plain"),
    "plain and FP8": ("plain", "deepseek_v3"),
    "MXFP4 and plain": ("gpt_oss", "plain"),
    "plain and MXFP4": ("plain", "gpt_oss"),
    "INT4 and FP8": ("int4", "fp8 of int4"),
    "MXFP4 of two kinds": ("mxfp4, packed", "int4"),
}


@pytest.fixture
def mixed(quantized: Callable[..., Path], tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Two checkpoints of one architecture in two formats."""

    def get(case: str) -> tuple[Path, Path]:
        pair = []
        names = MIXED[case]
        for seed, name in enumerate(names):
            other = names[1 - seed]
            if name == "plain":
                pair.append(plain(LAYOUTS[other], quantized(other, seed), tmp_path / f"plain-{seed}"))
                tiny.edit(pair[-1], narrow)
            elif name == "fp8 of int4":
                layout = LAYOUTS["deepseek_v3"]
                pair.append(save(replace(layout, sizes=LAYOUTS["int4"].sizes), tmp_path / "fp8", seed))
            else:
                pair.append(quantized(name, seed))
        return pair[0], pair[1]

    return get


@pytest.mark.parametrize("case", MIXED)
def test_any_two_formats_are_merged(mixed: Callable[[str], tuple[Path, Path]], tmp_path: Path, case: str) -> None:
    a, b = mixed(case)
    for form in ("a", "b"):
        merge(a, b, tmp_path / form, 0.3, align=False, format=form)  # type: ignore[arg-type]
        check(tmp_path / form, expected_merge(a, b, 0.3, form))
        config = json.loads((tmp_path / form / "config.json").read_text())
        wanted = json.loads(((a if form == "a" else b) / "config.json").read_text())
        assert config.get("quantization_config") == wanted.get("quantization_config")
    merge(a, b, tmp_path / "aligned", 0.5)
    assert plan_merge(a, b, tmp_path / "planned").tensors == len(tiny.tensors(a))


def dequantize(content: Parts, dtype: torch.dtype) -> None:
    """Puts the numbers of the reference in the place of quantized weights."""
    names = {weight.name for weight in weights_of(content)}
    found = numbers(content)
    content.clear()
    content.update({name: tensor.to(dtype) if name in names else tensor for name, tensor in found.items()})


def narrow(content: Parts) -> None:
    """Matrices in bfloat16."""
    content.update({name: one.bfloat16() for name, one in content.items() if one.ndim > 1 and one.is_floating_point()})


@pytest.mark.parametrize("case", ["FP8 and plain", "plain and MXFP4", "INT4 and FP8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_barrier_is_that_of_the_dequantized_checkpoints(
    mixed: Callable[[str], tuple[Path, Path]], tmp_path: Path, case: str, dtype: str
) -> None:
    a, b = mixed(case)
    (tmp_path / "text.txt").write_text("Thequickbrownfoxjumpsoverthelazydog." * 12)
    sides = []
    for number, folder in enumerate((a, b)):
        copy = shutil.copytree(folder, tmp_path / f"quantized-{number}")
        other = shutil.copytree(folder, tmp_path / f"dequantized-{number}")
        tiny.edit(other, partial(dequantize, dtype=getattr(torch, dtype)))
        tiny.edit_config(other, quantization_config=None, transformers_version=transformers.__version__)
        for one in (copy, other):
            tiny.tokenizer().save_pretrained(one)
        sides.append((copy, other))
    options = {"text": tmp_path / "text.txt", "points": 3, "context": 64, "dtype": dtype, "order": "expert", "ensemble": True}
    reports = [
        barrier(one, other, tmp_path / f"report-{number}", **options)  # type: ignore[arg-type]
        for number, (one, other) in enumerate(zip(*sides, strict=True))
    ]
    for path in reports[0].losses:
        assert torch.equal(reports[0].losses[path], reports[1].losses[path]), path
    of_both = [report.added[0.5].ensembles["logits"].losses for report in reports]
    assert torch.equal(*of_both) and not torch.equal(of_both[0][0], reports[0].losses["naive"][1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_inspect_names_the_formats(quantized: Callable[..., Path], name: str) -> None:
    found = inspect(quantized(name))
    assert found.quantisation and found.formats
    content = tiny.tensors(quantized(name))
    weights = weights_of(content)
    of_all = numbers(content)
    assert sum(found.formats.values()) == sum(of_all[weight.name].numel() for weight in weights)
    assert found.bytes == sum(tensor.nbytes for tensor in content.values())
    assert any(kind in found.table() for kind in found.formats)


def test_shards_may_hold_a_weight_and_its_scales_apart(quantized: Callable[..., Path], tmp_path: Path) -> None:
    def split(folder: Path, output: Path) -> Path:
        shutil.copytree(folder, output)
        content = tiny.tensors(folder)
        (output / "model.safetensors").unlink()
        where = {
            name: "model-00002-of-00002.safetensors" if "scale" in name else "model-00001-of-00002.safetensors"
            for name in content
        }
        for file in set(where.values()):
            save_file({name: one for name, one in content.items() if where[name] == file}, output / file, {"format": "pt"})
        (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return output

    a, b = (split(quantized("qwen3_moe", seed), tmp_path / f"{seed}") for seed in (0, 1))
    merge(a, b, tmp_path / "out", 0.3, align=False)
    check(tmp_path / "out", expected_merge(a, b, 0.3, "a"))
