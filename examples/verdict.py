"""Is a merge of two models worth having, and at which t?

    python examples/verdict.py MODEL_A MODEL_B TEXT... [-o OUT]

measures the loss on the straight line from A to B, naive and aligned, and prints the verdict. Each text counts alike. The
report, its plot and the symmetry that was found are in OUT.
"""

import argparse

import hf_moe_lmc as lmc


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("texts", nargs="+", help="held-out text: no line of it may have been trained on")
    parser.add_argument("-o", "--output", default="verdict")
    parser.add_argument("--points", type=int, default=25)
    given = parser.parse_args(args)
    report = lmc.barrier(given.a, given.b, given.output, text=given.texts, points=given.points)
    for sentence in report.verdict.sentences:
        print(sentence)
    for caution in report.verdict.cautions:
        print("Mind:", caution)
    losses = report.verdict.to_dict()["mean"]
    print({name: losses[name] for name in ("a", "b", "naive", "aligned")}, "nats per token")


if __name__ == "__main__":
    main()
