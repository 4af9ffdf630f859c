"""Pairs whose vocabularies, heads or special tokens differ, as a base and what was made of it do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import hf_moe_lmc as lmc
from hf_moe_lmc.checkpoints.joint import EMBEDDING, HEAD
from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.errors import CheckpointError, MismatchError, MoELMCWarning
from hf_moe_lmc.proof.miniature import build
from hf_moe_lmc.proof.small_config import shrink
from tests import tiny, zoo
from tests.schemas import check_alignment, check_report

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = 259  # of tiny.tokenizer()
FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3")


def saved(
    folder: Path, family: str, seed: int, *, rows: int, more: tuple[str, ...] = (), tied: bool = False, **special: str
) -> Path:
    """A model with so many rows of its vocabulary, and more tokens."""
    model = tiny.make_model(family, seed)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight.normal_(std=0.5, generator=generator)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(more), special_tokens=True)
    for role, token in special.items():
        setattr(tokenizer, role, token)
    tokenizer.save_pretrained(folder)
    return folder


def tables(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    model: PreTrainedModel = tiny.load(folder)
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("rows_a", "rows_b", "more_a", "more_b"),
    [
        (TOKENS, TOKENS + 1, (), ("<pad>",)),
        (TOKENS + 2, TOKENS, ("<|im_start|>", "<|im_end|>"), ()),
        (TOKENS, 320, (), ()),
        (264, 272, ("<a>",), ("<a>", "<b>")),
        (272, 272, (), ("<tool>",)),
    ],
)
def test_a_grown_vocabulary_is_merged_row_by_row(
    tmp_path: Path, family: str, rows_a: int, rows_b: int, more_a: tuple[str, ...], more_b: tuple[str, ...], align: bool
) -> None:
    a = saved(tmp_path / "a", family, 0, rows=rows_a, more=more_a)
    b = saved(tmp_path / "b", family, 1, rows=rows_b, more=more_b)
    alignment = lmc.merge(a, b, tmp_path / "out", 0.25, align=align)
    rows, has_a, has_b = max(rows_a, rows_b), TOKENS + len(more_a), TOKENS + len(more_b)
    for found, of_a, of_b in zip(tables(tmp_path / "out"), tables(a), tables(b), strict=True):
        assert len(found) == rows
        for i in range(rows):
            if i < min(has_a, has_b):
                expected = torch.lerp(of_a[i], of_b[i], 0.25)
            elif i < max(has_a, has_b):
                expected = of_a[i] if has_a > has_b else of_b[i]
            else:
                expected = of_a[i] if i < rows_a else of_b[i]
            assert torch.equal(found[i], expected), i
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == rows >= len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| all | {rows} |" in card and f"| of tokens that both have, interpolated | {min(has_a, has_b)} |" in card
    if alignment:
        content = json.loads((tmp_path / "out" / "alignment" / "alignment.json").read_text())
        check_alignment(content)
        assert content["vocabulary"]["rows"] == rows and content["vocabulary"]["interpolated"] == min(has_a, has_b)


def test_a_grown_vocabulary_is_measured_on_what_both_have(tmp_path: Path, text_file: Path) -> None:
    a = saved(tmp_path / "a", "mixtral", 0, rows=TOKENS)
    b = saved(tmp_path / "b", "mixtral", 1, rows=272, more=("<pad>",))
    options: dict[str, Any] = {"text": text_file, "points": 3, "max_tokens": 128, "context": 32, "routing": False}
    report = lmc.barrier(a, b, tmp_path / "out", **options)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    check_report(content)
    assert report.disagreement is None and report.own is not None and report.own["a"]["because"] == ["vocabulary"]
    for side, folder, end in (("a", a, 0), ("b", b, -1)):
        model = tiny.load(folder)
        losses = []
        for masked in (False, True):
            total, count = 0.0, 0
            for row in report.windows.rows:
                logits = model(row[None]).logits[0, :-1].double()
                if masked:
                    logits = logits[:, :TOKENS]
                total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
                count += len(row) - 1
            losses.append(total / count)
        assert content["own"][side]["nll"] == pytest.approx(losses[0], abs=1e-5)
        assert report.naive is not None and report.naive.nll[end] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3  # the mask counts


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("align", [True, False])
def test_a_tied_head_meets_one_of_its_own(tmp_path: Path, text_file: Path, side: str, align: bool) -> None:
    tied, real = (
        saved(tmp_path / name, "mixtral", seed, rows=272, tied=seed == 0) for seed, name in enumerate(("tied", "real"))
    )
    a, b = (tied, real) if side == "a" else (real, tied)
    assert "lm_head.weight" not in tiny.tensors(tied)
    lmc.merge(a, b, tmp_path / "out", 0.5, align=align)
    embedding, head = tables(tmp_path / "out")
    for found, of_a, of_b in zip((embedding, head), tables(a), tables(b), strict=True):
        assert torch.equal(found, torch.lerp(of_a, of_b, 0.5))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    report = lmc.barrier(a, b, tmp_path / "path", text=text_file, points=2, max_tokens=64, routing=False)
    merged = lmc.barrier(
        tmp_path / "out", tmp_path / "out", tmp_path / "ends", text=text_file, points=2, max_tokens=64, routing=False
    )
    middle = lmc.barrier(a, b, tmp_path / "middle", text=text_file, points=3, max_tokens=64, routing=False, refine=0)
    assert report.disagreement is None and middle.naive is not None and merged.naive is not None
    if not align:
        assert middle.naive.nll[1] == pytest.approx(merged.naive.nll[0], abs=1e-5)


def test_a_real_head_under_a_configuration_that_ties_is_used(tmp_path: Path, text_file: Path) -> None:
    """transformers keeps such a head, and warns."""
    a = saved(tmp_path / "a", "mixtral", 0, rows=272)
    tiny.edit_config(a, tie_word_embeddings=True)
    model = tiny.load(a)
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    report = lmc.barrier(a, a, tmp_path / "out", text=text_file, points=2, max_tokens=64, routing=False)
    row = report.windows.rows[0]
    logits = model(row[None]).logits[0, :-1].double()
    expected = float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    assert report.losses["aligned"][0, 0] == pytest.approx(expected, rel=1e-5)


def test_a_base_and_its_chat_model_are_merged_with_the_tokenizer_asked_for(tmp_path: Path) -> None:
    more = ("<|endoftext|>", "<|im_end|>")
    a = saved(tmp_path / "a", "qwen2_moe", 0, rows=272, more=more, eos_token="<|endoftext|>")
    b = saved(tmp_path / "b", "qwen2_moe", 1, rows=272, more=more, eos_token="<|im_end|>")
    (b / "chat_template.jinja").write_text("{{ messages }}")
    for folder, eos in ((a, TOKENS), (b, TOKENS + 1)):
        tiny.edit_config(folder, eos_token_id=eos)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    for side, eos in (("a", TOKENS), ("b", TOKENS + 1)):
        out = tmp_path / f"out-{side}"
        assert main(["merge", str(a), str(b), "-o", str(out), "--tokenizer", side]) == 0
        assert AutoTokenizer.from_pretrained(out).eos_token == more[eos - TOKENS]
        for file in ("config.json", "generation_config.json"):
            assert json.loads((out / file).read_text())["eos_token_id"] == eos
        assert (out / "chat_template.jinja").exists() == (side == "b")
        tiny.load(out)


def test_align_looks_at_no_tokens_and_the_others_refuse_ids_that_mean_something_else(
    copy: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    a, b = copy("mixtral", seed=0, name="a"), copy("mixtral", seed=1, name="b")
    content = json.loads((b / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    first, second = list(words)[10:12]
    words[first], words[second] = words[second], words[first]
    (b / "tokenizer.json").write_text(json.dumps(content))
    with pytest.warns(MoELMCWarning, match="align moves no embeddings"):
        lmc.align(a, b, tmp_path / "aligned")
    for call in (
        lambda: lmc.merge(a, b, tmp_path / "out"),
        lambda: lmc.merge(a, b, tmp_path / "out", align=False),
        lambda: lmc.barrier(a, b, tmp_path / "out", text=text_file),
    ):
        with pytest.raises(MismatchError, match="different tokenizers"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("side", ["a", "b"])
def test_buffers_that_no_model_reads_are_a_s(copy: Callable[..., Path], tmp_path: Path, side: str, align: bool) -> None:
    places = {"a": copy("mixtral", seed=0, name="a"), "b": copy("mixtral", seed=1, name="b")}
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tiny.edit(places[side], lambda tensors: tensors.update({name: torch.ones(4)}))
    lmc.merge(places["a"], places["b"], tmp_path / "out", align=align)
    assert (name in tiny.tensors(tmp_path / "out")) == (side == "a")


def test_another_number_of_experts_per_token_is_measured_apart(
    copy: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    a, b = copy("mixtral", seed=0, name="a"), copy("mixtral", seed=1, name="b")
    tiny.edit_config(b, num_experts_per_tok=3)
    assert main(["merge", str(a), str(b), "-o", str(tmp_path / "out")]) == 0
    report = lmc.barrier(a, b, tmp_path / "path", text=text_file, points=2, max_tokens=64, routing=False)
    assert report.own is not None and report.own["b"]["because"] == ["num_experts_per_tok"] and "a" not in report.own
    model, row = tiny.load(b), report.windows.rows[0]
    logits = model(row[None]).logits[0, :-1].double()
    loss = float(torch.nn.functional.cross_entropy(logits, row[1:]))
    if len(report.windows.rows) == 1:
        assert report.own["b"]["nll"] == pytest.approx(loss, abs=1e-5)
    assert report.naive is not None and abs(report.naive.nll[-1] - report.own["b"]["nll"]) > 1e-4
    assert "B by itself" in (tmp_path / "path" / "report.md").read_text()


@pytest.mark.parametrize("case", ["deepseek_v4", "mistral_large4", "inkling_mm_model", "gemma4", "nemotron_h", "dbrx"])
def test_every_table_over_the_vocabulary_has_a_known_name(case: str, tmp_path: Path) -> None:
    """Makers have names of their own for them, and the Hub's layout keeps those."""
    rows = 331  # of nothing else
    config = shrink(zoo.original(case))
    for key in ("vocab_size", "vocab_size_per_layer_input"):
        if hasattr(config.get_text_config(), key):
            setattr(config.get_text_config(), key, rows)
    build(config).save_pretrained(tmp_path, save_original_format=True)
    found = {name for name, values in tiny.tensors(tmp_path).items() if rows in values.shape and values.is_floating_point()}
    assert len(found) > 1
    assert {name for name in found if not (EMBEDDING.fullmatch(name) or HEAD.fullmatch(name))} == set()
    assert not HEAD.fullmatch("vision.head.weight") and not HEAD.fullmatch("model.layers.0.attention.output.weight")


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_tables_for_multi_token_prediction_grow_with_the_vocabulary(tmp_path: Path, both: bool, align: bool) -> None:
    a = saved(tmp_path / "a", "deepseek_v3", 0, rows=TOKENS)
    b = saved(tmp_path / "b", "deepseek_v3", 1, rows=264, more=("<pad>",))
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    added = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")

    def add(content: dict[str, torch.Tensor]) -> None:
        content["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)
        content |= {name: content[table] + 1 for name, table in zip(added, tables, strict=True)}

    for folder in (a, b) if both else (a,):
        tiny.edit(folder, add)
        tiny.edit_config(folder, num_nextn_predict_layers=1)
    lmc.merge(a, b, tmp_path / "out", 0.25, align=align)
    out, of_a, of_b = (tiny.tensors(folder) for folder in (tmp_path / "out", a, b))
    for name, table in zip(added, tables, strict=True):
        assert torch.equal(out[name][TOKENS], of_b[name if both else table][TOKENS])
        expected = torch.lerp(of_a[name], of_b[name][:TOKENS], 0.25) if both else of_a[name]
        assert out[name].shape == out[table].shape and torch.equal(out[name][:TOKENS], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lost_head_is_refused_and_a_tied_one_is_none(tmp_path: Path, family: str, text_file: Path) -> None:
    def drop_head(content: dict[str, torch.Tensor]) -> None:
        del content["lm_head.weight"]

    a, b = (saved(tmp_path / name, family, seed, rows=272) for seed, name in enumerate("ab"))
    for folder in (a, b):
        tiny.edit(folder, drop_head)
        tiny.edit_config(folder, tie_word_embeddings=False)
    for call in (
        lambda: lmc.align(a, b, tmp_path / "out"),
        lambda: lmc.merge(a, b, tmp_path / "out"),
        lambda: lmc.merge(a, b, tmp_path / "out", align=False),
        lambda: lmc.barrier(a, b, tmp_path / "out", text=text_file),
    ):
        with pytest.raises(CheckpointError, match=r"no head among the tensors[^$]*tie_word_embeddings"):
            call()
    for folder in (a, b):
        tiny.edit_config(folder, tie_word_embeddings=True)
    lmc.merge(a, b, tmp_path / "out", align=False)
    for folder in (a, b):  # a reward model, or an embedding model, has another head or none
        tiny.edit_config(folder, tie_word_embeddings=False, architectures=["MixtralForSequenceClassification"])
    lmc.merge(a, b, tmp_path / "other", align=False)
