"""The scripts beside the package, as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[1] / "scripts"


def script(name: str) -> ModuleType:
    """scripts/NAME.py."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))  # scripts import each other by name
    return importlib.import_module(name)
