"""What `align`, `apply` and `merge` would do: the option `--dry-run`. All is checked, nothing downloaded or written."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import InputError, OutputError
from hf_moe_lmc.runtime.progress import size_of
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.verbs.merge import open_plain
from hf_moe_lmc.writing.output import SPARE
from hf_moe_lmc.writing.shard_file import worker_count
from hf_moe_lmc.writing.spans import SPAN
from hf_moe_lmc.writing.workplace import check_output

if TYPE_CHECKING:
    from hf_moe_lmc.moe.model import MoEModel
    from hf_moe_lmc.symmetry.group import ModelSymmetry

PROBE = 32 << 20  # bytes read and written to see how fast that goes here
PRODUCT = 1024  # rows of the matrix product that is timed


@dataclass(frozen=True)
class Plan:
    """What a verb would do, from headers and a short probe of this machine.

    Attributes:
        tensors, shards: of the output; 0 where only a symmetry is written.
        bytes_to_download: of checkpoints on the Hub that are not in the cache.
        bytes_to_read: from disk; a checkpoint that is matched and rewritten counts twice, though much may still be cached.
        bytes_free: where the output would be.
        peak_memory: bytes, besides what Python and the libraries take.
        seconds: of reading and writing at the rates that the probe saw, downloads left out; None where nothing is here yet.
        matching_seconds: of the matching besides, at most: every expert compared in full. Related ones take a fraction.
    """

    verb: str
    tensors: int
    shards: int
    bytes_to_download: int
    bytes_to_read: int
    bytes_to_write: int
    bytes_free: int
    peak_memory: int
    read_rate: float | None
    write_rate: float
    seconds: float | None
    layers_to_match: int
    matching_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        rows = [
            ("tensors", f"{self.tensors:,} in {self.shards} shards"),
            *([("to download", size_of(self.bytes_to_download))] if self.bytes_to_download else []),
            ("to read", size_of(self.bytes_to_read) + (f", at {size_of(self.read_rate)}/s here" if self.read_rate else "")),
            (
                "to write",
                f"{size_of(self.bytes_to_write)}, at {size_of(self.write_rate)}/s here; {size_of(self.bytes_free)} free",
            ),
            ("peak memory", f"{size_of(self.peak_memory)} besides Python and its libraries"),
            ("reading and writing", f"about {_time(self.seconds)}" if self.seconds is not None else "unknown before download"),
        ]
        if self.layers_to_match:
            rows.append(
                ("matching", f"{self.layers_to_match} layers, at most {_time(self.matching_seconds)}, meanwhile written")
            )
        width = max(len(name) for name, _ in rows)
        lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
        return "\n".join([f"{self.verb} would be possible; nothing has been written", *lines])


def plan_merge(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    align: bool = True,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    overwrite: bool = False,
) -> Plan:
    """What `merge` would do with these arguments.

    Raises:
        InputError: as `merge` would.
    """
    if symmetry is not None and not align:
        raise InputError("a symmetry was given and alignment was turned off; choose one")
    with ExitStack() as stack:
        plain = open_plain(a, b, stack, output=output, overwrite=overwrite) if not align else None
        if plain:
            _check(output, plain, overwrite)
            return _plan("merge", output, plain, template=plain[0])
        from hf_moe_lmc.writing.streams import refuse_quantised

        how: dict[str, Any] = {"output": output, "overwrite": overwrite, "symmetry": symmetry}
        models = _models(a, b, stack, each=refuse_quantised, **how)
        from hf_moe_lmc.verbs.inputs import load_symmetry

        if symmetry is not None:
            load_symmetry(symmetry, models[1])
        inputs = [model.checkpoint for model in models]
        _check(output, inputs, overwrite)
        return _plan("merge", output, inputs, template=inputs[0], models=models, matched=align and symmetry is None)


def plan_align(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    symmetry_only: bool = False,
    overwrite: bool = False,
) -> Plan:
    """What `align` would do with these arguments.

    Raises:
        InputError: as `align` would.
    """
    with ExitStack() as stack:
        models = _models(a, b, stack, output=output, overwrite=overwrite, ignore_extra_layers=True)
        inputs = [model.checkpoint for model in models]
        _check(output, inputs, overwrite)
        template = None if symmetry_only else inputs[1]
        return _plan("align", output, inputs, template=template, models=models, matched=True)


def plan_apply(
    symmetry: str | os.PathLike[str] | ModelSymmetry,
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    inverse: bool = False,
    overwrite: bool = False,
) -> Plan:
    """What `apply` would do with these arguments.

    Raises:
        InputError: as `apply` would.
    """
    from hf_moe_lmc.proof.recognition import recognise
    from hf_moe_lmc.verbs.inputs import load_symmetry

    with ExitStack() as stack:
        model = recognise(stack.enter_context(Checkpoint.open(b)))
        load_symmetry(symmetry, model, inverse=inverse)
        inputs = [model.checkpoint]
        _check(output, inputs, overwrite)
        return _plan("apply", output, inputs, template=inputs[0], models=[model])


def _models(a: str | os.PathLike[str], b: str | os.PathLike[str], stack: ExitStack, **options: Any) -> Sequence[MoEModel]:
    from hf_moe_lmc.verbs.inputs import open_models

    return open_models(a, b, stack, **options)


def _check(output: str | os.PathLike[str], inputs: Sequence[Checkpoint], overwrite: bool) -> None:
    check_output(output, [checkpoint.folder for checkpoint in inputs], overwrite=overwrite)
    nearest = _nearest(output)
    if not os.access(nearest, os.W_OK):
        raise OutputError(f"{output}: cannot be written (no permission in {nearest}); choose another output")


def _plan(
    verb: str,
    output: str | os.PathLike[str],
    inputs: Sequence[Checkpoint],
    *,
    template: Checkpoint | None,
    models: Sequence[MoEModel] = (),
    matched: bool = False,
) -> Plan:
    """The plan for inputs that have been checked.

    Args:
        template: what is written has its tensors.
        matched: the two models are matched; a layer is written while it is still in the page cache, but the tensors outside
            the MoE blocks, which are compared in the end, are read twice.
    """
    sizes = {id(one): one.nbytes for one in inputs}
    outside = sum(model.checkpoint.tensors[name].nbytes for model in models for name in model.outside)
    reading = sum(sizes.values()) + (outside if matched and template else 0)
    writing = sum(shard.size for shard in template.shards.values()) if template else 0
    away = [one for one in inputs if not one.is_here]
    free = shutil.disk_usage(_nearest(output)).free
    if writing + SPARE > free:
        raise OutputError(
            f"{output}: {size_of(writing)} are to be written, {size_of(free)} are free there; choose another disk"
        )
    layers = [model.layers for model in models]
    common = sorted(layers[0].keys() & layers[-1].keys()) if matched else []
    flops = sum(_flops(models[0], index) for index in common)
    read_rate = None if away else _reading(inputs)
    write_rate = _writing(_nearest(output))
    return Plan(
        verb=verb,
        tensors=len(template.tensors) if template else 0,
        shards=len(template.shards) if template else 0,
        bytes_to_download=sum(sizes[id(one)] for one in away),
        bytes_to_read=reading,
        bytes_to_write=writing,
        bytes_free=free,
        peak_memory=_memory(models, matched),
        read_rate=read_rate,
        write_rate=write_rate,
        seconds=reading / read_rate + writing / write_rate if read_rate else None,
        layers_to_match=len(common),
        matching_seconds=flops / _multiplying() if flops else 0.0,
    )


def _memory(models: Sequence[MoEModel], matched: bool) -> int:
    """Bytes: buffers of the writer, copies of an expert in each of its threads, and what matching holds of a pair."""
    buffers = worker_count() * 2 * SPAN
    if not models:
        return buffers
    expert = max(layer.expert_numel for model in models for layer in model.layers.values())
    units = max(bank.unit_count for model in models for layer in model.layers.values() for bank in layer.banks.values())
    writing = buffers + worker_count() * 3 * 4 * expert // 3  # three copies of one of its matrices in float32
    return writing + ((2 * 4 * expert + 8 * units**2 + (32 << 20)) if matched else 0)


def _flops(model: MoEModel, index: int) -> int:
    """Of the full similarity of all pairs of experts that are matched in a layer."""
    layer = model.layers[index]
    shared = 2 * 3 * layer.shared.unit_count**2 * layer.banks[FIRST].width
    return sum(2 * bank.experts * bank.unit_count * bank.expert_numel for bank in layer.banks.values()) + shared


def _nearest(output: str | os.PathLike[str]) -> Path:
    root = Path(output).resolve()
    return next(path for path in (root, *root.parents) if path.exists())


def _reading(inputs: Sequence[Checkpoint]) -> float:
    """Bytes per second from the middle of each input's largest shard."""
    values, seconds, count = torch.empty(PROBE, dtype=torch.uint8), 1e-9, 0
    for checkpoint in inputs:
        shard = max(checkpoint.shards.values(), key=lambda shard: shard.size)
        wanted = values[: min(PROBE, shard.size // 2)]
        started = time.perf_counter()
        checkpoint.fill(wanted, shard.name, shard.size // 4)
        seconds += time.perf_counter() - started
        count += len(wanted)
    return max(count, 1) / seconds


def _writing(folder: Path) -> float:
    """Bytes per second to a file that has no name and is gone at once, sync included."""
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(PROBE >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return PROBE / (time.perf_counter() - started)


def _multiplying() -> float:
    """Floating-point operations per second of a float32 product."""
    a = torch.randn(PRODUCT, PRODUCT)
    a @ a
    started = time.perf_counter()
    a @ a
    return 2 * PRODUCT**3 / (time.perf_counter() - started)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "a second"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
