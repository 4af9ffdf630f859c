"""Output folders: checkpoints streamed at the speed of the disk, and reports, whole or not there at all.

Several threads compute ranges of the shards and write each where it belongs. A shard appears under its name when it is whole
and on disk; all of them become the output at the very end (see publication.py).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint, first_not_finite, is_finite, place
from hf_moe_lmc.checkpoints.configuration import without_foreign_switches
from hf_moe_lmc.checkpoints.contents import INDEX
from hf_moe_lmc.checkpoints.header import Shard
from hf_moe_lmc.checkpoints.untrusted import read_json_object
from hf_moe_lmc.errors import CheckpointError, OutputError, WriteError
from hf_moe_lmc.runtime.processes import team
from hf_moe_lmc.runtime.progress import bar, size_of
from hf_moe_lmc.writing.results import Kept, sync
from hf_moe_lmc.writing.shard_file import _in_parallel, _ShardFile
from hf_moe_lmc.writing.spans import Span
from hf_moe_lmc.writing.workplace import Workplace, at_work

SPARE = 64 << 20  # bytes to be left on the disk


class TensorStream(Protocol):
    """A checkpoint that is computed as it is read: the names, shapes, dtypes and shards of `template`, other values."""

    @property
    def template(self) -> Checkpoint: ...

    def spans(self, shard: Shard) -> Iterator[Span]:
        """All bytes of one shard behind its header, in any order."""


class FolderWriter:
    """Writes the files of one output; what had been written whole by a stopped call with equal facts is not written again.

    Args:
        workplace: holds the output until it is whole.
        facts: what the shards are made from, JSON; see Workplace.kept.
        inputs: the checkpoints behind the values, to say where a weight that is not finite comes from.
        allow_nonfinite: write weights that are NaN or infinite.
        durable: have all of it on disk at the end; no reason for what lives for a moment.
    """

    def __init__(
        self,
        workplace: Workplace,
        facts: Mapping[str, Any] | None = None,
        *,
        inputs: Sequence[Checkpoint] = (),
        allow_nonfinite: bool = False,
        durable: bool = True,
    ) -> None:
        self._workplace = workplace
        self._kept: Kept = workplace.output(facts or {})
        self._inputs = inputs
        self._allow_nonfinite = allow_nonfinite
        self._durable = durable
        self._threads = torch.get_num_threads()

    @property
    def folder(self) -> Path:
        """Where the files stand until the output is whole."""
        return self._kept.folder

    def path(self, file: str) -> Path:
        """Where to write `file` (relative to the output); it appears in the output when all is done."""
        path = self._kept.path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def fingerprint(self) -> str:
        """Of the checkpoint that has been written so far."""
        with Checkpoint.open(self.folder) as written:
            return written.fingerprint()

    def write_text(self, file: str, text: str) -> None:
        with self._kept.new(file, durable=self._durable) as path:
            path.write_text(text, encoding="utf-8")

    def copy(self, source: Path, file: str) -> None:
        """The contents of a file, through links; its mode is that of any new file."""
        with self._kept.new(file, durable=self._durable) as path:
            shutil.copyfile(source, path)

    def write_tensors(self, stream: TensorStream, *, quiet: bool = False, stop: threading.Event | None = None) -> None:
        """All shards of the template, with their very headers; each value is cast once, to the template's dtype.

        Args:
            stop: ends it early once it is set.

        Raises:
            OutputError: not enough space; nothing has been written.
            CheckpointError: a weight that is not finite, unless allowed; the tensor and the input are named.
        """
        template = stream.template
        self.check_space(template)
        left = self._left(template)
        done = template.nbytes - sum(template.tensors[name].nbytes for shard in left for name in shard.tensors)
        with bar(total=template.nbytes, initial=done, unit="B", desc="writing", quiet=quiet) as progress:
            files = [_ShardFile(self._kept, shard, template, durable=self._durable) for shard in left]
            jobs = self._jobs(stream, files, progress.update)
            _in_parallel(jobs, files if self._durable else [], stop or threading.Event(), threads=self._threads)

    def _left(self, template: Checkpoint) -> list[Shard]:
        """The shards that have not been written yet."""
        whole = self._kept.files()
        return [shard for shard in template.shards.values() if shard.name not in whole]

    def _jobs(
        self, stream: TensorStream, files: list[_ShardFile], tell: Callable[[int], object]
    ) -> Iterator[Callable[[], None]]:
        telling = threading.Lock()

        def write(file: _ShardFile, span: Span) -> None:
            values = span.compute().to(span.dtype)
            if not self._allow_nonfinite and not is_finite(values):
                raise self._not_finite(file, span, values)
            file.write(span, values)
            with telling:
                tell(span.nbytes)
            file.release()

        for file in files:
            file.begin()
            for span in stream.spans(file.shard):
                file.hold()
                yield partial(write, file, span)
            yield file.release

    def _not_finite(self, file: _ShardFile, span: Span, values: Tensor) -> CheckpointError:
        """What to say of a range with a value that is not finite: the tensor, and the input that it comes from."""
        first = first_not_finite(values.view(-1))
        at = span.start + first * span.dtype.itemsize
        info = file.tensor_at(at)
        found = [
            f"{one.name}/{one.tensors[info.name].shard}: tensor {info.name} holds NaN or infinite weights, the first at {where}"
            for one in self._inputs
            if info.name in one.tensors and (where := one.first_not_finite(info.name)) is not None
        ]
        if not found:
            spot = place(info.shape, (at - info.start) // info.dtype.itemsize)
            found = [f"{file.shard.name}: tensor {info.name} would get a value beyond the range of {info.dtype} at {spot}"]
        return CheckpointError("; ".join(found) + ". Repair the checkpoint, or write it as it is with --allow-nonfinite")

    def check_space(self, template: Checkpoint) -> None:
        """Raises OutputError where the shards of a template that are not there yet would not fit."""
        problem = lack_of_space(self._workplace.root, self._left(template), self.folder)
        if problem:
            raise OutputError(problem)

    def write_checkpoint_files(self, template: Checkpoint) -> None:
        """Configurations (without switches to foreign code), side files and an index, all as the template has them."""
        for file in ("config.json", *template.side_files()):
            path = template.source.path(file)
            held = read_json_object(path, f"{template.name}/{file}", constants=True) if file.endswith("config.json") else None
            plain = without_foreign_switches(held)
            if plain == held:
                self.copy(path, file)
            else:
                self.write_text(file, json.dumps(plain, indent=2) + "\n")
        weight_map = {name: info.shard for name, info in sorted(template.tensors.items())}
        index = {"metadata": {"total_size": template.nbytes}, "weight_map": weight_map}
        self.write_text(INDEX, json.dumps(index, indent=2) + "\n")

    def publish(self) -> None:
        """Makes it the output."""
        if self._durable:
            for file in self._kept.files():
                if not file.endswith(".safetensors") or "/" in file:
                    sync(self._kept.path(file))
        self._workplace.publish(self._kept, last=INDEX, durable=self._durable)


def lack_of_space(output: Path, shards: Sequence[Shard], folder: Path) -> str | None:
    """What to say where the disk of `folder` has no room for the shards of an output; None where it has."""
    needed, free = sum(shard.size for shard in shards), shutil.disk_usage(folder).free
    if needed + SPARE <= free or not needed:
        return None
    return (
        f"{output.resolve()}: {size_of(needed)} are to be written, {size_of(free)} are free there; free some space, or choose "
        "another disk"
    )


def begin(
    output: str | os.PathLike[str],
    *inputs: str | os.PathLike[str],
    stack: ExitStack,
    resume: bool = True,
    overwrite: bool = False,
) -> Workplace | None:
    """The workplace of an output, in process 0; None in all others. See `at_work`."""
    if not team().is_main:
        return None
    return stack.enter_context(at_work(output, *inputs, resume=resume, overwrite=overwrite))


@contextmanager
def writing(
    workplace: Workplace | None, facts: Mapping[str, Any] | None = None, **options: Any
) -> Iterator[FolderWriter | None]:
    """A writer whose files become the output at the end of the block; None without a workplace.

    Raises:
        WriteError: the system refuses to write; what is whole is kept.
    """
    if workplace is None:
        yield None
        return
    writer = FolderWriter(workplace, facts, **options)
    try:
        yield writer
        writer.publish()
    except OSError as error:
        whole = sum(file.endswith(".safetensors") for file in Kept(writer.folder).files()) if writer.folder.is_dir() else 0
        advice = "free some space and repeat the same call" if error.errno == errno.ENOSPC else "repeat the same call"
        raise WriteError(
            f"{workplace.root}: {error.strerror or error}" + (f" ({error.filename})" if error.filename else "") + "; "
            f"nothing unfinished stands there. {whole} whole shards are kept in {workplace.folder}: {advice}, it continues"
        ) from error
