"""The statistic: chance seldom does as well as its bound says, and relatives are recognised."""

from __future__ import annotations

import pytest
import torch

from hf_moe_lmc.lineage.routers import judge_routers, said_by
from hf_moe_lmc.lineage.statistic import Resemblance, judged, resemblance, whitened
from tests.lineage.rows import DRAWS

SHAPES = {(4, 16): 80, (6, 32): 100, (8, 64): 120, (16, 16): 60, (16, 64): 60, (64, 128): 20}  # pairs of each kind
DRAWN = 10_000  # pairs in all of the test that no two unrelated routers are taken for relatives


def pairs(kind: str, shape: tuple[int, int], count: int, seed: int) -> list[Resemblance]:
    """How unrelated rows of a kind resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    sides = [whitened(DRAWS[kind]((count, *shape), generator)) for _ in range(2)]
    assert sides[0] is not None and sides[1] is not None
    return [judged(cosines, shape[1]) for cosines in (sides[0] @ sides[1].mT).double()]


def test_no_unrelated_rows_of_ten_thousand_pairs_are_taken_for_relatives() -> None:
    count, verdicts = 0, set()
    total = sum(SHAPES.values()) * len(DRAWS)
    for shape, share in SHAPES.items():
        for number, kind in enumerate(DRAWS):
            found = pairs(kind, shape, -(-share * DRAWN // total), number)
            verdicts |= {(kind, shape, said_by(one, layers=1)[0]) for one in found}
            count += len(found)
    assert count >= DRAWN and {says for *_, says in verdicts} <= {"unlike", "undecided"}, verdicts


@pytest.mark.parametrize("kind", sorted(DRAWS.keys() - {"common clusters"}))
@pytest.mark.parametrize("shape", [(4, 16), (8, 64), (16, 16)])
def test_chance_does_no_better_than_its_bound(kind: str, shape: tuple[int, int]) -> None:
    """Of N draws the least of their bounds is rarely far below 1 / N; a test by plain cosines fails this, see below."""
    for where in ("log10_chance", "log10_chance_in_place"):
        assert min(getattr(one, where) for one in pairs(kind, shape, 200, 7)) > -4


def test_plain_cosines_would_take_unrelated_rows_for_relatives() -> None:
    """The control: without whitening, rows with a common mean are all alike."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(DRAWS["a large common mean"]((8, 64), generator), dim=1) for _ in range(2))
    assert float((a @ b.T).diagonal().mean()) > 0.9
    found = resemblance(whitened(a), whitened(b), 64)  # type: ignore[arg-type]
    assert found.cosine < 0.5 and found.log10_chance > -3


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("shape", [(8, 64), (16, 64), (64, 128)])
def test_relatives_are_recognised_in_every_distribution(kind: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    a = DRAWS[kind](shape, generator)
    order = torch.randperm(shape[0], generator=generator)
    noise = 0.05 * (a - a.mean(dim=0)).square().mean().sqrt() * torch.randn(shape, generator=generator)
    found = judge_routers({"": a}, {"": (a + noise)[order]}, layers=48)
    assert found.says == "shuffled" and found.resemblance is not None
    assert torch.equal(found.resemblance.order, order.argsort())
    assert found.moved == int((order != torch.arange(shape[0])).sum())
    assert judge_routers({"": a}, {"": a + noise}, layers=48).says == "in place"


def test_groups_of_experts_keep_together() -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(16, 64, generator=generator)
    order = torch.cat([torch.randperm(4, generator=generator) + 4 * group for group in (2, 0, 3, 1)])
    found = judge_routers({"": a}, {"": a[order]}, layers=1, groups=4)
    assert found.says == "alike" and found.resemblance is not None
    assert torch.equal(found.resemblance.order, order.argsort()) and found.moved == 16


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda rows: rows.index_fill(0, torch.tensor(1), torch.nan), "NaN"),
        (lambda rows: torch.ones_like(rows), "all router rows are equal"),
        (lambda rows: torch.zeros_like(rows), "all router rows are equal"),
        (lambda rows: rows[:2], "too few"),
    ],
)
def test_what_cannot_be_told_is_undecided(change, why: str) -> None:  # type: ignore[no-untyped-def]
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    found = judge_routers({"": change(rows)}, {"": change(rows)}, layers=1)
    assert found.says == "undecided" and why in found.why


def test_a_common_vector_and_another_length_change_nothing() -> None:
    """As a softmax router allows: logits that are shifted together."""
    generator = torch.Generator().manual_seed(6)
    a, b = torch.randn(8, 64, generator=generator), torch.randn(64, generator=generator)
    found = judge_routers({"": a}, {"": 3 * a + 20 * b}, layers=1)
    assert found.says == "in place" and found.resemblance is not None and found.resemblance.cosine > 0.999
