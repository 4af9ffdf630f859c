"""Which experts the tokens take along a path, watched while its points are evaluated.

What is relied on of transformers: in a decoder layer, a module called `gate` or `router` returns its logits [token, expert]
as its widest floating tensor, the first of them, and beside it a module called `experts` is called with the numbers of the
chosen experts [token, choice], int64, and their weights of the same shape. Where experts get no numbers (Llama 4 gives
every token to each of them, JetMoE sorts the tokens beforehand), the chosen ones are those of the largest logits, which is
checked against what the router returned. A model in which a layer shows neither has no routing here, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.path.endpoints import Point
from hf_moe_lmc.path.sweep import Lane

ROUTERS = ("gate", "router")
NOWHERE = -1  # stands for the expert of a pair whose weight is zero: the token reaches none (a class that skips the block)


@dataclass
class Site:
    """A router within a decoder layer.

    Attributes:
        layer: number of the decoder layer.
        module: path of the block within it; empty where the layer itself holds the router.
        returned: tensors that the router returned in the forward that runs just now.
    """

    layer: int
    module: str
    router: nn.Module
    experts: nn.Module | None
    returned: Sequence[Tensor] = ()

    @property
    def logits(self) -> Tensor | None:
        """One for each expert, so the widest; their first among scores of the same width."""
        floating = [value for value in self.returned if value.is_floating_point() and value.ndim > 1]
        return max(floating, key=lambda value: value.shape[-1], default=None)


@dataclass
class Tally:
    """Sums over the tokens that went through a router at one point; they do not depend on the order of the batches.

    Attributes:
        tokens, pairs: numbers of tokens, and of token-expert pairs.
        with_a, with_b: pairs whose expert A, or B, gives the token, too.
        counts: tokens of each expert, int64 [expert].
        entropies: nats, of each batch summed over its tokens; nan without logits.
    """

    tokens: int = 0
    pairs: int = 0
    with_a: int = 0
    with_b: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    entropies: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Takes in the sums over other tokens."""
        self.tokens += other.tokens
        self.pairs += other.pairs
        self.with_a += other.with_a
        self.with_b += other.with_b
        self.counts = other.counts + self.counts if len(self.counts) else other.counts
        self.entropies += other.entropies

    def stored(self) -> dict[str, Tensor]:
        sums = torch.tensor([self.tokens, self.pairs, self.with_a, self.with_b])
        return {"sums": torch.cat([sums, self.counts]), "entropies": torch.tensor(self.entropies, dtype=torch.float64)}

    @classmethod
    def of(cls, stored: Mapping[str, Tensor]) -> Tally:
        """The inverse of `stored`."""
        sums = stored["sums"]
        tokens, pairs, with_a, with_b = sums[:4].tolist()
        return cls(tokens, pairs, with_a, with_b, sums[4:], stored["entropies"].tolist())

    @property
    def entropy(self) -> float | None:
        """Mean over the tokens, nats."""
        total = math.fsum(self.entropies)
        return None if math.isnan(total) else total / self.tokens


Key = tuple[int, int, str]  # number of the point, layer, path of the block in the layer


