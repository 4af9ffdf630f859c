"""Pairs as people hand them in: real configurations, cut to a few layers and small sizes, and what differs in between."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.moe.reading import read_config, read_model
from tests import tiny
from tests.moe.test_mtp import with_mtp

VERBS = {"align": ["align"], "merge": ["merge"], "merge --no-align": ["merge", "--no-align"], "barrier": ["barrier"]}


def other_eos(folder: Path) -> None:
    tiny.edit_config(folder, eos_token_id=3)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(3)
    tokenizer.save_pretrained(folder)


def two_tokens_more(folder: Path) -> None:
    """ChatML's tokens behind the last row of every table over the vocabulary."""
    with Checkpoint.open(folder) as checkpoint:
        rows = int(read_config(checkpoint).get_text_config().vocab_size)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(
        [*(f"<pad-{i}>" for i in range(len(tokenizer), rows)), "<|im_start|>", "<|im_end|>"], special_tokens=True
    )
    tokenizer.save_pretrained(folder)
    tables = ("embed_tokens.weight", "lm_head.weight")
    tiny.edit(
        folder,
        lambda content: content.update(
            {n: torch.cat([v, torch.randn(2, v.shape[1])]) for n, v in content.items() if n.endswith(tables)}
        ),
    )
    tiny.edit_config(folder, vocab_size=rows + 2)


def more_mtp(case: str) -> Callable[[Path], None]:
    return lambda folder: with_mtp(case, folder) and None


def nothing(folder: Path) -> None:
    """Only the weights differ."""


# name of the configuration, of B's, and what else differs in B, or (MTP) in A
PAIRS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "Qwen3-30B-A3B x Instruct": ("qwen3-30b-a3b", "qwen3-30b-a3b", other_eos),
    "Qwen3-Coder": ("qwen3-coder-480b", "qwen3-coder-480b", nothing),
    "Qwen3-VL": ("qwen3-vl-30b", "qwen3-vl-30b", nothing),
    "Mixtral x ChatML": ("mixtral-8x7b", "mixtral-8x7b", two_tokens_more),
    "DeepSeek-V3 x R1": ("deepseek-v3", "deepseek-r1", nothing),
    "DeepSeek-V3 x R1 with MTP": ("deepseek-v3", "deepseek-r1", more_mtp("deepseek_v3")),
    "GLM-4.5": ("glm-4.5", "glm-4.5", nothing),
    "GLM-4.5, MTP in B": ("glm-4.5", "glm-4.5", more_mtp("glm4_moe")),
    "GLM-5, MTP in B": ("glm-5", "glm-5", more_mtp("glm_moe_dsa")),
    "Kimi-K2": ("kimi-k2", "kimi-k2", other_eos),
    "gpt-oss": ("gpt-oss-20b", "gpt-oss-20b", nothing),
    "Qwen3-Next": ("qwen3-next", "qwen3-next", nothing),
    "Qwen3-Next, MTP in B": ("qwen3-next", "qwen3-next", more_mtp("qwen3_next")),
    "Qwen3.5, MTP in B": ("qwen3.5-35b", "qwen3.5-35b", more_mtp("qwen3_5_moe")),
    "MiMo-V2-Flash, MTP in B": ("mimo-v2-flash", "mimo-v2-flash", more_mtp("mimo_v2_flash")),
    "Llama-4": ("llama-4-scout", "llama-4-scout", nothing),
    "MiniMax-M2": ("minimax-m2.5", "minimax-m2.5", nothing),
    "DeepSeek-V2-Lite": ("deepseek-v2-lite", "deepseek-v2-lite", nothing),
    "granite": ("granite-3.1-1b", "granite-3.1-1b", nothing),
    "Hunyuan": ("hunyuan-a13b", "hunyuan-a13b", nothing),
    "Nemotron": ("nemotron-3-nano", "nemotron-3-nano", nothing),
    "Nemotron Ultra, MTP in B": ("nemotron-3-ultra", "nemotron-3-ultra", more_mtp("nemotron_h")),
    "Step-3.7": ("step-3.7", "step-3.7", nothing),
    "Gemma-4": ("gemma-4-26b", "gemma-4-26b", nothing),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pair", PAIRS)
def test_real_pairs_are_accepted_both_ways(
    pair: str, real: Callable[[str, int], Path], tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name_a, name_b, change = PAIRS[pair]
    a, b = real(name_a, 0), Path(shutil.copytree(real(name_b, 1), tmp_path / "b"))
    change(b)
    refused = {}
    for verb, words in VERBS.items():
        for way, (one, other) in {"A x B": (a, b), "B x A": (b, a)}.items():
            text = ["--text", str(text_file)] if verb == "barrier" else []
            code = main([*words, str(one), str(other), "-o", str(tmp_path / "out"), *text, "--dry-run"])
            said = capsys.readouterr()
            if code:
                refused[f"{verb} {way}"] = said.err[-600:]
    assert not refused, "\n".join(f"{what}: {why}" for what, why in refused.items())


@pytest.mark.filterwarnings("ignore")
def test_another_architecture_is_refused(real: Callable[[str, int], Path], tmp_path: Path) -> None:
    for words in VERBS.values():
        if words[0] != "barrier":
            assert main([*words, str(real("mixtral-8x7b", 0)), str(real("glm-4.5", 0)), "-o", str(tmp_path / "o"), "--dry-run"])
    assert read_model(Checkpoint.open(real("mixtral-8x7b", 0))).family.name == "mixtral"
