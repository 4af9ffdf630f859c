"""The proof of a family's description: a small random model, every part of its group, and controls that must fail.

The model has the checkpoint's own configuration with small sizes (`shrink`). Transformers saves it in both layouts, this
package rewrites it, and transformers loads it again. It must then compute what it did. Where the group ends, it must not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.moe.action import ActedLayer
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.model_class import foreign
from hf_moe_lmc.moe.notation import split_role
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.moe.ties import SEEN, bound_orders
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.proof.miniature import miniature, ordinary_tokens, outputs
from hf_moe_lmc.proof.verdict import Check, SelfTest
from hf_moe_lmc.runtime.progress import quiet_transformers
from hf_moe_lmc.runtime.threads import suited
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.elements import BankSymmetry, UnitSymmetry
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry
from hf_moe_lmc.writing.output import TensorStream, open_writer
from hf_moe_lmc.writing.spans import Copied
from hf_moe_lmc.writing.streams import ModelStream, rewritten, whole
from hf_moe_lmc.writing.workspace import open_workspace

FEW = 16  # tokens that show what ties do
SCALE = 3.0  # scales are drawn between 1 / 3 and 3
COMPANIONS = ("correction_bias", "expert_scale", "expert_table")
LAYOUTS = {"as on the Hub": True, "as in memory": False}  # save_original_format

BANK_PARTS: dict[str, Callable[[BankSymmetry, BankSymmetry], BankSymmetry]] = {
    "expert order": lambda g, identity: replace(identity, expert_order=g.expert_order),
    "order of hidden units": lambda g, identity: replace(identity, unit_order=g.unit_order),
    "signs of hidden units": lambda g, identity: replace(identity, unit_scale=g.unit_scale.sign()),
    "scales of hidden units": lambda g, identity: replace(identity, unit_scale=g.unit_scale.abs()),
}
SHARED_PARTS: dict[str, Callable[[UnitSymmetry, UnitSymmetry], UnitSymmetry]] = {
    "shared expert: order of hidden units": lambda g, identity: replace(identity, order=g.order),
    "shared expert: signs": lambda g, identity: replace(identity, scale=g.scale.sign()),
    "shared expert: scales": lambda g, identity: replace(identity, scale=g.scale.abs()),
}


def restricted(part: str, g: LayerSymmetry, identity: LayerSymmetry, bank: str = FIRST) -> LayerSymmetry:
    """The element that has one part of `g`, of a bank's or the shared expert's, and is the identity besides."""
    if part in SHARED_PARTS:
        return replace(identity, shared=SHARED_PARTS[part](g.shared, identity.shared))
    return identity.with_bank(bank, BANK_PARTS[part](g.banks[bank], identity.banks[bank]))


@suited()
def prove(family: MoEFamily, config: PreTrainedConfig, *, seed: int = 0) -> SelfTest:
    """Runs the self-test of `family` on a miniature of `config`.

    Raises:
        FamilyError: the miniature does not have the blocks that the family describes.
    """
    built = miniature(config, seed)
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="hf_moe_lmc-") as folder:
        checks = tuple(_checks(family, built, Path(folder), seed))
    return SelfTest(str(config.model_type), family.name, checks)


def _checks(family: MoEFamily, built: PreTrainedModel, folder: Path, seed: int) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(seed)
    expected = outputs(built)
    for layout, original in LAYOUTS.items():
        source = folder / f"source-{original}"
        with foreign(type(built), "cannot be saved"):
            built.save_pretrained(source, save_original_format=original)
        with ExitStack() as stack:
            model = read_model(stack.enter_context(Checkpoint.open(source)), family)
            check_round_trip(model)
            g = model.random(generator, scale=SCALE)
            written = write(rewritten(model, g.layers), folder / f"moved-{original}")
            check_accounting(model, written)
            yield Check(f"everything at once, {layout}", difference(reloaded(built, written), expected), control=False)
    run = Rerun(model, built, expected)
    for name, part in parts(model, g).items():
        yield Check(name, run(model.acted(part.layers)), control=False)
    yield from _controls(model, g, run, generator)


@dataclass(frozen=True)
class Rerun:
    """Gives a model other layers, read in the layout of memory, and compares its outputs.

    Attributes:
        model: what `built` was saved as.
        expected: outputs of `built` as it was.
    """

    model: MoEModel
    built: PreTrainedModel
    expected: Tensor

    def __call__(self, layers: Mapping[int, LayerSource]) -> float:
        stream = ModelStream(self.model, layers, Copied(self.model.checkpoint))
        tensors = {name: whole(stream, name) for name in self.model.layer_of}
        unknown = self.built.load_state_dict(tensors, strict=False).unexpected_keys
        if unknown:
            raise FamilyError(f"{self.model.family.name}: transformers does not know {unknown[0]}")
        return difference(outputs(self.built), self.expected)

    def of_tied(self, tied: Mapping[int, Tied]) -> float:
        """The difference that moving the experts of layers with tied router rows makes, on a few tokens and in memory."""
        tokens = ordinary_tokens(self.built.config)[:1, :FEW]
        self._take(tied)
        before = outputs(self.built, tokens)
        groups, layers = self.model.groups, self.model.layers
        elements = {index: _rolled(layers[index].identity(), groups) for index in tied}
        self._take({index: ActedLayer(layer, elements[index], layer.original.units) for index, layer in tied.items()})
        return difference(outputs(self.built, tokens), before)

    def _take(self, layers: Mapping[int, LayerSource]) -> None:
        """Gives the model in memory the tensors of some layers."""
        state = self.built.state_dict()
        for index, source in layers.items():
            layer = self.model.layers[index]
            for name in layer.claims:
                if any(True for _ in layer.pieces(name)):
                    values = torch.cat([layer.assemble(name, piece, source) for piece in layer.pieces(name)])
                    state[name].view(-1).copy_(values)


def parts(model: MoEModel, g: ModelSymmetry) -> dict[str, ModelSymmetry]:
    """Each part of the group that this model has, as the element that `g` has of it."""
    identity = model.identity()
    elements = {}
    for bank in next(iter(g.layers.values())).banks:
        for name in (*BANK_PARTS, *SHARED_PARTS) if bank == FIRST else BANK_PARTS:
            layers = {index: restricted(name, g.layers[index], layer, bank) for index, layer in identity.layers.items()}
            element = ModelSymmetry(g.family, g.groups, layers)
            if element != identity:
                elements[name if bank == FIRST else f"bank {bank}: {name}"] = element
    return elements


@dataclass(frozen=True)
class PartlyActed:
    """A block in new coordinates, but for some roles, whose tensors stay as they are."""

    acted: LayerSource
    original: LayerSource
    unmoved: tuple[str, ...]

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        return (self.original if split_role(role)[1] in self.unmoved else self.acted).stored(role, expert)


@dataclass(frozen=True)
class Translated:
    """A block with one vector added to all its router rows, the same one in every bank: banks may share one softmax."""

    original: LayerSource

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        values = self.original.stored(role, expert)
        if split_role(role)[1] != "router":
            return values
        return values + torch.randn(values.shape[1], generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Tied:
    """A block whose first bank has one router row for all experts, its biases included."""

    original: MoELayer

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        values = self.original.stored(role, expert)
        return values[:1].expand_as(values) if role in SEEN else values


def _tied_layers(model: MoEModel) -> dict[int, Tied]:
    """The layers in which tied router rows change what is selected.

    Raises:
        FamilyError: the ties are not seen, and alignment would move the experts.
    """
    tied = {index: Tied(layer) for index, layer in model.layers.items() if "expert_table" not in layer.roles}
    tied = {index: one for index, one in tied.items() if model.top_k < one.original.experts}
    for index, one in tied.items():
        if FIRST not in bound_orders(one.original, model.groups, model.top_k, one):
            raise FamilyError(f"{model.family.name}: layer {index}: ties between router rows are not seen")
    return tied


def _rolled(identity: LayerSymmetry, groups: int) -> LayerSymmetry:
    """Each expert of the first bank goes one place on, or to the next group: no choice of some of the places survives it."""
    bank = identity.banks[FIRST]
    step = len(bank.expert_order) // groups if groups > 1 else 1
    return identity.with_bank(FIRST, replace(bank, expert_order=bank.expert_order.roll(step)))


def _controls(model: MoEModel, g: ModelSymmetry, run: Rerun, generator: torch.Generator) -> Iterator[Check]:
    """What must change the outputs, and the translation of the router, which tells the kinds of router apart."""
    layers, identity = model.layers, model.identity().layers
    first = next(iter(layers.values()))
    order, units = (
        {index: restricted(name, g.layers[index], identity[index]) for index in layers}
        for name in ("expert order", "order of hidden units")
    )

    def acted(elements: Mapping[int, LayerSymmetry], *unmoved: str) -> float:
        """The difference where all roles move but these."""
        return run({i: PartlyActed(ActedLayer(layer, elements[i], layer.units), layer, unmoved) for i, layer in layers.items()})

    yield Check("experts moved, router left", acted(order, "router", "router_bias"), control=True)
    for role in COMPANIONS:
        if any(role in layer.roles for layer in layers.values()):
            yield Check(f"experts moved, {role} left", acted(order, role), control=True)
    yield Check("hidden units moved, up projection left", acted(units, "up"), control=True)
    if model.groups > 1:
        torn = {i: restricted("expert order", layer.random(generator), identity[i]) for i, layer in layers.items()}
        yield Check("experts moved across their groups", acted(torn), control=True)
    if not first.banks[FIRST].kind.sign and first.banks[FIRST].kind.permutation:
        flipped = {i: _flipped(layer) for i, layer in identity.items()}
        yield Check("signs that the hidden units do not allow", acted(flipped), control=True)
    if tied := _tied_layers(model):
        yield Check("experts moved where router rows are tied", run.of_tied(tied), control=True)
    translated = run({index: Translated(layer) for index, layer in layers.items()})
    yield Check(f"router translated ({first.router})", translated, control=first.router != "softmax")


def _flipped(layer: LayerSymmetry) -> LayerSymmetry:
    """With all signs of the first bank's hidden units the other way."""
    bank = layer.banks[FIRST]
    return layer.with_bank(FIRST, replace(bank, unit_scale=-bank.unit_scale))