@dataclass
class RoutingObserver:
    """Records the routing at the points that interpolate the whole model.

    Agreement compares numbers of experts. On the aligned path B's experts have the numbers of those of A that they were
    matched with; on the naive path they keep B's own numbers, so that a mere relabelling counts as disagreement there.

    Memory: the choices of A and of B on every path, int16, in the layers that are on their way: in one layer of all windows,
    or where all weights are in memory at once in all layers of all windows.

    Args:
        model: tells the MoE layers, the experts per token and the kind of router.
        points: those with `layers` None come first; of them t = 0 first, and t = 1 of each path before the others on it.

    Attributes:
        tallies: by (number of the point, layer, module): sums, to which `add` adds those of other windows; whole after `end`.
        needed: numbers of A and of B on each path, whose choices the others are compared with.

    Raises:
        ValueError: the points are in another order.
    """

    model: MoEModel
    points: Sequence[Point]
    tallies: dict[Key, Tally] = field(default_factory=dict)
    needed: Sequence[int] = ()
    _new: dict[Key, Tally] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _references: dict[tuple[str | None, int, str, int], Tensor] = field(default_factory=dict)
    _running: Callable[[], Lane | None] = field(default=lambda: None)

    def __post_init__(self) -> None:
        watched = [point for point in self.points if point.layers is None]
        if watched != list(self.points[: len(watched)]) or not watched or watched[0].t != 0:
            raise ValueError("points of the whole model come first, t = 0 at their head")
        ended: set[str] = set()
        for point in watched:
            ended |= {point.path} if point.t == 1 else set()
            if 0 < point.t < 1 and point.path not in ended:
                raise ValueError(f"t = 1 of the path {point.path!r} comes before the points between its ends")
        self._watched = watched
        self.needed = [i for i, point in enumerate(watched) if i == 0 or point.t == 1]

    def begin(self, layers: Sequence[nn.Module], running: Callable[[], Lane | None]) -> None:
        """Puts hooks on routers and experts of the MoE layers."""
        self._running = running
        for number, layer in enumerate(layers):
            for site in _sites(number, layer) if number in self.model.layers else ():
                self._handles.append(site.router.register_forward_hook(self._after_router(site)))
                if site.experts is not None:
                    self._handles.append(site.experts.register_forward_pre_hook(self._before_experts(site), with_kwargs=True))

    def end(self) -> None:
        """Takes the hooks off; from now on `rows` is complete."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._references.clear()
        self.add(self._new)
        self._new.clear()

    @property
    def problem(self) -> str | None:
        """Why the routing of this model is not available; known when all windows have been taken in."""
        silent = sorted(
            {number for number in self.model.layers if number < self.model.num_layers} - {layer for _, layer, _ in self.tallies}
        )
        if not silent:
            return None
        return (
            f"layer {silent[0]} of {type(self.model.config).__name__} shows neither the numbers of the chosen experts nor "
            "logits from which they follow"
        )

    def add(self, tallies: Mapping[Key, Tally]) -> None:
        """Takes in what an observer of other windows of the same text has counted."""
        for key, tally in tallies.items():
            self.tallies.setdefault(key, Tally()).add(tally)

    def seen(self, points: Sequence[int]) -> dict[str, Tensor]:
        found = {key: self._new.pop(key) for key in sorted(self._new) if key[0] in points}
        self.add(found)
        return {
            f"{point}/{layer}/{module}/{name}": values
            for (point, layer, module), tally in found.items()
            for name, values in tally.stored().items()
        }

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        for name, sums in stored.items():
            place, _, what = name.rpartition("/")
            if what == "sums":
                point, layer, module = place.split("/")
                tally = Tally.of({"sums": sums, "entropies": stored[f"{place}/entropies"]})
                self.add({(int(point), int(layer), module): tally})

    def rows(self) -> list[dict[str, Any]]:
        """One entry per path, point, MoE layer and router; none where the routing is not available.

        Keys: path, t, layer, module (of the router's block within the decoder layer), load (share of each expert in the
        token-expert pairs), agreement_a and agreement_b (mean share of a token's experts that A, or B of the same path, gives
        it as well; agreement_b is None without t = 1 on the path), entropy (nats, mean over the tokens: of the softmax over
        all experts, or of scores divided by their sum where a router scores each expert by itself; None without logits).
        """
        if self.problem is not None:
            return []
        return [
            self._row(path, i, layer, module)
            for path in dict.fromkeys(point.path for point in self._watched)
            for i in sorted(
                (i for i, point in enumerate(self._watched) if i == 0 or (point.path == path and point.t > 0)),
                key=lambda i: self._watched[i].t,
            )
            for layer, module in sorted({key[1:] for key in self.tallies})
        ]

    def _row(self, path: str, number: int, layer: int, module: str) -> dict[str, Any]:
        tally, t = self.tallies[number, layer, module], self._watched[number].t
        ends = [i for i, point in enumerate(self._watched) if point == Point(path, 1.0)]
        if not ends:
            with_b = None
        elif number == 0:  # B was not there yet; what A shares with B, B shares with A
            end = self.tallies[ends[0], layer, module]
            with_b = end.with_a / end.pairs
        else:
            with_b = tally.with_b / tally.pairs
        return {
            "path": path,
            "t": t,
            "layer": layer,
            "module": module,
            "load": (tally.counts.double() / tally.pairs).tolist(),
            "agreement_a": tally.with_a / tally.pairs,
            "agreement_b": with_b,
            "entropy": tally.entropy,
        }

    def _after_router(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            site.returned = list(_tensors(output))
            if site.experts is None:
                self._from_sorted_pairs(site)

        return hook

    def _before_experts(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = list(_tensors([*args, *kwargs.values()]))
            chosen = next((value for value in tensors if value.dtype in (torch.int64, torch.int32)), None)
            if chosen is None:
                self._from_scores(site)
            else:
                weights = next((v for v in tensors if v.is_floating_point() and v.shape == chosen.shape), None)
                if weights is not None:
                    chosen = chosen.masked_fill(weights == 0, NOWHERE)
                self._record(site, chosen.reshape(-1, chosen.shape[-1]), site.logits)
            site.returned = ()

        return hook

    def _from_sorted_pairs(self, site: Site) -> None:
        """JetMoE's router returns the token-expert pairs in the order of their experts, and the logits."""
        pairs = next((value for value in site.returned if not value.is_floating_point()), None)
        if site.logits is not None and pairs is not None:
            chosen = site.logits.topk(self.model.top_k, dim=-1).indices
            if pairs.numel() == chosen.numel():
                self._record(site, chosen, site.logits)
        site.returned = ()

    def _from_scores(self, site: Site) -> None:
        """Llama 4's router returns scores that are zero but for the chosen experts, then the logits."""
        if len(site.returned) == 2 and site.returned[0].shape == site.returned[1].shape:
            scores, logits = site.returned
            chosen = logits.topk(self.model.top_k, dim=-1).indices
            if bool((scores.scatter(-1, chosen, 0) == 0).all()):
                self._record(site, chosen, logits)

    def _record(self, site: Site, chosen: Tensor, logits: Tensor | None) -> None:
        lane = self._running()
        if lane is None or lane.point >= len(self._watched) or not len(chosen):
            return
        point, key = self._watched[lane.point], (lane.point, site.layer, site.module)
        chosen = chosen.to(torch.int16)
        if lane.point == 0:
            self._references[None, site.layer, site.module, lane.batch] = chosen
        if point.t == 1:
            self._references[point.path, site.layer, site.module, lane.batch] = chosen
        if not lane.again:
            self._new.setdefault(key, Tally()).add(self._tally(site, lane, chosen, logits))
        if lane.point == len(self._watched) - 1:  # nobody will ask again
            for path in (None, *(point.path for point in self._watched)):
                self._references.pop((path, site.layer, site.module, lane.batch), None)

    def _tally(self, site: Site, lane: Lane, chosen: Tensor, logits: Tensor | None) -> Tally:
        """Of the tokens of one batch."""
        path, layer = self._watched[lane.point].path, self.model.layers[site.layer]
        of_a, of_b = (self._references.get((end, site.layer, site.module, lane.batch)) for end in (None, path))
        experts = layer.experts if logits is None else logits.shape[-1]
        entropy = None if logits is None else torch.special.entr(_distribution(logits, layer.router)).sum()
        return Tally(
            tokens=len(chosen),
            pairs=chosen.numel(),
            with_a=_shared(chosen, of_a),
            with_b=_shared(chosen, of_b),
            counts=torch.bincount(chosen[chosen != NOWHERE].long(), minlength=experts).cpu(),
            entropies=[math.nan if entropy is None else float(entropy)],
        )


