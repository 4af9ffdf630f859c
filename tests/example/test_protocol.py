from __future__ import annotations

import copy
import sysconfig
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.example.protocol import (
    Training,
    reinitialise,
    standard_library_text,
    token_stream,
    train,
    train_tokenizer,
)
from tests import tiny

EMAIL = Path(sysconfig.get_paths()["stdlib"]) / "email"


def test_the_text_is_split_by_file_and_the_tokenizer_reads_it_back() -> None:
    corpus = standard_library_text(EMAIL, minimum_characters=100)
    assert len(corpus.train) > 5 * len(corpus.held_out) > 0 and not set(corpus.train) & set(corpus.held_out)
    tokenizer = train_tokenizer(corpus.train, vocabulary=400)
    assert len(tokenizer) == 400
    assert tokenizer.decode(tokenizer("Parse email.")["input_ids"]) == "Parse email."
    stream = token_stream(tokenizer, corpus.held_out)
    assert stream.ndim == 1 and int((stream == tokenizer.eos_token_id).sum()) == len(corpus.held_out)


@pytest.mark.parametrize("layers", [[0], None])
def test_only_the_named_blocks_are_trained(layers: list[int] | None) -> None:
    base = tiny.make_model("mixtral")
    model = copy.deepcopy(base)
    if layers:
        reinitialise(model, layers, std=0.02, seed=1)
    tokens = torch.arange(3000) % 7
    early = train(model, tokens, Training(steps=25, learning_rate=1e-2, batch=4, sequence=16, warmup=5), seed=0, layers=layers)
    late = train(model, tokens, Training(steps=25, learning_rate=1e-2, batch=4, sequence=16, warmup=5), seed=1, layers=layers)
    assert late < early
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert changed, "the control: something was trained"
    if layers:
        assert all(name.startswith("model.layers.0.mlp.") for name in changed)
    else:
        assert set(base.state_dict()) == changed


def test_reinitialisation_is_a_function_of_the_seed() -> None:
    models = [tiny.make_model("mixtral") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        reinitialise(model, [1], std=0.02, seed=seed)
    experts = [model.model.layers[1].mlp.experts.down_proj for model in models]
    assert torch.equal(experts[0], experts[1]) and not torch.equal(experts[0], experts[2])
    assert experts[0].std().item() == pytest.approx(0.02, rel=0.05)
