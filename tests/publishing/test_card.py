"""A card says what a reader needs, nothing of this machine, and nothing that is not so."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_moe_lmc as lmc
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.source import Repository
from hf_moe_lmc.cli.parser import parser
from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.by_text import TextMeans
from hf_moe_lmc.perplexity.references import Beside, Shares, references
from hf_moe_lmc.perplexity.report import BarrierReport
from hf_moe_lmc.perplexity.windows import Windows
from hf_moe_lmc.publishing.card import UNPUBLISHED, CardContent, Destination, check_license, model_card
from hf_moe_lmc.publishing.measured import Measured
from hf_moe_lmc.publishing.usage import auto_class, named_for
from tests import prose, tiny, zoo

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = {"kind": "files", "files": [{"name": "held_out.txt", "sha256": "0" * 64}]}
DATASET = {"kind": "dataset", "name": "Salesforce/wikitext", "config": "wikitext-2-v1", "split": "test", "revision": "abc"}


class OnHub(Repository):
    """A repository whose files are in a folder here."""

    def path(self, file: str) -> Path:
        return FOLDERS[self.repo_id] / file

    def files(self) -> list[str]:
        return [path.name for path in FOLDERS[self.repo_id].iterdir()]


FOLDERS: dict[str, Path] = {}


def on_hub(folder: Path, repo_id: str, **metadata: object) -> Checkpoint:
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# B\n" if metadata else "# no metadata\n")
    FOLDERS[repo_id] = folder
    return replace(Checkpoint.open(folder), source=OnHub(repo_id, COMMIT, ()))


def card(a: Checkpoint, b: Checkpoint, *, name: str = "me/merged", license: str | None = None, **more: Any) -> ModelCard:
    text = model_card(
        CardContent(
            title="Merge of {A} and {B} at t = 0.5",
            summary="S.",
            inputs={"A": a, "B": b},
            base="AB",
            relation="merge",
            command=["merge", "A", "B", "-o", "OUT", "-t", "0.5"],
            template=a,
            destination=Destination(name=name, license=license),
            **more,
        )
    )
    assert yaml.safe_load(text.split("---\n")[1]) == ModelCard(text).data.to_dict()  # what was meant is what YAML reads
    return ModelCard(text)


@pytest.fixture
def pair(copy: Callable[..., Path]) -> tuple[Path, Path]:
    return copy("mixtral", name="a"), copy("mixtral", "per-expert", 1, name="b")


@pytest.mark.parametrize(
    ("of_a", "of_b", "chosen", "expected"),
    [
        ({"license": "mit"}, {"license": "mit"}, None, {"license": "mit"}),
        ({"license": "mit"}, {"license": "mit"}, "apache-2.0", {"license": "apache-2.0"}),
        ({"license": "mit"}, {"license": "apache-2.0"}, None, None),
        ({"license": "mit"}, {"license": "apache-2.0"}, "apache-2.0", {"license": "apache-2.0"}),
        ({"license": "mit"}, {}, None, None),
        ({}, {}, None, None),
        ({"license": ["mit"]}, {"license": ["mit"]}, None, None),  # no identifier
        ({"license": "other", "license_name": "x", "license_link": "https://l"},) * 2
        + (None, {"license": "other", "license_name": "x", "license_link": "https://l"}),
        ({"license": "other", "license_name": "x"}, {"license": "other", "license_name": "y"}, None, None),
    ],
)
def test_a_licence_is_inherited_only_when_equal(
    pair: tuple[Path, Path], of_a: dict[str, Any], of_b: dict[str, Any], chosen: str | None, expected: dict[str, Any] | None
) -> None:
    found = card(on_hub(pair[0], "org/a", **of_a), on_hub(pair[1], "org/b", **of_b), license=chosen)
    named = {key: value for key, value in found.data.to_dict().items() if key.startswith("license")}
    assert named == (expected or {})
    assert ("Not chosen yet" in found.text) == (expected is None)
    for letter, metadata in (("A", of_a), ("B", of_b)):
        if expected is None and isinstance(metadata.get("license"), str):
            assert f"{letter} (org/{letter.lower()}) is under {metadata['license']}" in found.text


def test_hub_inputs_are_parents_at_their_commits(pair: tuple[Path, Path]) -> None:
    a = on_hub(pair[0], "org/a", language=["en", "de"], pipeline_tag="text-generation", library_name="transformers")
    b = on_hub(pair[1], "org/b", language="no", pipeline_tag="text-generation", library_name="vllm")
    found = card(a, b)
    data = found.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (["org/a", "org/b"], "merge")
    assert {"merge", "moe", "mixture-of-experts", "hf_moe_lmc"} == set(data["tags"])
    assert (data["language"], data["pipeline_tag"], data["library_name"]) == (
        ["en", "de", "no"],
        "text-generation",
        "transformers",
    )
    assert f"hf-moe-lmc merge org/a@{COMMIT} org/b@{COMMIT} -o merged -t 0.5\n" in found.text
    assert f"https://huggingface.co/org/b/tree/{COMMIT}" in found.text and "# Merge of org/a and org/b at t = 0.5" in found.text
    assert f"hf_moe_lmc=={lmc.__version__}" in found.text and "](https://pypi.org/project/hf_moe_lmc/)" in found.text


def test_a_card_of_a_parent_that_cannot_be_read_says_nothing(pair: tuple[Path, Path]) -> None:
    a, b = on_hub(pair[0], "org/a"), on_hub(pair[1], "org/b")
    for damage in (b"---\ntags: [moe\n---\n", b"\xff\xfe", b"---\nlicense: {}\nlanguage: 7\n---\n", b"---\n- a\n---\n"):
        (pair[0] / "README.md").write_bytes(damage)
        assert card(a, b).data.language is None


def test_local_inputs_are_named_without_their_paths(tmp_path: Path) -> None:
    model = tiny.make_model("olmoe")
    folders = [tiny.save(model, tmp_path / "secret" / run / "checkpoint-500", "per-expert") for run in ("one", "two")]
    a, b = map(Checkpoint.open, folders)
    found = card(a, b)
    assert found.data.base_model is None and "base_model_relation" not in found.data.to_dict()
    assert "merge one/checkpoint-500 two/checkpoint-500 -o merged" in found.text and a.fingerprint()[:16] in found.text
    assert "secret" not in found.content and str(tmp_path) not in found.content


@pytest.mark.parametrize("identifier", ["Apache 2.0", "", "mit\n", "../LICENSE", "-x"])
def test_what_is_no_identifier_of_a_licence_is_refused(identifier: str) -> None:
    check_license("apache-2.0")
    with pytest.raises(InputError, match="not an identifier of a licence"):
        check_license(identifier)


MAPPINGS = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


def test_the_auto_class_is_one_that_knows_the_model() -> None:
    types = [*zoo.TOWERS.split(), *zoo.WRAPPERS.split()]
    known = [one for one in types if any(one in mapping for mapping in MAPPINGS.values())]
    chosen = {one: auto_class(CONFIG_MAPPING[one]().to_dict()) for one in known}
    assert [one for one, auto in chosen.items() if one not in MAPPINGS[auto]] == []
    assert len(known) > 60 and len(set(chosen.values())) > 4


def code_of(text: str, language: str) -> str:
    [found] = [block.text for block in prose.code(text) if block.language == language]
    return found


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_the_lines_that_load_it_do(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], template: str | None) -> None:
    a, b = pair
    if template:
        (a / "chat_template.jinja").write_text(template)
    text = str(card(Checkpoint.open(a), Checkpoint.open(b)))
    assert ("apply_chat_template" in text) == (template is not None)
    loaded: dict[str, Any] = {}
    exec(code_of(named_for(text.encode(), str(a)).decode(), "python"), loaded)
    assert tiny.logits(loaded["model"]).equal(tiny.logits(tiny.load(a)))
    assert loaded["model"].dtype == torch.float32 and capsys.readouterr().out


def test_another_text_keeps_its_lines(pair: tuple[Path, Path]) -> None:
    """Only the lines that load the model name the repository, once; what somebody wrote elsewhere stays."""
    text = str(card(*map(Checkpoint.open, pair)))
    theirs = '```python\nmodel_id = "somebody/else"\n```\n'
    renamed = named_for((text + theirs).encode(), "me/other").decode()
    assert renamed == text.replace('model_id = "me/merged"', 'model_id = "me/other"') + theirs
    assert named_for(theirs.encode(), "me/other") == theirs.encode()


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
@pytest.mark.parametrize("verb", ["align", "merge", "merge b", "apply"])
def test_the_command_on_the_card_makes_the_same_again(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Beside its inputs, with all options that were given."""
    a, b = pair
    if verb == "align":
        lmc.align(a, b, tmp_path / "out", order="gate", units="plain", license="mit")
    elif verb == "apply":
        lmc.align(a, b, tmp_path / "found", symmetry_only=True)
        lmc.apply(tmp_path / "found", b, tmp_path / "out", inverse=True, license="mit")
    else:
        lmc.merge(a, b, tmp_path / "out", 0.3, tokenizer="b" if verb == "merge b" else "a", license="mit")
    made = (tmp_path / "out" / "README.md").read_text()
    [line] = [line for line in code_of(made, "bash").splitlines() if line.startswith("hf-moe-lmc")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").rename(tmp_path / "before")
    given = vars(parser().parse_args(shlex.split(line)[1:]))
    getattr(lmc, given.pop("verb"))(**given)
    for file in ("model.safetensors", "README.md", "config.json", "tokenizer.json"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"


def report(text: dict[str, Any]) -> dict[str, Any]:
    windows = Windows(tuple(torch.arange(5) for _ in range(4)), (0, 0, 1, 1), context=5, bos=False, tokens_read=20)
    aligned = torch.tensor([[4.0] * 4, [3.0, 3.0, 5.0, 5.0], [8.0] * 4], dtype=torch.float64)
    naive = torch.tensor([[4.0] * 4, [20.0] * 4, [8.0] * 4], dtype=torch.float64)
    evaluation = {"text": text, **windows.describe(), "dtype": "float32"}
    ends = {"a": {"source": "/home/me/a"}, "b": {"source": "org/b"}}
    losses, t = {"aligned": aligned, "naive": naive}, (0.0, 0.5, 1.0)
    return BarrierReport(**ends, evaluation=evaluation, matching={}, windows=windows, losses=losses, t=t, seconds=1.0).to_dict()


@pytest.mark.parametrize("text", [TEXTS, DATASET, {**DATASET, "name": "/home/me/wikitext"}], ids=["files", "hub", "folder"])
def test_a_measured_barrier_is_told_and_becomes_results(pair: tuple[Path, Path], text: dict[str, Any]) -> None:
    measured = Measured(report=report(text), t=0.5, plot="barrier.png")
    found = card(*map(Checkpoint.open, pair), measured=measured, repair="ridge, fitted on 4,096 tokens.")
    assert "Barrier on the naive path: 3.5000 nats per token" in found.text and "![" in found.text
    assert "| this checkpoint | 1.0000 | [0.7500, 1.2500] | 2.72 |" in found.text
    assert "## Repair\n\nRidge, fitted on 4,096 tokens." in found.text and "/home/me" not in found.content
    assert found.data.model_name == "merged"
    results = {one.metric_type: one for one in found.data.eval_results}
    assert results.keys() == {"perplexity", "nll"} and results["nll"].metric_value == 1.0
    assert results["perplexity"].dataset_args["tokens_scored"] == 16
    on_the_hub = text.get("name") == DATASET["name"]
    assert results["perplexity"].dataset_type == (DATASET["name"] if on_the_hub else "text")
    assert results["perplexity"].dataset_revision == text.get("revision")


def test_results_have_the_name_of_the_merge_until_a_push_gives_that_of_the_repository(pair: tuple[Path, Path]) -> None:
    measured = Measured(report=report(TEXTS), t=0.5)
    text = card(*map(Checkpoint.open, pair), name=UNPUBLISHED, measured=measured).content
    assert ModelCard(text).data.model_name == "Merge of a and b at t = 0.5"
    pushed = text
    for repository in ("me/merged", "me/123", "me/null", "other/v2"):  # one after the other: a copy is pushed elsewhere
        pushed = named_for(pushed.encode(), repository).decode()
        found = ModelCard(pushed)
        assert found.data.model_name == repository.rpartition("/")[2] and len(found.data.eval_results) == 2
        assert found.text == text.split("---\n", 2)[2].replace('model_id = "."  # this folder', f'model_id = "{repository}"')
    own = text.replace("- name: Merge of a and b at t = 0.5", "- name: 'My: model'")
    assert ModelCard(named_for(own.encode(), "me/merged").decode()).data.model_name == "My: model"  # somebody's own
    for damaged in (own.replace("'My: model'", "["), own.replace("'My: model'", "[1]")):
        assert named_for(damaged.encode(), "me/merged").count(b"me/merged") == 1


def test_each_of_several_texts_has_its_losses(pair: tuple[Path, Path]) -> None:
    losses = {
        "prose": {"a": 1.0, "b": 2.0, "aligned": 0.5, "naive": 3.0},
        "code": {"a": 2.0, "b": 1.0, "aligned": 3.0, "naive": 3.5},
    }
    windows = Windows(
        tuple(torch.arange(2) for _ in range(12)), tuple(range(12)), 2, False, 24, texts=("prose",) * 6 + ("code",) * 6
    )
    models = {
        name: torch.tensor([losses[text][name] for text in windows.text_of], dtype=torch.float64)
        for name in ("a", "b", "aligned", "naive")
    }
    means = TextMeans(windows)
    right = {name: (values < 2).double() for name, values in models.items()}
    ensembles = {"logits": models["aligned"] - 0.25, "probabilities": models["aligned"]}
    beside = Beside(ensembles, {"accuracy": Shares(right, dict.fromkeys(ensembles, right["a"]), means)})
    several = {**report(TEXTS), "verdict": references(models, windows, t=0.5, beside=beside).to_dict()}
    found = card(*map(Checkpoint.open, pair), measured=Measured(report=several, t=0.5))
    for line in (
        "|  | A | B | mean of A, B | better | this checkpoint | less the better | naive | ensemble |",
        "| loss, prose | 1.0000 | 2.0000 | 1.5000 | A | 0.5000 | -0.5000 [-0.5000, -0.5000] | 3.0000 | 0.2500 |",
        "| loss, mean | 1.5000 | 1.5000 | 1.5000 | equal | 1.7500 | +0.2500 [+0.2500, +0.2500] | 3.2500 | 1.5000 |",
        "| accuracy, code | 0.0 | 100.0 | 50.0 | B | 0.0 | -100.0 [-100.0, -100.0] | 0.0 | 0.0 |",
    ):
        assert f"{line}\n" in found.text
    told = {(one.dataset_name, one.metric_type): one.metric_value for one in found.data.eval_results}
    assert told.keys() == {(text, metric) for text in losses for metric in ("nll", "perplexity")}
    assert told["prose", "nll"] == 0.5 and told["code", "perplexity"] == pytest.approx(20.0855, abs=1e-4)


def test_a_verdict_comes_first_and_a_point_that_was_not_measured_has_no_results(pair: tuple[Path, Path]) -> None:
    measured = Measured(report=report(TEXTS), verdict=["Merge at t = 0.5.", "It is better."], t=0.3)
    found = card(*map(Checkpoint.open, pair), measured=measured)
    assert found.data.eval_results is None and "this checkpoint" not in found.text
    assert found.text.index("Merge at t = 0.5.") < found.text.index("| A | 1.0000") and "Barrier on" not in found.text


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
def test_what_was_aligned_is_said_in_words(pair: tuple[Path, Path], tmp_path: Path) -> None:
    alignment = lmc.merge(*pair, tmp_path / "out")
    assert alignment is not None
    text, totals = (tmp_path / "out" / "README.md").read_text(), alignment.totals()
    assert re.search(
        rf"^- {totals['experts_moved']} of 18 experts changed places, in \d of 3 MoE layers\.$", text, re.MULTILINE
    )
    assert "kept" not in text and all(f"- {sentence}\n" in text for sentence in alignment.sentences())
    lmc.merge(*pair, tmp_path / "plain", align=False)
    assert "aligned" not in (tmp_path / "plain" / "README.md").read_text().lower().replace("--no-align", "")