def _sites(number: int, layer: nn.Module) -> Iterator[Site]:
    for path, block in layer.named_modules():
        if path.rpartition(".")[2] in ROUTERS:
            continue  # what a router consists of
        children: Mapping[str, nn.Module] = dict(block.named_children())
        router = next((children[name] for name in ROUTERS if name in children), None)
        if router is not None:
            yield Site(number, path, router, children.get("experts"))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, Tensor):
            yield value


def _shared(chosen: Tensor, others: Tensor | None) -> int:
    """Pairs of a token and an expert that are in both: [token, choice] twice; 0 where there is nothing to compare with."""
    if others is None:
        return 0
    return int((chosen[:, :, None] == others[:, None, :]).any(dim=-1).sum())


def _distribution(logits: Tensor, kind: str) -> Tensor:
    """Probabilities of the experts, float64 [token, expert], from what a router of this kind returns."""
    values = logits.double().reshape(-1, logits.shape[-1])
    if kind == "sigmoid":
        values = values.sigmoid()
    elif kind == "sqrtsoftplus":
        values = nn.functional.softplus(values).sqrt()
    elif bool((values < 0).any()) or not torch.allclose(values.sum(-1), torch.ones_like(values[:, 0]), atol=0.02):
        return values.softmax(-1)
    return values / values.sum(-1, keepdim=True)
