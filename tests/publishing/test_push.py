"""What a push does to what a repository holds already."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests import tiny
from tests.hub_server import HubServer
from tests.interpreter import COMMAND_LINE, Interpreter, Ran
from tests.publishing.conftest import contents, history

REPO = "tester/taken"
INDEX = "model.safetensors.index.json"
CARD = "---\ntags:\n- moe\n- hf_moe_lmc\n---\n# Ours\n"

# What is never weights of the checkpoint: it stays, whatever is pushed.
BYSTANDERS = {
    "q4.gguf": b"gguf", "consolidated.safetensors": b"c", "consolidated.00.pth": b"p", "original/model.safetensors": b"o",
    "original/consolidated.00.pth": b"o", "onnx/model.onnx": b"x", "onnx/model.safetensors": b"x", "plot.png": b"i",
    "train.parquet": b"d", "adapter_model.safetensors": b"a", "adapter_config.json": b"{}", "symmetry.safetensors": b"s",
    "tokenizer_extra.txt": b"t", "subfolder/model.safetensors": b"m", "adapters/adapter_model.bin": b"a",
}  # fmt: skip


def index(*files: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor{i}": file for i, file in enumerate(files)}}).encode()


def numbered(count: int, name: str = "model", ending: str = ".safetensors") -> dict[str, bytes]:
    return {f"{name}-{i + 1:05}-of-{count:05}{ending}": b"old" for i in range(count)}


HELD: dict[str, dict[str, bytes]] = {
    "single": {"model.safetensors": b"old"},
    "two shards": {INDEX: index(*numbered(2)), **numbered(2)},
    "nine shards": {INDEX: index(*numbered(9)), **numbered(9)},
    "single and shards": {"model.safetensors": b"old", INDEX: index(*numbered(9)), **numbered(9)},
    "shards without index": numbered(4),
    "index alone": {INDEX: index("gone.safetensors")},
    "index that is damaged": {INDEX: b"{", **numbered(2)},
    "shards with names of their own": {
        INDEX: index("part-a.safetensors", "parts/b.safetensors"),
        "part-a.safetensors": b"old",
        "parts/b.safetensors": b"old",
    },
    "pickle": {"pytorch_model.bin": b"old"},
    "pickled shards": {"pytorch_model.bin.index.json": index("w.bin"), "w.bin": b"old", **numbered(2, "pytorch_model", ".bin")},
    "variant": {"model.fp16.safetensors": b"old"},
    "variant in shards": {
        "model.safetensors.index.fp16.json": index(*numbered(2, "model.fp16")),
        **numbered(2, "model.fp16"),
        "model-00001-of-00001.bf16.safetensors": b"old",
    },
    "named by the configuration": {"config.json": b'{"transformers_weights": "own.safetensors"}', "own.safetensors": b"old"},
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in three shards that could be published."""
    folder = tiny.save(tiny.make_model("mixtral", 1), tmp_path_factory.mktemp("sharded"), "per-expert", shard="50KB")
    (folder / "README.md").write_text(CARD)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def weights_of(held: Mapping[str, bytes]) -> set[str]:
    return held.keys() - {"config.json"}


@pytest.mark.parametrize("form", ["finished", "sharded"])
@pytest.mark.parametrize("held", HELD)
def test_weights_are_replaced_only_when_asked(
    hub: HubServer, run: Callable[..., Ran], request: pytest.FixtureRequest, form: str, held: str
) -> None:
    folder, there = request.getfixturevalue(form), HELD[held]
    hub.publish(REPO, {**there, **BYSTANDERS})
    before = history(hub, REPO)
    run("push", folder, REPO).expect(2, REPO, "--overwrite", *weights_of(there))
    assert history(hub, REPO) == before and not hub.objects
    assert {request.method for request in hub.log if request.path != "/api/repos/create"} <= {"GET", "HEAD"}

    outcome = run("push", folder, REPO, "--overwrite")
    assert outcome.code == 0, outcome.errors
    assert history(hub, REPO)[len(before) :] == [{**BYSTANDERS, **contents(folder)}]
    for said in ("adapter_config.json", "consolidated.00.pth", "q4.gguf"):
        assert said in outcome.errors


