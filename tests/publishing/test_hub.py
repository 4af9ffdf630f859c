"""Pull and push with the real client against a server of our own.

Commands run in other processes, because the client reads its endpoint when it is imported: in forks of one interpreter, and
in a fresh one where the whole program is the point, or where the client is offline.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import safe_open

from hf_moe_lmc.checkpoints.contents import INDEX
from tests import tiny
from tests.hub_server import Commit, HubServer, Request
from tests.interpreter import Ran
from tests.publishing.conftest import PROBE, contents, history
from tests.schemas import check_alignment


def of_shards(hub: HubServer) -> list[Request]:
    """Requests for weights that sent something."""
    return [request for request in hub.log if request.path.endswith(".safetensors") and request.sent]


def only_header_was_read(hub: HubServer, commit: Commit) -> bool:
    """Whether some of the commit's only shard was sent, by range, and not all of it."""
    asked = [request for request in of_shards(hub) if commit.oid in request.path]
    whole = len(commit.files["model.safetensors"])
    return all(request.range for request in asked) and 0 < sum(request.sent for request in asked) < whole


def test_inspect_reads_headers_alone(hub: HubServer, program: Callable[..., Ran], model: Path) -> None:
    commit = hub.publish("tester/a", contents(model))
    outcome = program("inspect", "tester/a")
    assert (outcome.code, outcome.errors) == (0, "")
    assert f"tester/a at {commit.oid[:12]}" in outcome.output
    assert only_header_was_read(hub, commit)
    assert not any("tokenizer" in request.path for request in hub.log)


@pytest.mark.parametrize("revision", ["old", "refs/pr/3", "commit"])
def test_inspect_at_a_revision(
    hub: HubServer, run: Callable[..., Ran], saved: Callable[..., Path], model: Path, revision: str
) -> None:
    """A branch, a pull request and a commit are read as they are asked for; main holds something else."""
    commit = hub.publish("tester/moving", contents(model), revision="old" if revision == "commit" else revision)
    hub.publish("tester/moving", contents(saved("olmoe")))
    outcome = run("inspect", f"tester/moving@{commit.oid if revision == 'commit' else revision}", "--json")
    assert outcome.code == 0, outcome.errors
    found = json.loads(outcome.output)
    assert (found["family"], found["commit"]) == ("mixtral", commit.oid)
    assert only_header_was_read(hub, commit)


def test_ids_without_owner_need_the_scheme(hub: HubServer, run: Callable[..., Ran], model: Path) -> None:
    hub.publish("legacy", contents(model))
    for name in ("hf://legacy", "hf://legacy@main"):
        assert run("inspect", name).code == 0
    run("inspect", "legacy").expect(2, "the Hub was not asked", "hf://")


def test_a_header_of_any_length_is_read(hub: HubServer, run: Callable[..., Ran], model: Path) -> None:
    """Longer than what the client asks for first; space after the JSON is part of the header."""
    whole = (model / "model.safetensors").read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    header = whole[8:first] + b" " * PROBE
    longer = len(header).to_bytes(8, "little") + header + whole[first:]
    commit = hub.publish("tester/long", {**contents(model), "model.safetensors": longer})
    assert run("inspect", "tester/long").code == 0
    assert only_header_was_read(hub, commit)


