"""`compare` on the Hub: how little is fetched, that all of it is counted, and that the cache will do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hf_moe_lmc as lmc
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe.reading import read_model
from tests import tiny
from tests.hub_server import HubServer
from tests.interpreter import Ran
from tests.publishing.conftest import contents
from tests.schemas import COMPARISON, check


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A pair, B shuffled, whose shards are far longer than their headers."""
    folder = tmp_path_factory.mktemp("large")
    model = tiny.make_model("mixtral", hidden_size=64, intermediate_size=256)
    tiny.save(model, folder / "a", "per-expert", shard="1MB")
    with Checkpoint.open(folder / "a") as checkpoint:
        symmetry = read_model(checkpoint).random(torch.Generator().manual_seed(1))
    lmc.apply(symmetry, folder / "a", folder / "b")
    return [folder / "a", folder / "b"]


def test_little_is_fetched_from_the_hub_and_all_of_it_is_counted(
    hub: HubServer,
    run: Callable[..., Ran],
    home: Path,
    large: list[Path],
) -> None:
    shutil.rmtree(home / "hub", ignore_errors=True)
    names = []
    for folder in large:
        names.append(f"tester/{folder.name}")
        hub.publish(names[-1], contents(folder))
    hub.fail(503, times=2, path="safetensors")  # is asked for again
    hub.cut("GET", "safetensors", times=1)
    ran = run("compare", *names, "--json")
    assert ran.code == 0, ran.errors
    found = json.loads(ran.output)
    check(found, COMPARISON)
    local = lmc.compare(*large)
    assert found["sentence"] == local.sentence
    assert [layer["moved"] for layer in found["pairs"][0]["layers"]] == [layer.moved for layer in local.pairs[0].layers]
    for model, name in zip(found["models"], names, strict=True):
        answered = [one for one in hub.log if f"/{name}/resolve/" in one.path and one.method == "GET" and one.status < 300]
        assert model["bytes_fetched"] == sum(one.sent for one in answered)
        shards = [one for one in answered if one.path.endswith(".safetensors")]
        assert shards and all(one.range and one.status == 206 for one in shards) and model["ranges"] == len(shards)
        headers = {one.path for one in shards}
        size = sum(path.stat().st_size for path in large[0].glob("*.safetensors"))
        assert sum(one.sent for one in shards) < size // 2 and len(shards) < 3 * len(headers) + 40
    assert not list((home / "hub").rglob("*.safetensors"))


def test_what_another_revision_has_brought_into_the_cache_is_not_counted_again(
    hub: HubServer, run: Callable[..., Ran], home: Path, large: list[Path]
) -> None:
    shutil.rmtree(home / "hub", ignore_errors=True)
    for revision, folder in (("main", large[0]), ("other", large[1])):
        hub.publish("tester/a", contents(folder), revision=revision)
    assert run("compare", "tester/a", large[0], "--json").code == 0
    before = len(hub.log)
    ran = run("compare", "tester/a@other", large[0], "--json")
    assert ran.code == 0, ran.errors
    answered = [one for one in hub.log[before:] if "/resolve/" in one.path and one.method == "GET" and one.status < 300]
    assert json.loads(ran.output)["bytes_fetched"] == sum(one.sent for one in answered)


def test_a_merge_says_what_the_routers_tell_before_it_fetches_and_then_the_cache_will_do(
    hub: HubServer,
    run: Callable[..., Ran],
    home: Path,
    large: list[Path],
    tmp_path: Path,
) -> None:
    shutil.rmtree(home / "hub", ignore_errors=True)
    names = [f"tester/{folder.name}" for folder in large]
    for name, folder in zip(names, large, strict=True):
        hub.publish(name, contents(folder))
    ran = run("merge", *names, "-o", tmp_path / "out")
    assert ran.code == 0, ran.errors
    notes = [line for line in ran.errors.splitlines() if line.startswith("note:")]
    said = next(i for i, line in enumerate(notes) if "by their routers, B is of the same lineage as A, 3 of 3 layers" in line)
    assert any("fetching" in line for line in notes[said:]) and not any("fetching" in line for line in notes[:said])
    hub.fail(503, times=1000)
    offline = run("compare", *names, "--json")
    assert offline.code == 0, offline.errors
    assert json.loads(offline.output)["bytes_fetched"] == 0
