from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_moe_lmc.errors import SymmetryError
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry

SIZES = st.tuples(
    st.sampled_from([1, 2, 3]),  # groups
    st.integers(1, 3),  # members of a group
    st.integers(1, 5),  # units
    st.integers(0, 4),  # shared units
)
SEEDS = st.integers(0, 2**31)


def element(sizes: tuple[int, int, int, int], seed: int, scale: float) -> LayerSymmetry:
    groups, members, units, shared = sizes
    generator = torch.Generator().manual_seed(seed)
    return LayerSymmetry.random(groups * members, units, shared, groups=groups, scale=scale, generator=generator)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seeds=st.tuples(SEEDS, SEEDS, SEEDS), scale=st.sampled_from([1.0, 3.0]))
def test_group_laws(sizes: tuple[int, int, int, int], seeds: tuple[int, int, int], scale: float) -> None:
    f, g, h = (element(sizes, seed, scale) for seed in seeds)
    identity = LayerSymmetry.identity(*f.sizes.values())
    for value in (f, f @ g, f.inverse()):
        value.validate("test", groups=sizes[0])
    if scale == 1:  # without magnitudes the laws hold to the bit
        assert (f @ g) @ h == f @ (g @ h)
        assert f @ f.inverse() == identity == f.inverse() @ f
        assert (f @ g).inverse() == g.inverse() @ f.inverse()
        assert f.inverse().inverse() == f
    assert ((f @ g) @ h).isclose(f @ (g @ h))
    assert (f @ f.inverse()).isclose(identity) and (f.inverse() @ f).isclose(identity)
    assert (f @ g).inverse().isclose(g.inverse() @ f.inverse())
    assert f @ identity == f == identity @ f
    assert f.is_lossless == (scale == 1)


def test_composition_is_not_commutative() -> None:
    f, g = element((1, 3, 5, 0), 1, 1.0), element((1, 3, 5, 0), 2, 1.0)
    assert f @ g != g @ f


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_order": torch.tensor([0, 0, 1, 2])}, "expert_order is not a permutation"),
        ({"unit_order": torch.zeros(4, 3, dtype=torch.int64)}, "unit_order is not a permutation"),
        ({"unit_scale": torch.zeros(4, 3)}, "zero or not finite"),
        ({"unit_scale": torch.full((4, 3), torch.nan)}, "zero or not finite"),
        ({"unit_scale": torch.ones(4, 2)}, "disagree"),
        ({"shared_scale": torch.ones(5)}, "differ in length"),
        ({"expert_order": torch.tensor([0, 2, 1, 3])}, "tears the 2 expert groups apart"),
    ],
)
def test_validation_refuses_what_is_no_group_element(change: dict[str, torch.Tensor], message: str) -> None:
    fields = vars(LayerSymmetry.identity(4, 3, 2)) | change
    with pytest.raises(SymmetryError, match=message):
        ModelSymmetry("mixtral", 2, {0: LayerSymmetry(**fields)}).validate()


def test_composing_other_shapes_or_families_is_refused() -> None:
    one = ModelSymmetry("mixtral", 1, {0: LayerSymmetry.identity(4, 3)})
    for other in (
        ModelSymmetry("olmoe", 1, one.layers),
        ModelSymmetry("mixtral", 2, one.layers),
        ModelSymmetry("mixtral", 1, {1: LayerSymmetry.identity(4, 3)}),
        ModelSymmetry("mixtral", 1, {0: LayerSymmetry.identity(4, 2)}),
    ):
        with pytest.raises(SymmetryError, match="cannot compose"):
            one @ other


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, scale: float) -> None:
    layers = {i: element((2, 2, 5, 3), seed, scale) for i, seed in ((1, 5), (10, 6))}
    symmetry = ModelSymmetry("deepseek_v3", 2, layers, {"order": "best", "b_fingerprint": "abc"})
    file = tmp_path / "symmetry.safetensors"
    symmetry.save(file)
    loaded = ModelSymmetry.load(file)
    assert loaded == symmetry and loaded.metadata["b_fingerprint"] == "abc"
    assert ModelSymmetry.load(tmp_path) == symmetry  # the folder will do
    assert file.stat().st_mode & 0o044, "readable by others, as the umask says"


def test_loading_what_is_no_symmetry_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "symmetry.safetensors"
    with pytest.raises(SymmetryError, match="no symmetry here"):
        ModelSymmetry.load(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(SymmetryError, match="not a readable safetensors"):
        ModelSymmetry.load(file)
    save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(SymmetryError, match="no symmetry saved by"):
        ModelSymmetry.load(file)
    good = {"hf_moe_lmc": "symmetry", "format_version": "1", "family": "mixtral", "groups": "1"}
    save_file({"layers.0.expert_order": torch.arange(2)}, file, good | {"format_version": "99"})
    with pytest.raises(SymmetryError, match="format version 99"):
        ModelSymmetry.load(file)
    for missing in ("format_version", "family", "groups"):
        save_file({"layers.0.expert_order": torch.arange(2)}, file, {k: v for k, v in good.items() if k != missing})
        with pytest.raises(SymmetryError, match=r"format version None|lack the family"):
            ModelSymmetry.load(file)
    save_file({"layers.0.expert_order": torch.arange(2)}, file, good)
    with pytest.raises(SymmetryError, match="layer 0 lacks unit_order"):
        ModelSymmetry.load(file)
