"""The command line: verbs over the API. Results go to stdout, progress and complaints to stderr."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hf_moe_lmc as lmc  # each verb imports what it needs when it is called
from hf_moe_lmc.errors import InputError, MoELMCError, escaped
from hf_moe_lmc.runtime import processes as distribution

if TYPE_CHECKING:
    from hf_moe_lmc.matching.alignment import Alignment

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns 0, 1 (failure, or a self-test that did not pass), 2 (bad input or usage) or 130 (interrupted)."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's large tensors in huge pages: far fewer page faults
    mates = distribution.team()

    def complain(line: str) -> None:
        if mates.is_main:
            print(escaped(line), file=sys.stderr)

    warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
    verb: Callable[[argparse.Namespace], int | None] = options.verb
    try:
        distribution.check_launch(["-m", "hf_moe_lmc", *(sys.argv[1:] if arguments is None else arguments)])
        if mates.count > 1 and verb not in SHARED:
            raise InputError("this verb works in one process; start it without torchrun")
        _refuse_idle_options(vars(options))
        with _one_speaker(mates.is_main):
            code = verb(options) or 0
        sys.stdout.flush()
        return code
    except MoELMCError as error:
        complain(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        # whoever reads has seen enough; what is left in the buffer must not fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        resumes = ", what is done is kept: the same call continues" if hasattr(options, "resume") else ""
        complain(f"interrupted; nothing unfinished was left behind{resumes}")
        return INTERRUPTED
    finally:
        distribution.close()


@contextmanager
def _one_speaker(is_main: bool) -> Iterator[None]:
    """Of several processes only the first prints results."""
    if is_main:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def _refuse_idle_options(options: dict[str, Any]) -> None:
    """An option that could have no effect is a misunderstanding: better said than ignored."""
    for idle, because, unless in (
        (("order", "units"), "nothing is matched", options.get("symmetry") is None and options.get("align", True)),
        (("dataset_config", "dataset_revision", "split"), "the text is a file", not options.get("text")),
        (("column",), "the text is a plain file", not options.get("text") or any(map(_has_rows, options["text"]))),
    ):
        named = [f"--{name.replace('_', '-')}" for name in idle if options.get(name) is not None]
        if named and not unless:
            raise InputError(f"{' and '.join(named)} would have no effect: {because}; leave it out")


def _has_rows(file: str) -> bool:
    return file.endswith((".jsonl", ".parquet"))


def _inspect(options: argparse.Namespace) -> None:
    found = lmc.inspect(options.model)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.table())


def _selftest(options: argparse.Namespace) -> int:
    found = lmc.selftest(options.model)
    if options.json:
        checks = [
            # JSON has no NaN: null stands for outputs that are not finite
            {**vars(check), "difference": check.difference if math.isfinite(check.difference) else None, "passed": check.passed}
            for check in found.checks
        ]
        print(json.dumps({**vars(found), "passed": found.passed, "checks": checks}, indent=2, allow_nan=False))
    else:
        print(found.table())
    return 0 if found.passed else 1


def _families(options: argparse.Namespace) -> None:
    known = lmc.known_families()
    print(json.dumps(known.to_dict(), indent=2) if options.json else known.table())


def _align(options: argparse.Namespace) -> None:
    if options.dry_run:
        only = options.symmetry_only
        print(lmc.plan_align(options.a, options.b, options.output, symmetry_only=only, overwrite=options.overwrite).table())
        return
    alignment = lmc.align(
        options.a,
        options.b,
        options.output,
        order=options.order or "best",
        units=options.units or "scaled",
        exact=options.exact,
        symmetry_only=options.symmetry_only,
        push_to_hub=options.push_to_hub,
        private=options.private,
        resume=options.resume,
        overwrite=options.overwrite,
        allow_nonfinite=options.allow_nonfinite,
    )
    print(_totals(alignment))
    _say_where(options.output, options.push_to_hub)


def _apply(options: argparse.Namespace) -> None:
    if options.dry_run:
        undo, overwrite = options.inverse, options.overwrite
        plan = lmc.plan_apply(options.symmetry, options.b, options.output, inverse=undo, overwrite=overwrite)
        print(plan.table())
        return
    lmc.apply(
        options.symmetry,
        options.b,
        options.output,
        inverse=options.inverse,
        resume=options.resume,
        overwrite=options.overwrite,
        allow_nonfinite=options.allow_nonfinite,
    )
    _say_where(options.output, None)


def _barrier(options: argparse.Namespace) -> None:
    report = lmc.barrier(
        options.a,
        options.b,
        options.output,
        text=options.text,
        dataset=options.dataset,
        dataset_config=options.dataset_config,
        dataset_revision=options.dataset_revision,
        split=options.split or "test",
        column=options.column or "text",
        points=options.points,
        naive=options.naive,
        symmetry=options.symmetry,
        order=options.order or "best",
        units=options.units or "scaled",
        exact=options.exact,
        context=options.context,
        stride=options.stride,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        dtype=options.dtype,
        device=options.device,
        activation_memory=options.activation_memory,
        layerwise=options.layerwise,
        layers=options.layers,
        refine=options.refine,
        routing=options.routing,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    print(report.table())
    _say_where(options.output, None)


def _merge(options: argparse.Namespace) -> None:
    if options.dry_run:
        how = {"align": options.align, "symmetry": options.symmetry, "overwrite": options.overwrite}
        print(lmc.plan_merge(options.a, options.b, options.output, **how).table())
        return
    alignment = lmc.merge(
        options.a,
        options.b,
        options.output,
        options.t,
        align=options.align,
        symmetry=options.symmetry,
        order=options.order or "best",
        units=options.units or "scaled",
        exact=options.exact,
        push_to_hub=options.push_to_hub,
        private=options.private,
        resume=options.resume,
        overwrite=options.overwrite,
        allow_nonfinite=options.allow_nonfinite,
    )
    if alignment:
        print(_totals(alignment))
    _say_where(options.output, options.push_to_hub)


def _push(options: argparse.Namespace) -> None:
    address = lmc.push(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
        commit_message=options.commit_message,
    )
    print(f"published: {address}")


def _demo(options: argparse.Namespace) -> None:
    lmc.demo(options.output, tell=lambda line: print(line, flush=True))
    _say_where(options.output, None)


SHARED = (_align, _apply, _barrier, _merge)  # the verbs that several processes may call together


def _totals(alignment: Alignment) -> str:
    totals = alignment.totals()
    return (
        f"moved {totals['experts_moved']} of {totals['experts']} experts and {totals['units_moved']} of {totals['units']} "
        f"hidden units, flipped {totals['signs']} signs, kept the scales of {totals['scales_kept']} experts\n"
        f"distance of the expert weights, relative to A: {totals['relative_distance_before']:.4f} before, "
        f"{totals['relative_distance_after_order']:.4f} after the order, "
        f"{totals['relative_distance_after_units']:.4f} after the units"
    )


def _say_where(output: Path, repo_id: str | None) -> None:
    print(f"written: {output}" + (f", published: {repo_id}" if repo_id else ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-moe-lmc",
        description="Align, interpolate and merge Mixture-of-Experts language models. "
        "MODEL, A and B are local folders or Hub ids, OWNER/NAME[@REVISION].",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('hf_moe_lmc')}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    inspect = _verb(verbs, "inspect", _inspect, "what a checkpoint is, from its headers alone")
    inspect.add_argument("model", metavar="MODEL")
    _json(inspect)

    families = _verb(verbs, "families", _families, "the model types that are supported or refused, with their symmetries")
    _json(families)

    selftest = _verb(
        verbs,
        "selftest",
        _selftest,
        "prove on a small random model of the same configuration that the symmetries of MODEL are understood",
    )
    selftest.add_argument("model", metavar="MODEL", help="its weights are not read")
    _json(selftest)

    align = _verb(verbs, "align", _align, "write B with its experts and hidden units where A has them")
    _pair(align)
    _output(align, "OUT")
    _matching(align)
    _resuming(align)
    align.add_argument("--symmetry-only", action="store_true", help="write the symmetry and its report, no checkpoint")
    _writing(align)
    _publishing(align)

    apply = _verb(verbs, "apply", _apply, "apply a saved symmetry to B")
    apply.add_argument("symmetry", metavar="SYMMETRY", help="symmetry.safetensors, or a folder that holds it")
    apply.add_argument("b", metavar="B")
    _output(apply, "OUT")
    apply.add_argument("--inverse", action="store_true", help="undo it")
    _resuming(apply)
    _writing(apply)

    barrier = _verb(verbs, "barrier", _barrier, "measure the perplexity barrier between A and B, naive and aligned")
    _pair(barrier)
    _output(barrier, "DIR")
    text = barrier.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--text",
        metavar="FILE",
        action="append",
        default=[],
        help="UTF-8 text, one document; or .jsonl or .parquet, each row a document; repeatable",
    )
    text.add_argument("--dataset", metavar="NAME", help="dataset on the Hub or in a folder; each row is a document")
    barrier.add_argument("--dataset-config", metavar="C")
    barrier.add_argument("--split", metavar="S", help="(default: test)")
    barrier.add_argument("--dataset-revision", metavar="R", help="branch, tag or commit of a dataset on the Hub")
    barrier.add_argument("--column", metavar="COL", help="where the text of a row stands (default: text)")
    barrier.add_argument("--points", metavar="N", type=int, default=25, help="grid points, both ends included (default: 25)")
    barrier.add_argument("--no-naive", dest="naive", action="store_false", help="skip the path to B as it is")
    barrier.add_argument("--symmetry", metavar="FILE", help="take a saved symmetry instead of matching")
    _matching(barrier)
    _resuming(barrier)
    barrier.add_argument("--context", metavar="N", type=int, help="tokens per window (default: 2048, or the model's maximum)")
    barrier.add_argument(
        "--stride", metavar="N", type=int, help="let windows overlap, N tokens apart, each scored where the last ended"
    )
    barrier.add_argument("--max-tokens", metavar="N", type=int, help="tokens of text to read (default: all)")
    barrier.add_argument("--batch-size", metavar="N", type=int, help="windows per forward pass (default: 4096 tokens' worth)")
    barrier.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(default: %(default)s)"
    )
    barrier.add_argument("--device", help="where the layers run (default: a GPU if there is one)")
    barrier.add_argument(
        "--activation-memory",
        metavar="SIZE",
        type=_size,
        help="hidden states of all points and windows on their way, e.g. 4GiB; the smaller, the more often A and B are read "
        "(default: half of the free memory)",
    )
    barrier.add_argument(
        "--layerwise",
        metavar="N",
        type=int,
        nargs="?",
        const=5,
        default=0,
        help="also the barrier of each MoE layer alone, the rest staying A, with N points between its ends (5 if not given)",
    )
    barrier.add_argument(
        "--layers",
        metavar="LAYERS",
        help="layers for --layerwise, e.g. each,0-3,8: every MoE layer alone, 0 to 3 together, 8 alone (default: each)",
    )
    barrier.add_argument(
        "--refine",
        metavar="N",
        type=int,
        nargs="?",
        const=3,
        default=0,
        help="halve the intervals beside the aligned maximum N times (3 if not given), reading both models again each time",
    )
    barrier.add_argument(
        "--no-routing", dest="routing", action="store_false", help="do not record which experts the tokens take"
    )

    merge = _verb(verbs, "merge", _merge, "write (1 - t) A + t B, aligned")
    _pair(merge)
    _output(merge, "OUT")
    merge.add_argument("-t", type=float, default=0.5, help="0 is A, 1 is B (default: %(default)s)")
    how = merge.add_mutually_exclusive_group()
    how.add_argument("--no-align", dest="align", action="store_false", help="take B as it is")
    how.add_argument("--symmetry", metavar="FILE", help="take a saved symmetry instead of matching")
    _matching(merge)
    _resuming(merge)
    _writing(merge)
    _publishing(merge)

    push = _verb(verbs, "push", _push, "publish a finished folder in one commit")
    push.add_argument("folder", metavar="DIR")
    push.add_argument("repo_id", metavar="REPO_ID")
    push.add_argument("--private", action="store_true", default=None)
    push.add_argument("--revision", metavar="BRANCH")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--commit-message", metavar="TEXT")

    demo = _verb(verbs, "demo", _demo, "train small models, measure their barriers, merge; no network needed")
    _output(demo, "DIR")
    return parser


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    description: str,
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
    verb.set_defaults(verb=run)
    return verb


def _json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON")


def _pair(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("a", metavar="A")
    verb.add_argument("b", metavar="B")


def _output(verb: argparse.ArgumentParser, metavar: str) -> None:
    verb.add_argument("-o", "--output", metavar=metavar, type=Path, required=True, help="a new or empty folder")


def _size(text: str) -> int:
    """Bytes of a size such as 4GiB, 500 MB or 1048576."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 4GiB, 500MB or a number of bytes")
    number, unit, binary = found.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (" kmgt".index(unit.lower()) if unit else 0))


def _matching(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--order",
        choices=("gate", "expert", "best"),
        help="order the experts by router rows, by Gram matrices, or keep the better (default: best)",
    )
    verb.add_argument(
        "--units",
        choices=("plain", "scaled"),
        help="match hidden units as they are, or up to sign and scale (default: scaled)",
    )
    verb.add_argument(
        "--exact", action="store_true", help="compute all costs in full for wide experts, too; without, sketches come first"
    )


def _resuming(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue from what a stopped call with the same inputs and options had done (the default), or start afresh",
    )
    verb.add_argument(
        "--overwrite", action="store_true", help="replace what this package wrote there before, once the new output is whole"
    )


def _writing(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--allow-nonfinite", action="store_true", help="write weights that are NaN or infinite as they are")
    verb.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would be read and written; change nothing"
    )


def _publishing(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--push-to-hub", metavar="REPO_ID", help="publish the result")
    verb.add_argument("--private", action="store_true", default=None, help="publish it privately")


if __name__ == "__main__":
    sys.exit(main())
