"""Where on a path the loss is measured, and how the models run: values that check themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hf_moe_lmc.errors import InputError

DType = Literal["float32", "bfloat16", "float16"]
LAYERWISE = 5  # inner points where `layers` alone is given
QUESTIONS = 200  # of a cloze task where no number is given


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Which points of which paths are evaluated.

    Attributes:
        points: of the grid from t = 0 to t = 1, both included.
        naive: evaluate the path to B as it is, too.
        layerwise: inner points of the paths on which some layers alone leave A for their aligned place in B; 0: none, or
            LAYERWISE where `layers` says which.
        layers: decoder layers for `layerwise`, such as "0-3,8": those of a range together, 8 alone; "each", the default,
            stands for every MoE layer alone.
        refine: how many times the intervals beside the maximum of the aligned curve are halved.
        routing: record at each point which experts the tokens take.
        at: further points of both paths.
        halfway: measure t = 0.5 as well where the grid lacks it.

    Raises:
        InputError: a number out of range.

    Example:
        >>> GridOptions(points=3).t
        (0.0, 0.5, 1.0)
        >>> GridOptions(points=2, at=(0.3,)).t
        (0.0, 0.3, 1.0)
        >>> GridOptions(layerwise=1).steps
        (0.5, 1.0)
    """

    points: int = 25
    naive: bool = True
    layerwise: int = 0
    layers: str | None = None
    refine: int = 0
    routing: bool = True
    at: tuple[float, ...] = ()
    halfway: bool = True

    def __post_init__(self) -> None:
        check_least(self, points=2, layerwise=0, refine=0)

    @property
    def t(self) -> tuple[float, ...]:
        """The grid, with the further points."""
        return tuple(sorted({*(i / (self.points - 1) for i in range(self.points)), *self.at}))

    @property
    def steps(self) -> tuple[float, ...]:
        """The points behind A where some layers alone leave it; none where that is not measured."""
        inner = self.layerwise or (LAYERWISE if self.layers is not None else 0)
        return tuple((i + 1) / (inner + 1) for i in range(inner + 1)) if inner else ()


@dataclass(frozen=True, kw_only=True)
class AdditionOptions:
    """What is measured besides the losses along the paths.

    Attributes:
        ensemble: the ensemble of both parents: the mean of the logits, and the mean of the probabilities.
        cloze: questions of each text, at most, of a cloze task made from it; None: none are asked.

    Raises:
        InputError: a number out of range.

    Example:
        >>> AdditionOptions(cloze=0)
        Traceback (most recent call last):
        hf_moe_lmc.errors.InputError: cloze 0: expected at least 1
    """

    ensemble: bool = False
    cloze: int | None = None

    def __post_init__(self) -> None:
        check_least(self, cloze=1)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """How the models run.

    Attributes:
        dtype: of weights and activations.
        device: where the layers run; None: a GPU if there is one.
        batch_size: windows per forward pass; None: about 4096 tokens' worth.
        activation_memory: bytes for the hidden states of all points and windows on their way; None: half of the memory that
            is free.

    Raises:
        InputError: another dtype, or a number out of range.
    """

    dtype: DType = "float32"
    device: str | None = None
    batch_size: int | None = None
    activation_memory: int | None = None

    def __post_init__(self) -> None:
        check_least(self, batch_size=1, activation_memory=1)
        if self.dtype not in get_args(DType):
            raise InputError(f"dtype {self.dtype!r}: expected one of {', '.join(get_args(DType))}")


def check_least(options: object, **least: int) -> None:
    """Raises InputError where a field of some options is below its least value; None is fine."""
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise InputError(f"{name.replace('_', '-')} {value}: expected at least {lowest}")
