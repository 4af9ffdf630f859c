from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.notation import parse_spec
from hf_moe_lmc.moe.registry import families, get_family, register


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("router: expert model", (6, 4)),
        ("gate up: expert (half unit) model", (6, 10, 4)),
        ("gate up: expert model (unit half)", (6, 4, 10)),
        ("down: expert unit model", (6, 5, 4)),
        ("up: (expert unit) model", (30, 4)),
        ("shared_router: 1 model", (1, 4)),
    ],
)
def test_notation_gives_the_shape_on_disk(text: str, shape: tuple[int, ...]) -> None:
    assert parse_spec(text).shape({"expert": 6, "unit": 5, "model": 4}) == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expert model", "expected 'roles: axes'"),
        ("bogus: expert model", "unknown role 'bogus'"),
        ("up: unit width", "unknown axis word 'width'"),
        ("up: unit unit", "named twice"),
        ("up: unit ()", "an axis is empty"),
        ("gate up: unit model", "several roles need an axis 'half'"),
        ("up: (half unit) model", "several roles need an axis 'half'"),
        ("up router: (half unit) model", "cannot share a tensor"),
    ],
)
def test_wrong_notation_is_refused_with_its_text(text: str, message: str) -> None:
    with pytest.raises(FamilyError, match=re.escape(message)) as error:
        parse_spec(text)
    assert repr(text) in str(error.value)


def family(**changes: object) -> MoEFamily:
    values = {
        "name": "test",
        "model_types": ("test",),
        "router": "softmax",
        "units": "swiglu",
        "weights": {"gate.weight": "router: expert model"},
        "sizes": {"expert": "n", "model": "d"},
    }
    return MoEFamily(**(values | changes))


def test_families_that_cannot_work_are_refused() -> None:
    with pytest.raises(FamilyError, match="no size is given for axis 'unit'"):
        family(weights={"experts.{expert}.up": "up: unit model"})
    with pytest.raises(FamilyError, match="in the key and on an axis"):
        family(weights={"experts.{expert}.up": "router: expert model"})
    with pytest.raises(FamilyError, match="nothing says which expert"):
        family(sizes={"expert": "n", "unit": "h", "model": "d"}, weights={"experts.up": "up: unit model"})
    with pytest.raises(FamilyError, match="already described by family mixtral"):
        families()
        register(family(model_types=("mixtral",)))
    with pytest.raises(FamilyError, match="known: afmoe"):
        get_family("gpt2", "somewhere")


@pytest.mark.parametrize(
    ("model_type", "config", "groups"),
    [
        ("deepseek_v3", {"n_group": 8, "topk_group": 4}, 8),
        ("deepseek_v3", {"n_group": 8, "topk_group": 8}, 1),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}, 1),
        ("deepseek_v3", {"n_group": None, "topk_group": None}, 1),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}, 8),
        ("deepseek_v2", {"topk_method": "greedy", "n_group": None, "topk_group": None}, 1),
        ("mixtral", {}, 1),
    ],
)
def test_groups_count_only_where_they_bind(model_type: str, config: dict[str, object], groups: int) -> None:
    known = get_family(model_type, "test")
    assert known.evaluate(known.groups, SimpleNamespace(**config)) == groups


def test_sparse_layers_follow_the_configuration() -> None:
    known = get_family("qwen2_moe", "test")
    config = SimpleNamespace(mlp_only_layers=[3], num_experts=4, decoder_sparse_step=2)
    sparse = [layer for layer in range(8) if known.evaluate(known.moe_layers, config, layer=layer)]
    assert sparse == [1, 5, 7]
    with pytest.raises(FamilyError, match="decoder_sparse_step"):
        known.evaluate(known.moe_layers, SimpleNamespace(mlp_only_layers=[], num_experts=4), layer=0)
