"""Hub ids as inputs: no more is fetched than is read, its size is said first, and the cache does without the Hub."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.hub_server import HubServer
from tests.interpreter import Interpreter, Ran
from tests.publishing.conftest import IMPATIENT, contents

OTHERS = {  # what repositories hold beside the weights for transformers
    "pytorch_model.bin": b"b", "pytorch_model.bin.index.json": b"{}", "model.fp16.safetensors": b"f", "q4_k_m.gguf": b"g",
    "onnx/model.onnx": b"o", "onnx/model.safetensors": b"o", "consolidated.safetensors": b"c", "original/tokenizer.model": b"t",
    "original/consolidated.00.pth": b"p", "tf_model.h5": b"h", "flax_model.msgpack": b"m", "training_args.bin": b"t",
    "optimizer.pt": b"o", "modeling_own.py": b"", "runs/events.out": b"e", "plot.png": b"i",
}  # fmt: skip
NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A checkpoint in several shards, as a repository has it."""
    folder = tiny.save(tiny.make_model("mixtral"), tmp_path_factory.mktemp("sharded"), "per-expert", shard="50KB")
    return {**contents(folder), "README.md": b"---\nlicense: mit\n---\n"}


@pytest.fixture
def cache(home: Path) -> Path:
    """The cache of the Hub, empty."""
    shutil.rmtree(home / "hub", ignore_errors=True)
    return home / "hub"


def merge(name: str, out: Path) -> tuple[object, ...]:
    return "merge", name, name, "-o", out, "--no-align"


def test_no_more_is_fetched_than_is_read_and_its_size_is_said_first(
    hub: HubServer, run: Callable[..., Ran], cache: Path, sharded: dict[str, bytes], tmp_path: Path
) -> None:
    commit = hub.publish("tester/large", {**sharded, **OTHERS})
    ran = run(*merge("tester/large", tmp_path / "out"))
    assert ran.code == 0, ran.errors
    fetched = contents(cache / "models--tester--large" / "snapshots" / commit.oid)
    needed = {file for file in sharded if file.endswith((".safetensors", ".index.json"))} | NEEDED & sharded.keys()
    assert fetched.keys() == needed and fetched.items() <= sharded.items()
    asked = {request.path.rpartition(f"{commit.oid}/")[2] for request in hub.log if "/resolve/" in request.path}
    assert not {file for file in asked if file in OTHERS}
    [said] = [line for line in ran.errors.splitlines() if "fetching" in line]
    listed = next(i for i, request in enumerate(hub.log) if "/tree/" in request.path)  # it is said then
    brought = {request.path.rpartition("/")[2] for request in hub.log[listed:] if request.method == "GET" and request.sent}
    brought &= sharded.keys()
    size = sum(len(sharded[file]) for file in brought)
    assert {file for file in sharded if file.endswith(".safetensors")} < brought
    assert said == f"note: tester/large: fetching {len(brought)} files, {size / 1000:.3g} kB, from the Hub into {cache}"
    again = run(*merge("tester/large", tmp_path / "again"))
    assert again.code == 0 and "fetching" not in again.errors
    plan = run(*merge("tester/large", tmp_path / "planned"), "--dry-run")
    assert plan.code == 0 and "to download" not in plan.output


