"""Trained pairs of each kind: what routers and samples say of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import hf_moe_lmc as lmc
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.example.protocol import Training, reinitialise, token_stream, train, train_tokenizer
from hf_moe_lmc.lineage.judging import judge_all_routers, judge_layers
from hf_moe_lmc.lineage.outside import sample_outside
from hf_moe_lmc.lineage.verdict import LayerVerdict, sentence
from hf_moe_lmc.moe.reading import read_model

TEXT = (Path(__file__).parents[2] / "docs" / "matching.md").read_text(encoding="utf-8")
STEPS = 30
LAYERS = (0, 1)

Trained = Callable[[PreTrainedModel, int], PreTrainedModel]


def fresh(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": len(LAYERS), "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 0}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=8))


def upcycled(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """All experts of a layer from its first one, with a little noise, and routers drawn anew."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            for weights in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                noise = torch.randn(weights.shape, generator=generator)
                weights.copy_(weights[:1] + 0.05 * weights.std() * noise)
            layer.mlp.gate.weight.normal_(std=0.02, generator=generator)
    return model


def drawn_anew(model: PreTrainedModel, seed: int, *, routers: bool = True) -> PreTrainedModel:
    """The paper's protocol: other MoE blocks, everything else the same."""
    changed = copy.deepcopy(model)
    reinitialise(changed, LAYERS, std=0.02, seed=seed)
    if not routers:
        for layer, before in zip(changed.model.layers, model.model.layers, strict=True):
            layer.mlp.gate.weight.data.copy_(before.mlp.gate.weight)
    return changed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    tokenizer = train_tokenizer([TEXT], 512)
    tokens = token_stream(tokenizer, [TEXT])

    def trained(model: PreTrainedModel, seed: int, layers: tuple[int, ...] | None = None) -> PreTrainedModel:
        model = copy.deepcopy(model)
        train(model, tokens, Training(STEPS, 1e-3, batch=8, sequence=32, warmup=5), seed=seed, layers=layers)
        return model

    base = trained(fresh(0), 0)
    made = {
        "base": base,
        "tuned": trained(base, 1),
        "tuned otherwise": trained(base, 2),
        "independent": trained(fresh(9), 9),
        "blocks anew": trained(drawn_anew(base, 1), 1, LAYERS),
        "blocks anew otherwise": trained(drawn_anew(base, 2), 2, LAYERS),
        "upcycled": trained(upcycled(base, 1), 1),
        "upcycled otherwise": trained(upcycled(base, 2), 2),
        "experts anew": drawn_anew(base, 3, routers=False),
    }
    folder = tmp_path_factory.mktemp("trained")
    for name, model in made.items():
        model.save_pretrained(folder / name, save_original_format=True)
    yield {name: folder / name for name in made}


def judged(a: Path, b: Path) -> tuple[list[LayerVerdict], str]:
    with Checkpoint.open(a) as one, Checkpoint.open(b) as other:
        models = read_model(one), read_model(other)
        layers = judge_layers(*models, judge_all_routers(models)[0, 1])
        return layers, sentence(layers, sample_outside(one, other, models[0].outside))


@pytest.fixture
def shuffled(tmp_path: Path) -> Callable[[Path], Path]:
    """A model with its experts and hidden units in other places, signs and scales changed."""

    def make(folder: Path) -> Path:
        with Checkpoint.open(folder) as checkpoint:
            symmetry = read_model(checkpoint).random(torch.Generator().manual_seed(3), scale=1.5)
        lmc.apply(symmetry, folder, tmp_path / "shuffled")
        return tmp_path / "shuffled"

    return make


@pytest.mark.parametrize(
    ("a", "b", "verdict", "said"),
    [
        ("tuned", "tuned otherwise", "in place", "B is a fine-tune of the same model as A, experts in place"),
        ("base", "tuned", "in place", "B is a fine-tune of the same model as A, experts in place"),
        ("blocks anew", "blocks anew otherwise", "unrelated", "share what stands outside their MoE blocks"),
        ("base", "independent", "unrelated", "outside the MoE blocks A and B are unrelated, in the MoE blocks too"),
        ("upcycled", "upcycled otherwise", "in place", "B grew from the same experts as A, with routers of its own"),
        ("base", "experts anew", "unrelated", "share what stands outside their MoE blocks"),
    ],
)
def test_trained_pairs_of_each_kind(
    models: dict[str, Path], shuffled: Callable[[Path], Path], a: str, b: str, verdict: str, said: str
) -> None:
    layers, text = judged(models[a], models[b])
    assert {layer.verdict for layer in layers} == {verdict}, layers
    assert said in text
    layers, text = judged(models[a], shuffled(models[b]))
    if verdict == "in place":
        assert {layer.verdict for layer in layers} == {"shuffled"} and "align first" in text, layers
    else:
        assert {layer.verdict for layer in layers} == {verdict} and said in text, layers


def test_frozen_routers_are_not_taken_at_their_word(models: dict[str, Path]) -> None:
    layers, _ = judged(models["base"], models["experts anew"])
    assert {layer.routers for layer in layers} == {"alike"} and {layer.by for layer in layers} == {"experts"}
    assert all("byte for byte" in layer.why for layer in layers)


def test_units_in_other_places_are_seen_where_experts_are_in_place(models: dict[str, Path], tmp_path: Path) -> None:
    """Routers say nothing of hidden units."""
    with Checkpoint.open(models["tuned"]) as checkpoint:
        model = read_model(checkpoint)
        symmetry, identity = model.random(torch.Generator().manual_seed(5)), model.identity()
        layers = {
            index: type(layer)(
                {
                    name: type(bank)(identity.layers[index].banks[name].expert_order, bank.unit_order, bank.unit_scale)
                    for name, bank in layer.banks.items()
                },
                layer.shared,
            )
            for index, layer in symmetry.layers.items()
        }
    lmc.apply(lmc.ModelSymmetry(symmetry.family, symmetry.groups, layers), models["tuned"], tmp_path / "units")
    verdicts, text = judged(models["base"], tmp_path / "units")
    assert {layer.verdict for layer in verdicts} == {"shuffled"} and all(layer.moved == 0 for layer in verdicts)
    assert all("hidden units" in layer.why for layer in verdicts) and "align first" in text