def check_round_trip(model: MoEModel) -> None:
    """Raises FamilyError unless every claimed tensor, read through the view and put together again, has its own bytes."""
    for layer in model.layers.values():
        for name in layer.claims:
            values = torch.cat([layer.assemble(name, piece, layer) for piece in layer.pieces(name)])
            if not torch.equal(values.view(torch.uint8), model.checkpoint.read(name).view(torch.uint8)):
                raise FamilyError(f"{model.family.name}: {name} does not survive reading and writing")


def check_accounting(model: MoEModel, written: Path) -> None:
    """Raises FamilyError unless a rewritten checkpoint has the same keys, shapes, dtypes, and the same bytes outside."""
    with Checkpoint.open(written) as other:
        seen, expected = (
            {name: (info.dtype, info.shape, info.shard) for name, info in checkpoint.tensors.items()}
            for checkpoint in (other, model.checkpoint)
        )
        if seen != expected:
            raise FamilyError(f"{model.family.name}: the rewritten checkpoint has other tensors")
        for name in model.outside:
            if not torch.equal(other.read(name).view(torch.uint8), model.checkpoint.read(name).view(torch.uint8)):
                raise FamilyError(f"{model.family.name}: {name} lies outside the MoE blocks and was changed")


def write(stream: TensorStream, output: Path) -> Path:
    """A whole checkpoint folder from a stream."""
    with open_workspace(output) as workspace, open_writer(workspace, durable=False) as writer:
        assert writer is not None
        writer.write_tensors(stream, quiet=True)
        writer.write_checkpoint_files(stream.template)
    return output


def reloaded(built: PreTrainedModel, folder: Path) -> Tensor:
    """Outputs of what transformers loads from a folder; raises FamilyError if it does not find all of it."""
    model_class: Any = type(built)
    with foreign(model_class, "cannot load its own rewritten checkpoint"):
        model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if problems:
        raise FamilyError(f"{type(built).__name__} does not load its own rewritten checkpoint: {problems[0]}")
    return outputs(model.eval())


def difference(values: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest expected value."""
    return float((values - expected).abs().max() / expected.abs().max())
