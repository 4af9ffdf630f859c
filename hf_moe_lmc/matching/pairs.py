"""Pairs of experts whose hidden units are matched: each pair once, and each expert read as seldom as that allows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_moe_lmc.matching.certificate import COLUMNS, WIDER, Sketched, certified_permutation
from hf_moe_lmc.matching.expert_costs import sketched_expert_cost
from hf_moe_lmc.matching.finite import check_rows, finite_rows
from hf_moe_lmc.matching.options import UnitMethod
from hf_moe_lmc.matching.units import UnitMatch, UnitRows, is_wide, match_units
from hf_moe_lmc.moe.experts import Bank


@dataclass
class SketchedGrams:
    """Gram matrices of the sketches of experts, by number of columns and expert; see `Sketched.grams`."""

    a: dict[int, dict[int, Tensor]] = field(default_factory=lambda: {COLUMNS: {}, WIDER: {}})
    b: dict[int, dict[int, Tensor]] = field(default_factory=lambda: {COLUMNS: {}, WIDER: {}})

    def add(self, side: dict[int, dict[int, Tensor]], expert: int, sketched: Sketched) -> None:
        """Adds an expert of one side, `a` or `b`, with each of the sketches that it has."""
        for columns in side:
            if ("up", columns) in sketched.sketches:
                side[columns][expert] = sketched.grams(columns)

    def cost(self) -> tuple[Tensor, int]:
        """Estimates of the squared Gram costs, float64 [expert, expert], from so many columns."""
        all_have_wider = all(len(side[WIDER]) == len(side[COLUMNS]) for side in (self.a, self.b))
        columns = WIDER if all_have_wider else COLUMNS
        a, b = ([side[columns][i] for i in range(len(side[columns]))] for side in (self.a, self.b))
        return sketched_expert_cost(a, b), columns


@dataclass
class ExpertPairs:
    """Matches of pairs (expert of A, expert of B), each computed once.

    Attributes:
        exact: match wide experts, too, by their full similarity at once.
        matches: what has been matched.
        unproved: pairs for which sketches have been tried in vain.
        squared_before: squared distance of A's and B's expert of one number.
    """

    a: Bank
    b: Bank
    units: UnitMethod
    device: torch.device
    exact: bool
    matches: dict[tuple[int, int], UnitMatch] = field(default_factory=dict)
    unproved: set[tuple[int, int]] = field(default_factory=set)
    before: dict[int, float] = field(default_factory=dict)

    @property
    def wide(self) -> bool:
        """Whether sketches come first."""
        return not self.exact and self.a.kind.permutation and is_wide(self.a.unit_count)

    def match(self, i: int, j: int) -> UnitMatch:
        """The match of A's expert i with B's expert j."""
        if not self.proved(i, j):
            self.matches[i, j] = match_units(*self._rows(i, j), self.units)
        return self.matches[i, j]

    def proved(self, i: int, j: int) -> bool:
        """Whether the pair has been matched; tries sketches if those have not been."""
        if self.wide and (i, j) not in self.matches and (i, j) not in self.unproved:
            a, b = self._rows(i, j)
            self._try_sketches(i, j, Sketched(a, self.units), Sketched(b, self.units))
        return (i, j) in self.matches

    def squared_before(self, i: int) -> float:
        """Squared distance of A's and B's expert i as they are."""
        if i not in self.before:
            if (i, i) in self.matches:
                return self.matches[i, i].squared_before
            a, b = self._rows(i, i)
            self.before[i] = a.squared_distance(b)
        return self.before[i]

    def survey(self, permutation: Tensor) -> SketchedGrams:
        """Tries sketches on the pairs of a permutation, and sums up what a cost from Gram matrices needs.

        Goes along the cycles of the permutation, so that A's expert i meets B's permutation[i] and i while each is in memory:
        all are read once, and the first of a cycle again.
        """
        grams = SketchedGrams()
        seen: set[int] = set()
        for start in range(self.a.experts):
            if start in seen:
                continue
            i, a = start, self._sketched(self.a, start)
            while i not in seen:
                seen.add(i)
                j = int(permutation[i])
                b = self._sketched(self.b, j)
                self._try_sketches(i, j, a, b)
                grams.add(grams.a, i, a)
                grams.add(grams.b, j, b)
                if i != j:
                    del a  # not more than two at a time
                    a = self._sketched(self.a, j) if j != start else Sketched(finite_rows(self.a, j, self.device), self.units)
                    self.before[j] = a.rows.squared_distance(b.rows)
                elif (i, i) not in self.matches:
                    self.before[i] = a.rows.squared_distance(b.rows)
                del b
                i = j
        return grams

    def _try_sketches(self, i: int, j: int, a: Sketched, b: Sketched) -> None:
        match = match_sketched(a, b)
        if match is None:
            self.unproved.add((i, j))
        else:
            self.matches[i, j] = match

    def _rows(self, i: int, j: int) -> tuple[UnitRows, UnitRows]:
        return finite_rows(self.a, i, self.device), finite_rows(self.b, j, self.device)

    def _sketched(self, bank: Bank, expert: int) -> Sketched:
        sketched = Sketched(UnitRows.of(bank, expert, self.device), self.units)
        sketched.draw(COLUMNS)
        check_rows(sketched.rows, bank, expert)
        return sketched


def match_sketched(a: Sketched, b: Sketched) -> UnitMatch | None:
    """The match of two experts where sketches prove it; None where they do not."""
    certified = certified_permutation(a, b)
    if certified is None:
        return None
    pairs, certificate = certified
    return pairs.match(certificate)
