"""What the tensors of an MoE block hold in memory, by the names and flags that transformers gives all its experts modules.

What is relied on of transformers 5: experts modules hold a 3-D `down_proj`, and `gate_up_proj` or `up_proj`. Where a module
deviates, its flags `is_transposed` and `is_concatenated` say how.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.moe.notation import TensorSpec, parse_spec


@dataclass(frozen=True)
class Block:
    """The MoE block of one layer in memory.

    Attributes:
        prefix: of its layer, up to the number: `model.layers.3.`
        tensors: names of parameters and buffers, full, with what they hold.
        sizes: of the axis words.
    """

    prefix: str
    experts: str
    tensors: dict[str, TensorSpec]
    sizes: dict[str, int]

    @property
    def roles(self) -> frozenset[str]:
        return frozenset(role for spec in self.tensors.values() for role in spec.roles)


def find_blocks(model: nn.Module) -> dict[int, Block]:
    """The MoE blocks of a model (on any device) by layer.

    Raises:
        FamilyError: none, several in one layer, or a tensor whose meaning its name and shape do not tell.
    """
    blocks: dict[int, Block] = {}
    whole: Any = model
    text = whole.config.get_text_config()
    tower = next((name for name, module in model.named_modules() if getattr(module, "config", None) is text), "")
    for name, module in model.named_modules():
        if not name.startswith(tower):
            continue  # another tower of a composite model, which may have experts of its own
        down = getattr(module, "down_proj", None)
        if not isinstance(down, Tensor) or down.ndim != 3 or name.rpartition(".")[2].startswith("shared"):
            continue
        match = re.match(r"(?P<prefix>.*?\.(?P<layer>\d+)\.)", f"{name}.")
        if match is None:
            raise FamilyError(f"the experts {name} stand in no numbered layer")
        if int(match["layer"]) in blocks:
            raise FamilyError(
                f"layer {match['layer']} has two sets of experts, {blocks[int(match['layer'])].experts} and {name}"
            )
        blocks[int(match["layer"])] = _block(model, name, module, match["prefix"], int(text.hidden_size))
    if not blocks:
        raise FamilyError("no module with a 3-D `down_proj` was found, which is what transformers 5 makes of experts")
    return blocks


def _block(model: nn.Module, name: str, module: nn.Module, prefix: str, hidden: int) -> Block:
    down = module.down_proj
    assert isinstance(down, Tensor)
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:  # an experts module without transformers' decorator: one of the two multiplies by twice its rows
        gate_up = getattr(module, "gate_up_proj", None)
        transposed = isinstance(gate_up, Tensor) and gate_up.shape[2] == 2 * down.shape[1] and gate_up.shape[1] == down.shape[2]
    experts, *matrix = down.shape
    width, units = matrix[::-1] if transposed else matrix
    word = "model" if width == hidden else "latent"
    sizes = {"expert": experts, "unit": units, "model": hidden, word: width}
    tensors = dict(_expert_tensors(name, module, transposed, word))
    parent = name.rpartition(".")[0]
    for key, tensor in model.state_dict().items():
        if not key.startswith((f"{parent}.", f"{prefix}shared")) or key in tensors:
            continue
        rest = key.removeprefix(f"{parent}.") if key.startswith(f"{parent}.") else key.removeprefix(prefix)
        if f"{parent}." == prefix and not re.match(r"(router|gate|experts|shared)", rest):
            continue  # experts that hang in the layer itself: the rest of the layer is not theirs
        spec = _companion(rest, tensor, sizes)
        if spec is not None:
            tensors[key] = spec
    if not any("router" in spec.roles for spec in tensors.values()):
        raise FamilyError(f"{parent}: no router, a matrix with one row for each of {experts} experts")
    return Block(prefix, name, tensors, sizes)


def _expert_tensors(name: str, module: nn.Module, transposed: bool, width: str) -> Iterator[tuple[str, TensorSpec]]:
    half = "(half unit)" if getattr(module, "is_concatenated", True) else "(unit half)"
    known = {
        "gate_up_proj": f"gate up: expert {f'{width} {half}' if transposed else f'{half} {width}'}",
        "gate_proj": f"gate: expert {f'{width} unit' if transposed else f'unit {width}'}",
        "up_proj": f"up: expert {f'{width} unit' if transposed else f'unit {width}'}",
        "down_proj": f"down: expert {f'unit {width}' if transposed else f'{width} unit'}",
        "gate_up_proj_bias": f"gate_bias up_bias: expert {half}",
        "gate_proj_bias": "gate_bias: expert unit",
        "up_proj_bias": "up_bias: expert unit",
        "down_proj_bias": f"down_bias: expert {width}",
    }
    for key in module.state_dict():
        if key in known:
            yield f"{name}.{key}", parse_spec(known[key])


def _companion(key: str, tensor: Tensor, sizes: dict[str, int]) -> TensorSpec | None:
    """What a tensor beside the experts holds; None for one that no symmetry acts on. `sizes` learns new axis words."""
    first, leaf = key.partition(".")[0], key.rpartition(".")[2]
    shared = re.fullmatch(r"(?:.*\.)?(gate_up|gate|up|down|input|output)_(?:proj|linear)\.(weight|bias)", key)
    if first.startswith("shared") and "gate" in first.split("_")[-1:]:
        return parse_spec("shared_router: 1 model") if leaf == "weight" else None
    if first.startswith("shared"):
        if shared is None:
            raise FamilyError(f"{key}: a shared expert of another form than gate, up and down projection")
        part = {"input": "gate_up", "output": "down"}.get(shared[1], shared[1])
        roles = " ".join(f"shared_{role}" + ("_bias" if shared[2] == "bias" else "") for role in part.split("_"))
        rows = "model" if part == "down" else "(half shared)" if part == "gate_up" else "shared"
        sizes.setdefault("shared", tensor.shape[-1] if part == "down" else len(tensor) // (2 if part == "gate_up" else 1))
        return parse_spec(f"{roles}: {rows}" + ("" if shared[2] == "bias" else " shared" if part == "down" else " model"))
    of_experts = [axis for axis, size in enumerate(tensor.shape) if size == sizes["expert"]]
    if not tensor.is_floating_point():
        sizes |= {"token": tensor.shape[0], "choice": tensor.shape[-1]}
        return parse_spec("expert_table: token choice")
    if not of_experts:
        return None
    if len(of_experts) > 1:
        raise FamilyError(f"{key}: two axes of {sizes['expert']}, the number of experts")
    if tensor.ndim == 2 and 1 not in tensor.shape:
        other = tensor.shape[1 - of_experts[0]]
        word = "model" if other == sizes["model"] else "rank"
        sizes |= {word: other}
        return parse_spec("router: " + ("expert " + word if of_experts[0] == 0 else word + " expert"))
    role = "expert_scale" if "scale" in leaf else "router_bias" if leaf == "bias" else "correction_bias"
    return parse_spec(f"{role}: " + " ".join("expert" if axis in of_experts else "1" for axis in range(tensor.ndim)))
