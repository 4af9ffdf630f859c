"""Every MoE architecture of transformers against its description: accounting, symmetry, recovery, derivation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.matching.alignment import align_models
from hf_moe_lmc.matching.options import WeightMatching
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.reading import model_type, read_model
from hf_moe_lmc.moe.registry import families, get_family, refusals
from hf_moe_lmc.proof.checks import LAYOUTS, prove, write
from hf_moe_lmc.proof.derivation import TRANSFORMERS, derive
from hf_moe_lmc.proof.miniature import build, shrink
from hf_moe_lmc.writing.streams import rewritten
from tests import zoo

# what is built in another way than transformers' experts modules, so that only data can describe it
NOT_DERIVED = {
    "dbrx": "3-D `down_proj`",
    "ernie4_5_vl_moe_text": "two sets of experts",
    "inkling_text": "a shared expert of another form",
    "jetmoe": "3-D `down_proj`",
    "longcat_flash": "no router",
    "switch_transformers": "3-D `down_proj`",
    "zaya": "no router",
}
# where the derived description allows less than the written one, which is on the safe side
CAUTIOUS = {
    "hy_v4": "a clamp on the routed experts is taken to hold for the shared one",
    **dict.fromkeys(
        ("diffusion_gemma", "diffusion_gemma_text", "gemma4", "gemma4_text"), "the dense MLP beside the experts is left"
    ),
}


CASES = zoo.to_prove()
TOWERS = [case for case in CASES if case not in zoo.WRAPPERS.split() or case in zoo.TOWERS_ELSEWHERE]


@lru_cache(maxsize=1)
def small(case: str) -> PreTrainedConfig:
    return shrink(zoo.original(case))


def family_of(config: PreTrainedConfig) -> MoEFamily:
    return get_family(model_type(config), "test")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(case: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Layout -> a checkpoint of the case in it, made once."""
    root = tmp_path_factory.mktemp("zoo")
    built = build(small(case))
    for layout, original in LAYOUTS.items():
        built.save_pretrained(root / layout, save_original_format=original)
    yield lambda layout: root / layout


def test_the_description_passes_the_self_test(case: str) -> None:
    config = zoo.original(case)
    found = prove(family_of(config), config)
    assert found.passed, found.table()
    assert any(check.control for check in found.checks) and len(found.checks) > 5


