"""README.md and docs/: what they show runs, what they quote is true, what they link is there, and they read easily."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import hf_moe_lmc
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.matching import assignment, certificate, expert_costs, moves, units
from hf_moe_lmc.moe import registry
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.perplexity import bootstrap
from hf_moe_lmc.writing import shard_file, spans
from tests import prose, tiny
from tests.scripts import script

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {".": "*.md", "docs": "*.md", "model_cards": "README.md"}
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for folder, pattern in FOLDERS.items()
    for path in sorted((ROOT / folder).glob(pattern))
}
# Written from docstrings, schemas and data: their words are tested where they come from.
GENERATED = tuple(f"docs/{name}.md" for name in ("api", "command_line", "documents", "families", "faults", "report"))
WORDS = 25  # of a sentence, at most

# What the examples name, and what stands for it here.
SUBSTITUTES = {
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "./model-b",
    "mistralai/Mixtral-8x7B-v0.1": "./model-a",
    "Qwen/Qwen3-30B-A3B": "./model-a",
    "./my-finetune": "./model-b",
    "--dataset Salesforce/wikitext --dataset-config wikitext-2-raw-v1": "--dataset ./dataset",
    "--max-tokens 65536": "--max-tokens 200 --points 3",
    "--text held_out.txt": "--text held_out.txt --points 3",
    "points=25": "points=3",
    "refine=2": "refine=2, points=3",
}
# Lines of the examples that do not run here, by how they begin, and why.
EXCEPTED = {
    "bash scripts/demo.sh": "makes an environment and trains for minutes",
    "bash scripts/check.sh": "makes an environment and runs these tests",
    "hf-moe-lmc merge ./model-a ./model-b -t best": "warns, as an end is best here; tests/verbs/test_merge_text.py runs it",
    "torchrun": "starts processes, as tests/runtime/test_processes.py does; its arguments are parsed",
    "srun": "needs Slurm; its arguments are parsed",
}
# Numbers that a page quotes of the code.
QUOTED = [
    ("docs/matching.md", f"more than {units.SMALL:,} units"),
    ("docs/matching.md", f"a probability of at most {certificate.FAILURE:g}"),
    ("docs/matching.md", f"has {certificate.COLUMNS} columns, of the gate rows"),
    ("docs/matching.md", f"has {certificate.WIDER} columns, of all rows"),
    ("docs/matching.md", f"by more than {100 * units.SCALE_GAIN:g} %"),
    ("docs/matching.md", f"by no more than {100 * moves.UNIT_GAIN:g} %"),
    ("docs/memory.md", f"more than {units.SMALL:,} units"),
    ("docs/memory.md", f"{3 * certificate.WIDER} float32 numbers"),
    ("docs/memory.md", f"three [{certificate.WIDER}, {certificate.WIDER}] matrices"),
    ("docs/memory.md", f"float64 up to {assignment.SPARSE:,} units"),
    ("docs/memory.md", f"{4 * units.BLOCK >> 20} MiB"),
    ("docs/memory.md", f"at most {expert_costs.WORKSPACE >> 20} MiB"),
    ("docs/memory.md", f"{2 * spans.SPAN >> 20} MiB in each of at most four threads"),
    ("docs/outputs.md", f"cut to {spans.SPAN >> 20} MiB"),
    ("docs/barrier.md", f"fewer than {bootstrap.FEW_CLUSTERS} documents"),
    ("docs/barrier.md", f"with {bootstrap.Bootstrap.replicates:,} resamples"),
]


def read(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


class StandIn:
    """The Hub's client, as far as `push` asks it for anything; what it is asked is on record."""

    commits: list[dict[str, Any]]
    endpoint = "https://huggingface.co"

    def __init__(self, token: str | None = None) -> None: ...

    def create_repo(self, repo_id: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def model_info(self, repo_id: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(sha="0" * 40, siblings=[])

    def auth_check(self, repo_id: str, *, write: bool) -> None: ...

    def create_branch(self, repo_id: str, **_: object) -> None: ...

    def list_repo_tree(self, repo_id: str, **_: object) -> list[object]:
        return []

    def preupload_lfs_files(self, repo_id: str, additions: list[object], **_: object) -> None: ...

    def create_commit(self, repo_id: str, operations: list[Any], **options: object) -> SimpleNamespace:
        self.commits.append({"repo_id": repo_id, "files": [one.path_in_repo for one in operations], **options})
        return SimpleNamespace(pr_url=None, commit_url=f"https://huggingface.co/{repo_id}/commit/0")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples take: model-a, model-b (a relative of A, shuffled), held_out.txt, sample.jsonl, dataset."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny.make_model("mixtral")
    tiny.save(model, folder / "model-a", "per-expert")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator) if parameter.ndim > 1 else 0
    tiny.save(model, folder / "sibling", "per-expert")
    with Checkpoint.open(folder / "sibling") as sibling:
        symmetry = read_model(sibling).random(generator, scale=2.0)
    hf_moe_lmc.apply(symmetry, folder / "sibling", folder / "model-b")
    shutil.rmtree(folder / "sibling")
    text = "The expert that answers is the one the router picked. "
    (folder / "held_out.txt").write_text(text * 6, encoding="utf-8")
    rows = [json.dumps({"text": f"Row {number}. {text}"}) for number in range(20)]
    (folder / "sample.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "dataset").mkdir()
    (folder / "dataset" / "test.txt").write_text(f"{text}\n" * 4, encoding="utf-8")
    return folder


@pytest.fixture
def reader(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[MoEFamily]]:
    """Puts a reader with the inputs into a folder of their own; returns what gives the families that an example registers."""
    for path in inputs.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    known = registry.families()
    monkeypatch.setattr(registry, "_FAMILIES", dict(known))
    monkeypatch.setattr("hf_moe_lmc.publishing.push.HfApi", StandIn)
    monkeypatch.setattr("hf_moe_lmc.publishing.push._validate", lambda card, where, endpoint: None)
    monkeypatch.setenv("HF_TOKEN", "of a reader")
    monkeypatch.setattr(StandIn, "commits", [], raising=False)

    def save(_: object, path: Path) -> None:  # drawing takes as long as all the rest
        for suffix in (".png", ".svg"):
            path.with_suffix(suffix).touch()

    monkeypatch.setattr("hf_moe_lmc.plots.style.save", save)
    return lambda: [family for model_type, family in registry.families().items() if model_type not in known]


def substituted(text: str) -> str:
    for shown, here in SUBSTITUTES.items():
        text = text.replace(shown, here)
    return text


def commands(text: str) -> list[list[str]]:
    """The words of each command line of a block, in one block's order."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_commands(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(text):
        line = " ".join(words)
        if line.startswith(tuple(EXCEPTED)):
            if "hf_moe_lmc" in words:
                parsers()[words[words.index("hf_moe_lmc") + 1]].parse_args(words[words.index("hf_moe_lmc") + 2 :])
            continue
        assert words[0] == "hf-moe-lmc", line
        assert main(words[1:]) == 0, f"{line}\n{capsys.readouterr().err}"


def parsers() -> dict[str, Any]:
    found: dict[str, Any] = script("render_command_line").parsers()
    return found


EXAMPLES = [page for page in PAGES if page not in GENERATED and prose.code(read(page))]


@pytest.mark.filterwarnings("ignore:(naive|aligned) path. the barrier may be higher")  # few points, to be quick
@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_of_a_page_run_in_their_order(
    page: str, reader: Callable[[], list[MoEFamily]], capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in prose.code(read(page)):
        text = substituted(block.text)
        if block.language == "bash":
            run_commands(text, capsys)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + text, page, "exec"), names)
        else:
            assert block.language == "text", f"{page}, line {block.line}: say whether it is bash, python or text"


def test_what_stands_for_an_example_is_needed() -> None:
    shown = [block for page in EXAMPLES for block in prose.code(read(page)) if block.language != "text"]
    assert not [name for name in SUBSTITUTES if not any(name in block.text for block in shown)]
    lines = [" ".join(words) for block in shown if block.language == "bash" for words in commands(block.text)]
    assert not [begin for begin in EXCEPTED if not any(line.startswith(begin) for line in lines)]


def test_an_example_that_fails_is_seen(reader: Callable[[], list[MoEFamily]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="no-such-model: no such folder"):
        run_commands("hf-moe-lmc inspect ./no-such-model", capsys)
    with pytest.raises(AssertionError, match="rm -r"):
        run_commands("rm -r model-a", capsys)


def test_publishing_in_the_examples_publishes(
    reader: Callable[[], list[MoEFamily]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_commands("hf-moe-lmc merge model-a model-b --no-align -o merged/ --push-to-hub me/merged", capsys)
    (commit,) = StandIn.commits
    assert commit["repo_id"] == "me/merged" and {"README.md", "config.json"} < set(commit["files"])


OF_ROOMS = ("matching", "moe", "symmetry", "perplexity")  # their tests run the examples of their modules
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "hf_moe_lmc").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8") and path.parent.name not in OF_ROOMS
]


def wrong_examples(module: ModuleType) -> str:
    """What is wrong with the examples in the docstrings of a module."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    found = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs={"lmc": hf_moe_lmc})
    for example in found:
        runner.run(example, out=said.append)
    return "".join(said) if any(one.examples for one in found) else "no examples"


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_in_docstrings_are_true(module: str, reader: Callable[[], list[MoEFamily]]) -> None:
    assert wrong_examples(importlib.import_module(module)) == ""


def test_an_example_in_a_docstring_that_is_wrong_is_seen() -> None:
    assert "Expected:\n    3\nGot:\n    2" in wrong_examples(ModuleType("wrong", "Example:\n    >>> 1 + 1\n    3\n"))


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("render_api", "docs/api.md"),
        ("render_command_line", "docs/command_line.md"),
        ("render_costs", "docs/costs.md"),
        ("render_upcycling", "docs/upcycling.md"),
        ("render_reproduction", "docs/reproduction.md"),
    ],
)
def test_a_generated_page_is_what_its_script_writes(name: str, page: str) -> None:
    assert read(page) == script(name).markdown(), "run: bash scripts/render_docs.sh"


