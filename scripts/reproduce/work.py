"""The tasks of a run: data, bases, models, measurements. Each leaves one file, from which a stopped run goes on."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from .data import TEXT_NAMES, load_images, load_text, restore, save
from .models import register_models
from .settings import Run, Setting
from .training import base_model, on, save_model, train, with_fresh_blocks


@dataclass(frozen=True)
class Place:
    """Where a run keeps what it has, and how it computes.

    Attributes:
        folders: local copies of data sets, by name.
        deadline: seconds of time.time() after which nothing goes on.
    """

    root: Path
    run: Run
    device: str
    folders: Mapping[str, str | None]
    image_size: int | None
    deadline: float

    def data(self, name: str) -> Path:
        return self.root / "data" / f"{name}.pt"

    def model(self, name: str) -> Path:
        return self.root / "models" / name

    def cell(self, name: str) -> Path:
        return self.root / "cells" / f"{name}.json"


@dataclass(frozen=True)
class Task:
    """One piece of work. `kind` is a function of this module; `setting` is the one it serves.

    Attributes:
        makes: the file or folder that it leaves; needs: those that have to be there.
    """

    kind: str
    name: str
    makes: Path
    needs: tuple[Path, ...]
    setting: Setting | None = None
    seed: int = 0


def tasks(place: Place, settings: Mapping[str, Setting], claims: Mapping[str, Setting], ranked: set[str]) -> list[Task]:
    """All of a run, in an order that begins with what others wait for."""
    found: dict[Path, Task] = {}

    def add(kind: str, name: str, makes: Path, *needs: Path, setting: Setting | None = None, seed: int = 0) -> Path:
        found.setdefault(makes, Task(kind, name, makes, needs, setting, seed))
        return makes

    for setting in settings.values():
        data = add("prepare", setting.data, place.data(setting.data))
        add("base", setting.base, place.model(setting.base), data, setting=setting)
    for setting in settings.values():
        data, base = place.data(setting.data), place.model(setting.base)
        models = [_model(place, setting, seed) for seed in place.run.seeds]
        for seed, makes in zip(place.run.seeds, models, strict=True):
            add("block", f"{setting.name}-s{seed}", makes, data, base, setting=setting, seed=seed)
        kind = "ranked" if setting.name in ranked else "paths"
        add(kind, setting.name, place.cell(setting.name), *models, setting=setting)
    for setting in claims.values():
        models = [_model(place, setting, seed) for seed in place.run.seeds[:2]]
        add("claims", f"claims-{setting.name}", place.cell(f"claims-{setting.name}"), *models, setting=setting)
    return list(found.values())


def _model(place: Place, setting: Setting, seed: int) -> Path:
    return place.model(f"{setting.name}-s{seed}")


def do(place: Place, task: Task) -> float:
    """Does a task, and returns the seconds of CPU that it took.

    Raises:
        OutOfTime: the deadline has come; nothing of the task is kept.
    """
    started = _cpu()
    register_models()
    task.makes.parent.mkdir(parents=True, exist_ok=True)
    _KINDS[task.kind](place, task)
    return _cpu() - started


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _prepare(place: Place, task: Task) -> None:
    folder = place.folders.get(task.name)
    if task.name in TEXT_NAMES:
        save(load_text(task.name, folder=folder, test_tokens=place.run.test_tokens), task.makes)
    else:
        save(load_images(task.name, folder=folder, size=place.image_size), task.makes)


def _base(place: Place, task: Task) -> None:
    assert task.setting
    data, size = restore(place.data(task.setting.data)), place.run.size_of(task.setting)
    model = base_model(task.setting, size, data)
    loss = train(model, data, size.base, seed=0, layers=None, device=place.device, deadline=place.deadline)
    _keep(model, task, loss)


def _block(place: Place, task: Task) -> None:
    from .paths import load

    assert task.setting
    data, size = restore(place.data(task.setting.data)), place.run.size_of(task.setting)
    model = with_fresh_blocks(load(place.model(task.setting.base)), task.setting, size, data, task.seed)
    loss = train(model, data, size.block, seed=task.seed, layers=task.setting.moe, device=place.device, deadline=place.deadline)
    _keep(model, task, loss)


def _keep(model: Any, task: Task, loss: float) -> None:
    model.config.update({"training_loss": loss})
    save_model(model, task.makes)


def _measured(place: Place, task: Task, orders: bool) -> None:
    from .paths import Evaluator, load, measure_pair, opened

    assert task.setting
    started, cpu = time.perf_counter(), _cpu()
    data = restore(place.data(task.setting.data))
    pairs = []
    for one, other in combinations(place.run.seeds, 2):
        with opened(_model(place, task.setting, one), _model(place, task.setting, other), place.device) as pair:
            pairs.append({"seeds": [one, other], **measure_pair(pair, data, orders, place.deadline)})
    base = on(load(place.model(task.setting.base)), place.device)
    loss, accuracy = Evaluator(base, data, place.device)()
    own = task.setting
    _write(
        task.makes,
        {
            "data": own.data, "kind": own.kind, "gating": own.gating, "experts": own.experts, "layers": own.layers,
            "moe": list(own.moe), "place": own.place, "base": {"loss": loss, "accuracy": accuracy}, "pairs": pairs,
            "seconds": time.perf_counter() - started, "cpu_seconds": _cpu() - cpu,
        },
    )  # fmt: skip


def _paths(place: Place, task: Task) -> None:
    _measured(place, task, orders=False)


def _ranked(place: Place, task: Task) -> None:
    _measured(place, task, orders=True)


def _claims(place: Place, task: Task) -> None:
    from .claims import measure_claims
    from .paths import opened

    assert task.setting
    one, other = place.run.seeds[:2]
    data = restore(place.data(task.setting.data))
    with opened(_model(place, task.setting, one), _model(place, task.setting, other), place.device) as pair:
        found = measure_claims(pair, data)
    own = task.setting
    _write(
        task.makes,
        {"data": own.data, "kind": own.kind, "gating": own.gating, "moe": list(own.moe), "place": own.place, **found},
    )


def _write(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)


_KINDS = {
    "prepare": _prepare,
    "base": _base,
    "block": _block,
    "paths": _paths,
    "ranked": _ranked,
    "claims": _claims,
}


def in_process(place: Place, task: Task) -> float:
    """`do` in a process of its own kind: one thread, no progress of the package, equal results for equal seeds."""
    from hf_moe_lmc.runtime.progress import silenced

    torch.set_num_threads(1)
    with silenced():
        return do(place, task)
