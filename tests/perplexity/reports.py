"""Reports made from given losses, without models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_moe_lmc.perplexity.report import BarrierReport
from hf_moe_lmc.perplexity.windows import Windows
from tests.schemas import check_report


def make_report(windows: Windows, losses: Mapping[str, torch.Tensor], t: Sequence[float], **more: Any) -> BarrierReport:
    """A report of given losses, float64 [point, window], nats summed over each window; its content fits the schema."""
    facts = {
        "text": {"kind": "files", "files": [{"name": "held_out.txt", "text": "held_out", "sha256": "0" * 64}]},
        **windows.describe(),
        "dtype": "float32",
        "batch_size": 8,
        "device": ["cpu"],
        "attention_implementation": "sdpa",
        "experts_implementation": "grouped_mm",
        "mode": "resident",
        "passes": 1,
        "bytes_of_both": 1000,
        "weights": 2000,
        "activations": 500,
    }
    made = BarrierReport(
        a={"source": "org/a", "fingerprint": "a" * 64},
        b={"source": "org/b", "fingerprint": "b" * 64},
        evaluation=facts,
        matching={"symmetry": None},
        windows=windows,
        losses=dict(losses),
        t=tuple(t),
        seconds=1.0,
        **more,
    )
    check_report(json.loads(made.to_json()))
    return made


def cut(owners: Sequence[int], *, bytes_scored: tuple[int, ...] | None = None) -> Windows:
    """Windows of four predicted tokens, each of the document that `owners` names."""
    rows = tuple(torch.arange(5) for _ in owners)
    hashes = {"text_hash": "1" * 64, "tokenizer_hash": "2" * 64}
    return Windows(rows, tuple(owners), 5, False, 5 * len(owners), bytes_scored=bytes_scored, **hashes)


def report(naive: list[float] | None, aligned: list[float]) -> BarrierReport:
    """Losses per token at t = 0, 0.5 and 1 on one window of four predicted tokens."""
    losses = {"aligned": 4 * torch.tensor(aligned, dtype=torch.float64)[:, None]}
    if naive is not None:
        losses["naive"] = 4 * torch.tensor(naive, dtype=torch.float64)[:, None]
    return make_report(cut((0,)), losses, (0.0, 0.5, 1.0))


def on_documents(count: int = 24, **more: Any) -> BarrierReport:
    """Two windows of four predicted tokens in each document; naive barrier about 1, aligned about 0.2, at nine points."""
    generator = np.random.default_rng(0)
    owners = tuple(i // 2 for i in range(2 * count))
    t = tuple(i / 8 for i in range(9))
    level = generator.normal(3, 0.5, count).repeat(2)
    rise = generator.normal(1, 0.1, count).repeat(2)
    shape = 4 * np.array(t) * (1 - np.array(t))
    losses = {
        name: torch.from_numpy(4 * (level + height * shape[:, None] * rise))
        for name, height in (("aligned", 0.2), ("naive", 1.0))
    }
    return make_report(cut(owners, bytes_scored=(16,) * len(owners)), losses, t, **more)