def test_align_pulls_and_publishes_in_one_commit(hub: HubServer, run: Callable[..., Ran], home: Path, tmp_path: Path) -> None:
    inputs = [tiny.save(tiny.make_model("olmoe", seed), tmp_path / f"{seed}", "per-expert", shard="20KB") for seed in (0, 1)]
    licence = {"README.md": b"---\nlicense: apache-2.0\n---\n"}
    a = hub.publish("tester/a", contents(inputs[0]))
    b = hub.publish("tester/b", contents(inputs[1]) | licence, revision="v1")
    outcome = run("align", "tester/a", "tester/b@v1", "-o", tmp_path / "out", "--push-to-hub", "tester/out")
    assert outcome.code == 0, outcome.errors
    assert "published: tester/out" in outcome.output

    for repo_id, commit, needed in (("a", a, ".safetensors"), ("b", b, ("README.md", ".safetensors"))):
        pulled = contents(home / "hub" / f"models--tester--{repo_id}" / "snapshots" / commit.oid)
        assert len([file for file in commit.files if file.endswith(needed)]) > 1
        assert all(pulled[file] == content for file, content in commit.files.items() if file.endswith(needed))

    written = contents(tmp_path / "out")
    assert history(hub, "tester/out") == [written]
    assert {"README.md", "config.json", "tokenizer.json", INDEX, "alignment/symmetry.safetensors"} < written.keys()
    assert {file for file in written if "/" not in file and file.endswith(".safetensors")} == {
        file for file in b.files if file.endswith(".safetensors")
    }
    report = json.loads(written["alignment/alignment.json"])
    check_alignment(report)
    assert {side: (report[side]["source"], report[side]["commit"]) for side in "ab"} == {
        "a": ("tester/a", a.oid),
        "b": ("tester/b", b.oid),
    }
    with safe_open(tmp_path / "out" / "alignment" / "symmetry.safetensors", "pt") as symmetry:
        assert symmetry.metadata()["b_commit"] == b.oid
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.license) == (["tester/b"], "apache-2.0")
    assert a.oid in card.text and b.oid in card.text
    assert str(tmp_path) not in card.content + written["alignment/alignment.json"].decode()


def test_merge_publishes_a_card_with_both_inputs(
    hub: HubServer, run: Callable[..., Ran], saved: Callable[..., Path], tmp_path: Path
) -> None:
    for seed, licence in enumerate(("mit", "apache-2.0")):
        card = f"---\nlicense: {licence}\n---\n".encode()
        hub.publish(f"tester/seed{seed}", contents(saved("mixtral", "per-expert", seed)) | {"README.md": card})
    outcome = run("merge", "tester/seed0", "tester/seed1", "-o", tmp_path / "out", "--push-to-hub", "tester/mean", "--private")
    assert outcome.code == 0, outcome.errors
    assert history(hub, "tester/mean") == [contents(tmp_path / "out")]
    assert hub.repositories["tester/mean"].private
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.base_model, data.base_model_relation) == (["tester/seed0", "tester/seed1"], "merge")
    assert data.license is None


def test_other_architectures_are_refused_from_headers(
    hub: HubServer, run: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**tiny.COMMON, num_local_experts=5, num_experts_per_tok=2)
    other = tiny.save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "other", "per-expert")
    assert (other / "model.safetensors").stat().st_size > PROBE
    commits = [hub.publish("tester/six", contents(model)), hub.publish("tester/five", contents(other))]
    outcome = run("align", "tester/six", "tester/five", "-o", tmp_path / "out", "--push-to-hub", "tester/out")
    assert outcome.code == 2
    assert "Traceback" not in outcome.errors and "size of axis expert: A has 6, B has 5" in outcome.errors
    assert all(only_header_was_read(hub, commit) for commit in commits)
    assert all(request.method in ("GET", "HEAD") for request in hub.log)
    assert not (tmp_path / "out").exists()


def test_push_publishes_once_and_then_nothing_new(hub: HubServer, run: Callable[..., Ran], finished: Path) -> None:
    outcome = run("push", finished, "tester/new", "--commit-message", "First")
    assert outcome.code == 0, outcome.errors
    assert history(hub, "tester/new") == [contents(finished)]
    commit = hub.repositories["tester/new"].refs["main"][-1]
    assert (commit.message, hub.repositories["tester/new"].private) == ("First", False)
    assert outcome.output == f"published: {hub.endpoint}/tester/new/commit/{commit.oid}\n"
    assert run("push", finished, "tester/new").code == 0
    assert len(history(hub, "tester/new")) == 1


def test_push_without_owner_publishes_under_the_user(hub: HubServer, run: Callable[..., Ran], finished: Path) -> None:
    outcome = run("push", finished, "mine", "--private")
    assert outcome.code == 0, outcome.errors
    assert history(hub, "tester/mine") == [contents(finished)]
    assert hub.repositories["tester/mine"].private


