"""What each tensor on disk holds, read off by experiment.

The places of a small model's blocks are numbered, each with a number of its own. The model is saved in both layouts. Then the
numbers in a tensor on disk tell, axis by axis, which places in memory its values come from.

Worked example: a tensor on disk holds, along its first axis, the numbers of hidden units, and along its second one those of
channels. It was a part of `gate_up_proj`, in its first half. So its notation is `gate: unit model`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.moe.notation import TensorSpec, is_expert_role, parse_spec
from hf_moe_lmc.proof.checks import LAYOUTS
from hf_moe_lmc.proof.memory_layout import find_blocks

EXACT = 1 << 24  # integers up to here are exact in float32


@dataclass
class Numbering:
    """Numbers for the places of one block: a different one for every role, expert, hidden unit and channel.

    Attributes:
        specs: of the tensors that are numbered, with the first number of each and its shape by axis words.
    """

    sizes: Mapping[str, int]
    specs: list[tuple[TensorSpec, int, tuple[int, ...]]] = field(default_factory=list)
    total: int = 0

    def add(self, spec: TensorSpec) -> Tensor:
        """The numbers of one more tensor, int64, in its shape."""
        shape = spec.axis_sizes(self.sizes)
        first, self.total = self.total, self.total + math.prod(shape)
        if self.total > EXACT:
            raise FamilyError("the miniature is too large to number the places of a block")
        self.specs.append((spec, first, shape))
        return torch.arange(first, self.total).view(spec.shape(self.sizes))

    def places(self, numbers: Tensor) -> tuple[TensorSpec, Tensor] | None:
        """The tensor in memory that all `numbers` come from and their indices along its axes [number, axis], or None."""
        for spec, first, shape in self.specs:
            if first <= int(numbers.min()) and int(numbers.max()) < first + math.prod(shape):
                return spec, torch.stack(torch.unravel_index(numbers.flatten() - first, shape), dim=1)
        return None

    @cached_property
    def matrices(self) -> dict[str, Tensor]:
        """The numbers of each role, axes in the order of the tensor in memory without `half`."""
        numbers_of = {}
        for spec, first, shape in self.specs:
            numbers = torch.arange(first, first + math.prod(shape)).view(shape)
            for i, role in enumerate(spec.roles):
                numbers_of[role] = numbers.select(spec.axes.index("half"), i) if "half" in spec.axes else numbers
        return numbers_of


def read_templates(model: PreTrainedModel, folder: Path) -> tuple[dict[str, str | tuple[str, ...]], set[str]]:
    """Key templates with their notation, for both layouts, and what stands before a layer's number in either."""
    blocks, numberings = find_blocks(model), {}
    original_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = model.state_dict()
    for index, block in blocks.items():
        numberings[index] = Numbering(block.sizes)
        for name, spec in block.tensors.items():
            state[name].copy_(numberings[index].add(spec))
    notations: dict[str, dict[str, None]] = {}
    prefixes = set()
    for layout, original in LAYOUTS.items():
        model.save_pretrained(folder / layout, save_original_format=original, max_shard_size="10GB")
        layers: dict[tuple[str, int], dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / layout / "model.safetensors").items():
            match = re.match(r"(?P<prefix>(?:.*?\.)??)(?P<layer>\d+)\.(?P<rest>.+)", name)
            if match and int(match["layer"]) in blocks:
                layers.setdefault((match["prefix"], int(match["layer"])), {})[match["rest"]] = tensor
        for (prefix, index), tensors in layers.items():
            templates = _templates(numberings[index], tensors)
            for key, text in templates.items():
                notations.setdefault(key, {})[text] = None
            if any(is_expert_role(parse_spec(text).roles[0]) for text in templates.values()):
                prefixes.add(prefix)
    model.load_state_dict(original_state, strict=False)
    if len({prefix.split(".")[-2] for prefix in prefixes}) != 1:
        raise FamilyError(f"experts under {' and under '.join(sorted(prefixes)) or 'no layer'}; expected one run of layers")
    weights: dict[str, str | tuple[str, ...]] = {}
    for key, specs in notations.items():
        texts = tuple(specs)
        weights[key] = texts[0] if len(texts) == 1 else texts
    return weights, prefixes


def _templates(numbering: Numbering, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Key template -> notation of one layer's tensors on disk; the others in the block are `fixed`."""
    notation: dict[str, str] = {}
    for key, tensor in tensors.items():
        numbers = tensor.double()
        if numbers.numel() and bool((numbers == numbers.round()).all()) and numbering.places(numbers.long()):
            template, text = _describe(numbering, key, numbers.long())
            if notation.setdefault(template, text) != text:
                raise FamilyError(f"{template} means {notation[template]!r} and {text!r}")
    parts = {key.partition(".")[0] for key in notation}
    patterns = [re.compile(re.escape(template).replace(r"\{expert\}", r"\d+")) for template in notation]
    for key in tensors:
        if key.partition(".")[0] in parts and not any(pattern.fullmatch(key) for pattern in patterns):
            notation[key] = "fixed"
    return notation


def _describe(numbering: Numbering, key: str, numbers: Tensor) -> tuple[str, str]:
    """The template of a key and the notation of its tensor, read off the numbers in it."""
    origin = numbering.places(numbers)
    assert origin is not None
    spec, places = origin
    grid = places.view(*numbers.shape, len(spec.axes))
    groups = []
    for axis in range(numbers.ndim):
        line = grid[tuple([0] * axis + [slice(None)] + [0] * (numbers.ndim - axis - 1))]
        varying = [i for i in range(len(spec.axes)) if bool((line[:, i] != line[0, i]).any())]
        varying.sort(key=lambda i: bool(line[0, i] != line[1, i]))  # what stays put for a while is the slower one
        groups.append(" ".join(spec.axes[i] for i in varying) or "1")
    words = [word for group in groups for word in group.split()]
    roles = spec.roles
    if "half" in spec.axes and "half" not in words:
        roles = (spec.roles[int(places[0, spec.axes.index("half")])],)
    template = key
    if "expert" in spec.axes and "expert" not in words:
        expert = int(places[0, spec.axes.index("expert")])
        template, count = re.subn(rf"(?<=[._]){expert}(?=[._])", "{expert}", key)
        if count != 1:
            raise FamilyError(f"{key} holds expert {expert}, which its name does not say")
    text = f"{' '.join(roles)}: " + " ".join(f"({group})" if " " in group else group for group in groups)
    _verify(numbering, parse_spec(text), key, numbers, spec, places)
    return template, text


def _verify(numbering: Numbering, described: TensorSpec, key: str, numbers: Tensor, spec: TensorSpec, places: Tensor) -> None:
    """Raises FamilyError unless the notation accounts for every number of a tensor."""
    parts = []
    for role in described.roles:
        whole = numbering.matrices[role]
        axes = [word for word in spec.axes if word != "half"]
        if "expert" in axes and "expert" not in described.axes:
            whole = whole.select(axes.index("expert"), int(places[0, spec.axes.index("expert")]))
            axes.remove("expert")
        wanted = [word for word in described.axes if word not in ("half", "1") or (word == "1" and word in axes)]
        if sorted(wanted) != sorted(axes):
            raise FamilyError(f"{key}: {described.text!r} does not account for all of {spec.text!r}")
        parts.append(whole.permute([axes.index(word) for word in wanted]))
    expected = parts[0]
    if "half" in described.axes:
        expected = torch.stack(parts, dim=[word for word in described.axes if word != "1"].index("half"))
    if not torch.equal(expected.reshape(numbers.shape), numbers):
        raise FamilyError(f"{key}: {described.text!r} does not account for the order of its values")
