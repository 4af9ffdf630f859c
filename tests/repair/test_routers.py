"""Routers of widened merges: how large their logits are, and what that must not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.repair.routers import GATE, AveragedRouters, Router, gain, routers_of
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.merge import merge
from tests import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:outside the MoE blocks", "ignore:A and B hold"),
    pytest.mark.usefixtures("undrawn"),
]

SOFTMAX, SIGMOID = Router((("router",),), True), Router((("router",),), False)
TWO_BANKS = Router((("router", "router_bias"), ("zero.router", "zero.router_bias")), True)
T = 0.3


@dataclass(frozen=True)
class Given:
    """A block of routers alone."""

    values: Mapping[str, Tensor]

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        return self.values[role]


def drawn(seed: int) -> Given:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"router": (6, 512), "router_bias": (6,), "zero.router": (2, 512), "zero.router_bias": (2,)}
    return Given({role: torch.randn(shape, generator=generator) for role, shape in shapes.items()})


def at(router: Router, a: Given, b: Given, t: float = T) -> dict[str, Tensor]:
    found = AveragedRouters((router,), a, b, t)
    return {role: found.stored(role) for role in router.roles}


@pytest.mark.parametrize("router", [SOFTMAX, SIGMOID, TWO_BANKS], ids=["softmax", "sigmoid", "two banks"])
def test_alike_routers_stay_as_they_are(router: Router) -> None:
    a = drawn(0)
    for role, values in at(router, a, a).items():
        assert torch.equal(values, a.values[role])


def test_a_tokens_logit_is_as_large_as_that_of_the_parent_it_is_for() -> None:
    a, b = (drawn(seed).values["router"] for seed in (0, 1))
    merged, plain = at(SIGMOID, drawn(0), drawn(1), 0.5)["router"], (a + b) / 2
    for parent in (a, b):
        for number, row in enumerate(parent):
            assert float(merged[number] @ row) == pytest.approx(float(row @ row), rel=0.25)
            assert float(plain[number] @ row) < 0.65 * float(row @ row)


@pytest.mark.parametrize("router", [SOFTMAX, TWO_BANKS], ids=["one bank", "two banks"])
def test_what_softmax_does_not_see_does_not_count(router: Router) -> None:
    """A vector added to all rows that compete moves all logits alike."""
    a, b = drawn(0), drawn(1)
    common = torch.randn(512, generator=torch.Generator().manual_seed(2))
    shift = {role: common if role.endswith("router") else torch.tensor(0.7) for role in router.roles}
    moved = Given({**b.values, **{role: b.values[role] + 5 * shift[role] for role in router.roles}})
    here, there = at(router, a, b), at(router, a, moved)
    for role in router.roles:
        torch.testing.assert_close(there[role], here[role] + T * 5 * shift[role])
    shifted = at(replace(router, centred=False), a, moved)
    assert not torch.allclose(shifted["router"], here["router"] + T * 5 * common, atol=1e-2)


def test_equal_rows_stay_equal_and_no_gain_is_without_bounds() -> None:
    a, b = drawn(0), drawn(1)
    tied = [Given({**one.values, "router": one.values["router"].index_copy(0, torch.tensor([3]), one.values["router"][:1])})
            for one in (a, b)]  # fmt: skip
    rows = at(SOFTMAX, *tied)["router"]
    assert torch.equal(rows[0], rows[3]) and not torch.equal(rows[0], rows[1])
    some = torch.randn(4, 8, dtype=torch.float64)
    nothing = torch.zeros_like(some)
    assert gain(some, -some, 0.5) == pytest.approx(2) and gain(some, nothing, T) == gain(nothing, nothing, T) == 1
    for t in (0.01, 0.3, 0.5, 0.99):
        assert 1 <= gain(some, torch.randn_like(some), t) <= 2 + 1e-9


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_all_routers_of_a_block_are_found(saved: Callable[..., Path], family: str) -> None:
    model = read_model(Checkpoint.open(saved(family, "fused", 0)))
    for layer in model.layers.values():
        expected = {role for role in layer.roles if role.endswith(("router", "router_bias"))}
        found = [role for router in routers_of(layer) for role in router.roles]
        assert set(found) == expected and len(found) == len(expected)
        assert all(router.centred == (layer.router == "softmax" and GATE not in router.roles) for router in routers_of(layer))


@pytest.mark.parametrize(
    ("family", "router"), [("mixtral", "mlp.gate"), ("qwen2_moe", "mlp.shared_expert_gate"), ("deepseek_v3", "mlp.gate")]
)
def test_only_a_widened_merge_scales_its_routers(saved: Callable[..., Path], tmp_path: Path, family: str, router: str) -> None:
    a, b = saved(family, "per-expert", 0), saved(family, "per-expert", 1)
    for name, options in (("plain", {}), ("wide", {"widen": True})):
        merge(a, b, tmp_path / name, order="gate", **options)
    plain, wide = (tiny.load(tmp_path / name).state_dict() for name in ("plain", "wide"))
    (name, *_) = [name for name in plain if f"{router}.weight" in name]
    assert 1.02 < float(wide[name].std() / plain[name].std()) <= 2.001
    biases = [name for name in plain if name.endswith("e_score_correction_bias")]
    assert all(torch.equal(plain[name], wide[name]) for name in biases)
    assert bool(biases) == (family == "deepseek_v3")


@pytest.mark.parametrize(("order", "taken"), [(None, "gate"), ("expert", "expert"), ("best", "best")])
def test_experts_share_a_place_by_their_router_rows_unless_an_order_is_asked_for(
    saved: Callable[..., Path], tmp_path: Path, order: str | None, taken: str
) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    found = merge(a, b, tmp_path / "wide", widen=True, order=order)
    assert found is not None and found.order == taken
    card = (tmp_path / "wide" / "README.md").read_text()
    assert f"--order {taken}" in card and ("no order was asked for" in card) == (order is None)
    narrow = merge(a, b, tmp_path / "narrow", order=order)
    assert narrow is not None and narrow.order == (order or "best")
    expected = align(a, b, tmp_path / "b", order=taken)
    assert found.symmetry.layers.keys() == expected.symmetry.layers.keys()
    for index, layer in found.symmetry.layers.items():
        assert torch.equal(layer.banks[""].expert_order, expected.symmetry.layers[index].banks[""].expert_order)
