"""What an evaluation may hold at once: whether all weights are in place, how many passes the rest takes, and where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe_lmc.path.endpoints import Endpoints
from hf_moe_lmc.perplexity.windows import Windows
from hf_moe_lmc.runtime.memory import CPU, available_memory, memory_on
from hf_moe_lmc.runtime.processes import process_group

LANES = 4096  # at most at once
IN_FLIGHT = 6  # hidden states that a paused forward holds, about
SHARE = 0.5  # of the available memory, for all weights at once or for the activations
FULL = 0.8  # of an accelerator's memory, for weights and activations together


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How points are evaluated.

    Attributes:
        model_class: of transformers, predicts the next token.
        dtype: in which the models run.
        device: where; None: a GPU if there is one.
        batch_size: windows per forward pass.
        activation_memory: bytes for the hidden states of all windows and points that are on their way; None: half of the
            memory that is free.
        resident: whether to hold all weights; None: decided from the memory that is free.
        masked: token ids whose logits do not count, bool [rows]; None: all count.
    """

    model_class: type[PreTrainedModel]
    batch_size: int
    dtype: torch.dtype = torch.float32
    device: str | None = None
    activation_memory: int | None = None
    resident: bool | None = None
    masked: Tensor | None = None


@dataclass(frozen=True)
class Cost:
    """What an evaluation took.

    Attributes:
        mode: `resident` (all weights of both models in memory at once) or `layers` (those of one decoder layer).
        passes: how often both models were read.
        bytes_of_both: one pass.
        weights, activations: bytes planned for.
    """

    mode: str
    passes: int
    bytes_of_both: int
    weights: int
    activations: int


def plan_of(ends: Endpoints, points: int, windows: Windows, options: EvaluationOptions, layers: int) -> Cost:
    """Decides how much is in memory at once."""
    of_a, of_b = ends.a.checkpoint.nbytes, ends.b.checkpoint.nbytes
    stored = ends.a.checkpoint.stored.nbytes + ends.b.checkpoint.stored.nbytes
    everything = of_a + len(ends.symmetries) * of_b + ends.skeleton.nbytes
    hidden = int(ends.a.text_config.hidden_size)
    return planned(ends.skeleton.device, everything, points, windows, options, stored=stored, hidden=hidden, layers=layers)


def planned(
    device: torch.device,
    everything: int,
    points: int,
    windows: Windows,
    options: EvaluationOptions,
    *,
    stored: int,
    hidden: int,
    layers: int,
) -> Cost:
    """Decides whether all weights are in memory at once, and how many passes the activations take.

    An accelerator with memory of its own decides in the place of the CPU: the model and the activations are there.

    Args:
        everything: bytes of all weights at once.
        points: forward passes of each batch.
        stored: bytes that one pass reads.
        hidden: size of a hidden state.
        layers: decoder layers.
    """
    processes, there = process_group(), memory_on(device)
    if there is None:
        free = available_memory() // processes.local_count
    else:
        free = there // math.ceil(processes.local_count / torch.cuda.device_count())
    longest = max(len(row) for row in windows.rows)
    per_token = IN_FLIGHT * hidden * options.dtype.itemsize
    if everything < SHARE * free if options.resident is None else options.resident:
        return Cost("resident", 1, stored, everything, per_token * longest)
    needed = math.ceil(points * sum(len(row) for row in windows.rows) * per_token / processes.count)
    budget = options.activation_memory or int(SHARE * free)
    lanes = math.ceil(points * len(windows.rows) / processes.count)
    passes = min(max(math.ceil(needed / budget), math.ceil(lanes / LANES), 1), len(windows.rows))
    return Cost("layers", passes, stored, everything // max(layers, 1), needed // passes)


def home_of(device: torch.device, plan: Cost) -> torch.device:
    """Where the weights of both ends wait: beside the model, unless its memory is too small for that."""
    there = memory_on(device)
    return CPU if there is None or plan.weights + plan.activations > FULL * there else device


def rounds_of(batches: Sequence[int], plan: Cost, size: int | None = None) -> list[Sequence[int]]:
    """The batches of each pass; with `size`, at most so many where all weights are in place at once."""
    if size is None or plan.mode == "layers":
        size = math.ceil(len(batches) / plan.passes) or 1
    return [batches[first : first + size] for first in range(0, len(batches), size)]


def compute_device(device: str | None) -> torch.device:
    """The device that was asked for, or a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
