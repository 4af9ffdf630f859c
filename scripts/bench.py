"""What the benchmarks share: checkpoints shard by shard, an emptied page cache, figures of a process, a report.

Torch is imported only where a checkpoint is made: the memory of a process counts as the peak of the children that it starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, shards: Iterable[tuple[str, dict[str, Tensor]]]) -> Path:
    """Shards by file name, each written before the next one is asked for, and their index."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    for file, tensors in shards:
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Of all tensors of a language model, none of which is made."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def empty_cache(*folders: Path) -> None:
    """Drops the pages of all files in some folders."""
    os.sync()
    for folder in folders:
        for file in folder.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def own_memory(kind: str) -> int:
    """Bytes of this process: `RssAnon`, what it holds of anonymous memory, or `VmHWM`, its peak."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[kind].split()[0]) * 1024


class Watched:
    """What runs within a `with`: `seconds`, and `peak_bytes` of memory of its own above what there was before."""

    def __init__(self) -> None:
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._base = self._peak = own_memory("RssAnon")
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._done.set()
        self._thread.join()
        self.peak_bytes = self._peak - self._base

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._peak = max(self._peak, own_memory("RssAnon"))


def result_of(script: str, arguments: Iterable[object], environment: Mapping[str, str]) -> dict[str, Any]:
    """What `script --one ...` prints last, a line of JSON, in a process of its own."""
    command = [sys.executable, "-W", "ignore", script, "--one", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def report(output: Path | None, facts: Mapping[str, Any], arguments: Iterable[str] | None = None) -> None:
    """Prints the report of the running script, and writes it where `output` says.

    Args:
        arguments: of the command that the report names, by default those of this process.
    """
    command = ["python", f"scripts/{Path(sys.argv[0]).name}", *(sys.argv[1:] if arguments is None else arguments)]
    text = json.dumps({"command": " ".join(command), **facts}, indent=2) + "\n"
    if output:
        output.write_text(text)
    print(text)