def test_push_opens_a_pull_request(hub: HubServer, run: Callable[..., Ran], finished: Path) -> None:
    outcome = run("push", finished, "tester/reviewed", "--private", "--create-pr")
    assert (outcome.code, outcome.output) == (0, f"published: {hub.endpoint}/tester/reviewed/discussions/1\n")
    assert hub.repositories["tester/reviewed"].private
    assert history(hub, "tester/reviewed") == []
    assert history(hub, "tester/reviewed", "refs/pr/1") == [contents(finished)]


def test_push_to_a_branch_makes_it(hub: HubServer, run: Callable[..., Ran], finished: Path) -> None:
    hub.publish("tester/branched", {"README.md": b"# Before\n"})
    before = history(hub, "tester/branched")
    for _ in range(2):  # the second time the branch is there
        assert run("push", finished, "tester/branched", "--revision", "aligned/v2").code == 0
    assert history(hub, "tester/branched") == before
    assert history(hub, "tester/branched", "aligned/v2") == [contents(finished)]


@pytest.mark.parametrize("token", ["", "hf_wrong"])
@pytest.mark.parametrize("there", [False, True])
def test_push_is_refused_without_a_good_token(
    hub: HubServer, run: Callable[..., Ran], finished: Path, token: str, there: bool
) -> None:
    if there:
        hub.publish("tester/theirs", {})
    run("push", finished, "tester/theirs", HF_TOKEN=token).expect(1, "tester/theirs", "hf auth login")
    assert (history(hub, "tester/theirs") == [{}]) if there else not hub.repositories
    assert not hub.objects


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [("README.md", "the card"), ("config.json", "is missing"), ("model.safetensors", "expected model.safetensors")],
)
def test_push_refuses_an_incomplete_folder_before_any_request(
    hub: HubServer, run: Callable[..., Ran], finished: Path, tmp_path: Path, missing: str, complaint: str
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "folder"))
    (folder / missing).unlink()
    run("push", folder, "tester/new").expect(2, str(folder), complaint)
    run("push", folder / "nowhere", "tester/new").expect(2, "no such folder")
    assert not hub.log


def test_push_refuses_a_card_that_the_hub_refuses(
    hub: HubServer, run: Callable[..., Ran], finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "folder"))
    (folder / "README.md").write_text("---\ntags: [moe\n---\n")
    run("push", folder, "tester/new").expect(2, "README.md")
    assert not hub.objects and history(hub, "tester/new") == []


def test_a_push_that_fails_shows_nothing_and_is_taken_up_again(hub: HubServer, run: Callable[..., Ran], finished: Path) -> None:
    hub.fail(403, method="PUT")
    run("push", finished, "tester/new").expect(1, "tester/new", "model.safetensors", "403")
    hub.fail(503, times=4, path="/commit/")
    run("push", finished, "tester/new").expect(1, "tester/new", "503")
    assert history(hub, "tester/new") == []
    hub.log.clear()
    assert run("push", finished, "tester/new").code == 0
    assert history(hub, "tester/new") == [contents(finished)]
    assert "PUT" not in {request.method for request in hub.log}  # uploaded by the one before


def test_uploads_are_tried_again_when_the_server_is_busy(hub: HubServer, run: Callable[..., Ran], finished: Path) -> None:
    hub.fail(503, method="PUT")
    assert run("push", finished, "tester/busy").code == 0
    assert [request.status for request in hub.log if request.method == "PUT"] == [503, 200]
    assert history(hub, "tester/busy") == [contents(finished)]


def test_small_files_and_headers_are_asked_for_again_when_the_server_is_busy(
    hub: HubServer, run: Callable[..., Ran], model: Path
) -> None:
    hub.publish("tester/slow", contents(model))
    hub.fail(503, path="/resolve/.*/config.json")
    hub.fail(503, path="safetensors")
    assert run("inspect", "tester/slow").code == 0
    assert [request.status for request in hub.log if request.path.endswith("config.json")] == [503, 200, 200]
    assert [request.status for request in hub.log if request.path.endswith("safetensors")] == [503, 206]


