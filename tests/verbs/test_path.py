from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import CheckpointError, InputError, MismatchError
from hf_moe_lmc.moe.model_class import language_model_class, text_reader
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.endpoints import Point
from hf_moe_lmc.path.evaluation import Evaluator
from hf_moe_lmc.path.point_model import load_point
from hf_moe_lmc.perplexity.windows import Windows, cut_texts, cut_windows, window_losses
from hf_moe_lmc.proof.miniature import build, shrink
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.apply import apply
from hf_moe_lmc.verbs.barrier import barrier
from hf_moe_lmc.verbs.loading import load_interpolated
from hf_moe_lmc.verbs.merge import merge
from hf_moe_lmc.writing.streams import interpolated
from tests import tiny, zoo
from tests.schemas import check_report
from tests.verbs.test_alignment import random_symmetry, read, with_mtp_layer

FILES = ("barrier.png", "barrier.svg", "report.json", "report.md", "symmetry.safetensors")
# random models need neither be related nor have a curve that five points resolve
pytestmark = pytest.mark.filterwarnings("ignore:outside the MoE blocks", "ignore:.*the barrier may be higher")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
def test_a_point_of_the_path_is_the_written_merge(
    saved: Callable[..., Path], tmp_path: Path, family: str, layout: str, dtype: str
) -> None:
    kind = getattr(torch, dtype)
    a, b = saved(family, layout, 0), saved(family, "per-expert", 1)
    if dtype == "bfloat16":
        a = tiny.save(tiny.make_model(family).to(kind), tmp_path / "a", layout)
    symmetry = random_symmetry(read(b))
    symmetry.save(tmp_path / "g.safetensors")
    merge(a, b, tmp_path / "merge", 0.3, symmetry=tmp_path / "g.safetensors")
    written = tiny.load(tmp_path / "merge").to(kind)
    stream = interpolated(read(a), read(b), symmetry.layers, 0.3)
    point = load_point(stream, dtype=kind, device="cpu", offload_folder=tmp_path)
    expected = written.state_dict()
    for name, values in point.state_dict().items():
        assert torch.equal(values.to(expected[name].dtype), expected[name]), name


