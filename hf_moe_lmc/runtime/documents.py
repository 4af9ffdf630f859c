"""JSON documents: what a program reads of a result."""

from __future__ import annotations

import json
import math
from typing import Any


def as_json(value: Any) -> str:
    """A value as a JSON document that ends in a new line. JSON has no NaN and no infinity: null takes their place.

    Example:
        >>> print(as_json({"nll": [1.5, float("nan")]}), end="")
        {
          "nll": [
            1.5,
            null
          ]
        }
    """
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
