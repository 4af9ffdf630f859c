"""`compare`: the verdict, what the verbs would do, exit codes, and how little is fetched from the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralForCausalLM, MixtralConfig

import hf_moe_lmc as lmc
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.example.upcycling import dense_config, upcycle
from hf_moe_lmc.lineage.outside import OutsideSample
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.runtime.documents import as_json
from tests import tiny
from tests.schemas import COMPARISON, check, declared, seen

IN_PLACE = "B is a fine-tune of the same model as A, experts in place: merge without alignment"
UNRELATED = "outside the MoE blocks A and B are unrelated, in the MoE blocks too: a merge makes no sense"


@pytest.fixture(scope="module")
def relatives(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fine-tune of the tiny mixtral, and that with everything shuffled."""
    folder = tmp_path_factory.mktemp("relatives")
    model = tiny.make_model("mixtral")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    tiny.save(model, folder / "tuned", "fused")
    with Checkpoint.open(folder / "tuned") as checkpoint:
        symmetry = read_model(checkpoint).random(generator, scale=2.0)
    lmc.apply(symmetry, folder / "tuned", folder / "shuffled")
    return {"base": saved("mixtral"), "tuned": folder / "tuned", "shuffled": folder / "shuffled"}


def test_relatives_in_place(relatives: dict[str, Path]) -> None:
    found = lmc.compare(relatives["base"], relatives["tuned"])
    assert found.sentence == IN_PLACE == found.table().splitlines()[0] and found.makes_sense and not found.bytes_fetched
    [pair] = found.pairs
    assert {layer.verdict for layer in pair.layers} == {"in place"} and all(layer.moved == 0 for layer in pair.layers)
    assert [(one.what, one.a, one.b) for one in pair.differences] == [("layout", "per-expert", "fused")]
    assert [one.verb for one in pair.verbs if one.possible] == ["align", "merge", "merge --no-align", "barrier"]
    plan = lmc.plan_merge(relatives["base"], relatives["tuned"], "merged")
    told = pair.to_dict()["verbs"][1]
    assert all(told[key] == getattr(plan, key) for key in ("bytes_to_read", "bytes_to_write", "peak_memory"))
    check(found.to_dict(), COMPARISON)


def test_relatives_that_were_shuffled(relatives: dict[str, Path], tmp_path: Path) -> None:
    found = lmc.compare(relatives["base"], relatives["shuffled"])
    assert found.sentence == "B is of the same lineage as A, 3 of 3 layers shuffled: align first" and found.makes_sense
    alignment = lmc.align(relatives["base"], relatives["shuffled"], tmp_path / "aligned", order="gate", symmetry_only=True)
    orders = [layer["expert_order"] for layer in alignment.to_dict()["layers"]]
    assert [layer.moved for layer in found.pairs[0].layers] == [sum(i != j for i, j in enumerate(order)) for order in orders]
    check(found.to_dict(), COMPARISON)


@pytest.mark.parametrize(
    ("b", "code", "sentence"),
    [
        (lambda saved, folder: saved("mixtral", "per-expert", 1), 1, UNRELATED),
        (lambda saved, folder: saved("olmoe"), 1, "A and B cannot be merged: A ("),
        (lambda saved, folder: saved("mixtral"), 0, "A and B are the same checkpoint: a merge changes nothing"),
        (lambda saved, folder: folder / "nowhere", 2, ""),
    ],
    ids=["unrelated", "another architecture", "the same", "nothing there"],
)
def test_exit_codes(
    saved: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    b: Callable[..., Path],
    code: int,
    sentence: str,
) -> None:
    words = ["compare", str(saved("mixtral")), str(b(saved, tmp_path))]
    assert main([*words, "--json", "--quiet"]) == code
    said = capsys.readouterr()
    if code == 2:
        assert said.out == "" and "nowhere" in said.err
        return
    document = json.loads(said.out)
    check(document, COMPARISON)
    assert document["sentence"].startswith(sentence) and document["makes_sense"] == (code == 0)
    assert main([*words, "--quiet"]) == code
    assert capsys.readouterr().out.startswith(document["sentence"])


def test_a_tokenizer_that_differs_is_said_by_the_verbs_that_mind(relatives: dict[str, Path], tmp_path: Path) -> None:
    b = Path(shutil.copytree(relatives["tuned"], tmp_path / "b"))
    content = json.loads((b / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (b / "tokenizer.json").write_text(json.dumps(content))
    found = lmc.compare(relatives["base"], b)
    assert found.sentence.startswith(f"{IN_PLACE.partition(':')[0]}; but no merge is possible: A (") and not found.makes_sense
    verbs = {one.verb: one for one in found.pairs[0].verbs}
    assert [name for name, verb in verbs.items() if verb.possible] == ["align"]
    assert any("tokenizers" in warning for warning in verbs["align"].warnings)
    with pytest.raises(lmc.InputError) as refused:
        lmc.plan_merge(relatives["base"], b, tmp_path / "merged")
    assert verbs["merge"].reasons == (str(refused.value),)
    check(found.to_dict(), COMPARISON)


def test_models_without_experts(tmp_path: Path) -> None:
    """A merge without alignment takes them."""
    folders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**tiny.COMMON, "hidden_size": 32}))
        folders.append(tiny.save(model, tmp_path / str(len(folders)), "per-expert"))
    found = lmc.compare(*folders)
    assert found.sentence == "A and B resemble each other; they have no MoE blocks to align: merge without alignment"
    assert [pair.makes_sense for pair in found.pairs] == [True, False] and not found.makes_sense
    assert [one.verb for one in found.pairs[0].verbs if one.possible] == ["merge --no-align"]
    assert found.models[0].problem and not found.closest
    check(found.to_dict(), COMPARISON)


