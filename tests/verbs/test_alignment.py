from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import CheckpointError, FamilyError, InputError, MismatchError, SymmetryError
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.proof.checks import reloaded, write
from hf_moe_lmc.proof.miniature import build, shrink
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.apply import apply
from hf_moe_lmc.verbs.merge import merge
from hf_moe_lmc.writing.output import FolderWriter
from hf_moe_lmc.writing.spans import Copied
from hf_moe_lmc.writing.streams import ModelStream, rewritten
from tests import tiny, zoo
from tests.schemas import check_alignment


def random_symmetry(model: MoEModel, seed: int = 0, scale: float = 3.0, groups: int | None = None) -> ModelSymmetry:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        index: layer.random(generator, groups=groups or model.groups, scale=scale) for index, layer in model.layers.items()
    }
    return ModelSymmetry(model.family.name, groups or model.groups, layers)


def read(folder: Path) -> MoEModel:
    return read_model(Checkpoint.open(folder))


@dataclass(frozen=True)
class Forgetful:
    """A block in new coordinates, but for some roles that were forgotten."""

    acted: LayerSource
    original: LayerSource
    forgotten: tuple[str, ...]

    def stored(self, role: str, expert: int | None = None) -> torch.Tensor:
        return (self.original if role in self.forgotten else self.acted).stored(role, expert)


@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
def test_the_rewritten_checkpoint_computes_the_same_function(
    saved: Callable[..., Path], tmp_path: Path, family: str, layout: str
) -> None:
    folder = saved(family, layout)
    before = tiny.logits(tiny.load(folder))
    model = read(folder)
    symmetry = random_symmetry(model)
    apply(symmetry, folder, tmp_path / "moved")
    after = tiny.logits(tiny.load(tmp_path / "moved"))
    assert tiny.relative_difference(after, before) < 1e-5

    stored, written = tiny.tensors(folder), tiny.tensors(tmp_path / "moved")
    assert stored.keys() == written.keys()
    for name in stored:
        assert (stored[name].dtype, stored[name].shape) == (written[name].dtype, written[name].shape)
        if name in model.outside:
            assert tiny.same_bytes(stored[name], written[name]), name

    # the control: each part of the symmetry, forgotten, must show
    acted = model.acted(symmetry.layers)
    roles = next(iter(model.layers.values())).roles
    for role in [role for role in roles if role != "shared_router"]:
        layers = {i: Forgetful(acted[i], model.layers[i], (role,)) for i in acted}
        wrong = write(ModelStream(model, layers, Copied(model.checkpoint)), tmp_path / role)
        assert tiny.relative_difference(tiny.logits(tiny.load(wrong)), before) > 1e-3, role


@pytest.mark.parametrize("family", tiny.GROUPED)
def test_experts_cannot_leave_their_groups_where_routing_is_group_limited(
    saved: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = saved(family)
    model = read(folder)
    ungrouped = random_symmetry(model, scale=1.0, groups=1)
    with pytest.raises(SymmetryError, match="tears the 4 expert groups apart"):
        apply(ungrouped, folder, tmp_path / "refused")
    wrong = write(rewritten(model, ungrouped.layers), tmp_path / "wrong")
    assert tiny.relative_difference(tiny.logits(tiny.load(wrong)), tiny.logits(tiny.load(folder))) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("family", "layout"), [("mixtral", "per-expert"), ("deepseek_v3", "fused")])
def test_without_scales_the_inverse_restores_the_bytes_in_every_dtype(
    saved: Callable[..., Path], tmp_path: Path, family: str, layout: str, dtype: torch.dtype
) -> None:
    folder = tiny.save(tiny.make_model(family).to(dtype), tmp_path / "b", layout)
    apply(random_symmetry(read(folder), scale=1.0), folder, tmp_path / "there")
    apply(tmp_path / "there", tmp_path / "there", tmp_path / "back", inverse=True)
    stored, there, back = (tiny.tensors(tmp_path / name) for name in ("b", "there", "back"))
    assert all(tiny.same_bytes(stored[name], back[name]) for name in stored)
    assert any(not tiny.same_bytes(stored[name], there[name]) for name in stored)