def test_without_room_nothing_is_fetched(
    hub: HubServer, interpreter: Interpreter, cache: Path, sharded: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish("tester/large", sharded)
    full = "import shutil, collections as c; shutil.disk_usage = lambda path: c.namedtuple('U', 'free')(9); "
    interpreter.run(full + IMPATIENT, *merge("tester/large", tmp_path / "out")).expect(2, str(cache), "tester/large", "HF_HOME")
    assert not list(cache.rglob("model-*"))


def nobody() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("fault", "revision"), [("offline", ""), ("no network", ""), ("outage", ""), ("outage", "@v1"), ("outage", "@commit")]
)
def test_the_cache_does_without_the_hub(
    hub: HubServer,
    run: Callable[..., Ran],
    program: Callable[..., Ran],
    cache: Path,
    sharded: dict[str, bytes],
    tmp_path: Path,
    fault: str,
    revision: str,
) -> None:
    commit = hub.publish("tester/kept", sharded, revision="v1" if revision == "@v1" else "main")
    if revision == "@v1":
        hub.publish("tester/kept", {})
    name = "tester/kept" + revision.replace("commit", commit.oid)
    assert run(*merge(name, tmp_path / "online")).code == 0
    hub.log.clear()
    call = merge(name, tmp_path / "out")
    if fault == "offline":
        ran = program(*call, HF_HUB_OFFLINE="1")
    elif fault == "no network":
        ran = program(*call, HF_ENDPOINT=nobody())
    else:
        hub.fail(503, times=1000)
        ran = run(*call)
    assert ran.code == 0, ran.errors
    assert ("read from its cache" in ran.errors) == (fault != "offline")
    assert not any(request.status < 500 for request in hub.log)
    for file in ("model-00001-of-00004.safetensors", "README.md"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "online" / file).read_bytes()


def test_what_the_cache_lacks_is_named(
    hub: HubServer, run: Callable[..., Ran], cache: Path, sharded: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish("tester/kept", sharded)
    assert run("inspect", "tester/kept").code == 0  # headers alone
    hub.fail(503, times=1000)
    ran = run(*merge("tester/kept", tmp_path / "out"))
    assert ran.code == 2 and "repeat the call with a connection" in ran.errors and "model-00001-of" in ran.errors
    run("inspect", "tester/unseen").expect(1, "tester/unseen", "503", "repeat the same call")


def test_a_gate_leads_to_its_page(hub: HubServer, run: Callable[..., Ran], cache: Path, sharded: dict[str, bytes]) -> None:
    hub.publish("tester/gated", sharded, gated=True)
    for name in ("tester/gated", "tester/gated@main"):
        run("inspect", name).expect(
            2, name, "Access to model tester/gated is restricted", f"{hub.endpoint}/tester/gated", "HF_TOKEN"
        )


def test_the_token_and_the_cache_of_the_environment_are_used(
    hub: HubServer, run: Callable[..., Ran], program: Callable[..., Ran], sharded: dict[str, bytes], tmp_path: Path
) -> None:
    hub.publish("tester/private", sharded, private=True)
    assert program("inspect", "tester/private", HF_HOME=str(tmp_path / "elsewhere")).code == 0
    assert list((tmp_path / "elsewhere" / "hub" / "models--tester--private").rglob("config.json"))
    run("inspect", "tester/private", HF_TOKEN="").expect(2, "tester/private", "hf auth login")


EXTENSION = {"owner": "us", "repo": "hf-moe-lmc", "repo_id": "us/hf-moe-lmc", "short_name": "moe-lmc", "type": "python"}


def test_the_hf_command_runs_us_as_an_extension(program: Callable[..., Ran], interpreter: Interpreter, tmp_path: Path) -> None:
    """It finds the console script through the manifest that `hf extensions install` writes."""
    folder = tmp_path / "home" / ".local" / "share" / "hf" / "extensions" / "hf-moe-lmc"
    folder.mkdir(parents=True)
    script = folder / "hf-moe-lmc"
    script.write_text('#!/bin/sh\nexec "$PYTHON" -m hf_moe_lmc "$@"\n')
    script.chmod(0o755)
    manifest = {**EXTENSION, "executable_path": str(script), "installed_at": "2026-01-01T00:00:00+00:00"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    hf = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; sys.exit(main())"
    settings = {"HOME": str(tmp_path / "home"), "PYTHON": sys.executable, "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    ran = interpreter.run(hf, "moe-lmc", "--version", **settings)
    assert ran.code == 0 and ran.output.startswith("hf-moe-lmc "), ran
    assert interpreter.run(hf, "moe-lmc", "inspect", "./nowhere", **settings).code == 2
