"""What a push puts on the Hub: one commit that says what it is, whole after interruptions, and none where nothing changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests import tiny
from tests.hub_server import HubServer
from tests.interpreter import Interpreter, Ran
from tests.publishing.conftest import IMPATIENT, contents, history

REPO = "tester/made"
LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
print(tokenizer.decode(tokenizer("a text")["input_ids"]), model(**tokenizer("a text", return_tensors="pt")).logits.shape[-1])
"""


@pytest.fixture(scope="module")
def made(
    interpreter: Interpreter, saved: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What each verb writes, by the verb. Read only: copy before changing it."""
    root = tmp_path_factory.mktemp("made")
    a, b = (Path(shutil.copytree(saved("mixtral", "per-expert", seed), root / name)) for seed, name in enumerate("ab"))
    calls = {
        "align": (a, b),
        "symmetry": (a, b, "--symmetry-only"),
        "apply": (root / "align", b),
        "merge": (a, b, "-t", "0.25"),
        "barrier": (a, b, "--text", text_file, "--points", "3", "--context", "32", "--no-routing"),
    }
    for name, arguments in calls.items():
        ran = interpreter.run(IMPATIENT, {"symmetry": "align"}.get(name, name), *arguments, "-o", root / name)
        assert ran.code == 0, ran.errors
    return {name: root / name for name in calls}


MESSAGES = {
    "align": "b aligned to a",
    "symmetry": "Symmetry that aligns b to a",
    "apply": "b in the coordinates of a saved symmetry",
    "merge": "Merge of a and b at t = 0.25",
    "barrier": "Perplexity barrier between a and b",
}


@pytest.mark.parametrize("create_pr", [False, True], ids=["commit", "pull request"])
@pytest.mark.parametrize("verb", MESSAGES)
def test_each_folder_is_one_commit_that_says_what_it_is(
    hub: HubServer, run: Callable[..., Ran], made: dict[str, Path], tmp_path: Path, verb: str, create_pr: bool
) -> None:
    folder = Path(shutil.copytree(made[verb], tmp_path / "folder"))
    ran = run("push", folder, REPO, *(["--create-pr"] if create_pr else []))
    assert ran.code == 0, ran.errors
    ref = "refs/pr/1" if create_pr else "main"
    assert hub.repositories[REPO].refs[ref][-1].message == MESSAGES[verb]
    [published] = history(hub, REPO, ref)
    assert published.items() >= contents(folder).items()
    assert published.keys() - contents(folder).keys() <= {"README.md"}  # reports and symmetries get one
    if create_pr:
        assert history(hub, REPO) == []


@pytest.mark.parametrize("verb", MESSAGES)
def test_the_same_push_again_makes_no_commit_and_says_so(
    hub: HubServer, run: Callable[..., Ran], made: dict[str, Path], tmp_path: Path, verb: str
) -> None:
    folder = Path(shutil.copytree(made[verb], tmp_path / "folder"))
    assert run("push", folder, REPO).code == 0
    head = hub.repositories[REPO].refs["main"][-1].oid
    hub.log.clear()
    for options in ((), ("--create-pr",)):
        ran = run("push", folder, REPO, *options)
        assert (ran.code, ran.output) == (
            0,
            f"nothing to publish: {REPO} holds all of it already ({hub.endpoint}/{REPO}/commit/{head})\n",
        )
    assert hub.repositories[REPO].refs.keys() == {"main"} and hub.repositories[REPO].refs["main"][-1].oid == head
    assert not any(request.method == "PUT" or "/commit/" in request.path for request in hub.log)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [hf_moe_lmc, report, symmetry]\n---\n# Changed\n")
    assert run("push", folder, REPO).code == 0
    assert len(history(hub, REPO)) == 2 and not any(request.method == "PUT" for request in hub.log)


def test_the_pulled_copy_has_the_same_bytes_and_loads_with_its_tokenizer(
    hub: HubServer, run: Callable[..., Ran], interpreter: Interpreter, made: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made["merge"], tmp_path / "folder"))
    assert 'model_id = "."  # this folder\n' in (folder / "README.md").read_text()
    ran = run("push", folder, REPO, "--private")
    assert ran.code == 0 and "names no licence" in ran.errors
    assert f'model_id = "{REPO}"' in (folder / "README.md").read_text()
    pulled = interpreter.run("import sys; from huggingface_hub import snapshot_download as s; print(s(sys.argv[1]))", REPO)
    assert pulled.code == 0, pulled.errors
    there = contents(Path(pulled.output.strip()))
    assert there.pop(".gitattributes") and there == contents(folder)
    loaded = interpreter.run(LOAD, REPO)
    assert (loaded.code, loaded.output) == (0, f"a text {tiny.VOCABULARY}\n"), loaded.errors


def test_a_folder_that_cannot_be_written_is_published_all_the_same(
    hub: HubServer, run: Callable[..., Ran], made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made["merge"], tmp_path / "folder"))
    (folder / ".README.md.new").mkdir()  # where the new card would be written
    ran = run("push", folder, REPO)
    assert ran.code == 0 and "not rewritten" in ran.errors
    assert f'model_id = "{REPO}"'.encode() in history(hub, REPO)[-1]["README.md"]
    assert run("push", folder, REPO).output.startswith("nothing to publish")


@pytest.mark.parametrize("verb", ["align", "apply", "merge", "barrier"])
def test_every_verb_publishes_what_it_wrote(
    hub: HubServer, run: Callable[..., Ran], made: dict[str, Path], text_file: Path, tmp_path: Path, verb: str
) -> None:
    a, b = made["align"].parent / "a", made["align"].parent / "b"
    more = (
        ("--text", text_file, "--points", "3", "--context", "32", "--no-routing") if verb == "barrier" else ("--license", "mit")
    )
    inputs = (made["align"], b) if verb == "apply" else (a, b)
    call = (verb, *inputs, "-o", tmp_path / "out", *more, "--push-to-hub", REPO, "--private")
    ran = run(*call)
    assert ran.code == 0 and f"published: {REPO}" in ran.output, ran
    [published] = history(hub, REPO)
    assert published.items() >= contents(tmp_path / "out").items()
    if verb != "barrier":
        card = ModelCard(published["README.md"].decode())
        assert card.data.license == "mit" and f'model_id = "{REPO}"' in card.text


STEPS = {
    "the list of files": ("POST", "/preupload/", False),
    "an upload": ("PUT", "/lfs/", False),
    "the commit": ("POST", "/commit/", False),
    "the answer to an upload": ("PUT", "/lfs/", True),
    "the answer to the commit": ("POST", "/commit/", True),
}


@pytest.mark.parametrize("step", STEPS)
def test_after_a_cut_connection_the_same_call_ends_it(
    hub: HubServer, run: Callable[..., Ran], made: dict[str, Path], tmp_path: Path, step: str
) -> None:
    """Whatever was lost: nothing is visible before the commit, and what came through is not sent twice."""
    folder = Path(shutil.copytree(made["merge"], tmp_path / "folder"))
    method, path, done = STEPS[step]
    hub.cut(method, path, times=1000, done=done)
    ran = run("push", folder, REPO)
    assert ran.code == 1 and "Traceback" not in ran.errors
    assert ran.errors.splitlines()[-1].startswith(f"error: {REPO}: ")
    visible = step == "the answer to the commit"
    assert len(history(hub, REPO)) == visible
    uploaded = set(hub.objects)
    hub._cuts.clear()
    hub.log.clear()
    ran = run("push", folder, REPO)
    assert ran.code == 0 and ran.output.startswith("nothing to publish" if visible else "published")
    assert history(hub, REPO) == [contents(folder)]
    sent = {request.path.removeprefix("/lfs/") for request in hub.log if request.method == "PUT"}
    assert not sent & uploaded and (sent or uploaded)


@pytest.mark.parametrize("path", ["/preupload/", "/lfs/objects/batch", "/lfs/[0-9a-f]*$", "/commit/"])
@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_short_outage_is_waited_out(
    hub: HubServer, run: Callable[..., Ran], made: dict[str, Path], tmp_path: Path, path: str, fault: str
) -> None:
    folder = Path(shutil.copytree(made["merge"], tmp_path / "folder"))
    if fault == "cut":
        hub.cut("PUT" if "[0-9" in path else "POST", path)
    else:
        hub.fail(503, path=path)
    ran = run("push", folder, REPO)
    assert ran.code == 0, ran.errors
    assert history(hub, REPO) == [contents(folder)]


def test_a_pull_request_is_not_asked_for_twice(
    hub: HubServer, run: Callable[..., Ran], made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made["merge"], tmp_path / "folder"))
    hub.publish(REPO, {})
    hub.fail(503, path="/commit/")
    run("push", folder, REPO, "--create-pr").expect(1, REPO, "503")
    assert hub.repositories[REPO].refs.keys() == {"main"} and hub.objects


def test_files_that_the_repository_ignores_are_published(
    hub: HubServer, run: Callable[..., Ran], made: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made["merge"], tmp_path / "folder"))
    hub.publish(REPO, {".gitignore": b"*.safetensors\n"})
    assert run("push", folder, REPO).code == 0
    assert history(hub, REPO)[-1].items() >= contents(folder).items()


def test_a_licence_that_the_hub_does_not_know_is_refused_before_any_work(
    hub: HubServer, run: Callable[..., Ran], made: dict[str, Path], tmp_path: Path
) -> None:
    a, b = made["align"].parent / "a", made["align"].parent / "b"
    call = ("merge", a, b, "-o", tmp_path / "out", "--no-align", "--license")
    run(*call, "apache2", "--push-to-hub", REPO).expect(2, "apache2", "license")
    assert not hub.repositories and not (tmp_path / "out").exists()
    assert run(*call, "apache-2.0", "--push-to-hub", REPO).code == 0
    assert ModelCard(history(hub, REPO)[0]["README.md"].decode()).data.license == "apache-2.0"
