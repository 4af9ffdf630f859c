"""Renders what the README and model_cards/ show of the demo.

    python scripts/render_demo.py

runs `hf-moe-lmc demo` as it is, which gives the plots and the card of its merge (model_cards/), then as other machines would:
with other numbers of threads, and with the kernels of older processors. It keeps the figures of all (scripts/demo.json).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers")
PAIRS = ("upcycled", "independent", "shuffled")
# one thread is what the demo itself takes
RUNS = {
    "as it is": {},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "kernels for AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "kernels for SSE4.2": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}


def main() -> None:
    runs = []
    for name, settings in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "demo"
            runs.append({"run": name, "environment": settings, **run(output, settings)})
            if name == "as it is":
                runs[-1]["sentences"] = {name: sentences(output / name) for name in (*PAIRS, "merge")}
                for pair in PAIRS:
                    shutil.copyfile(output / pair / "barrier.png", ROOT / "model_cards" / f"demo-{pair}.png")
                shutil.copyfile(output / "merge" / "README.md", ROOT / "model_cards" / "demo-merge.md")
    result = {
        "command": "python scripts/render_demo.py",
        "runs": runs,
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    (ROOT / "scripts" / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run(output: Path, settings: dict[str, str]) -> dict[str, Any]:
    """The figures of one run, and what it took."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "hf_moe_lmc", "demo", "-o", output],
        check=True,
        cwd=output.parent,
        env={**os.environ, **settings},
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"pairs": figures(output), "seconds": round(seconds), "cpu_seconds": round(cpu)}


def figures(output: Path) -> dict[str, Any]:
    """Of each pair; of the references, the losses alone."""
    pairs: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    on = pairs["upcycled"]["references"]
    for found in (on["mean"], *on["texts"].values()):
        for key in [key for key, value in found.items() if isinstance(value, dict)]:
            del found[key]
    return pairs


def sentences(report: Path) -> list[str]:
    """What the terminal says first of a barrier."""
    found: list[str] = json.loads((report / "report.json").read_text(encoding="utf-8"))["verdict"]["sentences"]
    return found


if __name__ == "__main__":
    main()
