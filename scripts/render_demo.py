"""Renders what the README and model_cards/ show of the demo.

    python scripts/render_demo.py

runs `hf-moe-lmc demo` and keeps the figures (scripts/demo.json), the plots and the card of its merge (model_cards/).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from hf_moe_lmc import demo

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "demo"
        started = time.perf_counter()
        demo(output, tell=print)
        seconds = time.perf_counter() - started
        for pair in ("independent", "shuffled"):
            shutil.copyfile(output / pair / "barrier.png", ROOT / "model_cards" / f"demo-{pair}.png")
        shutil.copyfile(output / "merge" / "README.md", ROOT / "model_cards" / "demo-merge.md")
        result = {
            "command": "python scripts/render_demo.py",
            "pairs": json.loads((output / "summary.json").read_text(encoding="utf-8")),
            "seconds": round(seconds),
            "cores": os.cpu_count(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }
    (ROOT / "scripts" / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
