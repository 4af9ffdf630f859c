"""Files that somebody else wrote: only regular ones are opened, and JSON is read without leniency."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hf_moe_lmc.errors import CheckpointError, shown

JSON_LIMIT = 100_000_000  # bytes of one JSON document; the limit of the safetensors library for headers
_ROOM = 1 << 20  # below this, no document takes memory worth mentioning
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path, where: str) -> BinaryIO:
    """Opens a regular file for reading, never waiting: a named pipe or a device is refused.

    Raises:
        CheckpointError: naming `where`, and what is there.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: opening a device can have effects
            raise CheckpointError(f"{where}: expected a file, found {kind_of(path)}")
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        found = "a link that leads nowhere" if path.is_symlink() and not path.exists() else error.strerror
        raise CheckpointError(f"{where}: cannot be read ({found})") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it was exchanged meanwhile
        file.close()
        raise CheckpointError(f"{where}: expected a file")
    return file


def kind_of(path: Path) -> str | None:
    """What stands at a path, in words; None if nothing does."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a link that leads nowhere" if path.is_symlink() else None
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def parse_json(raw: bytes, *, constants: bool = False) -> Any:
    """A JSON document in UTF-8 in which every object has each key once.

    Memory: at most about 26 times the size of the document, as measured (many short keys; a header of tensors: 11 times).

    Args:
        constants: take NaN and Infinity, which Python writes although JSON has none.

    Raises:
        ValueError: anything else; the message says what, in one line.
    """
    if len(raw) > _ROOM and raw.count(b"[") + raw.count(b"{") > len(raw) // 6:
        raise ValueError("hardly anything but brackets")
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_once, parse_constant=None if constants else _no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(shown(error)) from error
    if _SURROGATE.search(text):
        _refuse_lone_surrogates(value)
    return value


def read_json_object(path: Path, where: str, *, constants: bool = False) -> dict[str, Any]:
    """A file that holds one JSON object; see `parse_json`.

    Raises:
        CheckpointError: naming `where`, and what is wrong.
    """
    with open_regular(path, where) as file:
        size = os.fstat(file.fileno()).st_size
        if size > JSON_LIMIT:
            raise CheckpointError(f"{where}: {size} bytes, expected at most {JSON_LIMIT}")
        raw = file.read(size)
    try:
        value = parse_json(raw, constants=constants)
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}); fetch it again, or correct it") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shown(repr(key))} is there twice")
            seen.add(key)
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _refuse_lone_surrogates(value: Any) -> None:
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"half a surrogate pair in {shown(repr(one))}") from error
        elif isinstance(one, Mapping):
            stack += [*one, *one.values()]
        elif isinstance(one, list):
            stack += one
