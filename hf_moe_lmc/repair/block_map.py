"""An MoE block in a transformers model as a linear map of its hidden units, taken from the module that runs.

Routing weights, chosen experts and gates are what the module's own parts hand to each other; nothing of a router is computed
here. Relied on of transformers: an experts module is called with inputs [token, width], numbers [token, choice] and weights
of the chosen experts, or with inputs [expert * token, width] that are 0 where an expert is not chosen. It holds `gate_up_proj`
and `down_proj`, and `_apply_gate` or `act_fn` makes hidden units of the products of `gate_up_proj`. Whether Phi D then is what
the block gave is checked in each layer; a family where it is not is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.repair.ridge import Part
from hf_moe_lmc.repair.sites import Site, unsuited

SHARED = "shared"  # key of the shared expert among the parts
# of the largest value of the block's output, by the dtype it runs in
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 3e-2, torch.float16: 5e-3}

Routed = tuple[Tensor, Tensor, Tensor]  # inputs, chosen and weights of `BlockMap`
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with


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
        raise unsuited(model, f"layer {site.layer}: the experts are not called with the numbers of the chosen ones")
    inputs, chosen, weights = seen.inputs
    routed = seen.routed[0].reshape(-1, seen.routed[0].shape[-1]).float()
    if inputs.ndim == 3:
        routed = routed.unflatten(0, (site.count, -1)).sum(dim=0)
    if routed.shape != output.shape:
        raise unsuited(model, f"layer {site.layer}: what the experts give is projected before it leaves the block")
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
        raise unsuited(
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
