from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.errors import InputError, MismatchError
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.merge import merge
from hf_moe_lmc.writing.interpolation import interpolate, interpolate_into
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:outside the MoE blocks")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolation_is_exact_at_the_ends_and_between_equals(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1000, generator=generator).to(dtype) for _ in range(2))
    b[0], a[0] = -0.0, 1.0
    wide = torch.promote_types(dtype, torch.float32)
    assert tiny.same_bytes(interpolate(a, b, 0.0), a.to(wide))
    assert tiny.same_bytes(interpolate(a, b, 1.0), b.to(wide))
    assert torch.equal(interpolate(a, a, 0.3), a.to(wide))
    assert torch.allclose(interpolate(a, b, 0.25), 0.75 * a.to(wide) + 0.25 * b.to(wide))
    assert interpolate(a, b.double(), 0.5).dtype == torch.float64


@pytest.mark.parametrize("into", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 1.0])
def test_interpolation_into_memory_is_interpolation_cast_once(
    monkeypatch: pytest.MonkeyPatch, into: torch.dtype, dtype: torch.dtype, t: float
) -> None:
    a, b = (torch.randn(6, 5, 7).transpose(0, 2).to(dtype) for _ in range(2))
    expected = interpolate(a, b, t).to(into)
    for at_once in (1, 40, 1000):  # elements, rows, all at once
        monkeypatch.setattr("hf_moe_lmc.writing.interpolation.AT_ONCE", at_once)
        out = torch.full(a.shape, torch.nan, dtype=into)
        interpolate_into(out, a, b.contiguous(), t)
        assert tiny.same_bytes(out, expected.contiguous())
    numbers = torch.arange(6)
    interpolate_into(numbers, torch.ones(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64), t)
    assert numbers.tolist() == [1] * 6
    with pytest.raises(MismatchError, match="integers that differ"):
        interpolate_into(numbers, numbers, numbers + 1, t)


@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
def test_a_merge_is_a_before_the_line_and_the_aligned_b_at_its_end(
    saved: Callable[..., Path], tmp_path: Path, family: str, layout: str
) -> None:
    a, b = saved(family, layout, 0), saved(family, layout, 1)
    align(a, b, tmp_path / "aligned")
    symmetry = tmp_path / "aligned" / "alignment" / "symmetry.safetensors"
    for t, folder in ((0.0, a), (1.0, tmp_path / "aligned")):
        merge(a, b, tmp_path / f"at-{t}", t, symmetry=symmetry)
        merged, expected = tiny.tensors(tmp_path / f"at-{t}"), tiny.tensors(folder)
        assert merged.keys() == expected.keys()
        assert all(tiny.same_bytes(merged[name], expected[name]) for name in expected)
    alignment = merge(a, b, tmp_path / "half")
    assert alignment is not None
    merged, of_a, of_b = (tiny.tensors(folder) for folder in (tmp_path / "half", a, tmp_path / "aligned"))
    for name in merged:
        assert torch.allclose(merged[name], (of_a[name] + of_b[name]) / 2, atol=1e-6), name
    tiny.load(tmp_path / "half")


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_layouts_dtypes_and_shards_may_differ_and_the_result_is_laid_out_as_a(
    saved: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    a = tiny.save(tiny.make_model(family, 0).to(torch.bfloat16), tmp_path / "a", "fused", "15KB")
    b = saved(family, "per-expert", 1)
    merge(a, b, tmp_path / "out", 1.0)
    align(a, b, tmp_path / "aligned")
    assert [f.name for f in sorted((tmp_path / "out").glob("*.safetensors"))] == [
        f.name for f in sorted(a.glob("*.safetensors"))
    ]
    merged, of_a = tiny.tensors(tmp_path / "out"), tiny.tensors(a)
    assert {name: (x.dtype, x.shape) for name, x in merged.items()} == {name: (x.dtype, x.shape) for name, x in of_a.items()}
    # at t = 1: the aligned B after A's layout and one cast
    fused = tmp_path / "fused"
    tiny.load(tmp_path / "aligned").save_pretrained(fused, save_original_format=False)
    expected = tiny.tensors(fused)
    assert all(tiny.same_bytes(merged[name], expected[name].to(merged[name].dtype)) for name in merged)


def test_without_alignment_it_is_the_plain_average(saved: Callable[..., Path], tmp_path: Path) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    assert merge(a, b, tmp_path / "out", 0.25, align=False) is None
    of_a, of_b, merged = (tiny.tensors(folder) for folder in (a, b, tmp_path / "out"))
    for name in merged:
        assert torch.allclose(merged[name], 0.75 * of_a[name] + 0.25 * of_b[name], atol=1e-6), name
    assert not (tmp_path / "out" / "alignment").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mixtral"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--no-align" in card and "t = 0.25" in card and str(tmp_path) not in card


def test_what_cannot_be_merged_is_refused(saved: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path) -> None:
    a = saved("deepseek_v3")
    for t in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="expected a number from 0"):
            merge(a, a, tmp_path / "out", t)
    with pytest.raises(InputError, match="choose one"):
        merge(a, a, tmp_path / "out", align=False, symmetry=tmp_path)
    assert not (tmp_path / "out").exists()


def test_integers_that_differ_cannot_be_interpolated(copy: Callable[..., Path], tmp_path: Path) -> None:
    folders = [copy("mixtral", "per-expert", seed, name=str(seed)) for seed in (0, 1)]
    for folder, value in zip(folders, (1, 2), strict=True):
        tiny.edit(folder, lambda content, value=value: content.update(counter=torch.tensor([value])))
    with pytest.raises(MismatchError, match="counter: integers that differ"):
        merge(*folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tiny.edit(folders[1], lambda content: content.update(counter=torch.tensor([1])))
    merge(*folders, tmp_path / "out")
    assert tiny.tensors(tmp_path / "out")["counter"].tolist() == [1]
