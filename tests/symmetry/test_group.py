from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_moe_lmc.errors import SymmetryError
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.elements import BankSymmetry, UnitSymmetry
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry, digest

OLD = Path(__file__).parent / "data" / "symmetry-0.1.0.safetensors"  # written by release 0.1.0
SIZES = st.tuples(
    st.sampled_from([1, 2, 3]),  # groups
    st.integers(1, 3),  # members of a group
    st.integers(1, 5),  # units
    st.integers(0, 4),  # shared units
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), max_size=2),  # experts and units of further banks
)
SEEDS = st.integers(0, 2**31)
Sizes = tuple[int, int, int, int, list[tuple[int, int]]]


def element(sizes: Sizes, seed: int, scale: float) -> LayerSymmetry:
    groups, members, units, shared, further = sizes
    generator = torch.Generator().manual_seed(seed)
    layer = LayerSymmetry.random(groups * members, units, shared, groups=groups, scale=scale, generator=generator)
    for number, (experts, width) in enumerate(further):
        layer = layer.with_bank(f"bank{number}", BankSymmetry.random(experts, width, scale=scale, generator=generator))
    return layer


def identity(sizes: Sizes) -> LayerSymmetry:
    groups, members, units, shared, further = sizes
    banks = {f"bank{number}": BankSymmetry.identity(*size) for number, size in enumerate(further)}
    layer = LayerSymmetry.identity(groups * members, units, shared)
    return replace(layer, banks={**layer.banks, **banks})


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seeds=st.tuples(SEEDS, SEEDS, SEEDS), scale=st.sampled_from([1.0, 3.0]))
def test_group_laws(sizes: Sizes, seeds: tuple[int, int, int], scale: float) -> None:
    f, g, h = (element(sizes, seed, scale) for seed in seeds)
    one = identity(sizes)
    for value in (f, f @ g, f.inverse()):
        value.validate("test", groups=sizes[0])
    if scale == 1:  # without magnitudes the laws hold to the bit
        assert (f @ g) @ h == f @ (g @ h)
        assert f @ f.inverse() == one == f.inverse() @ f
        assert (f @ g).inverse() == g.inverse() @ f.inverse()
        assert f.inverse().inverse() == f
    assert ((f @ g) @ h).isclose(f @ (g @ h))
    assert (f @ f.inverse()).isclose(one) and (f.inverse() @ f).isclose(one)
    assert (f @ g).inverse().isclose(g.inverse() @ f.inverse())
    assert f @ one == f == one @ f
    assert f.is_lossless == (scale == 1)


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seeds=st.tuples(SEEDS, SEEDS))
def test_composition_is_that_of_the_action(sizes: Sizes, seeds: tuple[int, int]) -> None:
    """new[i] = old[permutation[i]], in every bank and for the shared units."""
    f, g = (element(sizes, seed, 3.0) for seed in seeds)
    both = f @ g
    for name, bank in both.banks.items():
        values = torch.rand(bank.unit_order.shape)

        def acted(values: torch.Tensor, by: BankSymmetry) -> torch.Tensor:
            rows = [values[e][units] * s for e, units, s in zip(by.expert_order, by.unit_order, by.unit_scale[:], strict=True)]
            return torch.stack(rows)

        assert torch.allclose(acted(values, bank), acted(acted(values, g.banks[name]), f.banks[name]))
    values = torch.rand(len(both.shared.order))
    assert torch.allclose(
        values[both.shared.order] * both.shared.scale,
        (values[g.shared.order] * g.shared.scale)[f.shared.order] * f.shared.scale,
    )


def test_composition_is_not_commutative() -> None:
    f, g = element((1, 3, 5, 0, []), 1, 1.0), element((1, 3, 5, 0, []), 2, 1.0)
    assert f @ g != g @ f


@pytest.mark.parametrize("bank", [FIRST, "vision"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_order": torch.tensor([0, 0, 1, 2])}, "expert_order is not a permutation"),
        ({"unit_order": torch.zeros(4, 3, dtype=torch.int64)}, "unit_order is not a permutation"),
        ({"unit_order": torch.arange(4)}, r"unit_order must be \[expert, unit\]"),
        ({"unit_scale": torch.zeros(4, 3)}, "zero or not finite"),
        ({"unit_scale": torch.full((4, 3), torch.nan)}, "zero or not finite"),
        ({"unit_scale": torch.ones(4, 2)}, "disagree"),
    ],
)
def test_validation_refuses_what_is_no_group_element(change: dict[str, torch.Tensor], message: str, bank: str) -> None:
    one = LayerSymmetry.identity(4, 3, 2).with_bank("vision", BankSymmetry.identity(4, 3))
    one.validate("test", 2)
    with pytest.raises(SymmetryError, match="symmetry, layer 7" + (", bank vision: " if bank else ": ") + ".*" + message):
        ModelSymmetry("mixtral", 2, {7: one.with_bank(bank, replace(one.banks[bank], **change))}).validate()


