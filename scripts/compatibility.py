"""Runs the whole test suite in the environment of this interpreter, and records which releases that was on.

    PYTHON=python3.12 VENV=.venv-312 CONSTRAINTS=FILE bash scripts/setup.sh dev
    .venv-312/bin/python scripts/compatibility.py [OPTIONS OF PYTEST]

adds to docs/compatibility.json, or renews the entry with the same releases. FILE pins other releases than
scripts/constraints.txt.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "compatibility.json"
PACKAGES = (
    "torch", "transformers", "huggingface_hub", "datasets", "tokenizers", "safetensors", "accelerate", "numpy", "scipy",
    "matplotlib", "psutil", "filelock", "greenlet",
)  # fmt: skip
COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")
# of formatting, generated pages and figures: what they hold does not depend on releases
LEFT_OUT = ("tests/test_docs.py", "tests/test_release.py")


def main(options: list[str]) -> int:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"--ignore={file}" for file in LEFT_OUT), *options]
    ran = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    print(ran.stdout[-6000:], ran.stderr[-2000:], sep="\n")
    entry = {
        "command": " ".join(["python", *command]),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "tests": counts(ran.stdout),
    }
    RECORD.write_text(
        json.dumps(with_entry(json.loads(RECORD.read_text(encoding="utf-8")), entry), indent=1) + "\n", encoding="utf-8"
    )
    return ran.returncode


def counts(output: str) -> dict[str, int]:
    """The numbers in the last line of pytest.

    >>> counts("FAILED tests/test_1.py\\n2 failed, 1621 passed, 13 errors in 1516.66s")
    {'failed': 2, 'passed': 1621, 'errors': 13}
    """
    last = output.strip().splitlines()[-1] if output.strip() else ""
    return {what: int(number) for number, what in COUNTS.findall(last)}


def with_entry(record: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """The record with an entry in place of the one for the same releases."""

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return (one["python"], *(one["versions"][name] for name in PACKAGES))

    runs = [one for one in record["runs"] if key(one) != key(entry)]
    return {**record, "runs": sorted([*runs, entry], key=key)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
