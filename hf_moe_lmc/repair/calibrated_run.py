"""Repairs that are fitted on text: all candidates go through the model together, one decoder layer after the other.

A layer of A and of B' is read once for all candidates. Each candidate runs on calibration text, stops before the MoE block of
a layer, has its block fitted on what arrives there, and goes on with the new weights: all layers below are repaired already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.model_class import foreign, text_reader
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.path.endpoints import Endpoints, Part, conversions
from hf_moe_lmc.path.evaluation import IN_FLIGHT, SHARE, EvaluationOptions, compute_device
from hf_moe_lmc.path.skeleton import Skeleton
from hf_moe_lmc.path.sweep import Lane, Sweep
from hf_moe_lmc.perplexity.windows import Windows, batches_of, token_losses
from hf_moe_lmc.repair.block_map import (
    SHARED,
    TOLERANCES,
    BlockMap,
    Call,
    Site,
    block_maps,
    canonical,
    run_block,
    sites_of,
)
from hf_moe_lmc.repair.fitted import Fitted, Role
from hf_moe_lmc.repair.methods import Method
from hf_moe_lmc.repair.moments import Moments, linear_weights, watch
from hf_moe_lmc.repair.regmean import Gram, regmean
from hf_moe_lmc.repair.ridge import DOUBLE, ridge
from hf_moe_lmc.runtime.memory import available_memory
from hf_moe_lmc.runtime.progress import bar
from hf_moe_lmc.runtime.threads import products_of, suited
from hf_moe_lmc.symmetry.group import ModelSymmetry, digest
from hf_moe_lmc.writing.spans import Interpolated
from hf_moe_lmc.writing.streams import InterpolatedLayer, ModelStream, whole

PATH = "aligned"


@dataclass(frozen=True)
class Calibration:
    """Text that repairs are fitted and compared on.

    Attributes:
        windows: of all texts; they do not overlap.
        domains: names of the texts that A, and that B', was trained on; both may have all.
    """

    windows: Windows
    domains: tuple[frozenset[str], frozenset[str]]

    def of_parent(self, numbers: Sequence[int], parent: int) -> list[int]:
        """Those windows that are of a parent's own domain."""
        names = self.windows.text_of
        return [i for i in numbers if names[i] in self.domains[parent]]


@dataclass(frozen=True)
class Outcome:
    """What candidates gave.

    Attributes:
        losses: of each window that they are compared on, summed over its tokens, float64 [candidate, window], nats.
        fits: by candidate, an entry for each layer that was fitted.
    """

    losses: Tensor
    fits: list[list[dict[str, Any]]]


@dataclass
class _Runner:
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


