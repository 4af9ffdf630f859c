"""A family's description, derived from transformers, for a model type that no data file describes.

1. A model of the configuration on the meta device tells which layers hold experts, of which sizes and in which tensors.
2. What each tensor means in memory follows from names and flags (`memory_layout`).
3. What each tensor means on disk is read off a small model, by experiment (`disk_layout`).
4. What the router and the hidden units allow is measured on the same small model.

Nothing of this is believed before the self-test has passed (`recognition`). No other modules rely on how transformers builds
its experts.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.moe.action import ActedLayer
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.notation import (
    SHARED,
    UNIT_KINDS,
    UnitKind,
)
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.proof.checks import (
    SCALE,
    Rerun,
    Translated,
    restricted,
)
from hf_moe_lmc.proof.disk_layout import read_templates
from hf_moe_lmc.proof.memory_layout import Block, find_blocks
from hf_moe_lmc.proof.miniature import miniature, outputs, skeleton
from hf_moe_lmc.proof.small_config import has_experts
from hf_moe_lmc.proof.verdict import HOLDS
from hf_moe_lmc.runtime.progress import quiet_transformers
from hf_moe_lmc.runtime.threads import suited
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.group import LayerSymmetry

TRANSFORMERS = SpecifierSet(">=5.23,<6")  # releases whose experts modules are built as `memory_layout` says
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts", "top_k")
GROUPS = (("n_group", "topk_group"), ("num_expert_group", "topk_group"), ("n_groups", "topk_groups"))


@suited()
def derive(config: PreTrainedConfig, where: str) -> MoEFamily:
    """The family of a configuration that no data file describes; it is good for this configuration only.

    Args:
        where: the checkpoint, for messages.

    Raises:
        FamilyError: a dense model, another release of transformers, foreign code, or experts that are built in another way.
    """
    name = str(config.model_type)
    if not type(config).__module__.startswith("transformers."):
        raise FamilyError(
            f"{where}: model type {name!r} is custom code ({type(config).__module__}), from which nothing is derived; "
            "register a family for it (see the README)"
        )
    if not has_experts(config):
        raise FamilyError(
            f"{where}: a dense model: the configuration of model type {name!r} has no experts, and MoE blocks are what is "
            "aligned here. Take a Mixture-of-Experts model. Dense models are merged by merge --no-align without --text"
        )
    if not TRANSFORMERS.contains(transformers.__version__, prereleases=True):
        raise FamilyError(
            f"{where}: no data file describes model type {name!r}, and descriptions are derived from transformers "
            f"{TRANSFORMERS} only, not from {transformers.__version__}; install such a release, or register a family (README)"
        )
    try:
        return _derive(config, name)
    except FamilyError as error:
        raise FamilyError(
            f"{where}: no data file describes model type {name!r}, and no description can be derived: "
            f"{str(error).removesuffix('.')}. The README says how to add a family"
        ) from error


def _derive(config: PreTrainedConfig, name: str) -> MoEFamily:
    small = miniature(config)
    whole = skeleton(config)
    blocks = find_blocks(whole)
    first = next(iter(blocks.values()))
    sizes = _common_sizes(blocks)
    text = config.get_text_config()
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="hf_moe_lmc-") as folder:
        weights, prefixes = read_templates(small, Path(folder))
        starts = {prefix.partition(".")[0] + "." for prefix in prefixes}
        family = MoEFamily(
            name=name,
            model_types=(name,),
            router="sigmoid",  # the least that any router allows; so for the units
            units="plain",
            weights=weights,
            sizes=sizes,
            top_k=str(_top_k(text, whole, first)),
            moe_layers=_among(blocks),
            layer_prefix=min(prefixes, key=len) + "{layer}.",
            towers={name: starts.pop()} if text is not config and len(starts) == 1 else {},
            layers=str(int(text.num_hidden_layers)),
            when={
                role: _among(_with_role(blocks, role))
                for role in frozenset().union(*(block.roles for block in blocks.values()))
                if len(_with_role(blocks, role)) < len(blocks)
            },
        )
        # in the small model, other layers are MoE layers and have these roles
        small_blocks = find_blocks(small)
        twin = replace(
            family,
            sizes=_common_sizes(small_blocks),
            moe_layers=_among(small_blocks),
            layers=str(int(small.config.get_text_config().num_hidden_layers)),
            when={role: _among(_with_role(small_blocks, role)) for role in family.when},
            stacks=(),
        )
        return replace(family, stacks=(), **_measured(twin, small, text, Path(folder)))


def _with_role(blocks: Mapping[int, Block], role: str) -> tuple[int, ...]:
    return tuple(index for index, block in blocks.items() if role in block.roles)


def _among(layers: Iterable[int]) -> str:
    """As an expression of a family."""
    return f"layer in {tuple(layers)}"


def _common_sizes(blocks: Mapping[int, Block]) -> dict[str, str]:
    """The sizes of all blocks, which must not contradict each other."""
    sizes: dict[str, str] = {}
    for index, block in blocks.items():
        for word, size in block.sizes.items():
            if sizes.setdefault(word, str(size)) != str(size):
                raise FamilyError(f"axis {word} is {size} in layer {index}, and {sizes[word]} in another")
    return sizes


def _top_k(text: PreTrainedConfig, model: nn.Module, block: Block) -> int:
    parent = model.get_submodule(block.experts.rpartition(".")[0])
    values = [getattr(text, name, None) for name in TOP_K] + [getattr(module, "top_k", None) for module in parent.modules()]
    top_k = next((value for value in values if isinstance(value, int)), None)
    if top_k is None:
        raise FamilyError("the configuration does not say how many experts a token gets")
    return top_k


# --- what the router and the hidden units allow -------------------------------------------------------------------------


def _measured(family: MoEFamily, model: PreTrainedModel, text: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """Kind of router, kinds of hidden units and number of binding groups, by experiments on a miniature."""
    source = folder / "measured"
    model.save_pretrained(source, save_original_format=False)
    with ExitStack() as stack:
        opened = read_model(stack.enter_context(Checkpoint.open(source)), family)
        run = Rerun(opened, model, outputs(model))
        generator = torch.Generator().manual_seed(0)

        def holds(part: str, kind: UnitKind) -> bool:
            """Whether a part of what units of this kind would allow leaves the outputs alone."""
            elements = {}
            for index, layer in opened.layers.items():
                identity = layer.identity()
                drawn = LayerSymmetry.random(*identity.sizes.values(), signs=kind.sign, scale=SCALE, generator=generator)
                elements[index] = restricted(part, drawn, identity)
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
        groups, chosen = getattr(text, count, None), getattr(text, top, None)
        if isinstance(groups, int) and isinstance(chosen, int) and groups > 1 and chosen < groups:
            return groups
    return 1
