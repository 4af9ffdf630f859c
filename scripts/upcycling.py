"""Pairs of MoE models upcycled from one dense model: what merging them is worth, and what alignment does for it.

    python scripts/upcycling.py -o scripts/upcycling.json --models DIR

trains, for each of five seeds, a small dense model on prose and code, makes MoE models of it by upcycling and by
Drop-Upcycling (half of the units drawn anew), trains each pair apart, on the same mix or on one domain each, and measures
parents and merges at t = 0.5 after 300, 600 and 2,000 steps. No 12 words of evaluation text in a row are in training or
calibration text, which is checked. What is in DIR is kept and used again, so that a stopped call continues. Calls on several
machines, each with some of --experts and --steps, add up to one table, which says what was trained where.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from batched_mixtral import Recipe
from scipy.stats import t as student
from upcycled_models import METHODS, MIXES, Models, Scale, Setting
from upcycled_pairs import MEAN, ORACLE_EXPERTS, Job, measure

from hf_moe_lmc.runtime.progress import tracked

COMMAND = "python scripts/upcycling.py -o scripts/upcycling.json --models DIR"
PARENTS = ("a", "b")
RESULTS = "results"  # folder of a file for each pair
DOMAINS = ("prose", "code")
GROUP = ("method", "mix", "experts", "steps")


class OutOfTimeError(Exception):
    """The minutes are over."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--models", type=Path, required=True, help="folder of models and results; what is there is reused")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where models are trained")
    parser.add_argument("--experts", type=int, nargs="+", help="only models of so many experts")
    parser.add_argument("--steps", type=int, nargs="+", help="only these lengths of training")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="pairs that are measured at once")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the same call continues")
    parser.add_argument("--quick", action="store_true", help="a minute's trial of everything at a tiny size")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    deadline = started + 60 * options.minutes

    def check() -> None:
        if time.perf_counter() > deadline:
            raise OutOfTimeError

    torch.set_float32_matmul_precision("high" if options.device.startswith("cuda") else "highest")  # of training alone
    scale = quick_scale() if options.quick else Scale()
    if options.experts:
        scale = replace(scale, experts=tuple(options.experts))
    if options.steps:
        scale = replace(scale, upcycled=replace(scale.upcycled, kept=tuple(sorted(options.steps))))
    models = Models(options.models, scale, options.device)
    whole = True
    try:
        with workers(options.jobs) as pool:
            run(models, pool, check)
    except OutOfTimeError:
        whole = False
    write(options.output, models)
    if not whole:
        sys.exit(f"stopped after {options.minutes:g} minutes; the same call continues")


def quick_scale() -> Scale:
    """Everything at a size that says nothing but that it runs."""
    import asyncio

    return Scale(
        hidden_size=32,
        layers=1,
        units=32,
        experts=(3,),
        seeds=(0, 1),
        dense=Recipe((6,), 4e-3, batch=4, warmup=2),
        upcycled=Recipe((4, 8), 4e-3, batch=4, warmup=2),
        tokens=300,
        context=16,
        library=Path(asyncio.__file__).parent,
    )


def run(models: Models, pool: ProcessPoolExecutor | None, check: Callable[[], object]) -> None:
    """Trains what is missing, and measures each pair as soon as it is there."""
    models.prepare()
    models.train_dense(check)
    (models.root / RESULTS).mkdir(exist_ok=True)
    waiting: list[Future[None]] = []
    try:
        for experts in models.scale.experts:
            for setting, steps in models.train_upcycled(experts, lambda *pair: result_path(models, *pair).exists(), check):
                job, path = job_of(models, setting, steps), result_path(models, setting, steps)
                if pool is None:
                    check()
                    measure_and_keep(job, path)
                else:
                    waiting.append(pool.submit(measure_and_keep, job, path))
        for future in tracked(waiting, desc="measuring", unit="pair"):
            while not future.done():
                check()
                time.sleep(0.1)
            future.result()
    finally:
        for future in waiting:
            future.cancel()


