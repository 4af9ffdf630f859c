"""The header of one safetensors file, checked against the file.

The file is eight bytes of header length, the header in JSON, and the tensors one after the other. The rules are those of the
safetensors library. They are stricter in two points: no entry may be there twice, and names must print.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from hf_moe_lmc.checkpoints.untrusted import JSON_LIMIT, open_regular, parse_json
from hf_moe_lmc.errors import CheckpointError, Faults, listing, shown, worded

DIMENSION_LIMIT = 64
SIZE_LIMIT = 2**62  # elements, bytes
NAME_LIMIT = 4096  # characters of a tensor's name
PROBE = 100_001  # bytes of a remote file that are asked for first: most headers are shorter

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_parsing = Lock()  # one header at a time: a large one of junk takes memory


def dtype_name(dtype: torch.dtype) -> str:
    """What a safetensors header calls a dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at `start` in the file of `shard`."""

    name: str
    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its raw header (with the eight length bytes), its size, its tensors in file order."""

    name: str
    header: bytes
    size: int
    tensors: tuple[str, ...]


def read_shard(path: Path, name: str, where: str) -> tuple[Shard, list[TensorInfo]]:
    """The header of a local file, checked against its size.

    Memory: one header at a time is parsed, see `parse_json`.

    Raises:
        CheckpointError: naming `where` and the tensor; several faults where entries are bad.
    """
    with open_regular(path, where) as file:
        size = os.fstat(file.fileno()).st_size
        return _shard(_read_header(file.read, size, where), size, name, where)


def remote_shard(fetch: Callable[[int, int], tuple[bytes, int]], name: str, where: str) -> tuple[Shard, list[TensorInfo]]:
    """The same for a file that is read by ranges.

    Args:
        fetch: (first byte, number of bytes) -> these bytes, fewer where the file ends, and its size.
    """
    start, size = fetch(0, PROBE)
    at = 0

    def read(count: int) -> bytes:
        nonlocal at
        first, at = at, at + count
        if at <= len(start):
            return start[first:at]
        return start[first:] + (fetch(len(start), at - len(start))[0] if len(start) < size else b"")

    return _shard(_read_header(read, size, where), size, name, where)


def _shard(raw: bytes, size: int, name: str, where: str) -> tuple[Shard, list[TensorInfo]]:
    """The shard of a raw header."""
    with _parsing:
        infos = _parse_header(_header_object(raw[8:], where), name, len(raw), where)
    end = max((info.start + info.nbytes for info in infos), default=len(raw))
    if end != size:
        state = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(
            f"{where}: {state}: the header describes {end} bytes, the file has {size}; fetch it again",
            kind=f"shards that are {state}",
        )
    return Shard(name, raw, end, tuple(info.name for info in infos)), infos


def _read_header(read: Callable[[int], bytes], size: int, where: str) -> bytes:
    """The header and the eight bytes of its length before it.

    Args:
        read: gives the next bytes of the file, so many.
    """
    prefix = read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(JSON_LIMIT, size - 8):
        raise CheckpointError(
            f"{where}: not a whole safetensors file ({size} bytes, header of {length}, at most {JSON_LIMIT}); fetch it again",
            kind="files that are not whole",
        )
    return prefix + read(length)


def _header_object(body: bytes, where: str) -> dict[str, Any]:
    try:
        header = parse_json(body)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: the header is not valid JSON ({error}); fetch it again", kind="headers that are not valid JSON"
        ) from error
    if not isinstance(header, dict) or not body.startswith(b"{"):  # the library does not take leading spaces
        raise CheckpointError(f"{where}: the header is not a JSON object; fetch it again", kind="headers that are no object")
    return header


def _parse_header(header: Mapping[str, Any], shard: str, data: int, where: str) -> list[TensorInfo]:
    """The tensors of a shard in file order. Of several that begin at one byte, those without bytes come first.

    Raises:
        CheckpointError: one fault for each bad entry. Holes and overlaps are reported where all entries are good.
    """
    faults = Faults()
    infos = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                faults.add(CheckpointError(f"{where}: __metadata__: expected names with strings; fetch it again"))
            continue
        parsed = _parse_entry(name, entry, shard, data)
        if isinstance(parsed, TensorInfo):
            infos.append(parsed)
        elif not faults.enough("bad header entries"):
            faults.add(CheckpointError(f"{where}: tensor {parsed}; fetch it again", kind="bad header entries"))
    faults.check()
    infos.sort(key=lambda info: (info.start, info.nbytes))
    expected = data
    problems = []
    for info in infos:
        if info.start != expected:
            kind = "a hole" if info.start > expected else "an overlap"
            problems.append(f"tensor {info.name} starts at byte {info.start}, expected {expected}: {kind}")
        expected = info.start + info.nbytes
    if problems:
        raise CheckpointError(
            f"{where}: the tensors do not lie one after the other (hole or overlap); fetch it again:\n{listing(problems)}",
            kind="headers with holes or overlaps",
        )
    return infos


def _parse_entry(name: str, entry: Any, shard: str, data: int) -> TensorInfo | str:
    """One tensor, or the problem with its entry, as text."""
    if not name or not name.isprintable() or len(name) > NAME_LIMIT:
        return f"{shown(repr(name))}: expected a name of 1 to {NAME_LIMIT} characters that print"
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except KeyError as error:
        return f"{shown(name)}: dtype or field {shown(error)} is not one that is read here"
    except (TypeError, ValueError):
        return f"{shown(name)}: malformed header entry {worded(entry)}"
    numbers = (*shape, begin, end)
    if len(shape) > DIMENSION_LIMIT or any(type(number) is not int for number in numbers):
        return f"{shown(name)}: malformed header entry {worded(entry)}"
    fits = all(abs(number) <= SIZE_LIMIT for number in numbers) and math.prod(max(1, size) for size in shape) <= SIZE_LIMIT
    if not fits or begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        return f"{shown(name)}: {shown(list(shape))} of {dtype} does not fill bytes {shown(begin)} to {shown(end)}"
    return TensorInfo(name, shard, dtype, shape, data + begin, end - begin)