def test_models_are_placed_by_the_device_map_and_offloaded_to_disk(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = read(saved("deepseek_v3"))
    stream = interpolated(model, model, model.identity().layers, 0.5)
    whole = load_point(stream, dtype=torch.float32, device="cpu", offload_folder=tmp_path)
    on_cpu = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    places = dict.fromkeys(on_cpu, "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}
    monkeypatch.setattr("hf_moe_lmc.path.point_model.placement", lambda device: places)
    spread = load_point(stream, dtype=torch.float32, device=None, offload_folder=tmp_path)
    assert spread.model.layers[1].mlp.experts.down_proj.device.type == "meta"
    assert torch.equal(tiny.logits(spread), tiny.logits(whole))


def trained(family: str, text: Path, folder: Path) -> Path:
    """A model that has learnt the text: what disturbs its weights raises its loss (a random model's may well fall)."""
    model = tiny.make_model(family)
    ids = torch.tensor(tiny.tokenizer()(text.read_text())["input_ids"][:640]).view(20, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tiny.save(model, folder, "per-expert")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_planted_symmetry_leaves_no_barrier_and_plain_units_do(tmp_path: Path, text_file: Path, family: str) -> None:
    a = trained(family, text_file, tmp_path / "a")
    apply(random_symmetry(read(a), seed=2), a, tmp_path / "b")
    options = {"text": [text_file], "points": 5, "max_tokens": 256}
    report = barrier(a, tmp_path / "b", tmp_path / "scaled", **options)
    assert report.aligned.barrier < 1e-4
    assert report.naive is not None and report.naive.barrier > 0.05
    assert abs(report.endpoint_change or 0) < 1e-5
    plain = barrier(a, tmp_path / "b", tmp_path / "plain", units="plain", naive=False, **options)
    assert plain.aligned.barrier > 100 * max(report.aligned.barrier, 1e-5)


@pytest.fixture(scope="module")
def measured(
    saved: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    output = tmp_path_factory.mktemp("barrier") / "out"
    a, b = saved("qwen2_moe", "per-expert", 0), saved("qwen2_moe", "fused", 1)
    with pytest.warns(UserWarning, match="outside the MoE blocks"):
        barrier(a, b, output, text=[text_file, f"again={text_file}"], points=5, context=32, max_tokens=500)
    return output, json.loads((output / "report.json").read_text())


def test_the_report_holds_what_other_programs_read(measured: tuple[Path, dict], saved: Callable[..., Path]) -> None:
    output, report = measured
    check_report(report)
    maps = [f"{plot}-{path}.{kind}" for plot in ("routing", "load") for path in ("aligned", "naive") for kind in ("png", "svg")]
    assert sorted(path.name for path in output.iterdir()) == sorted([*FILES, *maps])
    assert report["version"] == 1
    assert report["a"]["source"] == saved("qwen2_moe").name and len(report["a"]["fingerprint"]) == 64
    evaluation = report["evaluation"]
    assert (evaluation["context"], evaluation["dtype"], evaluation["bos"]) == (32, "float32", False)
    assert (evaluation["tokens_read"], evaluation["documents"]) == (1000, 2)
    assert evaluation["attention_implementation"] and evaluation["experts_implementation"] and evaluation["device"] == ["cpu"]
    assert report["matching"]["units"] == "scaled" and len(report["matching"]["layers"]) == 2
    tokens = torch.tensor(report["windows"]["tokens"], dtype=torch.float64)
    assert len(tokens) == evaluation["windows"] and int(tokens.sum()) == evaluation["tokens_scored"]
    for path in (report["paths"]["naive"], report["paths"]["aligned"]):
        assert path["t"] == [0, 0.25, 0.5, 0.75, 1]
        window_nll = torch.tensor(path["window_nll"], dtype=torch.float64)
        assert window_nll.shape == (5, len(tokens))
        assert torch.allclose((window_nll * tokens).sum(1) / tokens.sum(), torch.tensor(path["nll"], dtype=torch.float64))
        assert path["perplexity"] == pytest.approx([math.exp(loss) for loss in path["nll"]])
        line = [(1 - t) * path["nll"][0] + t * path["nll"][-1] for t in path["t"]]
        excess = [loss - expected for loss, expected in zip(path["nll"], line, strict=True)]
        assert path["barrier"] == pytest.approx(max(excess)) and path["barrier"] >= 0
        assert path["area"] == pytest.approx(0.25 * sum(excess))
    naive, aligned = report["paths"]["naive"], report["paths"]["aligned"]
    assert naive["nll"][0] == aligned["nll"][0] and naive["nll"][-1] == pytest.approx(aligned["nll"][-1], abs=1e-5)


def test_the_losses_at_the_ends_are_those_of_the_two_models(measured: tuple[Path, dict], saved: Callable[..., Path]) -> None:
    _, report = measured
    text = (Path(saved("qwen2_moe")), Path(saved("qwen2_moe", "fused", 1)))
    document = "The expert that answers is the one the router picked. " * 12
    windows = cut_texts([[document], [document]], tiny.tokenizer(), context=32, max_tokens=500)
    for folder, end in zip(text, (0, -1), strict=True):
        loss = window_losses(tiny.load(folder), windows, batch_size=8).sum() / windows.scored.sum()
        assert report["paths"]["naive"]["nll"][end] == pytest.approx(loss.item(), abs=1e-5)


def test_the_plot_and_the_text_are_there_to_be_read(measured: tuple[Path, dict]) -> None:
    output, report = measured
    assert (output / "barrier.png").read_bytes().startswith(b"\x89PNG")
    text = (output / "report.md").read_text()
    assert f"{report['paths']['aligned']['barrier']:.4f}" in text and "nats" in text
    assert "does not prove" in text


@pytest.mark.usefixtures("undrawn")
def test_a_given_symmetry_is_used_and_no_naive_path_left_out(
    measured: tuple[Path, dict], saved: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    output, report = measured
    a, b = saved("qwen2_moe", "per-expert", 0), saved("qwen2_moe", "fused", 1)
    again = barrier(
        a, b, tmp_path / "out", text=[text_file, f"again={text_file}"], points=5, context=32, max_tokens=500, naive=False,
        symmetry=output / "symmetry.safetensors",
    )  # fmt: skip
    symmetry = ModelSymmetry.load(output)
    given = barrier(a, b, tmp_path / "given", text=text_file, points=2, max_tokens=64, naive=False, symmetry=symmetry)
    assert given.matching["symmetry"] is None and given.matching["order"] == "best"
    assert again.naive is None and again.percent_of_naive is None
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(found["paths"]) == ["aligned"]
    check_report(found)
    check_report(json.loads((tmp_path / "given" / "report.json").read_text()))
    assert found["paths"]["aligned"]["nll"] == report["paths"]["aligned"]["nll"]
    assert found["matching"]["symmetry"] == "symmetry.safetensors"


@pytest.mark.usefixtures("undrawn")
def test_overlapping_windows_of_rows_are_evaluated_alike_on_the_path_and_by_the_models(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    documents = ["The expert that answers is the one. " * n for n in (1, 2, 3)]
    rows.write_text("".join(json.dumps({"body": document}) + "\n" for document in documents))
    a, b = saved("mixtral"), saved("mixtral", "per-expert", 1)
    options = {"text": rows, "column": "body", "points": 2, "context": 32, "stride": 10, "naive": False}
    report = barrier(a, b, tmp_path / "out", batch_size=3, **options)
    windows = cut_windows(documents, tiny.tokenizer(), context=32, stride=10)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    check_report(content)
    found = content["evaluation"]
    assert found["convention_hash"] == windows.convention_hash and (found["stride"], found["documents"]) == (10, 3)
    assert torch.allclose(report.losses["aligned"][0], window_losses(tiny.load(a), windows, batch_size=5), atol=1e-4)


@pytest.mark.usefixtures("undrawn")
def test_multi_token_prediction_layers_do_not_matter_to_the_path(
    copy: Callable[..., Path], saved: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    a, b = copy("deepseek_v3"), saved("deepseek_v3", "per-expert", 1)
    options = {"text": [text_file], "points": 2, "max_tokens": 100, "naive": False}
    before = barrier(a, b, tmp_path / "before", **options).aligned.nll
    with_mtp_layer(a, 0)
    for one, other, name in ((a, b, "after"), (b, a, "swapped")):
        with pytest.warns(UserWarning, match=f"{'A' if name == 'swapped' else 'B'} lacks the multi-token"):
            after = barrier(one, other, tmp_path / name, **options).aligned.nll[:: -1 if name == "swapped" else 1]
        assert after == pytest.approx(before, abs=1e-5)
        check_report(json.loads((tmp_path / name / "report.json").read_text()))


def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(
    saved: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    a, b, output = saved("mixtral"), saved("mixtral", "per-expert", 1), tmp_path / "out"
    for options, message in (
        ({"text": []}, "give the text to evaluate on"),
        ({"text": [text_file], "dataset": "x"}, "give the text to evaluate on"),
        ({"points": 1}, "points 1: expected at least 2"),
        ({"batch_size": 0}, "batch-size 0: expected at least 1"),
        ({"max_tokens": 0}, "max-tokens 0"),
        ({"context": 65}, "has positions for 64 tokens"),
        ({"stride": 0}, "stride 0: expected at least 1"),
        ({"context": 32, "stride": 33}, "stride 33: expected 1 to 32"),
        ({"text": [], "dataset": str(tmp_path), "dataset_revision": "main"}, "has no revisions"),
        ({"dtype": "int8"}, "expected one of float32"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
        ({"device": "meta"}, "holds no data"),
        ({"text": [], "dataset": "./none"}, "the Hub was not asked"),
        ({"symmetry": tmp_path / "none"}, "no symmetry here"),
    ):
        with pytest.raises(InputError, match=message):
            barrier(a, b, output, **({"text": [text_file]} | options))
    bare = copy("mixtral", name="bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer here"), pytest.warns(match="A has no tokenizer files"):
        barrier(bare, b, output, text=[text_file])
    other = copy("mixtral", name="other")
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(other)
    content = json.loads((other / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="different tokenizers"):
        barrier(a, other, output, text=[text_file])
    assert not output.exists()


def test_a_checkpoint_that_transformers_cannot_fill_is_refused(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy("mixtral")
    tiny.edit(folder, lambda content: content.pop("model.layers.1.self_attn.q_proj.weight"))
    model = read_model(Checkpoint.open(folder))
    stream = interpolated(model, model, model.identity().layers, 0.5)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: not in the checkpoint"):
        load_point(stream, dtype=torch.float32, device="cpu", offload_folder=tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["qwen3_vl_moe", "llama4"])
def test_a_composite_model_is_evaluated_through_its_text(tmp_path: Path, case: str) -> None:
    folders = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        build(shrink(zoo.original(case)), seed).save_pretrained(folder)
        folders.append(folder)
    a, b = (read_model(Checkpoint.open(folder)) for folder in folders)
    rows = torch.arange(3 * 17).view(3, 17) * 7 % 90 + 3
    windows = Windows(tuple(rows), (0, 0, 0), context=17, bos=False, tokens_read=51)
    points = [Point("naive", t) for t in (0.0, 0.5, 1.0)]
    model_class = language_model_class(a)
    options = EvaluationOptions(model_class=model_class, batch_size=2)
    losses, _ = Evaluator(a, b, windows, options).evaluate({"naive": b.identity()}, points)
    for i, folder in enumerate(folders):
        model = model_class.from_pretrained(folder, dtype=torch.float32)
        logits = text_reader(model)(input_ids=rows).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").sum(1)
        assert torch.allclose(losses[2 * i].float(), expected, rtol=1e-4)


def test_models_without_a_perplexity_are_refused(tmp_path: Path) -> None:
    build(shrink(zoo.original("switch_transformers"))).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="it has no perplexity"):
        language_model_class(read_model(Checkpoint.open(tmp_path)))


def test_load_interpolated_is_the_written_merge_without_writing_it(saved: Callable[..., Path], tmp_path: Path) -> None:
    a, b = saved("qwen2_moe"), saved("qwen2_moe", "fused", 1)
    alignment = merge(a, b, tmp_path / "merge", 0.25)
    loaded = load_interpolated(a, b, alignment.symmetry, 0.25, device="cpu")
    expected = tiny.load(tmp_path / "merge").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert loaded.dtype == torch.float32 and not loaded.training
    assert loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape == (1, 5)
    naive = load_interpolated(a, b, None, 0.25, dtype=torch.bfloat16, device="cpu")
    assert naive.dtype == torch.bfloat16
    assert not torch.equal(naive.state_dict()["lm_head.weight"].float(), expected["lm_head.weight"])
    with pytest.raises(InputError, match="expected a number from 0"):
        load_interpolated(a, b, None, 2.0)
