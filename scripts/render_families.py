"""Writes docs/families.md from the data in hf_moe_lmc/families/.

python scripts/render_families.py
"""

from __future__ import annotations

from pathlib import Path

from hf_moe_lmc.moe.catalogue import known_families

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "families.md"


def main() -> None:
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(known_families().markdown(), encoding="utf-8")
    print(f"written: {OUTPUT}")


if __name__ == "__main__":
    main()
