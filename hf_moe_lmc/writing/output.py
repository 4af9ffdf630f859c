"""Output folders: checkpoints, streamed, and reports. An output appears whole or not at all.

Several threads compute ranges of the shards and write each in its place. A shard appears under its name when it is whole and
on disk. All files together become the output at the very end (see publication.py).
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint, first_not_finite, format_index, is_finite
from hf_moe_lmc.checkpoints.configuration import with_changes, without_foreign_switches
from hf_moe_lmc.checkpoints.contents import INDEX
from hf_moe_lmc.checkpoints.header import Shard
from hf_moe_lmc.checkpoints.side_files import speaks
from hf_moe_lmc.checkpoints.untrusted import read_json_object
from hf_moe_lmc.errors import CheckpointError, OutputError, WriteError
from hf_moe_lmc.formats.templates import quantization_file
from hf_moe_lmc.runtime.memory import cast
from hf_moe_lmc.runtime.processes import process_group
from hf_moe_lmc.runtime.progress import bar, size_of
from hf_moe_lmc.writing.records import RECORDS, ShardRecords
from hf_moe_lmc.writing.results import ResultFolder, sync
from hf_moe_lmc.writing.rounding import RoundingErrors
from hf_moe_lmc.writing.shard_file import ShardFile, run_in_parallel
from hf_moe_lmc.writing.spans import Span
from hf_moe_lmc.writing.workspace import Workspace, kept_files, open_workspace

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
WHOLE = ("",)  # the one folder of an output that is a single checkpoint
SPARE = 64 << 20  # bytes to be left on the disk


class TensorStream(Protocol):
    """Checkpoints that are computed in one pass over what they are made of.

    Each has the names, shapes, dtypes and shards of `template`.
    """

    @property
    def template(self) -> Checkpoint: ...

    @property
    def tallies(self) -> Sequence[RoundingErrors]:
        """Of each of them what storing weights anew has added; none where nothing is quantized."""

    def spans(self, shard: Shard) -> Iterator[Span]:
        """All bytes of one shard after its header, in any order, for each of the checkpoints."""


class FolderWriter:
    """Writes the files of one output. Files that a stopped call with equal facts had finished are not written again.

    Args:
        workspace: holds the output until it is whole.
        facts: inputs and options that the shards depend on, JSON; see Workspace.results.
        inputs: the checkpoints behind the values. Errors name the one that a NaN or infinite weight comes from.
        allow_nonfinite: write weights that are NaN or infinite.
        durable: sync all files to the disk. Temporary outputs do not need it.
    """

    def __init__(
        self,
        workspace: Workspace,
        facts: Mapping[str, Any] | None = None,
        *,
        inputs: Sequence[Checkpoint] = (),
        allow_nonfinite: bool = False,
        durable: bool = True,
    ) -> None:
        self._workspace = workspace
        self._results: ResultFolder = workspace.output_folder(facts or {})
        self._records = ShardRecords(workspace.results(RECORDS, facts or {}), durable=durable)
        self._inputs = inputs
        self._allow_nonfinite = allow_nonfinite
        self._durable = durable
        self._threads = torch.get_num_threads()

    @property
    def folder(self) -> Path:
        """Where the files stand until the output is whole."""
        return self._results.folder

    def path(self, file: str) -> Path:
        """Where to write `file` (relative to the output); it appears in the output when all is done."""
        path = self._results.path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def fingerprint(self) -> str:
        """The fingerprint of the checkpoint that has been written so far."""
        with Checkpoint.open(self.folder) as written:
            return written.fingerprint()

    def write_text(self, file: str, text: str) -> None:
        with self._results.new(file, durable=self._durable) as path:
            path.write_text(text, encoding="utf-8")

    def copy(self, source: Path, file: str) -> None:
        """Copies the contents of a file; links are followed. The mode is that of any new file."""
        with self._results.new(file, durable=self._durable) as path:
            shutil.copyfile(source, path)

    def write_tensors(
        self,
        stream: TensorStream,
        *,
        folders: Sequence[str] = WHOLE,
        quiet: bool = False,
        stop: threading.Event | None = None,
    ) -> None:
        """Writes all shards, with the very headers of the template. Each value is cast once, to the template's dtype.

        Args:
            folders: of the output, one for each checkpoint of the stream.
            stop: ends it early once it is set.

        Raises:
            OutputError: not enough space; nothing has been written.
            CheckpointError: a weight that is not finite, unless allowed; the tensor and the input are named.
        """
        template = stream.template
        self.check_space(template, folders)
        whole = self._results.files()
        left = shards_left(template, folders, whole)
        self._records.recall(stream.tallies, folders, template.shards, whole)
        every = template.nbytes * len(folders)
        done = every - sum(template.tensors[name].nbytes for shard, _ in left for name in shard.tensors)
        of_shard: dict[str, dict[int, ShardFile]] = {}  # by the number of the checkpoint
        for shard, folder in left:
            tallies = stream.tallies[folders.index(folder) :][:1]
            keep = partial(self._records.keep, tallies, folder, shard.name)
            file = ShardFile(self._results, shard, template, folder, durable=self._durable, finish=keep)
            of_shard.setdefault(shard.name, {})[folders.index(folder)] = file
        with bar(total=every, initial=done, unit="B", desc="writing", quiet=quiet) as progress:
            files = [file for copies in of_shard.values() for file in copies.values()]
            jobs = self._jobs(stream, of_shard, progress.update)
            run_in_parallel(jobs, files if self._durable else [], stop or threading.Event(), threads=self._threads)

    def _jobs(
        self, stream: TensorStream, of_shard: Mapping[str, Mapping[int, ShardFile]], report: Callable[[int], object]
    ) -> Iterator[Callable[[], None]]:
        """A job for each range of each shard: it computes the range for all files that lack it, and writes it to each."""
        reporting = threading.Lock()

        def write(files: Mapping[int, ShardFile], span: Span) -> None:
            for file, row in zip(files.values(), span.compute(list(files)), strict=True):
                values = cast(row, span.dtype)
                if not self._allow_nonfinite and not is_finite(values):
                    raise self._not_finite(file, span, values)
                file.write(span, values)
                with reporting:
                    report(span.nbytes)
                file.release()

        for name, files in of_shard.items():
            for file in files.values():
                file.begin()
            for span in stream.spans(stream.template.shards[name]):
                for file in files.values():
                    file.hold()
                yield partial(write, files, span)
            yield from (file.release for file in files.values())

    def _not_finite(self, file: ShardFile, span: Span, values: Tensor) -> CheckpointError:
        """The error for a range with a value that is not finite. It names the tensor and the input that the value is from."""
        first = first_not_finite(values.view(-1))
        at = span.start + first * span.dtype.itemsize
        info = file.tensor_at(at)
        problems = [
            f"{checkpoint.name}/{checkpoint.tensors[info.name].shard}: tensor {info.name} holds NaN or infinite weights, the "
            f"first at {where}"
            for checkpoint in self._inputs
            if info.name in checkpoint.tensors and (where := checkpoint.first_not_finite(info.name)) is not None
        ]
        if not problems:
            spot = format_index(info.shape, (at - info.start) // info.dtype.itemsize)
            problems = [f"{file.name}: tensor {info.name} would get a value beyond the range of {info.dtype} at {spot}"]
        return CheckpointError("; ".join(problems) + ". Repair the checkpoint, or write it as it is with --allow-nonfinite")

    def check_space(self, template: Checkpoint, folders: Sequence[str] = WHOLE) -> None:
        """Raises OutputError where the shards of a template that are not in all folders yet would not fit."""
        left = [shard for shard, _ in shards_left(template, folders, self._results.files())]
        problem = lack_of_space(self._workspace.root, left, self.folder)
        if problem:
            raise OutputError(problem)

    def write_checkpoint_files(self, template: Checkpoint, speaker: Checkpoint | None = None, *, folder: str = "") -> None:
        """Configurations (without switches to foreign code), side files and an index, as the template has them.

        Args:
            folder: of the output, in which the checkpoint stands.
            speaker: whose tokenizer, chat template, generation configuration and special ids are written; None: the template's.
        """
        other = speaker if speaker is not None and speaker is not template else None
        places = {file: template for file in ("config.json", *template.side_files()) if not (other and speaks(file))}
        places |= {file: other for file in other.side_files() if speaks(file)} if other else {}
        for file, checkpoint in places.items():
            path = checkpoint.source.path(file)
            held = read_json_object(path, f"{checkpoint.name}/{file}", constants=True) if file.endswith("config.json") else None
            written = without_foreign_switches(held)
            if file == "config.json":
                spoken = {key: other.config[key] for key in SPECIAL_IDS if key in other.config} if other else {}
                written = with_changes(written, {**template.changes, **spoken})
            if written == held:
                self.copy(path, posixpath.join(folder, file))
            else:
                self.write_text(posixpath.join(folder, file), json.dumps(written, indent=2) + "\n")
        if beside := quantization_file(template):
            self.copy(beside[0].source.path(beside[1]), posixpath.join(folder, beside[1]))
        weight_map = {name: info.shard for name, info in sorted(template.tensors.items())}
        index = {"metadata": {"total_size": template.nbytes}, "weight_map": weight_map}
        self.write_text(posixpath.join(folder, INDEX), json.dumps(index, indent=2) + "\n")

    def publish(self) -> None:
        """Puts the files in the place of the output."""
        if self._durable:
            for file in self._results.files():
                sync(self._results.path(file))
        self._workspace.publish(self._results, last=INDEX, durable=self._durable)


def shards_left(template: Checkpoint, folders: Sequence[str], written: Collection[str]) -> list[tuple[Shard, str]]:
    """The shards of an output that are not written yet, each with its folder.

    Args:
        folders: of the output, each of which gets all shards of the template.
        written: files of the output.
    """
    every = ((shard, folder) for shard in template.shards.values() for folder in folders)
    return [(shard, folder) for shard, folder in every if posixpath.join(folder, shard.name) not in written]


def check_room(workspace: Workspace, template: Checkpoint, folders: Sequence[str]) -> None:
    """As `FolderWriter.check_space`, before the facts of an output are known: what was begun there is continued or removed.

    Raises:
        OutputError: not enough space.
    """
    left = [shard for shard, _ in shards_left(template, folders, kept_files(workspace.root, None))]
    if problem := lack_of_space(workspace.root, left, workspace.folder):
        raise OutputError(problem)


def lack_of_space(output: Path, shards: Sequence[Shard], folder: Path) -> str | None:
    """What to say where the disk of `folder` has no room for the shards of an output; None where it has."""
    needed, free = sum(shard.size for shard in shards), shutil.disk_usage(folder).free
    if needed + SPARE <= free or not needed:
        return None
    return (
        f"{output.resolve()}: {size_of(needed)} are to be written, {size_of(free)} are free there; free some space, or choose "
        "another disk"
    )


def enter_workspace(
    output: str | os.PathLike[str],
    *inputs: str | os.PathLike[str],
    stack: ExitStack,
    resume: bool = True,
    overwrite: bool = False,
) -> Workspace | None:
    """The workspace of an output, in process 0; None in all others. See `open_workspace`."""
    if not process_group().is_main:
        return None
    return stack.enter_context(open_workspace(output, *inputs, resume=resume, overwrite=overwrite))


@contextmanager
def open_writer(
    workspace: Workspace | None, facts: Mapping[str, Any] | None = None, **options: Any
) -> Iterator[FolderWriter | None]:
    """A writer whose files become the output at the end of the block; None without a workspace.

    Raises:
        WriteError: the system refuses to write. Finished shards are kept.
    """
    if workspace is None:
        yield None
        return
    writer = FolderWriter(workspace, facts, **options)
    try:
        yield writer
        writer.publish()
    except OSError as error:
        whole = (
            sum(file.endswith(".safetensors") for file in ResultFolder(writer.folder).files()) if writer.folder.is_dir() else 0
        )
        advice = "free some space and repeat the same call" if error.errno == errno.ENOSPC else "repeat the same call"
        raise WriteError(
            f"{workspace.root}: {error.strerror or error}" + (f" ({error.filename})" if error.filename else "") + "; "
            f"nothing unfinished stands there. {whole} whole shards are kept in {workspace.folder}: {advice}, it continues"
        ) from error
