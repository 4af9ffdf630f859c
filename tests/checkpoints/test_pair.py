from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.configuration import ABSENT, check_counts, differing, with_changes, without_foreign_switches
from hf_moe_lmc.checkpoints.pair import check_plain_pair, origins, told_apart
from hf_moe_lmc.errors import SHOWN, CheckpointError, FamilyError, Faults, InputError, MismatchError
from hf_moe_lmc.proof.miniature import build
from hf_moe_lmc.proof.small_config import shrink
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.inputs import Inputs
from hf_moe_lmc.verbs.merge import merge
from tests import tiny, zoo
from tests.checkpoints.test_checkpoint import truncate


def test_a_single_fault_is_raised_as_it_is_and_several_as_one_list() -> None:
    Faults().check()
    faults, one = Faults(), CheckpointError("first")
    with faults.gather():
        raise one
    with pytest.raises(CheckpointError) as error:
        faults.check()
    assert error.value is one
    with faults.gather():
        raise CheckpointError("second\n  with lines")
    with pytest.raises(CheckpointError, match=r"2 faults.*\n  1\. first\n  2\. second\n       with lines") as error:
        faults.check()
    outer = Faults()
    outer.add(error.value)
    outer.add(CheckpointError("first"))  # again
    outer.add(FamilyError("third"))
    with pytest.raises(InputError, match=r"3 faults.*\n.*\n.*\n.*\n  3\. third") as combined:
        outer.check()
    assert type(combined.value) is InputError and len(combined.value.faults) == 3


def test_of_one_kind_some_are_shown_and_every_kind_is() -> None:
    inner, outer = Faults(), Faults()
    for i in range(50):
        inner.add(CheckpointError(f"shard {i}", kind="missing shards"))
    inner.add(CheckpointError("another"))
    for faults, count in ((inner, 51), (outer, 52)):
        with pytest.raises(CheckpointError, match=f"{count} faults") as error:
            faults.check()
        lines = str(error.value).splitlines()
        assert sum("shard " in line for line in lines) == SHOWN and any("another" in line for line in lines)
        assert lines[-1] == "  ... and 42 more: missing shards"
        if faults is inner:
            outer.add(error.value)
            outer.add(CheckpointError("one more"))


def test_everything_wrong_with_both_and_the_output_is_in_one_list(copy: Callable[..., Path], tmp_path: Path) -> None:
    a, b = copy("mixtral", name="a"), copy("mixtral", "per-expert", 1, name="b")
    truncate(a)
    tiny.edit_config(b, num_hidden_layers=10**9)
    (b / "model.safetensors").write_bytes(b"")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(InputError) as error:
        align(a, b, tmp_path / "out")
    message = str(error.value)
    assert message.startswith("4 faults; nothing has been done:\n  1. ")
    for expected in (
        f"{a}/model.safetensors: truncated",
        "num_hidden_layers is 1000000000",
        f"{b}/model.safetensors: not a whole",
        "holds precious",
    ):
        assert expected in message


def test_what_only_follows_from_a_fault_is_not_listed(copy: Callable[..., Path], tmp_path: Path) -> None:
    a, b = copy("mixtral", name="a"), copy("mixtral", name="b")
    truncate(a)
    with pytest.raises(CheckpointError) as error, ExitStack() as stack:
        Inputs(stack, tmp_path / "out").pair(a, b)
    assert not error.value.faults and str(error.value).startswith(f"{a}/model.safetensors: truncated")


def test_every_damaged_layer_and_a_mismatch_of_tokenizers_are_named(copy: Callable[..., Path], tmp_path: Path) -> None:
    a, b = copy("mixtral", name="a"), copy("mixtral", name="b")

    def change(content: dict[str, torch.Tensor]) -> None:
        for layer in (0, 2):
            content.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")

    tiny.edit(b, change)
    vocabulary = (b / "tokenizer.json").read_text()
    (b / "tokenizer.json").write_text(vocabulary.replace('"a":', '"A ":'))
    with pytest.raises(InputError, match="3 faults") as error:
        merge(a, b, tmp_path / "out")
    for expected in ("layer 0 is not a whole", "layer 2 is not a whole", "'a' in A, 'A ' in B"):
        assert expected in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_plain_pair_needs_equal_tensors_and_tokenizers(copy: Callable[..., Path], saved: Callable[..., Path]) -> None:
    a, b = Checkpoint.open(saved("mixtral")), Checkpoint.open(saved("mixtral", "per-expert", 1))
    assert check_plain_pair(a, b) == []
    assert check_plain_pair(a, a) == [f"A and B hold the same weights: both are {a.name}"]
    folder = copy("mixtral", "per-expert", 1)
    assert check_plain_pair(b, Checkpoint.open(folder)) == []  # whether a copy is whole is not known before it is read

    def change(content: dict[str, torch.Tensor]) -> None:
        content["model.norm.weight"] = torch.ones(17)
        content["model.layers.0.input_layernorm.weight"] = torch.ones(16, dtype=torch.int32)
        del content["lm_head.weight"]
        content.update({f"model.bonus.{i}": torch.ones(1) for i in range(20)})

    tiny.edit(folder, change)
    tiny.edit_config(folder, model_type="olmoe")
    with pytest.raises(MismatchError) as error:
        check_plain_pair(a, Checkpoint.open(folder))
    for expected in (
        "model type: A has 'mixtral', B has 'olmoe'",
        "lm_head.weight: in A, not in B",
        "model.bonus.0: in B, not in A",
        "and 12 more",
        "model.norm.weight: A has shape [16], B has [17]",
        "input_layernorm.weight: A has dtype torch.float32, B has torch.int32",
    ):
        assert expected in str(error.value)


