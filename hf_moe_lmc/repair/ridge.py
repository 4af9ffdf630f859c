"""Ridge regression of down projections: what the hidden units give, fitted to a target on calibration tokens.

With Phi [token, column], a column for each hidden unit of each expert, the output of a block is Phi D. Starting from D,

    D <- D + (Phi'Phi + lambda m I)^-1 Phi' (T - Phi D),   m = trace(Phi'Phi) / columns,

which with more columns than tokens is computed as D + Phi' (Phi Phi' + lambda m I)^-1 (T - Phi D). An expert's columns are
zero but for the tokens that it gets. Phi is never whole in memory: its parts come expert by expert, or in ranges of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ROWS = 4096  # tokens whose features are in memory at a time in the primal form
DOUBLE = 8192  # systems of more unknowns are solved in float32


@dataclass(frozen=True)
class Part:
    """The columns of Phi of one expert.

    Attributes:
        key: names the expert.
        rows: numbers of the tokens that it gets, int64 [n], ascending.
        units: its hidden units, so many columns.
        features: positions in `rows`, int64 [m] -> values of the hidden units for these tokens, float32 [m, unit].
    """

    key: Hashable
    rows: Tensor
    units: int
    features: Callable[[Tensor], Tensor]

    @cached_property
    def all(self) -> Tensor:
        """All positions in `rows`."""
        return torch.arange(len(self.rows), device=self.rows.device)


@dataclass(frozen=True)
class Fit:
    """What a ridge regression found.

    Attributes:
        changes: (key of a part, what is added to its down projection, float32 [unit, model]), as they are asked for.
        before, after: the root of the sum of squares of T - Phi D, with the old and with the new D.
    """

    changes: Iterator[tuple[Hashable, Tensor]]
    before: float
    after: float


def is_dual(parts: Sequence[Part], tokens: int) -> bool:
    """Whether there are more hidden units than tokens."""
    return sum(part.units for part in parts) > tokens


def ridge(parts: Sequence[Part], residual: Tensor, strength: float, *, dual: bool | None = None) -> Fit:
    """Fits all down projections of a block jointly to what they leave of a target.

    Memory: in the dual form [token, token] three times and the features of one expert; in the primal form [column, column]
    three times and the features of ROWS tokens.

    Args:
        residual: T - Phi D, float32 [token, model].
        strength: lambda.
        dual: which form; None: the one with the smaller system.

    Example:
        >>> phi = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> part = Part(0, torch.arange(3), 2, lambda rows: phi[rows])
        >>> residual = phi @ torch.tensor([[2.0], [3.0]])
        >>> fit = ridge([part], residual, 1e-9)
        >>> [(key, change.round(decimals=3).tolist()) for key, change in fit.changes]
        [(0, [[2.0], [3.0]])]
    """
    chosen = is_dual(parts, len(residual)) if dual is None else dual
    return _dual(parts, residual, strength) if chosen else _primal(parts, residual, strength)


def _dual(parts: Sequence[Part], residual: Tensor, strength: float) -> Fit:
    tokens, columns = len(residual), sum(part.units for part in parts)
    gram = torch.zeros(tokens, tokens, dtype=_wide(tokens), device=residual.device)
    for part in parts:
        phi = part.features(part.all)
        gram[part.rows[:, None], part.rows] += (phi @ phi.T).to(gram.dtype)
    shift = strength * float(gram.diagonal().double().sum()) / columns
    if not shift > 0:
        return Fit(iter(()), float(residual.norm()), float(residual.norm()))
    multipliers = _solved(gram, shift, residual).to(residual.dtype)

    def changes() -> Iterator[tuple[Hashable, Tensor]]:
        for part in parts:
            yield part.key, part.features(part.all).T @ multipliers[part.rows]

    # T - Phi (D + Phi' x) = (K + s I) x - K x
    return Fit(changes(), float(residual.norm()), shift * float(multipliers.norm()))


def _primal(parts: Sequence[Part], residual: Tensor, strength: float) -> Fit:
    columns = sum(part.units for part in parts)
    wide = _wide(columns)
    gram = torch.zeros(columns, columns, dtype=wide, device=residual.device)
    moment = torch.zeros(columns, residual.shape[1], dtype=wide, device=residual.device)
    for first in range(0, len(residual), ROWS):
        wanted = residual[first : first + ROWS]
        phi = _dense(parts, columns, first, len(wanted), residual)
        gram += (phi.T @ phi).to(wide)
        moment += (phi.T @ wanted).to(wide)
    shift = strength * float(gram.diagonal().double().sum()) / columns
    if not shift > 0:
        return Fit(iter(()), float(residual.norm()), float(residual.norm()))
    change = _solved(gram.clone(), shift, moment)
    before = float(residual.double().square().sum())
    after = before - 2 * float((change * moment).double().sum()) + float((change * (gram @ change)).double().sum())
    of_parts = change.to(residual.dtype).split([part.units for part in parts])
    found = iter([(part.key, values) for part, values in zip(parts, of_parts, strict=True)])
    return Fit(found, before**0.5, max(after, 0.0) ** 0.5)


def _dense(parts: Sequence[Part], columns: int, first: int, count: int, like: Tensor) -> Tensor:
    """Phi for a range of tokens, [count, column]."""
    phi = torch.zeros(count, columns, dtype=like.dtype, device=like.device)
    column = 0
    for part in parts:
        inside = ((part.rows >= first) & (part.rows < first + count)).nonzero().flatten()
        if len(inside):
            phi[part.rows[inside] - first, column : column + part.units] = part.features(inside)
        column += part.units
    return phi


def _solved(gram: Tensor, shift: float, wanted: Tensor) -> Tensor:
    """(gram + shift I)^-1 wanted; `gram` is written over."""
    gram.diagonal().add_(shift)
    return torch.cholesky_solve(wanted.to(gram.dtype), torch.linalg.cholesky(gram))


def _wide(unknowns: int) -> torch.dtype:
    return torch.float64 if unknowns <= DOUBLE else torch.float32
