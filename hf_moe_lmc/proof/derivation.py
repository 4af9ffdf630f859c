"""A family's description, derived from transformers: the only module that relies on how transformers builds its experts.

For a model type that no data file describes. A meta-device model of the configuration tells which layers hold experts, of
which sizes and with which tensors; what each tensor means follows from the names and flags that transformers gives all
its experts modules. The layouts on disk come from transformers' own conversion mapping, by experiment: a miniature whose
block holds a different number in every place is saved in both layouts, and each tensor on disk is read off, axis by axis.
What the router and the hidden units allow is measured on the same miniature. Nothing of this is believed before the
self-test has passed (`recognition`).

What is relied on of transformers 5: experts modules hold a 3-D `down_proj`, and `gate_up_proj` or `up_proj`, with the flags
`is_transposed` and `is_concatenated` where they deviate; `save_pretrained(save_original_format=...)` writes either layout.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.moe.action import ActedLayer
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.notation import (
    SHARED,
    UNIT_KINDS,
    TensorSpec,
    UnitKind,
    is_expert_role,
    parse_spec,
)
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.proof.checks import (
    HOLDS,
    LAYOUTS,
    SCALE,
    Rerun,
    Translated,
    restricted,
)
from hf_moe_lmc.proof.miniature import miniature, outputs, skeleton
from hf_moe_lmc.runtime.progress import quiet_transformers
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.group import LayerSymmetry

TRANSFORMERS = SpecifierSet(">=5.23,<6")  # releases whose experts modules are known to be as described above
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts", "top_k")
GROUPS = (("n_group", "topk_group"), ("num_expert_group", "topk_group"), ("n_groups", "topk_groups"))
EXACT = 1 << 24  # integers up to here are exact in float32


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


def derive(config: PreTrainedConfig, where: str) -> MoEFamily:
    """The family of a configuration that no data file describes; it is good for this configuration only.

    Args:
        where: the checkpoint, for messages.

    Raises:
        FamilyError: another release of transformers, foreign code, or experts that are built in another way.
    """
    name = str(config.model_type)
    if not TRANSFORMERS.contains(transformers.__version__, prereleases=True):
        raise FamilyError(
            f"{where}: no data file describes model type {name!r}, and descriptions are derived from transformers "
            f"{TRANSFORMERS} only, not from {transformers.__version__}; install such a release, or register a family (README)"
        )
    if not type(config).__module__.startswith("transformers."):
        raise FamilyError(
            f"{where}: model type {name!r} is custom code ({type(config).__module__}), from which nothing is derived; "
            "register a family for it (see the README)"
        )
    try:
        return _derive(config, name)
    except FamilyError as error:
        raise FamilyError(
            f"{where}: no data file describes model type {name!r}, and no description can be derived: {error}. "
            "The README says how to add a family"
        ) from error


def _derive(config: PreTrainedConfig, name: str) -> MoEFamily:
    small = miniature(config)  # refuses dense models
    whole = skeleton(config)
    blocks = find_blocks(whole)
    first = next(iter(blocks.values()))
    sizes = _common_sizes(blocks)
    text = config.get_text_config()
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="hf_moe_lmc-") as folder:
        weights, prefixes = _read_off(small, Path(folder))
        starts = {prefix.partition(".")[0] + "." for prefix in prefixes}
        family = MoEFamily(
            name=name,
            model_types=(name,),
            router="sigmoid",  # the least that any router allows; so for the units
            units="plain",
            weights=weights,
            sizes=sizes,
            top_k=str(_top_k(text, whole, first)),
            moe_layers=f"layer in {tuple(blocks)}",
            layer_prefix=min(prefixes, key=len) + "{layer}.",
            towers={name: starts.pop()} if text is not config and len(starts) == 1 else {},
            layers=str(int(text.num_hidden_layers)),
            when={
                role: f"layer in {tuple(index for index, block in blocks.items() if role in block.roles)}"
                for role in frozenset().union(*(block.roles for block in blocks.values()))
                if any(role not in block.roles for block in blocks.values())
            },
        )
        # of the miniature, other layers are MoE layers and have these roles
        found = find_blocks(small)
        measured = replace(
            family,
            sizes=_common_sizes(found),
            moe_layers=f"layer in {tuple(found)}",
            layers=str(int(small.config.get_text_config().num_hidden_layers)),
            when={role: f"layer in {tuple(i for i, block in found.items() if role in block.roles)}" for role in family.when},
            stacks=(),
        )
        return replace(family, stacks=(), **_measured(measured, small, text, Path(folder)))


def _common_sizes(blocks: Mapping[int, Block]) -> dict[str, str]:
    """The sizes of all blocks, which must not contradict each other."""
    sizes: dict[str, str] = {}
    for index, block in blocks.items():
        for word, size in block.sizes.items():
            if sizes.setdefault(word, str(size)) != str(size):
                raise FamilyError(f"axis {word} is {size} in layer {index}, and {sizes[word]} in another")
    return sizes


# --- in memory ------------------------------------------------------------------------------------------------------


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


def _top_k(text: PreTrainedConfig, model: nn.Module, block: Block) -> int:
    parent = model.get_submodule(block.experts.rpartition(".")[0])
    values = [getattr(text, name, None) for name in TOP_K] + [getattr(module, "top_k", None) for module in parent.modules()]
    found = next((value for value in values if isinstance(value, int)), None)
    if found is None:
        raise FamilyError("the configuration does not say how many experts a token gets")
    return found


# --- on disk --------------------------------------------------------------------------------------------------------


@dataclass
class Code:
    """Numbers for the places of one block: a different one for every role, expert, hidden unit and channel.

    Attributes:
        specs: what is coded, with the first number of each and its shape by axis words.
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
        found = {}
        for spec, first, shape in self.specs:
            numbers = torch.arange(first, first + math.prod(shape)).view(shape)
            for i, role in enumerate(spec.roles):
                found[role] = numbers.select(spec.axes.index("half"), i) if "half" in spec.axes else numbers
        return found