def test_validation_refuses_torn_groups_and_a_shared_expert_that_is_none() -> None:
    one = LayerSymmetry.identity(4, 3, 2)
    torn = one.with_bank(FIRST, replace(one.banks[FIRST], expert_order=torch.tensor([0, 2, 1, 3])))
    torn.validate("test")
    with pytest.raises(SymmetryError, match="tears the 2 expert groups apart"):
        torn.validate("test", 2)
    with pytest.raises(SymmetryError, match="4 experts do not divide into 3 groups"):
        one.validate("test", 3)
    one.with_bank("vision", torn.banks[FIRST]).validate("test", 2)  # the groups are those of the first bank
    for shared, message in (
        (UnitSymmetry(torch.arange(2), torch.ones(5)), "differ in length"),
        (UnitSymmetry(torch.tensor([1, 1]), torch.ones(2)), "order is not a permutation"),
        (UnitSymmetry(torch.arange(2), torch.tensor([1.0, 0.0])), "zero or not finite"),
    ):
        with pytest.raises(SymmetryError, match=f"test, shared expert: .*{message}"):
            replace(one, shared=shared).validate("test")


def test_composing_other_shapes_or_families_is_refused() -> None:
    one = ModelSymmetry("mixtral", 1, {0: LayerSymmetry.identity(4, 3)})
    for other in (
        ModelSymmetry("olmoe", 1, one.layers),
        ModelSymmetry("mixtral", 2, one.layers),
        ModelSymmetry("mixtral", 1, {1: LayerSymmetry.identity(4, 3)}),
        ModelSymmetry("mixtral", 1, {0: LayerSymmetry.identity(4, 2)}),
        ModelSymmetry("mixtral", 1, {0: LayerSymmetry.identity(4, 3, 1)}),
        ModelSymmetry("mixtral", 1, {0: one.layers[0].with_bank("zero", BankSymmetry.identity(1, 0))}),
    ):
        with pytest.raises(SymmetryError, match="cannot compose"):
            one @ other


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, scale: float) -> None:
    layers = {i: element((2, 2, 5, 3, [(3, 2), (1, 0)]), seed, scale) for i, seed in ((1, 5), (10, 6))}
    symmetry = ModelSymmetry("deepseek_v3", 2, layers, {"order": "best", "b_fingerprint": "abc"})
    file = tmp_path / "symmetry.safetensors"
    symmetry.save(file)
    loaded = ModelSymmetry.load(file)
    assert loaded == symmetry and loaded.metadata["b_fingerprint"] == "abc" and digest(loaded) == digest(symmetry)
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
    whole = LayerSymmetry.identity(2, 3).with_bank("vision", BankSymmetry.identity(1, 1))
    ModelSymmetry("mixtral", 1, {0: whole}).save(file)
    tensors = load_file(file)
    tensors |= {"layers.0.vision.shared_order": torch.arange(2), "layers.0.vision.shared_scale": torch.ones(2)}
    save_file(tensors, file, good)
    with pytest.raises(SymmetryError, match="layer 0, bank vision: shared fields with entries"):
        ModelSymmetry.load(file)


def test_a_file_of_the_first_release_is_read_and_written_again_to_its_bytes(tmp_path: Path) -> None:
    vision = BankSymmetry(torch.tensor([1, 0]), torch.tensor([[2, 0, 1], [0, 1, 2]]), torch.tensor([[1.0, -1, 1], [-1, 1, 1]]))
    first = BankSymmetry(
        expert_order=torch.tensor([2, 3, 1, 0]),
        unit_order=torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]]),
        unit_scale=torch.tensor([[1.0, -0.5], [2, 1], [-1, 1], [1, 0.25]]),
    )
    shared = UnitSymmetry(torch.tensor([3, 1, 0, 2]), torch.tensor([-1.0, 1, 4, 1]))
    still = LayerSymmetry.identity(4, 2).with_bank("vision", BankSymmetry.identity(2, 3))
    expected = ModelSymmetry("ernie4_5_vl_moe", 2, {1: LayerSymmetry({FIRST: first, "vision": vision}, shared), 10: still})
    loaded = ModelSymmetry.load(OLD)
    assert loaded == expected and loaded != replace(expected, layers={1: still, 10: still})
    assert {key: loaded.metadata[key] for key in ("method", "order", "units", "b_fingerprint", "a_source")} == {
        "method": "weight matching",
        "order": "best",
        "units": "scaled",
        "b_fingerprint": "0b",
        "a_source": "A",
    }
    assert digest(loaded) == "016b64f56acc22bce8d5681de9ab1613951939fedcb0081b09c9e41257bf49b2"  # as that release computed it
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == OLD.read_bytes()
