"""One way through a model with all candidates: each layer of A and of B' is read once, whatever their number.

Each candidate stops before the MoE block of a layer, has its block fitted on what arrives there, and goes on with the new
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_lmc.moe.model_class import text_reader
from hf_moe_lmc.path.endpoints import Part
from hf_moe_lmc.path.evaluation import predictions
from hf_moe_lmc.path.sweep import Lane, Sweep
from hf_moe_lmc.perplexity.scores import token_losses
from hf_moe_lmc.perplexity.windows import batches_of
from hf_moe_lmc.repair.block_map import Call
from hf_moe_lmc.repair.fitted import Fitted
from hf_moe_lmc.repair.methods import Method
from hf_moe_lmc.repair.moments import Moments, linear_weights, watch
from hf_moe_lmc.repair.regmean_layer import RegmeanLayer
from hf_moe_lmc.repair.ridge_layer import RidgeLayer
from hf_moe_lmc.repair.run_models import PATH, RunModels
from hf_moe_lmc.repair.sites import Site
from hf_moe_lmc.runtime.progress import bar
from hf_moe_lmc.runtime.threads import products_of, suited


@dataclass
class Runner:
    """One model on its way through the layers: a candidate, or a parent that RegMean watches.

    Attributes:
        number: of its lanes' point.
        method: None: a parent, at `t` 0 or 1.
        fitting, compared: its lanes on the text that is fitted on, and on the text that candidates are compared on.
    """

    number: int
    method: Method | None
    t: float
    fitting: list[Lane] = field(default_factory=list)
    compared: list[Lane] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lanes(self) -> list[Lane]:
        return [*self.fitting, *self.compared]


class Pass:
    """One way through the model with some candidates."""

    def __init__(
        self,
        of: RunModels,
        methods: Sequence[Method],
        fit: Sequence[int],
        compare: Sequence[int],
        kept: Mapping[Method, Fitted],
    ) -> None:
        self.of, self.kept, self.ends, self.t = of, kept, of.ends, of.t
        self.windows = of.calibration.windows
        self.place = {window: place for place, window in enumerate(compare)}
        self.batches: list[list[int]] = []
        self.fitting, self.comparing = self._batched(fit), self._batched(compare)
        self.runners = [Runner(number, method, of.t) for number, method in enumerate(methods)]
        self.parents: list[Runner] = []
        self.of_parents: list[list[int]] = []
        if any(method.fit == "regmean" for method in methods):
            self.parents = [Runner(len(methods) + parent, None, float(parent)) for parent in (0, 1)]
            self.of_parents = [self._batched(of.calibration.of_parent(fit, parent)) for parent in (0, 1)]
        self.totals = [sum(len(self.windows.rows[i]) for b in numbers for i in self.batches[b]) for numbers in self.of_parents]
        self.calls: dict[tuple[int, int], Call] = {}
        self.routed_by: dict[tuple[int, int], Tensor] = {}
        self.moments: dict[int, Moments] = {}
        self.sweep: Sweep
        fits = any(method.fit is not None for method in methods)
        self.sites = of.sites if fits else {}
        of_layers, self.beside = self.ends.parts()
        self.layers = [self._layer_module(part) for part in of_layers]
        self.of_layers = of_layers
        self.head = self._head() if self.parents else None
        self.stops, self.stop_of = self._stops()

    def _batched(self, numbers: Sequence[int]) -> list[int]:
        """Numbers of new batches of some windows."""
        first, rows = len(self.batches), [self.windows.rows[i] for i in numbers]
        self.batches += [[numbers[i] for i in batch] for batch in batches_of(rows, self.of.options.batch_size)]
        return list(range(first, len(self.batches)))

    def _layer_module(self, part: Part) -> nn.Module:
        return self.of.skeleton.module.get_submodule(f"{self.ends.layers_path}.{part.layer}")

    def _head(self) -> tuple[str, nn.Module] | None:
        """The language model's head, unless it is tied to the embeddings: full name of its weight, and the module."""
        skeleton = self.of.skeleton
        head = text_reader(skeleton.module).get_output_embeddings()
        name = next((f"{path}.weight" for path, module in skeleton.module.named_modules() if module is head), None)
        return None if head is None or name is None or name in skeleton.tied else (name, head)

    def _stops(self) -> tuple[list[nn.Module], dict[Any, int]]:
        """Modules that lanes stop before, and the number of each by layer, (layer, 'block') or 'head'."""
        stops: list[nn.Module] = []
        numbers: dict[Any, int] = {}
        for part, layer in zip(self.of_layers, self.layers, strict=True):
            numbers[part.layer] = len(stops)
            stops.append(layer)
            if part.layer in self.sites:
                numbers[part.layer, "block"] = len(stops)
                stops.append(self.sites[part.layer].stop)
        if self.head is not None:
            numbers["head"] = len(stops)
            stops.append(self.head[1])
        return stops, numbers

    def forward(self, batch: int) -> list[tuple[int, float]]:
        """(place among those that are compared, summed loss) of each window of a batch."""
        rows = self.batches[batch]
        ids = torch.stack([self.windows.rows[i] for i in rows])
        logits = predictions(self.of.skeleton, ids, self.of.options.masked)
        sums = self.windows.sums(rows, token_losses(logits, ids[:, 1:])).tolist()
        return [(self.place[i], value) for i, value in zip(rows, sums, strict=True) if i in self.place]

    def run(self) -> list[Runner]:
        handles = [self._watch_calls(site.stop, site.router) for site in self.sites.values()]
        handles += [self._watch_router(site.router) for site in self.sites.values() if site.router is not None]
        handles += [self._watch_calls(self.head[1])] if self.head else []
        try:
            with (
                torch.inference_mode(),
                suited(products_of(self.of.skeleton.module, self._tokens(), self.of.a.top_k)),
                Sweep(self.stops, self.forward) as self.sweep,
                bar(total=len(self.of_layers), desc="fitting on text", unit="layer") as shown,
            ):
                self._start()
                for part, layer in zip(self.of_layers, self.layers, strict=True):
                    self._through(part, layer)
                    shown.update(1)
                self._finish()
        finally:
            for handle in handles:
                handle.remove()
            self.of.skeleton.clear([name for part in (*self.of_layers, self.beside) for name in part.names])
            self.ends.drop([name for part in (*self.of_layers, self.beside) for name in part.names])
        return self.runners

    def _tokens(self) -> int:
        """Of the largest batch."""
        return max(sum(len(self.windows.rows[i]) for i in batch) for batch in self.batches)

    def _watch_router(self, router: nn.Module) -> Any:
        """Remembers what a lane calls a router with that stands in the layer itself."""

        def hook(module: nn.Module, args: Any) -> None:
            lane = self.sweep.running
            if lane is not None:
                self.routed_by[lane.point, lane.batch] = args[0]

        return router.register_forward_pre_hook(hook)

    def _watch_calls(self, module: nn.Module, router: nn.Module | None = None) -> Any:
        """Remembers what a lane calls a module with; comes before the hook that stops the lane there.

        Args:
            router: stands beside the experts that the lane stops before: what it read comes first.
        """

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            lane = self.sweep.running
            if lane is not None:
                key = lane.point, lane.batch
                self.calls[key] = (args, kwargs) if router is None else ((self.routed_by.pop(key), args[0]), {})

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def _start(self) -> None:
        """All lanes, up to the first layer."""
        for runner in self.runners:
            fits = runner.method is not None and runner.method.fit == "ridge"
            runner.fitting = self.sweep.start([runner.number], self.fitting if fits else [])
            runner.compared = self.sweep.start([runner.number], self.comparing)
        for runner, batches in zip(self.parents, self.of_parents, strict=True):
            runner.fitting = self.sweep.start([runner.number], batches)
        self.ends.load(self.beside.names)
        for runners in (self.runners, *([parent] for parent in self.parents)):
            self.ends.place(self.beside.names, PATH, runners[0].t)
            for runner in runners:
                self._advance(runner.lanes, 0)
        self.ends.drop(self.beside.names)

    def _advance(self, lanes: Sequence[Lane], stop: int | None) -> None:
        for lane in lanes:
            self.sweep.advance(lane, stop)

    def _behind(self, layer: int) -> int | None:
        """The stop behind a layer; None: the end."""
        return self.stop_of.get(layer + 1, self.stop_of.get("head"))

    def _through(self, part: Part, layer: nn.Module) -> None:
        """Takes every model through one decoder layer."""
        assert part.layer is not None
        self.ends.load(part.names)
        self.calls.clear()
        site, last = self.sites.get(part.layer), part is self.of_layers[-1]
        if last:
            self.ends.load(self.beside.names)
        averaged = self._regmean(part, layer, site) if self.parents else {}
        for runner in self.runners:
            assert runner.method is not None
            self.of.place_start(runner.method.start, part.names)
            if runner.method.fit == "regmean":
                self.of.skeleton.place(averaged)
            stop = self.stop_of.get((part.layer, "block"))
            if stop is not None:
                self._advance(runner.lanes, stop)
                if runner.method.fit == "ridge":
                    self._ridge(runner, RidgeLayer(self.of, self.sites[part.layer]))
            if last:  # what follows the last layer runs with it
                self.ends.place(self.beside.names, PATH, self.t)
            self._advance(runner.compared if last else runner.lanes, self._behind(part.layer))
        self.of.skeleton.clear(part.names)
        self.ends.drop(part.names)

    def _ridge(self, runner: Runner, block: RidgeLayer) -> None:
        """Fits a block for a candidate whose lanes stand before it, and puts what was fitted in place."""
        assert runner.method is not None and runner.method.strength is not None
        fitted, layer = self.kept.get(runner.method), block.site.layer
        if fitted is not None and fitted.has(layer):
            values, facts = block.stored(fitted), fitted.facts(layer)
        else:
            calls = [self.calls[runner.number, lane.batch] for lane in runner.fitting]
            values, facts = block.fit(calls, runner.method.strength)
            if fitted is not None:
                fitted.write(layer, values, {}, **facts)
        block.place(values)
        runner.facts.append({"layer": layer, **facts})

    def _regmean(self, part: Part, layer: nn.Module, site: Site | None) -> dict[str, Tensor]:
        """Runs both parents through a layer, and merges its linear maps: values by full name."""
        assert part.layer is not None
        maps, stored = RegmeanLayer(self.of, part.layer, site), self._stored(part.layer)
        weights = {} if stored else linear_weights(f"{self.ends.layers_path}.{part.layer}", layer, site)
        weights = {name: module for name, module in weights.items() if name in part.names}
        self.moments = {parent.number: Moments() for parent in self.parents}
        handles = [] if stored else watch(weights, site, self._running_moments)
        try:
            for parent in self.parents:
                self.ends.place(part.names, PATH, parent.t)
                if part is self.of_layers[-1]:
                    self.ends.place(self.beside.names, PATH, parent.t)
                if (part.layer, "block") in self.stop_of:
                    self._advance(parent.lanes, self.stop_of[part.layer, "block"])
                self._advance(parent.lanes, self._behind(part.layer))
        finally:
            for handle in handles:
                handle.remove()
        if stored:
            self._note_regmean(part.layer, stored.facts(part.layer))
            return maps.restored(stored, part)
        return self._merged(maps, list(weights))

    def _merged(self, maps: RegmeanLayer, names: Sequence[str]) -> dict[str, Tensor]:
        """Merges maps from the moments that were taken, and keeps them."""
        moments = [self.moments[parent.number] for parent in self.parents]
        found, facts = maps.merged(names, moments, (self.totals[0], self.totals[1]))
        for method, fitted in self.kept.items():
            if method.fit == "regmean":
                fitted.write(maps.layer, *maps.on_disk(found), **facts)
        self._note_regmean(maps.layer, facts)
        return found

    def _stored(self, layer: int) -> Fitted | None:
        """The maps that an earlier call has left of a layer."""
        kept = [fitted for method, fitted in self.kept.items() if method.fit == "regmean" and fitted.has(layer)]
        return kept[0] if kept else None

    def _note_regmean(self, layer: int | None, facts: Mapping[str, Any]) -> None:
        for runner in self.runners:
            if runner.method is not None and runner.method.fit == "regmean":
                runner.facts.append({"layer": layer, **facts})

    def _running_moments(self) -> Moments | None:
        lane = self.sweep.running
        return None if lane is None else self.moments.get(lane.point)

    def _finish(self) -> None:
        """The head, where it is a map to be merged as well: all lanes stand before it."""
        if self.head is None:
            return
        name, _ = self.head
        self.ends.load([name])
        self.moments = {parent.number: Moments() for parent in self.parents}
        for parent in self.parents:
            for lane in parent.lanes:
                self.moments[parent.number].add(name, self.calls[parent.number, lane.batch][0][0])
        merged = self._merged(RegmeanLayer(self.of, None, None), [name])
        for runner in self.runners:
            self.ends.place([name], PATH, self.t)
            if runner.method is not None and runner.method.fit == "regmean":
                self.of.skeleton.place(merged)
            self._advance(runner.compared, None)
