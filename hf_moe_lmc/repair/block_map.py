"""An MoE block in a transformers model as a linear map of its hidden units, taken from the module that runs.

Routing weights, chosen experts and gates are what the module's own parts hand to each other; nothing of a router is computed
here. Relied on of transformers: an experts module is called with inputs [token, width], numbers [token, choice] and weights
of the chosen experts, or with inputs [expert * token, width] that are 0 where an expert is not chosen. It holds `gate_up_proj`
and `down_proj`, and `_apply_gate` or `act_fn` makes hidden units of the products of `gate_up_proj`. Whether Phi D then is what
the block gave is checked in each layer; a family where it is not is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from operator import or_
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_moe_lmc.errors import FamilyError, InputError
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.notation import TensorSpec
from hf_moe_lmc.proof.memory_layout import Block, find_blocks
from hf_moe_lmc.repair.ridge import Part

SHARED = "shared"  # key of the shared expert among the parts
# of the largest value of the block's output, by the dtype it runs in
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 3e-2, torch.float16: 5e-3}

Routed = tuple[Tensor, Tensor, Tensor]  # inputs, chosen and weights of `BlockMap`
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with


class UnsuitedError(InputError):
    """The experts of a family cannot be refitted on calibration text."""


@dataclass(frozen=True)
class Site:
    """The MoE block of one decoder layer.

    Attributes:
        layer: number of the decoder layer.
        prefix: full name of the block.
        memory: its tensors, and what they hold.
        block: computes its output, float [.., token, model]; stop: what lanes stop before, the block itself or its experts.
        router: where the experts stand in the layer itself, beside their router; None: they stand in a block.
        down, shared_down: full names of the down projections; None: no shared expert.
    """

    layer: int
    prefix: str
    block: nn.Module
    stop: nn.Module
    router: nn.Module | None
    experts: nn.Module
    memory: Block
    down: str
    shared_down: str | None
    shared_gate: nn.Module | None

    @property
    def transposed(self) -> bool:
        """Whether matrices of experts are [input, output]."""
        return self.memory.tensors[self.down].axes[1] == "unit"

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of the block's parameters."""
        return tuple(f"{self.prefix}.{name}" for name, _ in self.block.named_parameters())

    @cached_property
    def count(self) -> int:
        return self.memory.sizes["expert"]

    def units(self, expert: int, inputs: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Hidden units of an expert, [token, unit], in the dtype of the weights.

        Args:
            values: parameters by full name; None: those that stand in the module.
        """
        matrix, bias = (self._of_expert(name, expert, values) for name in ("gate_up_proj", "gate_up_proj_bias"))
        assert matrix is not None
        matrix = matrix.to(inputs.device, inputs.dtype)
        products = inputs @ (matrix if self.transposed else matrix.T)
        if bias is not None:
            products = products + bias.to(inputs.device, inputs.dtype)
        units: Tensor = self._apply_gate(products)
        return units

    def _of_expert(self, name: str, expert: int, values: Mapping[str, Tensor] | None) -> Tensor | None:
        found = (values or {}).get(f"{self.memory.experts}.{name}")
        if found is None:
            found = getattr(self.experts, name, None)
        return None if found is None else found[expert]

    @property
    def roles(self) -> dict[str, str]:
        """Full names of its parameters by role."""
        return {role: name for name, spec in self.memory.tensors.items() for role in spec.roles}

    @property
    def _apply_gate(self) -> Callable[[Tensor], Tensor]:
        return cast("Callable[[Tensor], Tensor]", getattr(self.experts, "_apply_gate", self._activated))

    def _activated(self, products: Tensor) -> Tensor:
        gate, up = products.chunk(2, dim=-1)
        activation = cast("Callable[[Tensor], Tensor]", self.experts.act_fn)
        return activation(gate) * up

    def down_of(self, expert: int) -> Tensor:
        """What stands in the module, [unit, model]."""
        matrix = self.experts.get_parameter("down_proj")[expert]
        return matrix if self.transposed else matrix.T


def sites_of(module: PreTrainedModel, model: MoEModel) -> dict[int, Site]:
    """The MoE blocks of a model by decoder layer.

    Raises:
        UnsuitedError: experts that are no gated MLPs, or that do not stand in a block of their own.
    """
    try:
        blocks = find_blocks(module)
    except FamilyError as error:
        raise _unsuited(model, str(error)) from error
    return {layer: _site(module, model, layer, memory) for layer, memory in blocks.items()}


def _site(module: PreTrainedModel, model: MoEModel, layer: int, memory: Block) -> Site:
    experts = module.get_submodule(memory.experts)
    prefix = memory.experts.rpartition(".")[0]
    if not hasattr(experts, "gate_up_proj") or not (hasattr(experts, "_apply_gate") or hasattr(experts, "act_fn")):
        raise _unsuited(model, f"layer {layer}: its experts are no gated MLPs with one matrix for gate and up projection")
    block, holders = module.get_submodule(prefix), {role: name for name, spec in memory.tensors.items() for role in spec.roles}
    router, stop = None, block
    if f"{prefix}." == memory.prefix:
        name = holders["router"].removeprefix(memory.prefix).partition(".")[0]
        router, stop = block.get_submodule(name), experts
        block = RouterAndExperts(name, router, memory.experts.rpartition(".")[2], experts)
    elsewhere = router is not None  # and a shared expert may stand beside its block
    within = {role: name for role, name in holders.items() if name.startswith(f"{prefix}.") and not elsewhere}
    gate = within.get("shared_router")
    return Site(
        layer=layer,
        prefix=prefix,
        block=block,
        stop=stop,
        router=router,
        experts=experts,
        memory=memory,
        down=holders["down"],
        shared_down=within.get("shared_down"),
        shared_gate=None if gate is None else module.get_submodule(gate.rpartition(".")[0]),
    )


class RouterAndExperts(nn.Module):
    """The routed experts of a layer that have no block of their own, under the names that they have in the layer."""

    def __init__(self, router_name: str, router: nn.Module, experts_name: str, experts: nn.Module) -> None:
        super().__init__()
        self.add_module(router_name, router)
        self.add_module(experts_name, experts)
        self._parts = (router_name, experts_name)

    def forward(self, routed_by: Tensor, inputs: Tensor) -> Tensor:
        """What the experts give, [token, model].

        Args:
            routed_by: what the router reads.
            inputs: what the experts read.
        """
        router, experts = (self.get_submodule(name) for name in self._parts)
        returned = router(routed_by)
        chosen = next(value for value in returned if not value.is_floating_point())
        weights = next(value for value in returned if value.is_floating_point() and value.shape == chosen.shape)
        output: Tensor = experts(inputs, chosen, weights)
        return output


def _unsuited(model: MoEModel, why: str) -> UnsuitedError:
    return UnsuitedError(
        f"{model.checkpoint.name}: the experts of family {model.family.name} cannot be refitted on text: {why}. "
        "Expected: gated experts whose weighted sum is what their block gives. Take a repair that needs no text, or none"
    )


@dataclass
class _Seen:
    """What the parts of a block have handed to each other in one call."""

    inputs: Routed | None = None
    routed: list[Tensor] = field(default_factory=list)
    shared: list[Tensor] = field(default_factory=list)
    shared_output: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class BlockMap:
    """Phi of a block for some tokens.

    Attributes:
        inputs: of the experts, [token, width], or [token, choice, width] where each has its own.
        chosen, weights: of the experts of each token, [token, choice].
        shared: hidden units of the shared expert times its gate, [token, unit]; None: there is none.
        output: of the block, float32 [token, model].
        rest: what of it does not come from the shared expert.
        factor: by which the block multiplies what the experts give.
    """

    site: Site
    inputs: Tensor
    chosen: Tensor
    weights: Tensor
    shared: Tensor | None
    output: Tensor
    rest: Tensor
    factor: float = 1.0

    def __or__(self, later: BlockMap) -> BlockMap:
        """With the tokens of another."""
        shared = None if self.shared is None or later.shared is None else torch.cat([self.shared, later.shared])
        return replace(
            self,
            inputs=torch.cat([self.inputs, later.inputs]),
            chosen=torch.cat([self.chosen, later.chosen]),
            weights=torch.cat([self.weights, later.weights]),
            output=torch.cat([self.output, later.output]),
            rest=torch.cat([self.rest, later.rest]),
            shared=shared,
        )

    def parts(self) -> list[Part]:
        """Phi by expert; the shared expert is the last one."""
        found = [self._part(expert) for expert in range(self.site.count)]
        if self.shared is not None:
            shared = self.shared
            rows = torch.arange(len(shared), device=shared.device)
            found.append(Part(SHARED, rows, shared.shape[1], lambda wanted: shared[wanted].float()))
        return found

    def _part(self, expert: int) -> Part:
        rows, choice = (self.chosen == expert).nonzero(as_tuple=True)
        return Part(expert, rows, self.site.memory.sizes["unit"], partial(self._features, expert, rows, choice))

    def _features(self, expert: int, rows: Tensor, choice: Tensor, wanted: Tensor) -> Tensor:
        tokens = rows[wanted]
        weights = self.factor * self.weights[tokens, choice[wanted]].float()
        return self.site.units(expert, taken(self.inputs, tokens, choice[wanted])).float() * weights[:, None]

    def routed(self) -> Tensor:
        """What the routed experts give with the weights that stand in the module, float32 [token, model]."""
        found = torch.zeros_like(self.output)
        bias = getattr(self.site.experts, "down_proj_bias", None)
        for expert in range(self.site.count):
            part = self._part(expert)
            found[part.rows] += part.features(part.all) @ self.site.down_of(expert).float()
            if bias is not None:
                rows, choice = (self.chosen == expert).nonzero(as_tuple=True)
                found[rows] += self.factor * self.weights[rows, choice].float()[:, None] * bias[expert].float()
        return found


def block_maps(site: Site, calls: Sequence[Call], model: MoEModel) -> BlockMap:
    """Runs a block as it was called, with the weights that stand in it, and gives it as a linear map.

    Raises:
        UnsuitedError: Phi D is not what the block gave in the first call.
    """
    found = _block_map(site, calls[0], model)
    _check(found, model)
    return reduce(or_, (_block_map(site, call, model) for call in calls[1:]), found)


def _block_map(site: Site, call: Call, model: MoEModel) -> BlockMap:
    with _watched(site) as seen:
        output = run_block(site, call)
    if seen.inputs is None or len(seen.routed) != 1:
        raise _unsuited(model, f"layer {site.layer}: the experts are not called with the numbers of the chosen ones")
    inputs, chosen, weights = seen.inputs
    routed = seen.routed[0].reshape(-1, seen.routed[0].shape[-1]).float()
    if inputs.ndim == 3:
        routed = routed.unflatten(0, (site.count, -1)).sum(dim=0)
    if routed.shape != output.shape:
        raise _unsuited(model, f"layer {site.layer}: what the experts give is projected before it leaves the block")
    shared, terms = None, [routed]
    if seen.shared:
        gate = seen.gates[-1].float().sigmoid().reshape(-1, 1) if seen.gates else 1.0
        shared = seen.shared[-1].reshape(-1, seen.shared[-1].shape[-1]) * gate
        terms.append(seen.shared_output[-1].reshape(output.shape).float() * gate)
    factors = _factors(terms, output)
    if shared is not None:
        shared = factors[1] * shared
    rest = output - factors[1] * terms[1] if shared is not None else output
    return BlockMap(site, inputs, chosen, weights, shared, output, rest, factors[0])


def _factors(terms: Sequence[Tensor], output: Tensor) -> list[float]:
    """By which a block multiplies what its routed and its shared experts give; 1 where that is as near as rounding allows."""
    columns = torch.stack([term.double().flatten() for term in terms], dim=1)
    gram, wanted = columns.T @ columns, columns.T @ output.double().flatten()
    found = torch.linalg.lstsq(gram.cpu(), wanted.cpu()[:, None], driver="gelsd").solution.flatten().tolist()
    return [1.0 if abs(factor - 1) < 0.01 else factor for factor in found]


def _check(found: BlockMap, model: MoEModel) -> None:
    """Raises UnsuitedError where Phi D is not what the block gave."""
    off = float((found.routed() - found.rest).abs().max())
    largest = float(found.output.abs().max())
    if not off <= TOLERANCES[found.inputs.dtype] * largest:
        layer = found.site.layer
        raise _unsuited(
            model, f"layer {layer}: its output is not the weighted sum of the experts (off by {off:.2g} of {largest:.2g})"
        )


def run_block(site: Site, call: Call) -> Tensor:
    """What a block gives with the weights that stand in it: float32 [token, model]."""
    args, kwargs = call
    output = site.block.forward(*args, **kwargs)
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first.reshape(-1, first.shape[-1]).float()


def routed_inputs(site: Site, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Routed | None:
    """What an experts module was called with; None where that does not tell which experts a token goes to."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    inputs = tensors[0].reshape(-1, tensors[0].shape[-1])
    chosen = next((value for value in tensors if not value.is_floating_point()), None)
    if chosen is not None:
        weights = next(value for value in tensors if value.is_floating_point() and value.shape == chosen.shape)
        return inputs, chosen, weights
    if len(tensors) != 1 or len(inputs) % site.count:
        return None
    of_experts = inputs.unflatten(0, (site.count, -1))
    used = of_experts.abs().amax(dim=-1).T > 0  # [token, expert]
    chosen = used.float().topk(max(int(used.sum(dim=-1).max()), 1), dim=-1).indices
    tokens = torch.arange(len(used), device=used.device)[:, None]
    return of_experts[chosen, tokens], chosen, used.gather(-1, chosen).to(inputs.dtype)


def taken(inputs: Tensor, tokens: Tensor, choice: Tensor) -> Tensor:
    """Inputs of one expert, [n, width], for the tokens that chose it at some places."""
    return inputs[tokens] if inputs.ndim == 2 else inputs[tokens, choice]


@contextmanager
def _watched(site: Site) -> Iterator[_Seen]:
    seen = _Seen()

    def before_experts(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.inputs = routed_inputs(site, args, kwargs)

    handles = [
        site.experts.register_forward_pre_hook(before_experts, with_kwargs=True),
        site.experts.register_forward_hook(lambda module, args, output: seen.routed.append(output)),
    ]
    if site.shared_down is not None:
        owner = _owner(site, site.shared_down)
        handles.append(owner.register_forward_pre_hook(lambda module, args: seen.shared.append(args[0])))
        handles.append(owner.register_forward_hook(lambda module, args, output: seen.shared_output.append(output.clone())))
    if site.shared_gate is not None:
        handles.append(site.shared_gate.register_forward_hook(lambda module, args, output: seen.gates.append(output)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _owner(site: Site, name: str) -> nn.Module:
    return site.block.get_submodule(name.removeprefix(f"{site.prefix}.").rpartition(".")[0])


def canonical(spec: TensorSpec, values: Tensor) -> dict[tuple[str, int | None], Tensor]:
    """A parameter by (role, expert), each [unit, model] or as the role has it; views where they can be."""
    axes: Sequence[str] = spec.axes
    found = _ungrouped(spec, values)
    roles = spec.segments[0]
    halves = found.unbind(axes.index("half")) if "half" in axes else (found,)
    rest = [axis for axis in axes if axis != "half"]
    result: dict[tuple[str, int | None], Tensor] = {}
    for role, half in zip(roles, halves, strict=True):
        if rest[0] == "expert" and role in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
            for expert, one in enumerate(half):
                result[role, expert] = _rowwise(rest[1:], one)
        else:
            result[role, None] = _rowwise(rest, half)
    return result


def _ungrouped(spec: TensorSpec, values: Tensor) -> Tensor:
    """With an axis for each word: `(half unit)` becomes two."""
    shape: list[int] = []
    for group, size in zip(spec.groups, values.shape, strict=True):
        halves = len(spec.segments[0])
        shape += [size] if len(group) == 1 else [halves if word == "half" else size // halves for word in group]
    return values.reshape(shape)


def _rowwise(axes: Sequence[str], values: Tensor) -> Tensor:
    """Units before what they read or write."""
    order = sorted(range(len(axes)), key=lambda i: axes[i] not in ("expert", "unit", "shared"))
    return values.permute(order)