def _read_off(model: PreTrainedModel, folder: Path) -> tuple[dict[str, str | tuple[str, ...]], set[str]]:
    """Key templates with their notation, for both layouts, and what stands before a layer's number in either."""
    blocks, codes = find_blocks(model), {}
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = model.state_dict()
    for index, block in blocks.items():
        codes[index] = Code(block.sizes)
        for name, spec in block.tensors.items():
            state[name].copy_(codes[index].add(spec))
    found: dict[str, dict[str, None]] = {}
    prefixes = set()
    for layout, original in LAYOUTS.items():
        model.save_pretrained(folder / layout, save_original_format=original, max_shard_size="10GB")
        layers: dict[tuple[str, int], dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / layout / "model.safetensors").items():
            match = re.match(r"(?P<prefix>(?:.*?\.)??)(?P<layer>\d+)\.(?P<rest>.+)", name)
            if match and int(match["layer"]) in blocks:
                layers.setdefault((match["prefix"], int(match["layer"])), {})[match["rest"]] = tensor
        for (prefix, index), tensors in layers.items():
            templates = _templates(codes[index], tensors)
            for key, text in templates.items():
                found.setdefault(key, {})[text] = None
            if any(is_expert_role(parse_spec(text).roles[0]) for text in templates.values()):
                prefixes.add(prefix)
    model.load_state_dict(kept, strict=False)
    if len({prefix.split(".")[-2] for prefix in prefixes}) != 1:
        raise FamilyError(f"experts under {' and under '.join(sorted(prefixes)) or 'no layer'}; expected one run of layers")
    weights: dict[str, str | tuple[str, ...]] = {}
    for key, specs in found.items():
        texts = tuple(specs)
        weights[key] = texts[0] if len(texts) == 1 else texts
    return weights, prefixes