@pytest.mark.filterwarnings("ignore:experts under talker")  # of qwen3_omni_moe
def test_a_planted_symmetry_is_recovered(case: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    if case not in TOWERS:
        pytest.skip("recovered in its tower alone")
    with ExitStack() as stack:
        a = read_model(stack.enter_context(Checkpoint.open(folders("as on the Hub"))))
        planted = a.random(torch.Generator().manual_seed(1), scale=3.0)
        moved = write(rewritten(a, planted.layers), tmp_path / "moved")
        b = read_model(stack.enter_context(Checkpoint.open(moved)))
        found = align_models(a, b, WeightMatching())
        assert found.symmetry.isclose(planted.inverse(), 1e-4)
        assert found.totals()["experts_moved"] > 0
        assert found.totals()["relative_distance_after_units"] < 1e-5 < found.totals()["relative_distance_before"]
        b.check_symmetry(found.symmetry)


@pytest.mark.skipif(
    not TRANSFORMERS.contains(transformers.__version__, prereleases=True), reason=f"derived from transformers {TRANSFORMERS}"
)
def test_the_derived_description_equals_the_written_one(case: str, folders: Callable[[str], Path]) -> None:
    if case not in TOWERS:
        pytest.skip("derived as a tower of its own")
    if case in NOT_DERIVED:
        with pytest.raises(FamilyError, match=NOT_DERIVED[case]):
            derive(small(case), "test")
        return
    derived = derive(small(case), "test")
    for layout in LAYOUTS:
        with Checkpoint.open(folders(layout)) as checkpoint:
            written, other = read_model(checkpoint), read_model(checkpoint, derived)
            assert (other.groups, other.top_k) == (written.groups, written.top_k)
            assert other.layers.keys() == written.layers.keys()
            for index, layer in written.layers.items():
                same_view(layer, other.layers[index], cautious=case in CAUTIOUS)


def same_view(written: MoELayer, derived: MoELayer, cautious: bool) -> None:
    left = set(written.roles) - set(derived.roles)
    assert (
        set(derived.roles) <= set(written.roles) and (not left or cautious) and all(role.startswith("shared_") for role in left)
    )
    for word, size in derived.sizes.items():
        assert written.sizes.get(word, size) == size, word
    assert (derived.router == "softmax") == (written.router == "softmax")
    for bank in ("", "shared") if "shared_up" in written.roles else ("",):
        kinds = [replace(kind, name="", words="") for kind in (written.units[bank], derived.units[bank])]
        assert kinds[0] == kinds[1] or (cautious and derived.units[bank].allows(sign=True, scale=False)), bank
    for role in derived.roles:
        for expert in range(0, written.experts, 5) if role in written.expert_roles else [None]:
            assert torch.equal(derived.stored(role, expert), written.stored(role, expert)), role


def test_every_known_model_type_is_in_the_table() -> None:
    """Nothing is described that is not tested; at least 68 of the 74 entries of transformers 5.23 are."""
    tested = {model_type(zoo.original(case)) for case in zoo.CASES}
    installed = {name for name in families() if zoo.is_installed(name)}
    assert tested == installed - {"qwen3_omni_moe_talker_text"}  # no checkpoint is that tower alone
    assert len(zoo.TOWERS.split()) >= 68 and set(refusals()) == set(zoo.REFUSED)


def test_what_is_always_proved_shows_each_family_and_all_of_its_notation() -> None:
    def shown(cases: Iterable[str]) -> set[tuple[str, Any]]:
        return {(family, part) for family, parts in map(zoo.notation, cases) for part in ("itself", *parts)}

    always = zoo.covering(zoo.CASES)
    assert shown(always) == shown(zoo.CASES) and set(always) <= set(CASES) and len(always) < 75
    assert {family for family, _ in shown(always)} == {
        family.name for name, family in families().items() if zoo.is_installed(name)
    }
    # the control: none of them is there for nothing
    for case in ("deepseek_v2[groups]", "granitemoehybrid", "nemotron_h[latent]", "cohere2_moe[sigmoid]", "zaya"):
        if case not in CASES:
            continue  # it came with a later release
        assert shown(set(always) - {case}) < shown(always)


@pytest.mark.parametrize("refused", zoo.REFUSED)
def test_refused_model_types_are_refused_with_their_reason(refused: str) -> None:
    with pytest.raises(FamilyError, match=f"'{refused}' is not supported: .* experts"):
        get_family(refused, "test")


@pytest.mark.parametrize(
    ("case", "change", "fails"),
    [
        ("deepseek_v3", {"groups": "1"}, "everything at once"),
        ("qwen3_moe", {"router": "sigmoid"}, "router translated"),
        ("gpt_oss", {"units": "swiglu"}, "signs of hidden units"),
        ("nemotron_h", {"units": "relu"}, "scales of hidden units"),
        ("olmoe", {"units": "clamped", "router": "sigmoid"}, "router translated"),
    ],
)
def test_a_wrong_description_fails_the_self_test(case: str, change: dict[str, str], fails: str) -> None:
    config = zoo.original(case)
    found = prove(replace(family_of(config), stacks=(), **change), config)
    assert not found.passed and "FAILED" in found.table()
    assert any(check.name.startswith(fails) for check in found.checks if not check.passed)


def test_swapped_projections_fail_the_self_test() -> None:
    config = zoo.original("qwen3_moe")
    family = family_of(config)
    weights = {key: str(text).replace("gate up", "up gate") for key, text in family.weights.items()}
    weights |= {
        f"mlp.experts.{{expert}}.{name}_proj.weight": f"{role}: unit model" for name, role in (("gate", "up"), ("up", "gate"))
    }
    found = prove(replace(family, weights=weights), config)
    assert [check.name for check in found.checks if not check.passed and "signs" in check.name]