def measure_and_keep(job: Job, path: Path) -> None:
    path.with_suffix(".part").write_text(json.dumps(measure(job)), encoding="utf-8")
    path.with_suffix(".part").replace(path)


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes of one thread each, without a GPU; with one job, none."""
    if jobs == 1:
        yield None
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start) as pool:
        yield pool


def _start() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def job_of(models: Models, setting: Setting, steps: int) -> Job:
    same = setting.mix == "same"
    return Job(
        about={**vars(setting), "steps": steps, "trained": machine(models.device)},
        a=models.checkpoint(setting, "a", steps),
        b=models.checkpoint(setting, "b", steps),
        texts={name: models.text("evaluation", name) for name in DOMAINS},
        calibration={name: models.text("calibration", name) for name in DOMAINS},
        context=models.scale.context,
        tokens=models.scale.tokens,
        domains=(DOMAINS, DOMAINS) if same else (DOMAINS[:1], DOMAINS[1:]),
        orders=same,
        oracle=same and setting.experts <= ORACLE_EXPERTS,
    )


def machine(device: str) -> str:
    """What trains the models, in words."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "a CPU"
    return f"torch {version('torch')} and Python {'.'.join(platform.python_version_tuple()[:2])} on {name}"


def result_path(models: Models, setting: Setting, steps: int) -> Path:
    return models.root / RESULTS / f"{setting.name}-{steps}.json"


def write(output: Path, models: Models) -> None:
    """All results that are there, and their means over seeds."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((models.root / RESULTS).glob("*.json"))]
    scale = models.scale
    result = {
        "command": COMMAND,
        "scale": {
            "hidden_size": scale.hidden_size,
            "layers": scale.layers,
            "units": scale.units,
            "seeds": scale.seeds,
            "dense": vars(scale.dense),
            "upcycled": vars(scale.upcycled),
            "evaluation_tokens_of_each_domain": scale.tokens,
        },
        "settings": rounded([summary(pairs) for pairs in groups(found)]),
        "pairs": rounded(found),
    }
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def groups(found: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Pairs that differ in the seed alone, in the order of the tables."""
    by_setting: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for pair in found:
        by_setting.setdefault(tuple(pair[key] for key in GROUP), []).append(pair)
    order = [list(METHODS), list(MIXES)]
    keys = sorted(by_setting, key=lambda key: (order[0].index(key[0]), order[1].index(key[1]), *key[2:]))
    return [by_setting[key] for key in keys]


def summary(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, with intervals of 95 %, of losses, of what a merge is above or below its parents, and of shares."""
    domains = list(pairs[0]["losses"]["a"])
    found = {key: pairs[0][key] for key in GROUP} | {"seeds": len(pairs)}
    found["trained"] = sorted({pair["trained"] for pair in pairs})
    names = [name for name in pairs[0]["losses"] if all(name in pair["losses"] for pair in pairs)]
    found["losses"] = {
        name: {domain: with_interval([pair["losses"][name][domain] for pair in pairs]) for domain in domains} for name in names
    }
    merges = [name for name in names if name not in PARENTS]
    found["above_better_parent"] = {
        name: with_interval([loss(pair, name) - min(loss(pair, side) for side in PARENTS) for pair in pairs]) for name in merges
    }
    naive = [barrier(pair, "naive") for pair in pairs]
    found["naive_barrier"] = with_interval(naive)
    found["percent_of_naive"] = {
        name: share_of([barrier(pair, name) for pair in pairs], naive) for name in merges if " " not in name or "order" in name
    }
    keys = pairs[0]["matching"]
    found["matching"] = {key: mean(pair["matching"][key] for pair in pairs) for key in keys}
    return found


def loss(pair: Mapping[str, Any], name: str, domain: str = MEAN) -> float:
    return float(pair["losses"][name][domain])


def barrier(pair: Mapping[str, Any], name: str) -> float:
    """What a merge loses against the mean of its parents, on the mean of the domains."""
    return loss(pair, name) - mean(loss(pair, side) for side in PARENTS)


def with_interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half-width of its 95 % interval over seeds (Student's t); no width from one seed."""
    width = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": mean(values), "width": width}


def share_of(parts: Sequence[float], wholes: Sequence[float]) -> dict[str, float | None]:
    """The ratio of two means in percent, and the half-width of its 95 % interval by the jackknife over seeds.

    Example:
        >>> share_of([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
        {'mean': 50.0, 'width': 0.0}
    """
    count = len(parts)
    ratio = 100 * sum(parts) / sum(wholes)
    if count == 1:
        return {"mean": ratio, "width": None}
    left_out = [100 * (sum(parts) - x) / (sum(wholes) - y) for x, y in zip(parts, wholes, strict=True)]
    error = ((count - 1) * mean((value - mean(left_out)) ** 2 for value in left_out)) ** 0.5
    return {"mean": ratio, "width": float(student.ppf(0.975, count - 1)) * error}


def rounded(value: Any) -> Any:
    """Numbers to five places, in whatever holds them."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
