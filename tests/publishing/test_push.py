"""Only what is finished is published. What the Hub makes of it is the matter of test_hub.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from hf_moe_lmc import merge
from hf_moe_lmc.checkpoints.contents import INDEX
from hf_moe_lmc.errors import InputError
from hf_moe_lmc.publishing import push as module
from hf_moe_lmc.publishing.push import push
from hf_moe_lmc.writing.output import FolderWriter
from tests import tiny

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Asked(Exception):
    """The Hub would have been asked."""


@pytest.fixture
def folder(saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished checkpoint in two shards."""

    def asked(*_: object, **__: object) -> None:
        raise Asked

    monkeypatch.setattr(module, "HfApi", asked)
    folder = tmp_path / "folder"
    folder.mkdir()
    tensors = tiny.tensors(saved("mixtral"))
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, members in parts.items() for name in members}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in saved("mixtral").iterdir():
        if file.name != "model.safetensors":
            shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text("# A model\n")
    return folder


def put(path: Path, data: bytes = b"some") -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(data)


UNFINISHED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a new output beside it": (lambda f: put(f.parent / ".folder.progress" / "output-0a" / "config.json"), "unfinished"),
    "a shard of one": (lambda f: put(f.parent / ".folder.progress" / "output-0a" / f"{SHARDS[0]}.unfinished"), "unfinished"),
    "the rest of it inside": (
        lambda f: put(f / ".progress" / "output-0a" / "alignment" / "symmetry.safetensors"),
        "unfinished",
    ),
    "an index that names a missing shard": (lambda f: (f / SHARDS[1]).unlink(), f"shard {SHARDS[1]}, listed in {INDEX}"),
    "an index that names missing tensors": (lambda f: shutil.copyfile(f / SHARDS[0], f / SHARDS[1]), "is in two shards"),
    "shards without an index": (lambda f: (f / INDEX).unlink(), f"2 safetensors files .* but no {INDEX}"),
    "an index alone": (lambda f: [(f / shard).unlink() for shard in SHARDS], "2 faults"),
    "half a shard": (lambda f: (f / SHARDS[0]).write_bytes((f / SHARDS[0]).read_bytes()[:-9]), "truncated"),
    "half an index": (lambda f: (f / INDEX).write_text((f / INDEX).read_text()[:-9]), "not valid JSON"),
}
FINISHED: dict[str, Callable[[Path], object]] = {
    "as it is": lambda f: None,
    "what was matched for another": lambda f: put(f.parent / ".folder.progress" / "matching-0a" / "layer-0.safetensors"),
    "an output of which nothing is there": lambda f: (f.parent / ".folder.progress" / "output-0a").mkdir(parents=True),
    "another's": lambda f: put(f.parent / ".other.progress" / "output-0a" / "config.json"),
}


@pytest.mark.parametrize("state", UNFINISHED)
def test_an_unfinished_folder_is_refused(folder: Path, state: str) -> None:
    change, message = UNFINISHED[state]
    change(folder)
    with pytest.raises(InputError, match=message):
        push(folder, "tester/new")


@pytest.mark.parametrize("state", FINISHED)
def test_a_finished_one_is_not(folder: Path, state: str) -> None:
    FINISHED[state](folder)
    with pytest.raises(Asked):
        push(folder, "tester/new")


def test_all_that_is_missing_is_said_at_once(folder: Path) -> None:
    for file in ("README.md", "config.json", SHARDS[0]):
        (folder / file).unlink()
    with pytest.raises(InputError, match=rf"(?s)3 faults.*the card.*config\.json is missing.*shard {SHARDS[0]}"):
        push(folder, "tester/new")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_stopped_call_left_is_refused_until_it_is_finished(
    folder: Path, saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Where the call was to replace an output, that one still stands, whole."""
    b, out = saved("mixtral", "per-expert", 1), tmp_path / "out"
    if overwrite:
        merge(folder, b, out, 0.25, align=False)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FolderWriter, "write_checkpoint_files", stop)
        merge(folder, b, out, align=False, overwrite=overwrite)
    assert out.exists() == overwrite
    with pytest.raises(InputError, match=r"out: unfinished: .*\.out\.progress holds what is done of it.*repeat it"):
        push(out, "tester/new")
    merge(folder, b, out, align=False, overwrite=overwrite)
    with pytest.raises(Asked):
        push(out, "tester/new")