def test_the_tables_and_the_picture_are_up_to_date() -> None:
    tables, architecture = script("render_readme"), script("render_architecture")
    known = {**tables.TABLES, "rooms": architecture.rooms_map}
    used = [name for page in PAGES for name in tables.names_in(read(page))]
    assert sorted(used) == sorted(known), "each table once"
    for page in PAGES:
        assert read(page) == tables.fill(read(page), known), f"{page}: run: bash scripts/render_docs.sh"
    assert (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8") == architecture.svg()


def test_a_table_that_is_out_of_date_is_seen() -> None:
    tables = script("render_readme")
    page = read("docs/matching.md")
    text = page.replace("| 1.180 |", "| 1.280 |")
    assert text != page and tables.fill(text, tables.TABLES) == page


def test_means_are_those_of_the_pairs() -> None:
    tables = script("render_readme")
    protocol = tables.read("paper_protocol")
    for name, setting in protocol["settings"].items():
        shares = " | ".join(f"{value:.1f} %" for value in setting["mean_percent_of_naive"].values())
        assert f"| {name} | {setting['mean_naive_barrier']:.3f} | {shares} |" in tables.protocol()
    # the goals: mean aligned barrier with default options, as a share of the naive one
    assert protocol["settings"]["first"]["mean_percent_of_naive"]["default"] <= 28
    assert protocol["settings"]["last"]["mean_percent_of_naive"]["default"] <= 42
    for file, page in (("paper_protocol", "docs/matching.md"), ("demo", "README.md"), ("upcycling", "docs/upcycling.md")):
        assert f"`{tables.read(file)['command']}`" in " ".join(read(page).split())
    assert f"`{tables.read('sweep_memory')['command']}`" in read("docs/memory.md")


def test_the_arrows_of_the_picture_are_imports() -> None:
    architecture = script("render_architecture")
    rooms = [room for row in architecture.rows() for room in row]
    arrows = architecture.imports(rooms)
    assert ("path", "perplexity") in arrows and ("path", "matching") not in arrows
    assert not [pair for pair in arrows if rooms.index(pair[0]) >= rooms.index(pair[1])]
    assert len(architecture.svg().split("marker-end")) - 1 == len(arrows)


def test_the_readme_is_short_and_names_every_verb() -> None:
    readme = read("README.md")
    assert len(readme.splitlines()) <= 150
    verbs = parsers()
    assert not [verb for verb in verbs if not re.search(rf"^\| `{verb}[ `]", readme, re.MULTILINE)]
    written = read("docs/outputs.md")
    assert not [verb for verb in verbs if f"`{verb}" not in written]
    assert hf_moe_lmc.known_families().summary.removesuffix(".") in readme


def test_every_public_name_is_explained() -> None:
    api = read("docs/api.md")
    assert not [name for name in hf_moe_lmc.__all__ if f"\n## {name}\n" not in api]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder, missing = PAGES[page].parent, []
    for link in prose.links(read(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (folder / target).resolve() if target else PAGES[page]
        if not path.exists() or (anchor and anchor not in prose.anchors(path.read_text(encoding="utf-8"))):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    named = re.findall(r"`((?:hf_moe_lmc|scripts|tests|docs)/[\w./-]+)`", read(page))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_page_can_be_reached() -> None:
    linked = {
        (PAGES[index].parent / link.partition("#")[0]).resolve()
        for index in ("README.md", "docs/README.md")
        for link in prose.links(read(index))
    }
    assert not [page for page, path in PAGES.items() if path not in linked and page != "README.md"]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_sentences_are_short(page: str) -> None:
    assert not [sentence for sentence in prose.sentences(read(page)) if prose.words(sentence) > WORDS]


def test_a_long_sentence_is_seen() -> None:
    long = " ".join(["word"] * 26)
    for text in (f"Short. {long[0].upper()}{long[1:]}.", f"- {long}.", f"{long[:60]}\n{long[61:]}", f"[{long}](there.md)"):
        assert max(map(prose.words, prose.sentences(text))) == 26, text
    for text in (f"```text\n{long}\n```", f"| {long} |", f"`{long}`", f"    {long}", f"{long[:90]}. {long[:90].upper()}"):
        assert max(map(prose.words, prose.sentences(text)), default=0) < 26, text


def test_pages_quote_the_numbers_of_the_code() -> None:
    flat = {page: " ".join(read(page).split()) for page in PAGES}
    assert not [(page, words) for page, words in QUOTED if words not in flat[page]]
    assert max(2, min(shard_file.WORKERS, 64)) == 4  # the threads that memory.md counts


def test_the_example_of_a_family_is_one(reader: Callable[[], list[MoEFamily]]) -> None:
    (example,) = [block.text for block in prose.code(read("docs/adding_a_family.md")) if block.language == "python"]
    exec(example, {})
    (family,) = reader()
    config = SimpleNamespace(n_routed_experts=8, zero_expert_num=2, moe_intermediate_size=4, hidden_size=6, use_bias=True)
    facts = family.at(config, 0)
    assert family.banks == ("", "zero") and facts.units["zero"].name == "rigid" and facts.sizes["zero.expert"] == 2
    assert family.evaluate(family.moe_layers, config, layer=0)