@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
def test_align_undoes_a_planted_symmetry(saved: Callable[..., Path], tmp_path: Path, family: str, layout: str) -> None:
    a = saved(family, layout)
    planted = random_symmetry(read(a), seed=4)
    apply(planted, a, tmp_path / "b")
    alignment = align(a, tmp_path / "b", tmp_path / "out")
    assert alignment.symmetry.isclose(planted.inverse())
    assert ModelSymmetry.load(tmp_path / "out" / "alignment" / "symmetry.safetensors") == alignment.symmetry
    stored, aligned = tiny.tensors(a), tiny.tensors(tmp_path / "out")
    for name in stored:
        assert torch.allclose(stored[name], aligned[name], rtol=1e-5, atol=1e-6), name
    plain = align(a, tmp_path / "b", tmp_path / "plain", units="plain", symmetry_only=True)
    assert not plain.symmetry.isclose(planted.inverse())  # flipped signs are invisible to plain units
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["alignment.json", "symmetry.safetensors"]


def test_two_fine_tunes_are_rewritten_without_loss(saved: Callable[..., Path], tmp_path: Path) -> None:
    a = saved("qwen2_moe")
    model = tiny.make_model("qwen2_moe")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01 * float(parameter.std().nan_to_num(0)))
    b = tiny.save(model, tmp_path / "b", "per-expert")
    alignment = align(a, b, tmp_path / "out")
    assert alignment.symmetry.is_lossless and alignment.totals()["units_moved"] == 0 == alignment.totals()["signs"]
    stored, aligned = tiny.tensors(b), tiny.tensors(tmp_path / "out")
    assert all(tiny.same_bytes(stored[name], aligned[name]) for name in stored)


def test_the_output_is_complete_and_says_what_was_done(saved: Callable[..., Path], tmp_path: Path) -> None:
    a = saved("deepseek_v2", "fused", 0)
    b = tiny.save(tiny.make_model("deepseek_v2", 1).to(torch.bfloat16), tmp_path / "b", "per-expert", shard="20KB")
    shards = sorted(path.name for path in b.glob("*.safetensors"))
    assert len(shards) > 2
    with pytest.warns(UserWarning, match="outside the MoE blocks the two models are unrelated"):
        alignment = align(a, b, tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    index, original = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (out, b))
    assert index["weight_map"] == original["weight_map"]
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (b / file).read_bytes()
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in out.glob("*.safetensors"))
    assert (out / "README.md").read_text().startswith("---\n")

    report = json.loads((out / "alignment" / "alignment.json").read_text())
    check_alignment(report)
    assert report["family"] == "deepseek_v2" and report["groups"] == 4
    assert str(tmp_path) not in json.dumps(report) and str(tmp_path) not in (out / "README.md").read_text()
    assert report["a"]["fingerprint"] != report["b"]["fingerprint"]
    assert report["outside"]["relative_distance"] > 0.5 and report["outside"]["median_cosine"] < 0.5
    assert report["warnings"] and [layer["layer"] for layer in report["layers"]] == [1, 2]
    for layer in report["layers"]:
        assert layer["distance_before"] > layer["distance_after_units"] > 0
        assert layer["experts"] == 8 and layer["units"] == 8 * 8 + 16 and sorted(layer["expert_order"]) == list(range(8))
        assert 0 < layer["units_moved"] <= layer["units"] and 0 <= layer["signs"] <= layer["units"]
    metadata = ModelSymmetry.load(out).metadata
    assert metadata["order"] == "best" and metadata["b_fingerprint"] == report["b"]["fingerprint"]
    assert alignment.symmetry == ModelSymmetry.load(out)
    before, after = tiny.logits(tiny.load(b)), tiny.logits(tiny.load(out))
    assert tiny.relative_difference(after, before) < 2e-2  # bf16: scales round, so only roughly


