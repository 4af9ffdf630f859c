from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import transformers

from hf_moe_lmc.runtime import threads
from hf_moe_lmc.runtime.threads import Products, products_of, suited

MANY = 6


@pytest.fixture
def unchosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch has as many threads as it would take by itself on a machine of so many cores."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_by_itself", lambda: {MANY})
    before = torch.get_num_threads()
    torch.set_num_threads(MANY)
    yield
    torch.set_num_threads(before)


def layer(hidden: int, units: int, experts: int) -> transformers.MixtralConfig:
    return transformers.MixtralConfig(
        hidden_size=hidden,
        intermediate_size=units,
        num_local_experts=experts,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1024,
    )


@pytest.mark.parametrize(
    ("hidden", "units", "experts", "tokens", "expected"),
    [
        (32, 64, 6, 4096, 1),  # the models of these tests
        (64, 512, 4, 4096, 1),  # those of the demo
        (64, 512, 4, 1024, 1),  # in training
        (256, 128, 128, 4096, 1),  # many products, each of them small
        (2048, 1024, 64, 4096, MANY),
        (2048, 1024, 64, 64, MANY),  # few tokens, but the weights come from memory
        (2048, 768, 128, 2, MANY),
        (4096, 14336, 8, 4096, MANY),
    ],
)
@pytest.mark.usefixtures("unchosen")
def test_small_products_have_one_thread_and_large_ones_all(
    hidden: int, units: int, experts: int, tokens: int, expected: int
) -> None:
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(layer(hidden, units, experts))
    with suited(products_of(model, tokens, top_k=2)):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == MANY


@pytest.mark.usefixtures("unchosen")
def test_threads_come_back_after_an_error_and_what_names_nothing_is_small() -> None:
    with pytest.raises(ZeroDivisionError), suited():
        assert torch.get_num_threads() == 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == MANY


@pytest.mark.parametrize("name", threads.VARIABLES)
@pytest.mark.usefixtures("unchosen")
def test_a_choice_in_the_environment_is_obeyed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, str(MANY))
    with suited():
        assert torch.get_num_threads() == MANY


@pytest.mark.parametrize("chosen", [1, 2, MANY + 1])
@pytest.mark.usefixtures("unchosen")
def test_a_choice_of_torch_is_obeyed(chosen: int) -> None:
    torch.set_num_threads(chosen)
    for products in ([], [Products(1, 10**9, 10**4)]):
        with suited(products):
            assert torch.get_num_threads() == chosen


def test_what_torch_takes_by_itself_is_no_choice() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in threads.VARIABLES}
    program = "import torch; print(torch.get_num_threads())"
    ran = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert int(ran.stdout) in threads._by_itself()
    assert 10**6 not in threads._by_itself()  # the control
