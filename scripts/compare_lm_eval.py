"""Compares the losses of this package with those of lm-evaluation-harness on the same windows.

Two ways: the windows of this package through the harness's log-likelihoods, and the harness's own rolling windows (each
token predicted once; the last window reaches back to be full) through this package. Needs `pip install lm_eval`, which is no
dependency of the package.

    python scripts/compare_lm_eval.py MODEL TEXT [--context N] [--stride N] [--max-tokens N]

MODEL is a local folder or Hub id of any causal model. Exit code 1 if a mean differs by more than 1e-4 nats per token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_lmc.perplexity.windows import Windows, cut_windows, window_losses

TOLERANCE = 1e-4  # nats per token


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--max-tokens", type=int)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8")
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=options.context, backend="causal")

    ours = cut_windows([text], tokenizer, context=options.context, stride=options.stride, max_tokens=options.max_tokens)
    requests = []
    for i, row in enumerate(ours.rows):
        first = 1 + (ours.context_only[i] if ours.context_only else 0)
        requests.append((None, row[:first].tolist(), row[first:].tolist()))
    theirs = torch.tensor([-value for value, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]).double()
    worst = _compare("windows of this package", window_losses(model, ours, batch_size=4), theirs, ours.scored)

    # the harness reads whole texts, and its windows predict `max_length` tokens behind one of context
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids[: options.max_tokens])
    ids = harness.tok_encode(text)
    rows, context_only = [], []
    for given, predicted in get_rolling_token_windows(ids, harness.prefix_token_id, options.context, 1):
        rows.append(torch.tensor([*given, predicted[-1]]))
        context_only.append(len(given) - len(predicted))
    windows = Windows(tuple(rows), (0,) * len(rows), options.context + 1, False, len(ids), context_only=tuple(context_only))
    total = -harness.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)[0]
    losses = window_losses(model, windows, batch_size=4).sum()[None]
    worst = max(worst, _compare("rolling windows of the harness", losses, torch.tensor([total]).double(), windows.scored))
    return int(not worst <= TOLERANCE)


def _compare(what: str, ours: torch.Tensor, theirs: torch.Tensor, scored: torch.Tensor) -> float:
    """Largest difference, nats per token: of a window where there is one number for each, and of the whole text."""
    tokens = scored if len(scored) == len(ours) else scored.sum()[None]
    mean = ours.sum() / scored.sum(), theirs.sum() / scored.sum()
    worst = max(float(((ours - theirs) / tokens).abs().max()), float((mean[0] - mean[1]).abs()))
    print(f"{what}: {len(scored)} windows, {mean[0]:.6f} here, {mean[1]:.6f} there, at most {worst:.1e} nats per token apart")
    return worst


if __name__ == "__main__":
    sys.exit(main())