def test_a_saved_symmetry_is_applied_only_where_it_belongs(saved: Callable[..., Path], tmp_path: Path) -> None:
    a = saved("mixtral")
    file = tmp_path / "symmetry.safetensors"
    random_symmetry(read(a)).save(file)
    for family, message in (("olmoe", "is of family mixtral"), ("qwen3_moe", "is of family mixtral")):
        with pytest.raises(SymmetryError, match=message):
            apply(file, saved(family), tmp_path / "out")
    symmetry = ModelSymmetry.load(file)
    narrower = {i: LayerSymmetry.identity(6, 23) for i in symmetry.layers}
    with pytest.raises(SymmetryError, match=r"layer 0: expected .*'unit': 24.*found .*'unit': 23"):
        apply(ModelSymmetry("mixtral", 1, narrower), a, tmp_path / "out")
    with pytest.raises(SymmetryError, match="layer 2: absent from the symmetry"):
        apply(ModelSymmetry("mixtral", 1, {i: symmetry.layers[i] for i in (0, 1)}), a, tmp_path / "out")
    with pytest.raises(SymmetryError, match="no symmetry here"):
        apply(tmp_path / "nowhere", a, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_recorded_fingerprint_is_compared(saved: Callable[..., Path], tmp_path: Path) -> None:
    a, other = saved("mixtral"), saved("mixtral", "per-expert", 1)
    apply(random_symmetry(read(a), scale=1.0), a, tmp_path / "b")
    align(a, tmp_path / "b", tmp_path / "out")
    with pytest.warns(UserWarning, match="recorded for another checkpoint"):
        apply(tmp_path / "out", other, tmp_path / "elsewhere")
    for wrong in (tmp_path / "b", other):  # the inverse acts on what was aligned
        with pytest.warns(UserWarning, match="recorded for another checkpoint"):
            apply(tmp_path / "out", wrong, tmp_path / f"wrong-{wrong.name}", inverse=True)
    # the recorded ones: no warning, neither from the file nor from the value, nor from what an inverse was saved as
    symmetry = ModelSymmetry.load(tmp_path / "out")
    apply(symmetry, tmp_path / "b", tmp_path / "again")
    apply(tmp_path / "out", tmp_path / "out", tmp_path / "undone", inverse=True)
    apply(symmetry.inverse(), tmp_path / "out", tmp_path / "undone-again")
    apply(tmp_path / "undone", tmp_path / "undone", tmp_path / "redone", inverse=True)
    stored, undone = tiny.tensors(tmp_path / "b"), tiny.tensors(tmp_path / "undone")
    assert all(tiny.same_bytes(stored[name], undone[name]) for name in stored)


def with_mtp_layer(folder: Path, seed: int) -> Path:
    """Adds layer 3, a multi-token-prediction layer, as a copy of layer 2 under other experts."""

    def change(content: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name in [name for name in content if name.startswith("model.layers.2.")]:
            values = torch.randn(content[name].shape, generator=generator)
            content[name.replace("layers.2.", "layers.3.")] = values
        content["model.layers.3.eh_proj.weight"] = torch.randn(16, 32, generator=generator)

    tiny.edit(folder, change)
    return folder


@pytest.mark.filterwarnings("ignore:A and B hold the same")
def test_multi_token_prediction_layers_are_moe_layers_like_any_other(copy: Callable[..., Path], tmp_path: Path) -> None:
    a = with_mtp_layer(copy("deepseek_v3", name="a"), 0)
    model = read(a)
    assert list(model.layers) == [1, 2, 3] and model.extra_layers == (3,)
    planted = random_symmetry(model)
    apply(planted, a, tmp_path / "b")
    alignment = align(a, tmp_path / "b", tmp_path / "out")
    assert alignment.symmetry.isclose(planted.inverse()) and 3 in alignment.symmetry.layers
    check_alignment(alignment.to_dict())

    without = copy("deepseek_v3", name="without")  # the configuration promises one, and it may be absent
    with pytest.warns(UserWarning, match=r"A lacks the multi-token-prediction layers \[3\]"):
        alone = align(without, a, tmp_path / "alone")
    check_alignment(alone.to_dict())
    assert alone.symmetry.layers[3] == LayerSymmetry.identity(8, 8, 16)
    tiny.edit_config(a, num_nextn_predict_layers=0)
    with pytest.raises(InputError, match="layer 3 is one too many"):
        read(a)


def test_models_of_other_shapes_are_refused_with_all_differences(saved: Callable[..., Path], tmp_path: Path) -> None:
    a = saved("mixtral")
    with pytest.raises(MismatchError, match="family: A has mixtral, B has olmoe"):
        align(a, saved("olmoe"), tmp_path / "out")
    config = tiny.CONFIGS["mixtral"]()
    config.num_local_experts, config.intermediate_size = 4, 20
    other = type(tiny.make_model("mixtral"))(config)
    with pytest.raises(MismatchError) as error:
        align(a, tiny.save(other, tmp_path / "other", "per-expert"), tmp_path / "out")
    assert "size of axis expert: A has 6, B has 4" in str(error.value)
    assert "size of axis unit: A has 24, B has 20" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_outside_tensors_must_agree(saved: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path) -> None:
    b = copy("mixtral")
    tiny.edit(b, lambda content: content.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(MismatchError, match=r"q_proj\.weight: in A, not in B"):
        align(saved("mixtral"), b, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:A and B hold the same")
def test_an_output_that_cannot_be_used_is_refused(
    saved: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path
) -> None:
    a, b = saved("mixtral"), copy("mixtral")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    for output, message in (
        (tmp_path / "full", "not empty .it holds precious"),
        (tmp_path / "full" / "precious", "found a file"),
        (b / "inside", "lies inside the input"),
    ):
        with pytest.raises(InputError, match=message):
            align(a, b, output)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    align(a, b, tmp_path / "empty")  # an empty folder will do
    assert (tmp_path / "empty" / "model.safetensors.index.json").exists()


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
def test_a_failure_on_the_way_leaves_nothing_in_the_output(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderWriter, "write_checkpoint_files", interrupted)
    (tmp_path / "kept").mkdir()
    for output in (tmp_path / "new" / "deep", tmp_path / "kept"):
        with pytest.raises(KeyboardInterrupt):
            align(saved("mixtral"), saved("mixtral", "per-expert", 1), output)
    # beside the output, what is done of it; in it, nothing
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".deep.progress"] and not list(
        (tmp_path / "kept").iterdir()
    )


def test_the_same_checkpoint_twice_is_the_identity(
    saved: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path
) -> None:
    b = copy("qwen3_moe")
    with pytest.warns(UserWarning, match="hold the same weights"):
        alignment = align(saved("qwen3_moe"), b, tmp_path / "out")
    assert alignment.symmetry == read(b).identity()

    def swap_two_units(content: dict[str, torch.Tensor]) -> None:
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            values = content[f"model.layers.1.mlp.experts.3.{name}.weight"]
            values.copy_(values.index_select(axis, torch.tensor([0, 1, 3, 2, *range(4, 16)])))

    tiny.edit(b, swap_two_units)  # as near as can be to the same: no warning, and the swap is found
    assert align(saved("qwen3_moe"), b, tmp_path / "swapped").totals()["units_moved"] == 2


@pytest.mark.parametrize("absent", [False, True])  # transformers saves empty tensors
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_deepseek_without_shared_experts(tmp_path: Path, layout: str, absent: bool) -> None:
    config = tiny.CONFIGS["deepseek_v2"]()
    config.n_shared_experts = 0
    torch.manual_seed(0)
    a = tiny.save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "a", layout)
    if absent:
        tiny.edit(a, lambda content: [content.pop(name) for name in list(content) if "shared" in name])
    planted = random_symmetry(read(a))
    apply(planted, a, tmp_path / "b")
    assert align(a, tmp_path / "b", tmp_path / "out").symmetry.isclose(planted.inverse())


@pytest.mark.filterwarnings("ignore:A and B hold the same weights")
def test_weights_outside_the_blocks_that_are_not_finite_are_named(
    copy: Callable[..., Path], saved: Callable[..., Path], tmp_path: Path
) -> None:
    bad = copy("mixtral")
    tiny.edit(bad, lambda content: content["model.norm.weight"].fill_(torch.nan))
    for pair in ((bad, saved("mixtral")), (saved("mixtral"), bad)):
        with pytest.raises(CheckpointError, match=r"copy/model\.safetensors: tensor model\.norm\.weight holds NaN .* at \[0\]"):
            align(*pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    align(saved("mixtral"), bad, tmp_path / "out", allow_nonfinite=True)
    assert bool(tiny.tensors(tmp_path / "out")["model.norm.weight"].isnan().all())


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
def test_configurations_that_compute_differently_are_pointed_out(copy: Callable[..., Path], tmp_path: Path) -> None:
    a, b = copy("mixtral", name="a"), copy("mixtral", "per-expert", 1, name="b")
    tiny.edit_config(b, rms_norm_eps=0.1, router_aux_loss_coef=0.5)
    with pytest.warns(UserWarning) as caught:
        align(a, b, tmp_path / "out", symmetry_only=True)
    messages = [str(warning.message) for warning in caught]
    assert any("rms_norm_eps is" in message for message in messages)
    assert not any("router_aux_loss_coef" in message for message in messages)


def miniature(case: str, folder: Path, seed: int = 0) -> Path:
    """A saved miniature of one of the architectures in the zoo."""
    build(shrink(zoo.original(case)), seed).save_pretrained(folder)
    return folder


def to_bfloat16(content: dict[str, torch.Tensor]) -> None:
    content.update((name, value.bfloat16()) for name, value in content.items() if not name.endswith("correction_bias"))


@pytest.mark.filterwarnings("ignore:outside the MoE blocks", "ignore:experts under")
@pytest.mark.parametrize("case", ["qwen3_vl_moe", "llama4", "glm4v_moe", "ernie4_5_vl_moe", "qwen3_next"])
def test_a_text_tower_is_aligned_where_it_stands_and_the_rest_is_copied(tmp_path: Path, case: str) -> None:
    a = miniature(case, tmp_path / "a")
    extra = {f"talker.layers.0.mlp.experts.{i}.up_bias": torch.randn(24, 32) for i in range(12)}
    tiny.edit(a, lambda content: content.update(extra))  # of something that has experts of another kind
    planted = random_symmetry(read(a))
    apply(planted, a, tmp_path / "b")
    align(a, tmp_path / "b", tmp_path / "out")
    before, moved, after = (tiny.tensors(folder) for folder in (a, tmp_path / "b", tmp_path / "out"))
    outside = read(a).outside
    assert set(extra) <= set(outside) and any("visual" in name or "vision" in name for name in outside) == (
        case != "qwen3_next"
    )
    for name in before:
        if name in outside:
            assert tiny.same_bytes(before[name], moved[name]) and tiny.same_bytes(before[name], after[name]), name
        else:
            assert torch.allclose(before[name], after[name], atol=1e-5), name
    assert any(not torch.equal(before[name], moved[name]) for name in before)


def test_experts_with_their_inputs_first_are_told_by_shape_or_refused(tmp_path: Path) -> None:
    folder = miniature("qwen3_vl_moe", tmp_path / "a")
    shutil.copytree(folder, tmp_path / "hub")

    def transpose(content: dict[str, torch.Tensor]) -> None:
        for name in [name for name in content if ".experts." in name]:
            content[name] = content[name].transpose(1, 2)

    tiny.edit(tmp_path / "hub", transpose)  # as on the Hub
    one, other = read(folder), read(tmp_path / "hub")
    for index, layer in one.layers.items():
        for role in layer.roles:
            for expert in range(layer.experts) if role in layer.expert_roles else [None]:
                assert torch.equal(layer.stored(role, expert), other.layers[index].stored(role, expert))
    before = reloaded(build(shrink(zoo.original("qwen3_vl_moe"))), tmp_path / "hub")
    apply(random_symmetry(other), tmp_path / "hub", tmp_path / "moved")
    assert tiny.relative_difference(reloaded(build(shrink(zoo.original("qwen3_vl_moe"))), tmp_path / "moved"), before) < 1e-5
    square = shrink(zoo.original("qwen3_vl_moe"))
    square.text_config.moe_intermediate_size = square.text_config.hidden_size
    build(square).save_pretrained(tmp_path / "square")
    with pytest.raises(FamilyError, match=r"down_proj: shape .12, 32, 32. fits .* and nothing tells which it is"):
        read(tmp_path / "square")


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
def test_correction_biases_stay_in_float32_and_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    a, b = (miniature("glm4_moe", tmp_path / name, seed) for seed, name in enumerate("ab"))
    for folder in (a, b):
        tiny.edit(folder, to_bfloat16)
    align(a, b, tmp_path / "aligned")
    merge(a, b, tmp_path / "merged")
    for folder in (b, tmp_path / "aligned", tmp_path / "merged"):
        dtypes = {name: tensor.dtype for name, tensor in tiny.tensors(folder).items()}
        biases = [name for name in dtypes if name.endswith("e_score_correction_bias")]
        assert biases and {dtypes.pop(name) for name in biases} == {torch.float32}
        assert set(dtypes.values()) == {torch.bfloat16}
    tied = [miniature("lfm2_moe", tmp_path / f"tied-{seed}", seed) for seed in (0, 1)]
    merge(*tied, tmp_path / "tied-merge")
    assert not any("lm_head" in name for name in tiny.tensors(tmp_path / "tied-merge"))
    assert json.loads((tmp_path / "tied-merge" / "config.json").read_text())["tie_word_embeddings"]


def test_a_table_of_token_experts_is_relabelled_and_decides_the_order(tmp_path: Path) -> None:
    a = miniature("deepseek_v4", tmp_path / "a")
    planted = random_symmetry(read(a))
    apply(planted, a, tmp_path / "b")
    table = next(name for name in tiny.tensors(a) if name.endswith("tid2eid"))
    assert not torch.equal(tiny.tensors(a)[table], tiny.tensors(tmp_path / "b")[table])
    with pytest.raises(MismatchError, match="tid2eid: integers that differ between A and B"):
        merge(a, tmp_path / "b", tmp_path / "naive", align=False)
    alignment = merge(a, tmp_path / "b", tmp_path / "merged")
    assert torch.equal(tiny.tensors(a)[table], tiny.tensors(tmp_path / "merged")[table])
    assert "table" in {matching.first.order_method for matching in alignment.layers.values()}
    check_alignment(alignment.to_dict())


def spoil(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(content: dict[str, torch.Tensor]) -> None:
        key = next(key for key in content if name in key)
        value = change(content.pop(key))
        if value is not None:
            content[key] = value

    return edit


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("zaya", spoil("router_mlp.fc1.weight", lambda value: None), "missing: .*router_mlp.fc1.weight"),
        ("zaya", spoil("router_mlp.fc2.bias", lambda value: value[:5]), r"fc2.bias: expected shape \[.*found \[5\]"),
        ("muse_spark_text", spoil("post_expert_norm", lambda value: None), "missing: .*post_expert_norm"),
        ("gemma4_text", spoil("router.scale", lambda value: None), "missing: .*router.scale"),
        ("qwen3_moe", spoil("experts.3.up_proj", lambda value: value.bfloat16()), "they cannot change places"),
        ("deepseek_v4", spoil("tid2eid", lambda value: value.fill_(12)), "names experts 12 to 12, there are 12"),
        ("deepseek_v4", spoil("tid2eid", lambda value: value.fill_(-1)), "names experts -1 to -1"),
        ("gpt_oss", spoil("router.bias", lambda value: value.fill_(torch.nan)), "router bias holds NaN"),
        ("gemma4_text", spoil("per_expert_scale", lambda value: value.fill_(torch.inf)), "expert scale holds NaN or infinite"),
    ],
)
def test_damage_in_any_part_of_a_block_is_named(
    tmp_path: Path, case: str, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    a, bad = miniature(case, tmp_path / "a"), miniature(case, tmp_path / "bad", 1)
    tiny.edit(bad, change)
    with pytest.raises((FamilyError, CheckpointError), match=message):
        align(a, bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_group": 5}, "divides experts into 5 groups, layer 1 has 12"),
        ({"num_experts_per_tok": 13}, "asks for 13 experts per token, layer 1 has 12"),
        ({"topk_group": 0}, "keeps 0 of 4 expert groups"),
        ({"n_group": 6, "topk_group": 1}, "asks for 3 experts per token out of 1 groups of 2: the rest are ties"),
    ],
)
def test_routing_that_cannot_be_is_refused(tmp_path: Path, values: dict[str, int], message: str) -> None:
    folder = miniature("deepseek_v3", tmp_path / "a")
    tiny.edit_config(folder, **values)
    with pytest.raises(FamilyError, match=message):
        read(folder)


def test_layouts_whose_names_differ_outside_the_blocks_are_told(tmp_path: Path) -> None:
    model = build(shrink(zoo.original("nemotron_h")))
    for layout in (True, False):
        model.save_pretrained(tmp_path / str(layout), save_original_format=layout)
    with pytest.raises(MismatchError, match="the same tensors under other names: one is in the Hub's layout"):
        align(tmp_path / "True", tmp_path / "False", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
def test_an_order_that_makes_things_worse_is_pointed_out(tmp_path: Path) -> None:
    a, b = miniature("mixtral", tmp_path / "a"), miniature("mixtral", tmp_path / "b")

    def other_routers(content: dict[str, torch.Tensor]) -> None:
        for name in [name for name in content if name.endswith("gate.weight")]:
            content[name] = content[name].flip(0).contiguous()

    tiny.edit(b, other_routers)
    with pytest.warns(UserWarning, match="further apart in the order that `gate` found"):
        align(a, b, tmp_path / "gate", order="gate", symmetry_only=True)


def test_a_bank_without_experts_is_none(tmp_path: Path) -> None:
    config = shrink(zoo.original("longcat_flash"))
    config.zero_expert_num = 0
    build(config).save_pretrained(tmp_path / "a")
    model = read(tmp_path / "a")
    assert list(next(iter(model.layers.values())).banks) == [""]
    apply(random_symmetry(model), tmp_path / "a", tmp_path / "b")
    assert align(tmp_path / "a", tmp_path / "b", tmp_path / "out").totals()["relative_distance_after_units"] < 1e-5
