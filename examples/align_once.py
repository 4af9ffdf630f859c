"""Match two models once, and use the symmetry as often as you like.

    python examples/align_once.py MODEL_A MODEL_B [-o OUT] [-t T...]

writes B in A's coordinates, says how far the experts were apart before and after, and writes one merge for each t. A and B
are read once for all of them, and nothing is matched twice.
"""

import argparse
from pathlib import Path

import hf_moe_lmc as lmc


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("-o", "--output", type=Path, default=Path("aligned-once"))
    parser.add_argument("-t", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    given = parser.parse_args(args)
    alignment = lmc.align(given.a, given.b, given.output / "aligned")
    for sentence in alignment.sentences():
        print(sentence)
    lmc.merge(given.a, given.b, given.output / "merges", t=given.t, symmetry=alignment.symmetry)
    for path in sorted((given.output / "merges").iterdir()):
        print("written:", path)


if __name__ == "__main__":
    main()