class Calibrated:
    """Runs candidates for the merge of two models.

    Memory: a decoder layer of A, of B' and of a candidate; what a fit needs, see `ridge`; the activations of all candidates
    of a pass, by which `activation_memory` decides how many go together.

    Args:
        symmetry: takes B to B'.
        t: of the merge.
        starts: the MoE layers that a repair without data gives at `t`, by its name.

    Raises:
        ForeignError, CheckpointError: as `Evaluator`.
    """

    def __init__(
        self,
        a: MoEModel,
        b: MoEModel,
        symmetry: ModelSymmetry,
        t: float,
        calibration: Calibration,
        options: EvaluationOptions,
        starts: Mapping[str, Mapping[int, LayerSource]],
    ) -> None:
        self.a, self.b, self.t, self.options, self.calibration = a, b, t, options, calibration
        skeleton = Skeleton(options.model_class, a.config, dtype=options.dtype, device=compute_device(options.device))
        self.ends = Endpoints(a, b, {PATH: symmetry}, skeleton, conversions(skeleton, a, b))
        outside = Interpolated(a.checkpoint, b.checkpoint, (t,))
        self.starts = starts
        self.streams = {name: ModelStream(a, dict(layers), outside) for name, layers in starts.items()}

    def layers(self, start: str) -> dict[int, LayerSource]:
        """The MoE layers that a repair starts from."""
        if start in self.starts:
            return dict(self.starts[start])
        acted = self.b.acted(self.ends.symmetries[PATH].layers)
        return {
            index: InterpolatedLayer(index, layer, acted[index], self.t) if index in acted else layer
            for index, layer in self.a.layers.items()
        }

    @property
    def skeleton(self) -> Skeleton:
        return self.ends.skeleton

    @cached_property
    def sites(self) -> dict[int, Site]:
        """The MoE blocks by decoder layer; raises UnsuitedError."""
        return sites_of(self.skeleton.module, self.a)

    def facts(self) -> dict[str, Any]:
        """All that fitted weights depend on, but for the candidates."""
        sides = {"a": self.a.checkpoint.resume_key(), "b": self.b.checkpoint.resume_key()}
        return {
            **sides,
            "symmetry": digest(self.ends.symmetries[PATH]),
            "t": self.t,
            "windows": self.calibration.windows.describe(),
            "domains": [sorted(names) for names in self.calibration.domains],
            "dtype": str(self.options.dtype),
            "batch_size": self.options.batch_size,
            "device": self.skeleton.device.type,
            **{f"layout_{side}": found for side, found in self.ends.layouts().items()},
        }

    def check_sites(self) -> None:
        """Raises UnsuitedError where the experts of this family cannot be fitted, as far as their modules tell."""
        assert self.sites

    def run(
        self, methods: Sequence[Method], fit: Sequence[int], compare: Sequence[int], kept: Mapping[Method, Fitted] | None = None
    ) -> Outcome:
        """Fits the candidates on some windows, and gives their losses on others.

        Args:
            fit, compare: numbers of windows.
            kept: takes the fitted weights, layer by layer, and has those that an earlier call has left.

        Raises:
            UnsuitedError: the experts of this family cannot be fitted.
            InputError: more tokens than memory allows.
        """
        losses, fits = torch.empty(len(methods), len(compare), dtype=torch.float64), []
        size = self.together(len(fit) + len(compare))
        for first in range(0, len(methods), size):
            group = methods[first : first + size]
            for number, runner in enumerate(_Pass(self, group, fit, compare, kept or {}).run()):
                for lane in runner.compared:
                    for place, value in lane.result:
                        losses[first + number, place] = value
                fits.append(runner.facts)
        return Outcome(losses, fits)

    def together(self, windows: int) -> int:
        """How many candidates go through the model at once."""
        tokens = windows * self.calibration.windows.context
        each = tokens * IN_FLIGHT * int(self.a.text_config.hidden_size) * self.options.dtype.itemsize
        budget = self.options.activation_memory or int(SHARE * available_memory())
        return max(1, budget // each)


class _Pass:
    """One way through the model with some candidates."""

    def __init__(
        self,
        of: Calibrated,
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
        self.runners = [_Runner(number, method, of.t) for number, method in enumerate(methods)]
        self.parents: list[_Runner] = []
        self.of_parents: list[list[int]] = []
        if any(method.fit == "regmean" for method in methods):
            self.parents = [_Runner(len(methods) + parent, None, float(parent)) for parent in (0, 1)]
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
        rows, skeleton = self.batches[batch], self.of.skeleton
        ids = torch.stack([self.windows.rows[i] for i in rows]).to(skeleton.device)
        with foreign(type(skeleton.module), "cannot run on token ids alone"):
            logits = text_reader(skeleton.module)(input_ids=ids, use_cache=False).logits[:, :-1]
        if self.of.options.masked is not None:
            logits = logits.masked_fill(self.of.options.masked.to(logits.device), -math.inf)
        sums = self.windows.sums(rows, token_losses(logits, ids[:, 1:])).tolist()
        return [(self.place[i], value) for i, value in zip(rows, sums, strict=True) if i in self.place]

    def run(self) -> list[_Runner]:
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
            runner.fitting = self._lanes(runner, self.fitting if fits else [])
            runner.compared = self._lanes(runner, self.comparing)
        for runner, batches in zip(self.parents, self.of_parents, strict=True):
            runner.fitting = self._lanes(runner, batches)
        self.ends.load(self.beside.names)
        for runners in (self.runners, *([parent] for parent in self.parents)):
            self.ends.place(self.beside.names, PATH, runners[0].t)
            for runner in runners:
                self._advance(runner.lanes, 0)
        self.ends.drop(self.beside.names)

    def _lanes(self, runner: _Runner, batches: Sequence[int]) -> list[Lane]:
        already = {id(lane) for lane in self.sweep._lanes}
        return [lane for lane in self.sweep.start([runner.number], batches) if id(lane) not in already]

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
        averaged = self._regmean_layer(part, layer, site) if self.parents else {}
        for runner in self.runners:
            assert runner.method is not None
            self._place_start(runner.method, part)
            if runner.method.fit == "regmean":
                self.of.skeleton.place(averaged)
            stop = self.stop_of.get((part.layer, "block"))
            if stop is not None:
                self._advance(runner.lanes, stop)
                if runner.method.fit == "ridge":
                    self._ridge_block(runner, part, self.sites[part.layer])
            if last:  # what follows the last layer runs with it
                self.ends.place(self.beside.names, PATH, self.t)
            self._advance(runner.compared if last else runner.lanes, self._behind(part.layer))
        self.of.skeleton.clear(part.names)
        self.ends.drop(part.names)

    def _place_start(self, method: Method, part: Part) -> None:
        stream = self.of.streams.get(method.start)
        self.ends.place(part.names, PATH, self.t)
        if stream is None:
            return
        conversion = self.ends.conversions[0]
        claimed = self.of.a.layer_of.keys()
        groups = dict.fromkeys(conversion.group_of[name] for name in part.names if name in conversion.group_of)
        for group in groups:
            if any(key in claimed for key in group.keys):
                self.of.skeleton.place(conversion.convert(group, partial(whole, stream)))

    def _ridge_block(self, runner: _Runner, part: Part, site: Site) -> None:
        """Fits the down projections of a block to the interpolated outputs of both parents' blocks, and puts them in place."""
        assert runner.method is not None and runner.method.strength is not None and part.layer is not None
        fitted = self.kept.get(runner.method)
        if fitted is not None and fitted.has(part.layer):
            self._place_fitted(fitted, site)
            runner.facts.append({"layer": part.layer, **fitted.facts(part.layer)})
            return
        calls = [self.calls[runner.number, lane.batch] for lane in runner.fitting]
        found = block_maps(site, calls, self.of.a)
        _check_memory(found)
        standing = {name: self.of.skeleton.value(name) for name in site.names}
        target = torch.zeros_like(found.output)
        for t, weight in ((0.0, 1 - self.t), (1.0, self.t)):
            if weight:
                self.ends.place([name for name in part.names if name in standing], PATH, t)
                target += weight * torch.cat([run_block(site, call) for call in calls])
        self.of.skeleton.place({name: value for name, value in standing.items() if value is not None})
        residual, size = target - found.output, float(target.norm())
        if not math.isfinite(float(residual.norm())):
            raise InputError(
                f"layer {part.layer}: what its MoE block gives on the calibration text is not finite; expected numbers. "
                "Try --dtype float32"
            )
        facts: dict[str, Any] = {"tokens": len(target), "before": float(residual.norm()) / size}
        block: dict[Role, Tensor] = {}
        if facts["before"] > TOLERANCES[found.inputs.dtype]:  # else both parents' blocks are equal, as far as the dtype tells
            fit = ridge(found.parts(), residual, runner.method.strength)
            for key, change in fit.changes:
                role: Role = ("shared_down", None) if key == SHARED else ("down", int(str(key)))
                block[role] = self._changed(site, role, change, part.layer)
            facts["after"] = fit.after / size
        runner.facts.append({"layer": part.layer, **facts})
        if fitted is not None:
            fitted.write(part.layer, block, {}, **facts)
        self._place_block(site, block)

    def _changed(self, site: Site, role: Role, change: Tensor, layer: int) -> Tensor:
        """A new down projection [unit, model], rounded as the checkpoint will hold it."""
        name, expert = (site.shared_down if role[0] == "shared_down" else site.down), role[1]
        assert name is not None
        standing = self.of.skeleton.value(name)
        assert standing is not None
        old = standing.T if expert is None else site.down_of(expert)
        return (old.float() + change).to(self._dtype(layer, role))

    def _dtype(self, layer: int, role: Role) -> torch.dtype:
        """Of a role in A's checkpoint."""
        name, _ = self.of.a.layers[layer].piece_of(*role)
        return self.of.a.checkpoint.tensors[name].dtype

    def _place_fitted(self, fitted: Fitted, site: Site) -> None:
        roles: list[Role] = [("down", expert) for expert in range(site.count)]
        roles += [("shared_down", None)] if site.shared_down is not None else []
        found = {role: fitted.value(site.layer, *role) for role in roles}
        self._place_block(site, {role: value for role, value in found.items() if value is not None})

    def _place_block(self, site: Site, block: Mapping[Role, Tensor]) -> None:
        """Writes down projections [unit, model] over those that stand in a block."""
        for (role, expert), value in block.items():
            name = site.shared_down if role == "shared_down" else site.down
            assert name is not None
            standing = self.of.skeleton.value(name)
            assert standing is not None
            if expert is None:
                standing.copy_(value.T)
            else:
                standing[expert].copy_(value if site.transposed else value.T)

    def _regmean_layer(self, part: Part, layer: nn.Module, site: Site | None) -> dict[str, Tensor]:
        """Runs both parents through a layer, and merges its linear maps: values by full name."""
        stored = self._stored_regmean(part.layer)
        weights = {} if stored else linear_weights(f"{self.ends.layers_path}.{part.layer}", layer, site)
        weights = {name: module for name, module in weights.items() if name in part.names}
        self.moments = {parent.number: Moments() for parent in self.parents}
        handles = [] if stored else watch(weights, site, self._running_moments)
        try:
            for parent in self.parents:
                self.ends.place(part.names, PATH, parent.t)
                if part is self.of_layers[-1]:
                    self.ends.place(self.beside.names, PATH, parent.t)
                assert part.layer is not None
                if (part.layer, "block") in self.stop_of:
                    self._advance(parent.lanes, self.stop_of[part.layer, "block"])
                self._advance(parent.lanes, self._behind(part.layer))
        finally:
            for handle in handles:
                handle.remove()
        if stored:
            return self._restored(stored, part, site)
        found = {name: self._merged(name) for name in weights if name in self.moments[self.parents[0].number].grams}
        untouched: list[int] = []
        if site is not None:
            found |= self._merged_experts(site, untouched)
        self._keep_regmean(part.layer, site, found, untouched)
        return found

    def _stored_regmean(self, layer: int | None) -> Fitted | None:
        """The weights that an earlier call has left of a layer."""
        kept = [fitted for method, fitted in self.kept.items() if method.fit == "regmean" and fitted.has(layer)]
        return kept[0] if kept else None

    def _restored(self, stored: Fitted, part: Part, site: Site | None) -> dict[str, Tensor]:
        """Parameters of a layer from the record of an earlier call; says that they are."""
        found = {}
        for name in part.names:
            group = self.ends.conversions[0].group_of[name]
            if site is not None and name in site.memory.tensors:
                value = torch.empty_like(self.ends.held[None, name])
                roles = canonical(site.memory.tensors[name], value)
                for role, place in roles.items():
                    fitted = stored.value(site.layer, *role)
                    if fitted is not None:
                        place.copy_(fitted)
                        found[name] = value
            elif group.patterns[0] is None and (outside := stored.outside(group.keys[0])) is not None:
                found[name] = outside
        for runner in self.runners:
            if runner.method is not None and runner.method.fit == "regmean":
                runner.facts.append({"layer": part.layer, **stored.facts(part.layer)})
        return found

    def _running_moments(self) -> Moments | None:
        lane = self.sweep.running
        return None if lane is None else self.moments.get(lane.point)

    def _merged(self, name: str) -> Tensor:
        """One linear map of both parents, in A's dtype."""
        a, b = self.ends.held[None, name], self.ends.held[PATH, name]
        grams = [self.moments[parent.number].grams[name] for parent in self.parents]
        device = grams[0].matrix.device
        merged = regmean(a.to(device).float(), b.to(device).float(), (grams[0], grams[1]), self._totals(), self.t)
        return merged.to(a.dtype)

    def _totals(self) -> tuple[int, int]:
        return self.totals[0], self.totals[1]

    def _merged_experts(self, site: Site, untouched: list[int]) -> dict[str, Tensor]:
        """The routed experts, one after the other; `untouched` takes those that no token of either text reaches."""
        names = {"in": f"{site.memory.experts}.gate_up_proj", "out": site.down}
        found = {name: torch.empty_like(self.ends.held[None, name]) for name in names.values()}
        for expert in range(site.count):
            inputs = [self.moments[parent.number].of_expert(expert) for parent in self.parents]
            ends = ({name: self.ends.held[end, name] for name in self._expert_names(site)} for end in (None, PATH))
            units = [site.units(expert, x, values) for x, values in zip(inputs, ends, strict=True)]
            if not any(len(x) for x in inputs):
                untouched.append(expert)
            for where, values in (("in", inputs), ("out", units)):
                name = names[where]
                grams = [_gram_of(x) for x in values]
                a, b = (self._matrix(site, end, name, expert).to(grams[0].matrix.device) for end in (None, PATH))
                merged = regmean(a, b, (grams[0], grams[1]), self._totals(), self.t)
                found[name][expert] = (merged.T if site.transposed else merged).to(found[name])
        return found

    def _expert_names(self, site: Site) -> list[str]:
        return [name for name in site.names if name.startswith(f"{site.memory.experts}.")]

    def _matrix(self, site: Site, end: str | None, name: str, expert: int) -> Tensor:
        """[output, input] in float32."""
        matrix = self.ends.held[end, name][expert].float()
        return matrix.T if site.transposed else matrix

    def _keep_regmean(self, layer: int | None, site: Site | None, found: Mapping[str, Tensor], untouched: list[int]) -> None:
        for runner in self.runners:
            if runner.method is None or runner.method.fit != "regmean":
                continue
            facts: dict[str, Any] = {"layer": layer, "maps": len(found)}
            if untouched:
                facts["averaged_experts"] = untouched
            runner.facts.append(facts)
            fitted = self.kept.get(runner.method)
            if fitted is not None:
                block, outside = self._on_disk(site, found)
                fitted.write(layer, block, outside, **{name: fact for name, fact in facts.items() if name != "layer"})

    def _on_disk(self, site: Site | None, found: Mapping[str, Tensor]) -> tuple[dict[Role, Tensor], dict[str, Tensor]]:
        """Parameters in the checkpoint's terms; outside of MoE blocks, those that are tensors of their own there."""
        block: dict[Role, Tensor] = {}
        outside = {}
        for name, value in found.items():
            group = self.ends.conversions[0].group_of[name]
            if site is not None and name in site.memory.tensors:
                block |= canonical(site.memory.tensors[name], value)
            elif group.patterns[0] is None:
                outside[group.keys[0]] = value
        return block, outside

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
        merged = self._merged(name)
        self._keep_regmean(None, None, {name: merged}, [])
        for runner in self.runners:
            self.ends.place([name], PATH, self.t)
            if runner.method is not None and runner.method.fit == "regmean":
                self.of.skeleton.place({name: merged})
            self._advance(runner.compared, None)


def _gram_of(inputs: Tensor) -> Gram:
    gram = Gram.empty(inputs.shape[-1], inputs.device)
    gram.add(inputs)
    return gram


def _check_memory(found: BlockMap) -> None:
    """Raises InputError where the system to solve does not fit."""
    tokens, columns = len(found.output), sum(part.units for part in found.parts())
    unknowns = min(tokens, columns)
    needed = 3 * unknowns * unknowns * (8 if unknowns <= DOUBLE else 4)
    if found.output.device.type == "cpu" and needed > available_memory():
        raise InputError(
            f"ridge on {tokens} calibration tokens and {columns} hidden units takes {needed >> 20} MiB for its equations; "
            f"{available_memory() >> 20} MiB are free. Take less calibration text (--calibration-tokens)"
        )
