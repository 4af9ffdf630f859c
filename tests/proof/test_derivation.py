"""Model types that no data file describes: derived, proved, used, and refused where that cannot be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from packaging.specifiers import SpecifierSet
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import CheckpointError, FamilyError
from hf_moe_lmc.moe import registry
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.proof import checks as proof
from hf_moe_lmc.proof import derivation, recognition
from hf_moe_lmc.proof.derivation import TRANSFORMERS, derive
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.apply import apply
from tests import tiny

pytestmark = pytest.mark.skipif(
    not TRANSFORMERS.contains(transformers.__version__, prereleases=True), reason=f"derived from transformers {TRANSFORMERS}"
)


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the package forget families."""
    known = registry.families()

    def forget(*model_types: str) -> None:
        monkeypatch.setattr(registry, "_FAMILIES", {name: value for name, value in known.items() if name not in model_types})
        monkeypatch.setattr(recognition, "_PROVED", {})

    return forget


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_an_unknown_model_type_is_aligned_as_a_known_one(
    saved: Callable[..., Path], unknown: Callable[..., None], tmp_path: Path, name: str, layout: str
) -> None:
    a, b = (saved(name, layout, seed) for seed in (0, 1))
    expected = align(a, b, tmp_path / "known").symmetry
    unknown(name)
    with pytest.warns(UserWarning, match=f"no data file describes model type '{name}'.* passed [0-9]+ checks"):
        found = align(a, b, tmp_path / "derived").symmetry
    assert dict(found.layers) == dict(expected.layers) and found.groups == expected.groups
    for file in (tmp_path / "known").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "derived" / file.name).read_bytes()


def test_a_derived_family_is_proved_once(
    saved: Callable[..., Path], unknown: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown("olmoe")
    proofs = []
    prove = proof.prove
    monkeypatch.setattr(proof, "prove", lambda *arguments: proofs.append(arguments) or prove(*arguments))
    with pytest.warns(UserWarning, match="no data file"), Checkpoint.open(saved("olmoe")) as checkpoint:
        model = recognition.recognise(checkpoint)
        symmetry = model.identity()
    apply(ModelSymmetry("olmoe", 1, symmetry.layers), saved("olmoe"), tmp_path / "out")
    assert len(proofs) == 1


def test_a_description_that_fails_its_self_test_is_not_used(
    saved: Callable[..., Path], unknown: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown("deepseek_v3")
    monkeypatch.setattr(derivation, "_declared_groups", lambda text: 1)  # as if the groups had gone unnoticed
    with pytest.raises(FamilyError, match=r"(?s)fails its self-test.*FAIL .*everything at once"):
        align(saved("deepseek_v3"), saved("deepseek_v3", "per-expert", 1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_release_of_transformers_is_refused(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivation, "TRANSFORMERS", SpecifierSet(">=7"))
    with pytest.raises(FamilyError, match=rf"transformers >=7 only, not from {transformers.__version__}"):
        derive(tiny.CONFIGS["olmoe"](), "here")


def test_custom_code_is_refused(saved: Callable[..., Path], copy: Callable[..., Path]) -> None:
    class CustomConfig(PreTrainedConfig):
        model_type = "custom_moe_of_the_tests"

    AutoConfig.register(CustomConfig.model_type, CustomConfig)
    with pytest.raises(FamilyError, match=r"is custom code .tests\.proof\.test_derivation., from which nothing is derived"):
        derive(CustomConfig(), "here")
    folder = copy("olmoe")
    tiny.edit_config(folder, model_type="nobody_knows_it", auto_map={"AutoConfig": "configuration_x.XConfig"})
    (folder / "configuration_x.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(CheckpointError, match="transformers cannot read it"), Checkpoint.open(folder) as checkpoint:
        recognition.recognise(checkpoint)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_dense_models_are_refused(model_type: str) -> None:
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type](
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=64
    )
    with pytest.raises(
        FamilyError, match=rf"here: a dense model: the configuration of model type '{model_type}' has no experts"
    ) as e:
        derive(config, "here")
    assert ".." not in str(e.value) and "add a family" not in str(e.value) and "merge --no-align" in str(e.value)


def test_a_cause_is_one_sentence_of_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise FamilyError("No miniature of it can be made.")

    monkeypatch.setattr(derivation, "_derive", refuse)
    with pytest.raises(FamilyError, match=r"be derived: No miniature of it can be made\. The README"):
        derive(tiny_gpt_oss(), "here")


def test_what_is_relied_on_of_transformers() -> None:
    """The contract: TRANSFORMERS must not be widened without these, and test_proof derives every family with them."""
    assert TRANSFORMERS.contains(transformers.__version__, prereleases=True)
    assert "save_original_format" in inspect.signature(PreTrainedModel.save_pretrained).parameters
    experts = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts(tiny_gpt_oss())
    assert experts.is_transposed and not experts.is_concatenated
    assert experts.down_proj.ndim == experts.gate_up_proj.ndim == 3


def tiny_gpt_oss() -> PreTrainedConfig:
    return transformers.GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=4, num_hidden_layers=1)


def test_the_derived_family_says_what_it_read(saved: Callable[..., Path]) -> None:
    derived = derive(tiny.CONFIGS["deepseek_v3"](), "here")
    assert derived.weights["mlp.experts.{expert}.up_proj.weight"] == "up: unit model"
    assert derived.weights["mlp.experts.gate_up_proj"] == "gate up: expert (half unit) model"
    assert (derived.router, derived.units, derived.groups) == ("sigmoid", "swiglu", "4")
    with Checkpoint.open(saved("deepseek_v3")) as checkpoint:
        assert read_model(checkpoint, derived).layers.keys() == read_model(checkpoint).layers.keys()
