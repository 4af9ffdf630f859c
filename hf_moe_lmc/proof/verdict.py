"""What a self-test found: its checks, for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HOLDS = 1e-4  # largest relative difference of the outputs, in float32, that counts as none
FAILS = 1e-3  # smallest one that counts as another function


@dataclass(frozen=True)
class Check:
    """One comparison of outputs.

    Attributes:
        difference: largest difference of the outputs, relative to the largest output.
        control: whether the outputs must differ.
    """

    name: str
    difference: float
    control: bool

    @property
    def passed(self) -> bool:
        return self.difference > FAILS if self.control else self.difference < HOLDS

    @property
    def expected(self) -> str:
        return f"must differ by {FAILS:g}" if self.control else f"at most {HOLDS:g}"

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.difference:7.0e}  ({self.expected})  {self.name}"


@dataclass(frozen=True)
class StorageCheck(Check):
    """One comparison in a storage format, of outputs or of what is stored.

    Attributes:
        exact: nothing at all may differ. `difference` is then that of values, or the share of tensors whose bytes differ.

    Example:
        >>> print(StorageCheck("expert order: values", 0.0, control=False, exact=True))
        ok        0e+00  (exactly 0)  expert order: values
        >>> StorageCheck("expert order: values", 1e-9, control=False, exact=True).passed
        False
    """

    exact: bool = False

    @property
    def passed(self) -> bool:
        return self.difference == 0 if self.exact else super().passed

    @property
    def expected(self) -> str:
        return "exactly 0" if self.exact else super().expected


@dataclass(frozen=True)
class StorageProof:
    """What the self-test found in the storage format of a quantized model.

    Attributes:
        format: in words: `FP8 in blocks of 128 x 128`.
        checks: on a small model that is stored as the model is; none where no such model can be made.
        not_covered: sentences on what of the model they say nothing of, or why there are none.
    """

    format: str
    checks: tuple[StorageCheck, ...]
    not_covered: tuple[str, ...] = ()

    @property
    def passed(self) -> bool | None:
        """Whether all checks passed; None: there are none, so that nothing is known."""
        return all(check.passed for check in self.checks) if self.checks else None

    def to_dict(self) -> dict[str, Any]:
        """The verdict and each check."""
        return {**vars(self), "passed": self.passed, "checks": _documents(self.checks)}

    def lines(self) -> Iterator[str]:
        """For a terminal: a heading, one check a line, and what is not covered."""
        verdict = {None: "NOT TESTED", True: "passed", False: "FAILED"}[self.passed]
        if self.passed and self.not_covered:
            verdict += ", but for what is named below"
        yield f"in the format of its weights, {self.format}: {verdict}"
        yield from (f"  {check}" for check in self.checks)
        yield from (f"  not covered: {one}" for one in self.not_covered)


@dataclass(frozen=True)
class SelfTest:
    """What the self-test of one configuration found.

    Attributes:
        checks: of the description of the family, on plain weights.
        storage: what was found in the storage format of the model's weights; None: they are plain.

    Example:
        >>> moved, left = Check("expert order", 3e-7, control=False), Check("experts moved, router left", 0.4, control=True)
        >>> print(SelfTest("mixtral", "mixtral", (moved, left)).table())
        self-test of model type mixtral as family mixtral: passed
          ok      3e-07  (at most 0.0001)  expert order
          ok      4e-01  (must differ by 0.001)  experts moved, router left
    """

    model_type: str
    family: str
    checks: tuple[Check, ...]
    storage: StorageProof | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed. Where `storage` has none, this says nothing of the storage format."""
        return all(check.passed for check in self._all)

    @property
    def _all(self) -> tuple[Check, ...]:
        return (*self.checks, *(self.storage.checks if self.storage else ()))

    def to_dict(self) -> dict[str, Any]:
        """The verdict and each check; `storage` is there for quantized weights alone."""
        found = {"model_type": self.model_type, "family": self.family, "passed": self.passed, "checks": _documents(self.checks)}
        return {**found, "storage": self.storage.to_dict()} if self.storage else found

    def table(self) -> str:
        """For a terminal: one check a line."""
        failed = sum(not check.passed for check in self._all)
        verdict = "passed" if not failed else f"FAILED ({failed} of {len(self._all)} checks)"
        if not failed and self.storage and self.storage.passed is None:
            verdict = "passed for plain weights, not tested for the format that these have"
        title = f"self-test of model type {self.model_type} as family {self.family}: {verdict}"
        return "\n".join([title, *(f"  {check}" for check in self.checks), *(self.storage.lines() if self.storage else ())])


def _documents(checks: tuple[Check, ...]) -> list[dict[str, Any]]:
    return [{**vars(check), "passed": check.passed} for check in checks]