def test_what_was_pushed_is_what_loads(
    hub: HubServer, run: Callable[..., Ran], model: Path, sharded: Path, tmp_path: Path
) -> None:
    """Without the deletion it is not: transformers takes the single file that stood there."""
    hub.publish(REPO, contents(model))
    assert run("push", sharded, REPO, "--overwrite").code == 0
    expected, old = tiny.logits(tiny.load(sharded)), tiny.logits(tiny.load(model))
    for name, files in (("now", {}), ("beside", {"model.safetensors": (model / "model.safetensors").read_bytes()})):
        for file, content in {**history(hub, REPO)[-1], **files}.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
    assert tiny.logits(tiny.load(tmp_path / "now")).equal(expected)
    assert tiny.logits(tiny.load(tmp_path / "beside")).equal(old) and not old.equal(expected)


def test_the_same_weights_again_replace_nothing(hub: HubServer, run: Callable[..., Ran], sharded: Path, tmp_path: Path) -> None:
    """Of equal sizes, contents tell whether they are the same."""
    folder = Path(shutil.copytree(sharded, tmp_path / "folder"))
    assert run("push", folder, REPO).code == 0
    (folder / "README.md").write_text(CARD + "more\n")
    assert run("push", folder, REPO).code == 0
    assert history(hub, REPO)[-1] == contents(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    changed = bytearray(shard.read_bytes())
    changed[-1] ^= 1
    shard.write_bytes(changed)
    run("push", folder, REPO).expect(2, shard.name, "--overwrite")
    hub.publish(REPO, {"model.safetensors": b"old"})
    run("push", sharded, REPO).expect(2, "model.safetensors", "--overwrite")


VERBS = ("align", "apply", "merge")


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_that_publish_look_before_any_work(
    hub: HubServer, run: Callable[..., Ran], saved: Callable[..., Path], tmp_path: Path, verb: str
) -> None:
    a, b, out = saved("mixtral"), saved("mixtral", "per-expert", 1), tmp_path / "out"
    if verb == "apply":
        assert run("align", a, b, "-o", tmp_path / "s", "--symmetry-only").code == 0
        a = tmp_path / "s"
    hub.publish(REPO, HELD["single"])
    call = (verb, a, b, "-o", out, "--push-to-hub", REPO, "--overwrite")  # that is for the folder
    hub.log.clear()
    found = [run(*call, *dry) for dry in ((), ("--dry-run",))]
    for outcome in found:
        outcome.expect(2, REPO, "model.safetensors", f"hf-moe-lmc push {out} {REPO} --overwrite")
    assert found[0].errors == found[1].errors
    assert {request.method for request in hub.log} == {"GET"}
    assert not out.exists() and not (tmp_path / ".out.progress").exists()
    # faults of the inputs are reported with it
    both = run(verb, a, tmp_path / "nowhere", "-o", out, "--push-to-hub", REPO, "--dry-run")
    assert both.code == 2 and "2 faults" in both.errors and "nowhere" in both.errors and REPO in both.errors
    # the way out leads out
    assert run(verb, a, b, "-o", out).code == 0
    assert run("push", out, REPO, "--overwrite").code == 0
    assert history(hub, REPO)[-1] == contents(out)


def test_without_a_login_or_a_network_a_verb_says_so_before_any_work(
    hub: HubServer, run: Callable[..., Ran], program: Callable[..., Ran], model: Path, sharded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    call = ("merge", model, model, "-o", out, "--no-align", "--push-to-hub", REPO)
    for dry in ((), ("--dry-run",)):
        run(*call, *dry, HF_TOKEN="").expect(1, REPO, "hf auth login")
        run(*call, *dry, HF_TOKEN="hf_wrong").expect(1, REPO, "hf auth login")
    program(*call, HF_HUB_OFFLINE="1").expect(1, REPO, "offline")
    program("push", sharded, REPO, HF_HUB_OFFLINE="1").expect(1, REPO, "offline")
    assert not out.exists() and not hub.repositories


def test_a_repository_without_weights_or_owner_is_no_obstacle(
    hub: HubServer, run: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    hub.publish("tester/mine", BYSTANDERS)
    for name, repo_id in (("new", "tester/new"), ("mine", "tester/mine")):
        call = (
            "merge",
            model,
            model,
            "-o",
            tmp_path / name,
            "--no-align",
            "--push-to-hub",
            name if name == "mine" else repo_id,
        )
        assert run(*call, "--dry-run").code == 0
        assert ("tester/new" in hub.repositories) is False
        assert run(*call).code == 0
        assert history(hub, repo_id)[-1].items() >= contents(tmp_path / name).items()
        del hub.repositories[repo_id]


@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/commit/"])
def test_who_may_not_write_is_told_in_one_line(hub: HubServer, run: Callable[..., Ran], sharded: Path, path: str) -> None:
    if "create" not in path:  # the client takes a repository that is there for one that may be written to
        hub.publish(REPO, {})
    hub.fail(403, path=path)
    run("push", sharded, REPO).expect(1, REPO, "hf auth login")
    assert REPO not in hub.repositories or history(hub, REPO) == [{}]


def test_a_verb_asks_before_any_work_whether_it_may_write(
    hub: HubServer, run: Callable[..., Ran], saved: Callable[..., Path], tmp_path: Path
) -> None:
    hub.publish(REPO, {})
    hub.fail(403, path="/auth-check/write")
    call = ("merge", saved("mixtral"), saved("mixtral", "per-expert", 1), "-o", tmp_path / "out", "--push-to-hub", REPO)
    run(*call).expect(1, REPO, "hf auth login")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", [409, 412])
def test_somebody_who_was_faster_keeps_what_they_pushed(
    hub: HubServer, run: Callable[..., Ran], sharded: Path, status: int
) -> None:
    hub.publish(REPO, HELD["single"])
    if status == 412:
        hub.meanwhile("/commit/", lambda: hub.publish(REPO, {"model.safetensors": b"theirs"}))
    else:
        hub.fail(409, path="/commit/")
    run("push", sharded, REPO, "--overwrite").expect(1, REPO, "changed it since it was looked at", "push again")
    expected = b"theirs" if status == 412 else b"old"
    assert history(hub, REPO)[-1] == {"model.safetensors": expected}
    assert run("push", sharded, REPO, "--overwrite").code == 0
    assert history(hub, REPO)[-1] == contents(sharded)


def test_a_verb_that_was_overtaken_says_that_its_output_is_finished(
    hub: HubServer, run: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    hub.meanwhile("/api/repos/create", lambda: hub.publish(REPO, HELD["single"]))
    outcome = run("merge", model, model, "-o", tmp_path / "out", "--no-align", "--push-to-hub", REPO, "--private")
    assert outcome.code == 2 and "model.safetensors" in outcome.errors
    assert f"is finished; publish it with: hf-moe-lmc push {tmp_path / 'out'} {REPO} --private" in outcome.errors
    assert history(hub, REPO) == [HELD["single"]]


def test_a_branch_is_looked_at_itself(hub: HubServer, run: Callable[..., Ran], sharded: Path) -> None:
    hub.publish(REPO, {"README.md": CARD.encode()})
    hub.publish(REPO, {"model.safetensors": b"old"}, revision="v1")
    run("push", sharded, REPO, "--revision", "v1").expect(2, f"{REPO}@v1", "model.safetensors")
    assert run("push", sharded, REPO).code == 0
    assert run("push", sharded, REPO, "--revision", "v1", "--overwrite").code == 0
    assert history(hub, REPO, "v1")[-1] == contents(sharded)


def test_a_new_branch_takes_nothing_from_the_one_that_it_begins_as(
    hub: HubServer, run: Callable[..., Ran], sharded: Path
) -> None:
    there = {**HELD["single"], "README.md": b"# Theirs\n", "plot.png": b"i"}
    hub.publish(REPO, there)
    assert run("push", sharded, REPO, "--revision", "new").code == 0
    assert history(hub, REPO) == [there]
    assert history(hub, REPO, "new")[-1] == {"plot.png": b"i", **contents(sharded)}


def test_a_pull_request_is_held_to_the_branch_that_it_targets(hub: HubServer, run: Callable[..., Ran], sharded: Path) -> None:
    hub.publish(REPO, HELD["nine shards"])
    run("push", sharded, REPO, "--create-pr").expect(2, INDEX)
    run("push", sharded, REPO, "--create-pr", "--revision", "nowhere").expect(2, "no such revision")
    assert hub.repositories[REPO].refs.keys() == {"main"}
    assert run("push", sharded, REPO, "--create-pr", "--overwrite").code == 0
    assert history(hub, REPO) == [HELD["nine shards"]]
    assert history(hub, REPO, "refs/pr/1")[-1] == contents(sharded)


@pytest.mark.parametrize(
    ("there", "options", "stays"),
    [
        ("# Somebody's\n", (), True),
        ("---\ntags:\n- moe\n---\n# Somebody's\n", (), True),
        ("---\ntags: [moe\n---\n# Damaged, with hf_moe_lmc in its text\n", (), True),
        ("---\ntags: hf_moe_lmc\n---\nno list\n", (), True),
        ("---\nlicense: mit\n---\n# Somebody's\n", ("--overwrite",), True),
        ("---\nlicense: mit\n---\n# Somebody's\n", ("--overwrite-card",), False),
        ("---\ntags:\n- hf_moe_lmc\n---\n# Of an older push\n", (), False),
        ("---\ntags:\n- hf_moe_lmc\n- report\n---\n# Of a report\n", (), False),
    ],
)
def test_a_card_of_somebody_else_stays(
    hub: HubServer, run: Callable[..., Ran], sharded: Path, there: str, options: tuple[str, ...], stays: bool
) -> None:
    hub.publish(REPO, {"README.md": there.encode()})
    outcome = run("push", sharded, REPO, *options)
    assert outcome.code == 0, outcome.errors
    ours = contents(sharded)
    assert history(hub, REPO)[-1] == {**ours, "README.md": there.encode() if stays else ours["README.md"]}
    assert ("--overwrite-card" in outcome.errors) == stays


def test_tokenizer_files_that_stay_are_named(hub: HubServer, run: Callable[..., Ran], sharded: Path) -> None:
    hub.publish(REPO, {"chat_template.jinja": b"{{ old }}", "notes.txt": b""})
    outcome = run("push", sharded, REPO)
    assert outcome.code == 0 and "chat_template.jinja" in outcome.errors and "notes.txt" not in outcome.errors


@pytest.fixture(scope="module")
def report(
    interpreter: Interpreter, saved: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `barrier` writes."""
    out = tmp_path_factory.mktemp("report") / "out"
    a, b = saved("mixtral"), saved("mixtral", "per-expert", 1)
    outcome = interpreter.run(COMMAND_LINE, "barrier", a, b, "-o", out, "--text", text_file, "--points", "3", "--context", "32")
    assert outcome.code == 0, outcome.errors
    return out


def test_a_report_is_published_with_its_text_as_the_card(
    hub: HubServer, run: Callable[..., Ran], report: Path, tmp_path: Path
) -> None:
    outcome = run("push", report, "tester/report")
    assert outcome.code == 0 and "names folders of this machine" not in outcome.errors
    assert str(tmp_path.parent) not in (report / "report.json").read_text()
    [published] = history(hub, "tester/report")
    card = published.pop("README.md").decode()
    assert published == contents(report)
    assert card.endswith((report / "report.md").read_text()) and "hf_moe_lmc" in card
    assert set(re.findall(r"\]\((\S+\.png)\)", card)) <= published.keys()

    other = Path(shutil.copytree(report, tmp_path / "other"))
    (other / "report.md").write_text("# Measured anew\n")
    content = json.loads((other / "report.json").read_text())
    content["a"]["source"] = "/home/me/model"  # as older releases wrote it
    (other / "report.json").write_text(json.dumps(content))
    outcome = run("push", other, "tester/report")
    assert outcome.code == 0 and "report.json: names folders of this machine" in outcome.errors
    assert history(hub, "tester/report")[-1]["README.md"].endswith(b"# Measured anew\n")


@pytest.mark.parametrize("kind", ["report", "symmetry", "alignment"])
def test_what_holds_no_weights_takes_none_away(
    hub: HubServer, run: Callable[..., Ran], report: Path, tmp_path: Path, kind: str
) -> None:
    folder = report
    if kind != "report":
        folder = tmp_path / "folder"
        place = folder / "alignment" if kind == "alignment" else folder
        place.mkdir(parents=True)
        shutil.copyfile(report / "symmetry.safetensors", place / "symmetry.safetensors")
    there = {**HELD["single and shards"], **HELD["pickle"], "README.md": CARD.encode()}
    hub.publish(REPO, there)
    for options in ((), ("--overwrite",)):
        outcome = run("push", folder, REPO, *options)
        assert outcome.code == 0 and "--overwrite-card" in outcome.errors
        assert history(hub, REPO)[-1] == {**there, **contents(folder)}
    assert run("push", folder, f"{REPO}-new").code == 0
    assert b"hf_moe_lmc" in history(hub, f"{REPO}-new")[-1]["README.md"]


def test_verbs_publish_reports_and_symmetries(
    hub: HubServer, run: Callable[..., Ran], saved: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    there = HELD["single"]
    hub.publish(REPO, there)
    pair = saved("mixtral"), saved("mixtral", "per-expert", 1)
    barrier = ("barrier", *pair, "--text", text_file, "--points", "2", "--context", "32", "--no-routing")
    for name, call in (("r", barrier), ("s", ("align", *pair, "--symmetry-only"))):
        call = (*call, "-o", tmp_path / name, "--push-to-hub", REPO)
        seen = len(history(hub, REPO))
        assert run(*call, "--dry-run").code == 0
        assert len(history(hub, REPO)) == seen
        outcome = run(*call)
        assert outcome.code == 0 and f"published: {REPO}" in outcome.output
        assert history(hub, REPO)[-1].items() >= {**there, **contents(tmp_path / name)}.items()


def remove_a_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()


def cut_a_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])


def leave_an_output_beside(folder: Path) -> None:
    begun = folder.parent / f".{folder.name}.progress" / "output-0"
    begun.mkdir(parents=True)
    (begun / "config.json").write_text("{}")


def leave_an_output_inside(folder: Path) -> None:
    (folder / ".progress" / "output-0").mkdir(parents=True)
    (folder / ".progress" / "publication.json").write_text("{}")
    (folder / ".progress" / "output-0" / "config.json").write_text("{}")


UNFINISHED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (remove_a_shard, "missing model-0000"),
    "cut shard": (cut_a_shard, "truncated"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "shards but no"),
    "single file beside the index": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "the single file"),
    "another shard": (lambda folder: (folder / "model-00009-of-00009.safetensors").write_bytes(b""), "model-00009-of-00009"),
    "output beside": (leave_an_output_beside, ".folder.progress"),
    "output inside": (leave_an_output_inside, ".progress"),
    "weights elsewhere": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "transformers_weights": "own.safetensors"})
        ),
        "own.safetensors",
    ),
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_an_unfinished_folder_is_refused_before_any_request(
    hub: HubServer, run: Callable[..., Ran], sharded: Path, tmp_path: Path, case: str
) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "folder"))
    change, complaint = UNFINISHED[case]
    change(folder)
    run("push", folder, REPO).expect(2, str(folder), complaint)
    assert not hub.log


def test_traces_of_a_finished_call_are_no_obstacle(
    hub: HubServer, run: Callable[..., Ran], sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "folder"))
    progress = tmp_path / ".folder.progress"
    (progress / "matched-0").mkdir(parents=True)
    (progress / "output-1" / "alignment").mkdir(parents=True)
    (folder / ".progress" / "output-0").mkdir(parents=True)
    (progress / "publication.json").write_text("{}")
    assert run("push", folder, REPO).code == 0
    (tmp_path / ".begun.progress" / "output-0").mkdir(parents=True)
    run("push", tmp_path / "begun", REPO).expect(2, "no such folder to publish yet", ".begun.progress")
    (tmp_path / "empty").mkdir()
    run("push", tmp_path / "empty", REPO).expect(2, "nothing to publish")


def test_the_outputs_within_a_folder_are_named_with_their_commands(
    hub: HubServer, run: Callable[..., Ran], sharded: Path, report: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out of one call"
    for name in ("t0.3", "t0.5", "deeper/t0.7"):
        shutil.copytree(sharded, out / name)
        (out / name / "alignment").mkdir(exist_ok=True)
        shutil.copyfile(report / "symmetry.safetensors", out / name / "alignment" / "symmetry.safetensors")
    shutil.copytree(report, out / "barrier")
    remove_a_shard(Path(shutil.copytree(sharded, out / "t0.6")))
    outcome = run("push", out, REPO)
    assert outcome.code == 2 and "found none of them in the folder itself. Publish what it holds" in outcome.errors
    named = re.findall(r"hf-moe-lmc push '(.+)' OWNER/NAME", outcome.errors)
    assert named == [str(out / name) for name in ("barrier", "deeper/t0.7", "t0.3", "t0.5")]
    assert not hub.log
    assert run("push", named[0], REPO).code == 0
