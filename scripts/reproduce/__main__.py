"""Trains, measures and tabulates everything.

    python -m scripts.reproduce --quick -o DIR --json scripts/reproduction.json

DIR keeps models and measurements; the same call goes on where an earlier one was stopped. `--minutes` stops it cleanly.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .data import TEXT_NAMES, VISION_NAMES, parsed
from .settings import FULL, FULL_GPU, QUICK, Setting, all_settings, in_tables, ranks
from .training import OutOfTime
from .work import Place, Task, in_process, tasks

T = TypeVar("T")
RENDER = "python scripts/render_reproduction.py"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m scripts.reproduce", description="The paper reproduced.")
    extent = options.add_mutually_exclusive_group(required=True)
    extent.add_argument("--quick", action="store_true", help="about 50 minutes of CPU: two seeds, one setting of each table")
    extent.add_argument("--full", action="store_true", help="everything, three seeds; larger models with --device cuda")
    options.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="models and measurements, kept")
    options.add_argument("--json", type=Path, help="where the results go (DIR/reproduction.json)")
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, each with one thread (all cores)")
    options.add_argument("--minutes", type=float, help="stop cleanly after so many; the next call goes on")
    options.add_argument("--seeds", type=int, help="models of each setting (2, with --full 3)")
    options.add_argument("--text", nargs="+", metavar="NAME[=FOLDER]", help=f"of {', '.join(TEXT_NAMES)}")
    options.add_argument("--vision", nargs="+", metavar="NAME[=FOLDER]", help=f"of {', '.join(VISION_NAMES)}")
    options.add_argument("--image-size", type=int, help="rows and columns to bring images to")
    options.add_argument("--only", help="settings whose name contains this")
    options.add_argument("--prepare", action="store_true", help="data alone: DIR can then go where there is no network")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    run = QUICK if options.quick else FULL_GPU if options.device.startswith("cuda") else FULL
    text, vision = parsed(options.text or run.text, TEXT_NAMES), parsed(options.vision or run.vision, VISION_NAMES)
    seeds = tuple(range(1, options.seeds + 1)) if options.seeds else run.seeds
    run = replace(run, text=tuple(text), vision=tuple(vision), seeds=seeds)
    started = time.time()
    deadline = started + 60 * options.minutes if options.minutes else 1e18
    place = Place(options.output, run, options.device, {**text, **vision}, options.image_size, deadline)
    output = options.json or options.output / "reproduction.json"
    return carry_out(place, options.jobs, output, options.only or "", prepare_only=options.prepare)


def carry_out(place: Place, jobs: int, output: Path, only: str = "", *, prepare_only: bool = False) -> int:
    """Does what is missing, and writes the results. Returns 0 if everything is there, else 3."""
    check_run(place)
    settings = {name: setting for name, setting in all_settings(place.run).items() if only in name}
    ranked = {setting.name for setting in ranks(place.run)}
    plan = tasks(place, settings, with_claims(settings), ranked)
    plan = [task for task in plan if task.kind == "prepare" or not prepare_only]
    started = time.time()
    spent = {task.name: 0.0 for task in plan if not task.makes.exists()}
    print(f"{len(plan)} tasks, {len(plan) - len(spent)} of them done before; {jobs} processes", flush=True)
    record = place.root / "seconds.json"
    known: dict[str, float] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    with Here() if jobs == 1 else ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done, (task, seconds) in enumerate(finished(pool, place, plan, jobs), start=1):
            known[f"{task.kind} {task.name}"] = seconds
            record.write_text(json.dumps(known), encoding="utf-8")
            print(f"{time.time() - started:6.0f} s  {done}/{len(spent)}  {task.kind} {task.name}: {seconds:.1f} s", flush=True)
    found = results(place, all_settings(place.run), known, time.time() - started, jobs)
    output.write_text(compact(found), encoding="utf-8")
    missing = [task.name for task in plan if not task.makes.exists()]
    print(f"{output}: {len(found['cells'])} settings, {len(found['claims'])} sets of claims; render with: {RENDER}")
    if missing:
        print(f"stopped with {len(missing)} of {len(plan)} tasks to do; the same call goes on", file=sys.stderr)
    return 3 if missing else 0


def compact(found: Any) -> str:
    """JSON whose lists of numbers and shortest objects are on one line, numbers to six digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(one) for key, one in value.items()}
        if isinstance(value, list):
            return [rounded(one) for one in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    text = json.dumps(rounded(found), indent=1)
    return re.sub(r"([\[{])\s+([^\[\]{}]*?)\s+([\]}])", lambda m: m[1] + re.sub(r"\s*\n\s*", " ", m[2]) + m[3], text) + "\n"


def check_run(place: Place) -> None:
    """What a folder holds is of one run; raises SystemExit where another one is asked for."""
    facts = json.loads(json.dumps({**place.run.facts(), "device": place.device.partition(":")[0]}))
    path = place.root / "run.json"
    place.root.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(facts), encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := [key for key in facts if facts[key] != before.get(key)]:
        raise SystemExit(f"{place.root} holds a run with another {', '.join(changed)}; give another folder with -o")


def with_claims(settings: dict[str, Setting]) -> dict[str, Setting]:
    """The claims are measured where every layer was trained; of the real classes, wherever they were."""
    return {
        name: setting
        for name, setting in settings.items()
        if (setting.kind == "paper" and setting.place == "all") or (setting.kind != "paper" and setting.place == "first")
    }


class Here(Executor):
    """Does what is submitted at once, in this process."""

    def submit(self, work: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        future = Future[T]()
        try:
            future.set_result(work(*arguments, **named))
        except Exception as error:  # noqa: BLE001  it is the caller's to raise, as with processes
            future.set_exception(error)
        return future


def finished(pool: Executor, place: Place, plan: list[Task], jobs: int) -> Iterator[tuple[Task, float]]:
    """Tasks with their seconds of CPU as they end; each begins when what it needs is there, none after the deadline.

    A task that fails is reported with its traceback, and the others go on.
    """
    waiting = [task for task in plan if not task.makes.exists()]
    running: dict[Future[float], Task] = {}
    while waiting or running:
        ready = [task for task in waiting if all(path.exists() for path in task.needs)]
        for task in ready[: jobs - len(running)] if time.time() < place.deadline else []:
            running[pool.submit(in_process, place, task)] = task
            waiting.remove(task)
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task, error = running.pop(future), future.exception()
            if error is None:
                yield task, future.result()
            elif not isinstance(error, OutOfTime):
                print(f"{task.kind} {task.name} failed; what needs it is left out:", file=sys.stderr)
                traceback.print_exception(error)


def results(place: Place, settings: dict[str, Setting], spent: dict[str, float], seconds: float, jobs: int) -> dict[str, Any]:
    """Everything that is there."""
    import numpy
    import scipy
    import torch
    import transformers

    from .data import Text, restore

    cells = {name: _read(place.cell(name)) for name in settings if place.cell(name).exists()}
    claims = [f"claims-{name}" for name in settings if place.cell(f"claims-{name}").exists()]
    data = {name: restore(place.data(name)) for name in (*place.run.text, *place.run.vision) if place.data(name).exists()}
    cuda = place.device.startswith("cuda")
    tables = {table: [name for name in names if name in cells] for table, names in in_tables(place.run).items()}
    return {
        "command": command(place),
        "run": place.run.facts(),
        "machine": {
            "processor": _processor(), "cores": os.cpu_count(), "jobs": jobs,
            "device": torch.cuda.get_device_name() if cuda else "cpu", "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__, "numpy": numpy.__version__,
            "scipy": scipy.__version__,
        },
        "seconds_of_the_last_call": seconds,
        "cpu_seconds": {"all": sum(spent.values()), "by_task": {name: round(value, 1) for name, value in spent.items()}},
        "data": {
            name: {**found.facts, **({"proof": found.proof} if isinstance(found, Text) else {})} for name, found in data.items()
        },
        "tables": tables,
        "missing": [name for name in settings if name not in cells],
        "cells": cells,
        "claims": {name.removeprefix("claims-"): _read(place.cell(name)) for name in claims},
    }  # fmt: skip


def command(place: Place) -> str:
    """What makes these results again."""
    usual = {"quick": QUICK, "full": FULL}[place.run.name]
    own = {"text": usual.text, "vision": usual.vision}
    changed = [f"--{key} {' '.join(getattr(place.run, key))}" for key, value in own.items() if getattr(place.run, key) != value]
    changed += [f"--seeds {len(place.run.seeds)}"] if place.run.seeds != usual.seeds else []
    changed += [f"--device {place.device}"] if place.device != "cpu" else []
    return " ".join([f"python -m scripts.reproduce --{place.run.name}", *changed, "-o DIR"])


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    sys.exit(main())
