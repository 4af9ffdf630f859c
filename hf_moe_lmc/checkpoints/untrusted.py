"""Files that somebody else wrote. Only regular ones are opened, and JSON is read strictly."""

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
_SMALL = 1 << 20  # bytes; a smaller document takes no memory worth mentioning
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path, where: str) -> BinaryIO:
    """Opens a regular file for reading, never waiting: a named pipe or a device is refused.

    Raises:
        CheckpointError: naming `where` and the kind of file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: opening a device can have effects
            raise CheckpointError(f"{where}: expected a file, found {kind_of(path)}")
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        reason = "a link that leads nowhere" if path.is_symlink() and not path.exists() else error.strerror
        raise CheckpointError(f"{where}: cannot be read ({reason})") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it was replaced meanwhile
        file.close()
        raise CheckpointError(f"{where}: expected a file")
    return file


def kind_of(path: Path) -> str | None:
    """The kind of file at a path, as text; None if there is none."""
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
        ValueError: anything else, with the reason in one line.
    """
    if len(raw) > _SMALL and raw.count(b"[") + raw.count(b"{") > len(raw) // 6:
        raise ValueError("hardly anything but brackets")
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=None if constants else _no_constant)
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
        CheckpointError: naming `where` and the problem.
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


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shown(repr(key))} is there twice")
            seen.add(key)
    return unique


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _refuse_lone_surrogates(value: Any) -> None:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"half a surrogate pair in {shown(repr(item))}") from error
        elif isinstance(item, Mapping):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