def test_of_several_models_the_closest_come_first(relatives: dict[str, Path], saved: Callable[..., Path]) -> None:
    found = lmc.compare(relatives["base"], saved("mixtral", "per-expert", 1), relatives["shuffled"], relatives["tuned"])
    assert [pair.b for pair in found.pairs] == ["B", "C", "D"]
    assert [pair.makes_sense for pair in found.pairs] == [False, True, True]
    closest = found.closest[0]
    assert (closest.a, closest.b) == ("C", "D") and closest.router_distance == pytest.approx(0, abs=1e-6)
    distances = [one.router_distance for one in found.closest]
    assert len(distances) == 6 and distances == sorted(distances) and [one.related for one in found.closest[:3]] == [3, 3, 3]
    assert "closest by their routers" in found.table()
    check(found.to_dict(), COMPARISON)


def test_a_third_model_is_not_taken_for_the_second(relatives: dict[str, Path], saved: Callable[..., Path]) -> None:
    """The verbs know two models, and call the other one B."""
    found = lmc.compare(relatives["base"], saved("olmoe"), saved("qwen3_moe"))
    first, second = (pair.sentence for pair in found.pairs)
    assert first.startswith("A and B cannot be merged: A (")
    assert second.startswith("A and C cannot be merged: with C for B, A (")
    table = found.table()
    assert "\nA and B\n" in table and "\nA and C, which verbs call B\n" in table
    assert table.count("Take two checkpoints of one model") == 2 and table.count("refused, as align") == 6


def test_copies_of_one_mlp_are_not_said_to_be_in_order(tmp_path: Path) -> None:
    """With few experts routers decide nothing, and any copy of an expert is as good as its own."""
    config = MixtralConfig(**{**tiny.COMMON, "hidden_size": 32}, num_local_experts=4)
    torch.manual_seed(0)
    dense = MistralForCausalLM(dense_config(config))
    for seed, name in enumerate("ab"):
        tiny.save(upcycle(dense, config, seed=seed), tmp_path / name, "per-expert")
    found = lmc.compare(tmp_path / "a", tmp_path / "b")
    assert found.sentence == (
        "B grew from the same experts as A, and nothing tells their order: align first, measure the barrier"
    )
    assert all(layer.moved is None and "too much alike" in layer.why for layer in found.pairs[0].layers)
    same = lmc.compare(tmp_path / "a", Path(shutil.copytree(tmp_path / "a", tmp_path / "copy")))
    assert same.sentence == IN_PLACE  # the control: equal routers tell


def test_the_key_paths_of_comparisons_are_those_of_the_schema(
    relatives: dict[str, Path], saved: Callable[..., Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    dense = tiny.save(LlamaForCausalLM(LlamaConfig(**tiny.COMMON)), tmp_path / "dense", "per-expert")
    found = lmc.compare(saved("mixtral"), relatives["tuned"], saved("mixtral", "per-expert", 1), saved("deepseek_v3"), dense)
    away = replace(found, models=(replace(found.models[0], commit="0" * 40), *found.models[1:]))
    warned = replace(found.pairs[0].verbs[0], warnings=("said by the verb",))
    unknown = replace(found.pairs[0], outside=OutsideSample({}), verbs=(warned,))
    unlike = replace(found.pairs[0].layers[0], cosine=None, margin=None, least_margin=None, log10_chance=None)
    told = replace(found.pairs[0], layers=(replace(unlike, expert_cosine=None, moved=None), *found.pairs[0].layers))
    paths = set()
    for one in (found, away, replace(found, pairs=(unknown, told))):
        document = json.loads(as_json(one.to_dict()))
        check(document, COMPARISON)
        paths |= seen(document, COMPARISON)
    assert paths == declared(COMPARISON), (paths - declared(COMPARISON), declared(COMPARISON) - paths)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.filterwarnings("ignore")
def test_quantized_models(quantized: Callable[..., Path], name: str, tmp_path: Path) -> None:
    found = lmc.compare(quantized(name), Path(shutil.copytree(quantized(name), tmp_path / "b")))
    assert found.makes_sense and {layer.verdict for layer in found.pairs[0].layers} <= {"in place", "undecided"}
    check(found.to_dict(), COMPARISON)


@pytest.mark.parametrize("verb", ["align", "merge"])
def test_verbs_say_what_the_routers_tell(
    verb: str, relatives: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [verb, str(relatives["base"]), str(relatives["shuffled"])]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert "note: by their routers, B is of the same lineage as A, 3 of 3 layers shuffled" in capsys.readouterr().err
    assert main([*words, "-o", str(tmp_path / "quiet"), "--quiet"]) == 0
    assert "by their routers" not in capsys.readouterr().err
