"""Kills `merge`, `align` and `apply` at points spread over the whole run, and looks at what stands and how it goes on.

    python scripts/kill_trials.py -o scripts/kill_trials.json [--trials 40]

A trial is a process that kills itself (SIGKILL) at its n-th act on the file system: a file opened for writing, made, renamed
or removed, a write (half of which is done first), an fsync. n goes over the whole run, in `--trials` steps for each case.
After the kill the output has to be absent, or whole. Then the same call is made again. Everything in the output has to equal,
byte for byte, what an undisturbed call wrote (alignment.json without its seconds). Nothing else may be left, but a workspace
without results where the kill met its removal. The output is whole then, and the second call is refused as after any.

Cases: the output beside its workspace; an empty folder that alone may be written in (so files move in one by one); an old
output that is replaced.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bench
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import hf_moe_lmc as lmc
from hf_moe_lmc.writing import location, spans, workspace

EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
CALLS = ("pwrite", "fsync", "fdatasync", "posix_fallocate")
SEVERAL = "merge of two points"
VERBS = ("merge", "align", "apply")  # of the record
INDEX = "model.safetensors.index.json"
PLACES = ("beside", "inside", "overwrite")


def run(last: int, work: Callable[[], Any], counted: Path | None = None) -> int:
    """Exit code of a child that runs `work` and is killed at event number `last` (0: never): -9 where it was killed.

    The child writes the number of its events to `counted`.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.dup2(2, 1)
        torch.set_num_threads(1)  # the parent's threads are not here
        count = _arm(last)
        work()
        if counted:
            counted.write_text(str(count()))
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 (a forked child must not go on as its parent)
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)


def _arm(last: int) -> Callable[[], int]:
    seen, lock = 0, threading.Lock()

    def tick(half: Callable[[], object] = lambda: None) -> None:
        nonlocal seen
        with lock:
            seen += 1
            if seen == last:
                half()
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opens or event in EVENTS:
            tick()

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            writes = real.__name__ == "pwrite" and len(arguments[1]) > 1
            tick(lambda: writes and real(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2]))
            return real(*arguments)

        return call

    for name in CALLS:
        setattr(os, name, counting(getattr(os, name)))
    sys.addaudithook(audit)
    return lambda: seen


def make_pair(folder: Path) -> tuple[Path, Path]:
    """Two small Mixtral checkpoints of several shards, the second one with its experts in another order."""
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        )  # fmt: skip
        path = folder / "ab"[seed]
        MixtralForCausalLM(config).save_pretrained(path, max_shard_size="30KB")
        paths.append(path)
    return paths[0], paths[1]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, without what differs from call to call, and without the name of the folder in its card."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in found:
        if name.endswith("alignment.json"):
            found[name] = re.sub(rb'"seconds": [0-9.e+-]+', b"", found[name])
    if "README.md" in found:
        found["README.md"] = re.sub(rb'(model_id = "|-o |- name: )[^"\s]+', rb"\1OUT", found["README.md"])
    return found


def call(verb: str, a: Path, b: Path, output: Path, symmetry: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if verb in ("merge", SEVERAL):
            lmc.merge(a, b, output, (0.3, 0.7) if verb == SEVERAL else 0.5, align=False, **options)
        elif verb == "align":
            lmc.align(a, b, output, **options)
        else:
            lmc.apply(symmetry, b, output, **options)


def prepare(place: str, output: Path, old: Path) -> dict[str, Any]:
    """What stands at the output before, and the options of the call."""
    if place == "inside":
        output.mkdir()
    if place == "overwrite":
        shutil.copytree(old, output)
        return {"overwrite": True}
    return {}


def workspace_left(output: Path) -> bool:
    """Removes a workspace that holds nothing but its lock, and says whether there was one."""
    for folder in (output.parent / f".{output.name}.progress", output / location.INSIDE):
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {location.LOCK}:
            shutil.rmtree(folder)
            return True
    return False


def trials(verb: str, place: str, count: int, folder: Path, a: Path, b: Path) -> Iterator[dict[str, Any]]:
    """Kills one verb `count` times, spread over its run; yields what each trial found.

    Raises:
        AssertionError: what stands is neither absent nor whole, or going on ends in something else.
    """
    old, whole, symmetry = folder / "old", folder / f"whole-{verb}", folder / "g"
    if not old.exists():
        call("merge", b, a, old, symmetry)
        lmc.align(a, b, symmetry, symmetry_only=True)
    if not whole.exists():
        call(verb, a, b, whole, symmetry)
    expected, before = contents(whole), contents(old)
    choose = workspace.working_folder
    if place == "inside":  # as where the output is a mount point
        workspace.working_folder = lambda root: root / location.INSIDE
    try:
        number, counted = 0, folder / "counted"
        output = folder / "first" / "out"
        output.parent.mkdir()
        options = prepare(place, output, old)
        assert run(0, lambda: call(verb, a, b, output, symmetry, **options), counted) == 0
        number = int(counted.read_text())
        shutil.rmtree(output.parent)
        for trial in range(count):
            last = 1 + trial * (number - 1) // max(1, count - 1)
            output = folder / f"{verb}-{place}-{trial}" / "out"
            output.parent.mkdir()
            options = prepare(place, output, old)
            again = partial(call, verb, a, b, output, symmetry, **options)
            code = run(last, again)
            found = contents(output) if output.is_dir() else {}
            found = {name: data for name, data in found.items() if not name.startswith(f"{location.INSIDE}/")}
            state = "absent" if not found else "whole" if found == expected else "old" if found == before else "part"
            if place == "inside" and state == "part":  # files move in one by one, the indices last
                assert all(expected[name] == data for name, data in found.items()), sorted(found)
                moved = {name for name in expected if not name.endswith(INDEX)} <= found.keys()
                assert moved or not any(name.endswith(INDEX) for name in found), sorted(found)
            else:
                assert state != "part", (verb, place, last, sorted(found))
            code_again = run(0, again)
            # killed when all was done but for the workspace: the output is refused as not empty, as any finished one
            assert code_again == 0 or state == "whole", (verb, place, last, code_again)
            left = workspace_left(output)
            assert not left or (code_again and state == "whole"), (verb, place, last, left)
            assert contents(output) == expected, (verb, place, last)
            assert [path.name for path in output.parent.iterdir()] == ["out"], (verb, place, last)
            yield {"event": last, "of": number, "killed": code == -signal.SIGKILL, "stood": state, "left": left}
            shutil.rmtree(output.parent)
    finally:
        workspace.working_folder = choose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--trials", type=int, default=40, help="of each verb and place")
    options = parser.parse_args()
    spans.SPAN = 1024  # many ranges, many events
    results = []
    with tempfile.TemporaryDirectory(prefix="kill-trials-") as d:
        a, b = make_pair(Path(d))
        for verb in VERBS:
            for place in PLACES:
                found = list(trials(verb, place, options.trials, Path(d), a, b))
                stood = {state: sum(one["stood"] == state for one in found) for state in ("absent", "old", "part", "whole")}
                results.append({
                    "verb": verb, "output": place, "events": found[0]["of"], "trials": len(found),
                    "killed": sum(one["killed"] for one in found), "stood_after_the_kill": stood,
                    "resumed_to_the_same_bytes": len(found),
                    "left_a_workspace_without_results": sum(one["left"] for one in found),
                })  # fmt: skip
                print(results[-1], file=sys.stderr, flush=True)
    bench.report(options.output, {"results": results})


if __name__ == "__main__":
    main()