def test_what_is_not_tried_again_fails_in_one_line(hub: HubServer, run: Callable[..., Ran], model: Path) -> None:
    hub.publish("tester/busy", contents(model))
    hub.fail(503, path="/api/models/")
    run("inspect", "tester/busy").expect(1, "tester/busy", "503")
    assert run("inspect", "tester/busy").code == 0


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("tester/nobody", "no such repository"),
        ("tester/a@nowhere", "no such revision"),
        ("tester/private", "hf auth login"),
        ("tester/gated", "gated"),
        ("tester/cards", "expected model.safetensors"),
        ("tester/--", "Hub id"),
        ("tester/a@", "Hub id"),
        ("tester/a/b", "local path"),
        ("./tester/a", "local path"),
        ("/nowhere/at/all", "local path"),
        ("~/nowhere", "local path"),
        ("tester/a/", "local path"),
        ("folder/name", "local path"),
    ],
)
def test_a_wrong_name_is_an_error_of_the_user(
    hub: HubServer, run: Callable[..., Ran], home: Path, model: Path, name: str, complaint: str
) -> None:
    (home / "folder").mkdir(exist_ok=True)
    hub.publish("tester/a", contents(model))
    hub.publish("tester/private", contents(model), private=True)
    hub.publish("tester/gated", contents(model), gated=True)
    hub.publish("tester/cards", {"README.md": b""})
    run("inspect", name, HF_TOKEN="").expect(2, name, complaint)
    assert not (hub.log and complaint in ("local path", "Hub id"))
    assert not of_shards(hub)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:4],
        lambda whole: whole[:400],
        lambda whole: (1 << 40).to_bytes(8, "little") + whole[8:],
        lambda whole: whole[:8] + b"#" + whole[9:],
        lambda whole: (2).to_bytes(8, "little") + b"[]",
        lambda whole: (8).to_bytes(8, "little") + b'{"a": 1}',
    ],
    ids=["no length", "cut", "long", "no json", "list", "no tensor"],
)
def test_a_damaged_header_is_named(
    hub: HubServer, run: Callable[..., Ran], model: Path, damage: Callable[[bytes], bytes]
) -> None:
    whole = (model / "model.safetensors").read_bytes()
    hub.publish("tester/damaged", {**contents(model), "model.safetensors": damage(whole)})
    run("inspect", "tester/damaged").expect(2, "tester/damaged", "model.safetensors")


def test_a_truncated_shard_is_found_after_the_download(
    hub: HubServer, run: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    """Its header, all that is read before, is whole."""
    whole = (model / "model.safetensors").read_bytes()
    hub.publish("tester/whole", contents(model))
    hub.publish("tester/cut", {**contents(model), "model.safetensors": whole[:-100]})
    run("align", "tester/whole", "tester/cut", "-o", tmp_path / "out").expect(2, "truncated")
    assert not (tmp_path / "out").exists()


def test_a_server_that_cannot_be_reached_is_a_failure(run: Callable[..., Ran]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        run("inspect", "tester/unseen", HTTP_PROXY=nobody).expect(1, "tester/unseen", "cannot be reached")


def test_offline_the_cache_is_enough_and_what_it_lacks_is_refused(
    hub: HubServer, run: Callable[..., Ran], program: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    commit = hub.publish("tester/kept", contents(model))
    assert run("merge", "tester/kept", "tester/kept", "-o", tmp_path / "online", "--no-align").code == 0
    seen = len(hub.log)
    pinned = f"tester/kept@{commit.oid}"
    outcome = program("merge", pinned, pinned, "-o", tmp_path / "out", "--no-align", HF_HUB_OFFLINE="1")
    assert (outcome.code, len(hub.log)) == (0, seen), outcome.errors
    assert commit.oid in (tmp_path / "out" / "README.md").read_text()
    program("inspect", "tester/unseen", HF_HUB_OFFLINE="1").expect(1, "tester/unseen", "not in the cache")