def test_settings_that_differ_are_told_as_written() -> None:
    a = {"rms_norm_eps": 1e-5, "only_a": 1, "text_config": {"hidden_size": 4}, "use_cache": True}
    b = {"rms_norm_eps": 1e-6, "text_config": {"hidden_size": 8}, "transformers_version": "5"}
    found = differing(a, b, only_common=True)
    assert [line.split(" is ")[0] for line in found] == [
        "config.json: rms_norm_eps",
        "config.json: text_config.hidden_size",
        "config.json: only in A: only_a; the path and a merge take A's",
    ]


@pytest.mark.parametrize("only_common", [False, True])
def test_differences_that_cannot_matter_are_not_told(only_common: bool) -> None:
    for a, b in (
        ({"qkv_bias": None}, {"qkv_bias": False}),
        ({"qkv_bias": False}, {}),
        ({}, {"text_config": {"sliding_window": None}}),
        ({"use_cache": True, "transformers_version": "5"}, {"_name_or_path": "x"}),
    ):
        assert differing(a, b, only_common=only_common) == [] == differing(b, a, only_common=only_common)
    for a, b, words in (  # the controls
        ({"qkv_bias": None}, {"qkv_bias": True}, r"qkv_bias is absent in A and on in B"),
        ({"top_k": None}, {"top_k": 0}, "top_k is absent in A and 0 in B"),
        ({"rope": {"type": "yarn"}}, {"rope": {"type": "linear"}}, r"rope.type is 'yarn' in A and 'linear' in B"),
        ({"kinds": ["a", None]}, {"kinds": ["a", True]}, r'kinds is \["a", null\] in A and \["a", true\] in B'),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": None}, "tie_word_embeddings is off in A and absent in B"),
    ):
        (line,) = differing(a, b, only_common=only_common)
        assert re.search(words, line)
    assert differing({"tie_word_embeddings": False}, {}, only_common=only_common)


def test_switches_to_foreign_code_go_at_every_level() -> None:
    config = {
        "auto_map": {"AutoConfig": "x.X"},
        "hidden_size": 4,
        "text_config": {
            "auto_map": {},
            "_attn_implementation": "someone/kernel",
            "layers": [{"trust_remote_code": True, "a": 1}],
        },
        "custom_pipelines": {"task": {"impl": "x.Y"}},
    }
    assert without_foreign_switches(config) == {"hidden_size": 4, "text_config": {"layers": [{"a": 1}]}}


def test_counts_that_no_model_has_are_refused() -> None:
    check_counts("here", {"num_hidden_layers": 61, "rope_theta": 10**9, "vocab_size": 10**6, "num_experts": 512})
    with pytest.raises(CheckpointError, match=r"text_config\.num_experts is 1000000, expected at most 10000;"):
        check_counts("here", {"text_config": {"num_experts": 10**6}})
    assert with_changes({"a": 1, "text_config": {"a": 2, "b": 3}}, {"a": ABSENT, "c": ABSENT}) == {"text_config": {"b": 3}}
    with pytest.raises(CheckpointError, match="2 faults"):
        check_counts("here", {"num_labels": 10**9, "num_hidden_layers": -(10**4000)})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["longcat_flash", "ernie4_5_vl_moe", "step3p5", "openai_privacy_filter", "inkling2_text"])
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_the_plain_merge_takes_what_transformers_saves(case: str, layout: str, tmp_path: Path) -> None:
    """Experts without weights, experts of two modalities, towers alone, a head that is cut to its tokens."""
    build(shrink(zoo.original(case)), 0).save_pretrained(tmp_path / "a", save_original_format=layout == "per-expert")
    merge.plan(tmp_path / "a", tmp_path / "a", tmp_path / "out", align=False)


def test_folders_of_one_name_are_told_apart_by_as_few_parents_as_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run1/checkpoint-500", "run2/checkpoint-500", "x/run1/checkpoint-500", "run1/checkpoint-900"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run1 = tmp_path / "run1/checkpoint-500"
    assert told_apart(run1, Path("run2/checkpoint-500")) == ("run1/checkpoint-500", "run2/checkpoint-500")
    assert told_apart(run1, Path("run1/checkpoint-900")) == ("checkpoint-500", "checkpoint-900")
    assert told_apart(run1, Path("x/run1/checkpoint-500"))[1] == "x/run1/checkpoint-500"
    assert told_apart(run1, Path("run1/../run1/checkpoint-500/.")) == ("checkpoint-500",) * 2  # one folder


def test_origins_name_no_more_of_a_path_than_tells_two_models_apart(saved: Callable[..., Path], tmp_path: Path) -> None:
    for run in ("run1", "run2"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "last").symlink_to(saved("mixtral"), target_is_directory=True)
        shutil.copytree(saved("mixtral"), tmp_path / run / "checkpoint-500")
    with ExitStack() as stack:
        first, second, linked = (
            stack.enter_context(Checkpoint.open(tmp_path / name))
            for name in ("run1/checkpoint-500", "run2/checkpoint-500", "run2/last")
        )
        a, b = origins(first, second)
        assert (a["source"], b["source"]) == ("run1/checkpoint-500", "run2/checkpoint-500")
        assert a["fingerprint"] == first.fingerprint() == b["fingerprint"]
        assert origins(first, linked) == (first.origin(), linked.origin())
