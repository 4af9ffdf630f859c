"""The group of symmetries at work: B moved, moved back, and held against what it was.

    python examples/symmetry.py MODEL_A MODEL_B [-o OUT]

shows that a symmetry is a value: it is saved, loaded, inverted and composed, and B in other coordinates is still B.
"""

import argparse
from pathlib import Path

import torch

import hf_moe_lmc as lmc


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("-o", "--output", type=Path, default=Path("symmetry"))
    given = parser.parse_args(args)
    found = lmc.align(given.a, given.b, given.output / "found", symmetry_only=True).symmetry
    assert lmc.ModelSymmetry.load(given.output / "found").isclose(found)
    assert (found.inverse() @ found).isclose(found @ found.inverse())

    ids = torch.arange(1, 17).view(1, -1)
    with torch.no_grad():
        as_it_is = lmc.load_interpolated(given.a, given.b, None, 1.0)(ids).logits  # t = 1 is B
        moved = lmc.load_interpolated(given.a, given.b, found, 1.0)(ids).logits
        middle = lmc.load_interpolated(given.a, given.b, found, 0.5)(ids).logits
    print(f"B in A's coordinates: its logits change by at most {(moved - as_it_is).abs().max():.1e}")
    print(f"Halfway to A: by at most {(middle - as_it_is).abs().max():.1e}")


if __name__ == "__main__":
    main()
