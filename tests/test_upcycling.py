"""The scripts that train and measure upcycled pairs, at a tiny size."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralForCausalLM, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe_lmc import barrier
from hf_moe_lmc.example.protocol import AUXILIARY_LOSS_WEIGHT, small_mixtral
from hf_moe_lmc.example.upcycling import dense_config, upcycle
from tests.scripts import script

batched, models, upcycling = script("batched_mixtral"), script("upcycled_models"), script("upcycling")
CONFIG = small_mixtral(hidden_size=16, layers=2, intermediate_size=24)


def dense(seed: int) -> MistralForCausalLM:
    torch.manual_seed(seed)
    return MistralForCausalLM(dense_config(CONFIG))


@pytest.mark.parametrize("routed", [False, True])
def test_many_models_at_once_have_the_losses_and_gradients_of_each(routed: bool) -> None:
    pair: list[Any] = [upcycle(dense(0), CONFIG, seed=i, noise=0.5, redrawn=0.5) if routed else dense(i) for i in range(2)]
    stacked = {
        name: values.clone().requires_grad_() for name, values in batched.stack([model.state_dict() for model in pair]).items()
    }
    ids = torch.randint(CONFIG.vocab_size, (2, 3, 12))
    losses = batched.loss_of(stacked, pair[0].config, ids)
    losses.sum().backward()
    for i, model in enumerate(pair):
        output = model(input_ids=ids[i], labels=ids[i], **({"output_router_logits": True} if routed else {}))
        loss = output.loss
        if routed:
            balance = load_balancing_loss_func(output.router_logits, CONFIG.num_local_experts, CONFIG.num_experts_per_tok)
            loss = loss - CONFIG.router_aux_loss_coef * output.aux_loss + AUXILIARY_LOSS_WEIGHT * balance
        loss.backward()
        torch.testing.assert_close(losses[i], loss)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(stacked[name].grad[i], parameter.grad, rtol=1e-3, atol=1e-6)


def test_experts_run_on_their_tokens_give_what_they_give_on_all() -> None:
    torch.manual_seed(0)
    model, tokens, width, experts, units = 2, 7, 8, 3, 5
    x, gate_up = torch.randn(model, tokens, width), torch.randn(model, experts, 2 * units, width)
    weights, down = torch.rand(model, tokens, experts), torch.randn(model, experts, width, units)
    weights[..., 1] = 0  # an expert without tokens
    weights[:, ::2, 0] = 0
    found = [run(x, weights, gate_up, down) for run in (batched.all_experts, batched.chosen_experts)]
    torch.testing.assert_close(*found)
    assert not torch.allclose(batched.chosen_experts(x, weights.roll(1, dims=-1), gate_up, down), found[0])


def test_models_trained_at_once_are_those_trained_alone_and_branches_leave_the_trunk_as_it_was() -> None:
    states = [upcycle(dense(0), CONFIG, seed=i).state_dict() for i in range(2)]
    tokens = torch.arange(500) % 7
    recipe = batched.Recipe((4, 8), 1e-2, decay=0.5, batch=2, sequence=8, warmup=2)

    def trained(some: list[Any], seeds: list[int], recipe: Any) -> dict[int, list[dict[str, torch.Tensor]]]:
        found = {}

        def keep(steps: int, stacked: Any) -> None:
            found[steps] = [batched.unstack(stacked, i) for i in range(len(some))]

        rows = [tokens] * len(some)
        batched.train_stack(batched.stack(some), CONFIG, rows, seeds, recipe, device="cpu", keep=keep)
        return found

    both, alone = trained(states, [0, 1], recipe), trained(states[1:], [1], recipe)
    assert list(both) == [4, 8] and recipe.steps == 4 + 2 + 4
    longest = trained(states, [0, 1], replace(recipe, kept=(8,)))
    for name, values in states[0].items():
        torch.testing.assert_close(both[8][1][name], alone[8][0][name], rtol=1e-3, atol=1e-5)
        assert torch.equal(both[8][0][name], longest[8][0][name])
        assert "norm" in name or not torch.equal(both[4][0][name], values)


@pytest.mark.parametrize("redrawn", [0.0, 0.5])
def test_an_upcycled_model_is_the_dense_one_but_for_its_experts(redrawn: float) -> None:
    base = dense(0)
    one, other = (upcycle(base, CONFIG, seed=seed, noise=0.0, redrawn=redrawn) for seed in (1, 2))
    again = upcycle(base, CONFIG, seed=1, noise=0.0, redrawn=redrawn)
    assert isinstance(one, MixtralForCausalLM)
    for name, values in base.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(one.state_dict()[name], values)
    down = base.model.layers[1].mlp.down_proj.weight
    experts = one.model.layers[1].mlp.experts
    kept = (experts.down_proj == down).all(dim=1)
    assert kept.sum(dim=1).tolist() == [round((1 - redrawn) * CONFIG.intermediate_size)] * CONFIG.num_local_experts
    gate_and_up = torch.cat([base.model.layers[1].mlp.gate_proj.weight, base.model.layers[1].mlp.up_proj.weight])
    assert torch.equal((experts.gate_up_proj == gate_and_up).all(dim=2), kept.repeat(1, 2))
    assert bool(kept.all()) or not torch.equal(kept[0], kept[1]), "each expert draws its own"
    assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(one.model.layers[0].mlp.gate.weight, other.model.layers[0].mlp.gate.weight)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = upcycling.quick_scale()
    short = replace(scale.upcycled, kept=(4,))
    monkeypatch.setattr(upcycling, "quick_scale", lambda: replace(scale, seeds=(0,), upcycled=short))
    monkeypatch.setattr(models, "METHODS", {"drop": 0.5})
    monkeypatch.setattr(upcycling, "METHODS", {"drop": 0.5})


@pytest.mark.usefixtures("tiny")
def test_pairs_are_trained_measured_and_told_and_a_second_call_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["-o", str(tmp_path / "found.json"), "--models", str(tmp_path / "models"), "--quick", "--device", "cpu"]
    with pytest.raises(SystemExit, match="stopped after 0 minutes; the same call continues"):
        upcycling.main([*call, "--jobs", "1", "--minutes", "0"])
    assert json.loads((tmp_path / "found.json").read_text())["pairs"] == []
    upcycling.main([*call, "--jobs", "1"])
    record = json.loads((tmp_path / "found.json").read_text())
    same, different = record["settings"]
    assert (same["mix"], different["mix"]) == ("same", "different") and same["seeds"] == 1
    names = {"a", "b", "naive", "aligned", "norms", "crossover", "ridge", "crossover+ridge", "regmean", "auto", "ensemble"}
    assert names <= set(same["losses"]) and set(different["losses"]) == names
    assert {"joint order", "best order", "blocks aligned", "outside naive"} <= set(same["losses"])
    losses = {name: found["mean"]["mean"] for name, found in different["losses"].items()}
    above = different["above_better_parent"]["aligned"]
    assert above["mean"] == pytest.approx(losses["aligned"] - min(losses["a"], losses["b"]), abs=2e-5)
    assert above["width"] is None

    # the numbers are those of the verb
    root, setting = tmp_path / "models", "drop-different-e3-s0"
    texts = {name: root / "evaluation" / f"{name}.jsonl" for name in ("prose", "code")}
    report = barrier(
        *(root / "models" / f"{setting}-{side}-4" for side in "ab"), tmp_path / "barrier",
        text=texts, context=16, max_tokens=300, points=2, routing=False, device="cpu", ensemble=True,
    )  # fmt: skip
    for text, found in (*report.references.texts.items(), ("mean", report.references.mean)):
        for name in ("a", "b", "naive", "aligned", "ensemble"):
            assert different["losses"][name][text]["mean"] == pytest.approx(found.loss(name), abs=2e-5)

    page = script("render_upcycling").page(record)
    assert f"| Drop-Upcycling | 3 | 4 | mean | {losses['a']:.3f} | {losses['b']:.3f} | {losses['naive']:.3f} |" in page
    monkeypatch.setattr(models, "train_stack", None)  # nothing is trained or measured again
    monkeypatch.setattr(upcycling, "measure", None)
    shutil.rmtree(tmp_path / "models" / "models")
    upcycling.main([*call, "--jobs", "1"])
    assert json.loads((tmp_path / "found.json").read_text())["pairs"] == record["pairs"]


def test_repairs_of_the_papers_protocol_are_measured_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repairs = script("repaired_protocol")
    protocol = replace(repairs.quick_protocol(), settings=("qwen2_moe last",))
    monkeypatch.setattr(repairs, "quick_protocol", lambda: protocol)
    call = ["-o", str(tmp_path / "found.json"), "--models", str(tmp_path / "models"), "--quick", "--jobs", "1"]
    repairs.main(call)
    record = json.loads((tmp_path / "found.json").read_text())
    (setting,), (pair,) = record["settings"], record["pairs"]
    losses = pair["losses"]
    parents = (losses["a"] + losses["b"]) / 2
    assert setting["naive_gap"]["mean"] == pytest.approx(losses["naive"] - parents, abs=2e-5)
    names = {"aligned", "norms", "crossover", "ridge", "crossover+ridge", "regmean", "auto", "ensemble", "widened"}
    assert set(setting["percent_of_naive"]) == names
    (wide,), (one,) = record["widened"], record["widened_pairs"]
    assert one["losses"]["gate order"] == losses["widened"]  # the default
    left = 100 * (losses["widened"] - parents) / (losses["naive"] - parents)
    assert wide["percent_of_naive"]["gate order"]["mean"] == pytest.approx(left, rel=0.05)
    assert "| qwen2_moe last | " in script("render_upcycling").protocol(record)
    monkeypatch.setattr(repairs, "train", None)  # no model is trained again
    repairs.main(call)


def test_shares_and_intervals() -> None:
    assert upcycling.with_interval([1.0, 3.0]) == {"mean": 2.0, "width": pytest.approx(12.706, abs=1e-3)}
    assert upcycling.with_interval([1.0]) == {"mean": 1.0, "width": None}
    share = upcycling.share_of([0.1, 0.3, 0.2], [0.4, 0.6, 0.5])
    assert share["mean"] == pytest.approx(40.0) and share["width"] > 5