def _templates(code: Code, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Key template -> notation of one layer's tensors on disk; what lies beside them in the block is `fixed`."""
    coded: dict[str, str] = {}
    for key, tensor in tensors.items():
        numbers = tensor.double()
        if numbers.numel() and bool((numbers == numbers.round()).all()) and code.places(numbers.long()):
            template, text = _describe(code, key, numbers.long())
            if coded.setdefault(template, text) != text:
                raise FamilyError(f"{template} means {coded[template]!r} and {text!r}")
    parts = {key.partition(".")[0] for key in coded}
    patterns = [re.compile(re.escape(template).replace(r"\{expert\}", r"\d+")) for template in coded]
    for key in tensors:
        if key.partition(".")[0] in parts and not any(pattern.fullmatch(key) for pattern in patterns):
            coded[key] = "fixed"
    return coded


def _describe(code: Code, key: str, numbers: Tensor) -> tuple[str, str]:
    """The template of a key and the notation of its tensor, read off the numbers in it."""
    held = code.places(numbers)
    assert held is not None
    spec, places = held
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
    _verify(code, parse_spec(text), key, numbers, spec, places)
    return template, text


def _verify(code: Code, found: TensorSpec, key: str, numbers: Tensor, spec: TensorSpec, places: Tensor) -> None:
    """Raises FamilyError unless the notation accounts for every number of a tensor."""
    parts = []
    for role in found.roles:
        whole = code.matrices[role]
        axes = [word for word in spec.axes if word != "half"]
        if "expert" in axes and "expert" not in found.axes:
            whole = whole.select(axes.index("expert"), int(places[0, spec.axes.index("expert")]))
            axes.remove("expert")
        wanted = [word for word in found.axes if word not in ("half", "1") or (word == "1" and word in axes)]
        if sorted(wanted) != sorted(axes):
            raise FamilyError(f"{key}: {found.text!r} does not account for all of {spec.text!r}")
        parts.append(whole.permute([axes.index(word) for word in wanted]))
    expected = parts[0]
    if "half" in found.axes:
        expected = torch.stack(parts, dim=[word for word in found.axes if word != "1"].index("half"))
    if not torch.equal(expected.reshape(numbers.shape), numbers):
        raise FamilyError(f"{key}: {found.text!r} does not account for the order of its values")


# --- what the router and the hidden units allow -------------------------------------------------------------------------


def _measured(family: MoEFamily, model: PreTrainedModel, text: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """Kind of router, kinds of hidden units and number of binding groups, by experiments on a miniature."""
    source = folder / "measured"
    model.save_pretrained(source, save_original_format=False)
    with ExitStack() as stack:
        opened = read_model(stack.enter_context(Checkpoint.open(source)), family)
        run = Rerun(opened, model, outputs(model), folder)
        generator = torch.Generator().manual_seed(0)

        def holds(part: str, kind: UnitKind) -> bool:
            """Whether a part of what units of this kind would allow leaves the outputs alone."""
            elements = {}
            for index, layer in opened.layers.items():
                one = layer.identity()
                drawn = LayerSymmetry.random(*one.sizes.values(), signs=kind.sign, scale=SCALE, generator=generator)
                elements[index] = restricted(part, drawn, one)
            units = {FIRST: kind, SHARED: kind}
            return run({i: ActedLayer(layer, elements[i], units) for i, layer in opened.layers.items()}) < HOLDS

        first = next(iter(opened.layers.values()))
        limited = _has_limit(text)
        facts: dict[str, Any] = {
            "router": "softmax" if run({i: Translated(layer) for i, layer in opened.layers.items()}) < HOLDS else "sigmoid",
            "units": _kind(holds, "signs of hidden units", "scales of hidden units", limited, first.roles, ""),
        }
        if "shared_up" in first.roles:
            shared = _kind(holds, "shared expert: signs", "shared expert: scales", limited, first.roles, "shared_")
            facts |= {"bank_units": {"shared": shared}} if shared != facts["units"] else {}
        groups = _declared_groups(text)
        if groups > 1:
            torn = {
                i: restricted("expert order", layer.random(generator), layer.identity()) for i, layer in opened.layers.items()
            }
            if run({i: ActedLayer(layer, torn[i], layer.units) for i, layer in opened.layers.items()}) > HOLDS:
                facts["groups"] = str(groups)
        return facts


def _kind(
    holds: Callable[[str, UnitKind], bool], signs: str, scales: str, limited: bool, roles: tuple[str, ...], prefix: str
) -> str:
    """The largest kind of hidden units whose parts hold; a clamp, which a miniature may not reach, excludes scales."""
    swiglu, affine, relu, relu2 = (UNIT_KINDS[name] for name in ("swiglu", "affine", "relu", "relu2"))
    if f"{prefix}gate" not in roles:
        return next((kind.name for kind in (relu, relu2) if not limited and holds(scales, kind)), "plain")
    if holds(signs, swiglu):
        return "swiglu" if not limited and holds(scales, swiglu) else "clamped"
    if f"{prefix}up_bias" in roles and not limited and holds(signs, affine) and holds(scales, affine):
        return "affine"
    return "plain"


def _has_limit(text: PreTrainedConfig) -> bool:
    """Whether the configuration bounds activations, by the names that transformers uses for it."""
    names = re.compile(r"(glu|activation|expert).*(limit|clamp|cap)")
    values = [value for name, value in text.to_dict().items() if names.search(name)]
    numbers = [number for value in values for number in (value if isinstance(value, list) else [value])]
    return any(isinstance(number, (int, float)) and 0 < number < math.inf for number in numbers)


def _declared_groups(text: PreTrainedConfig) -> int:
    for count, top in GROUPS:
        groups, kept = getattr(text, count, None), getattr(text, top, None)
        if isinstance(groups, int) and isinstance(kept, int) and groups > 1 and kept < groups:
            return groups
    return 1
