"""The proof that the storage format of a quantized model carries its symmetry, on small models that are stored as it is.

Everything that `align` and `merge` write in that format is held against the numbers that it stands for. Where the format is
exact, so is the comparison. A move that leaves the scales must be found.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import reduce
from operator import matmul
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError, ForeignError, listing
from hf_moe_lmc.formats.decoded import DecodedCheckpoint
from hf_moe_lmc.formats.encoding import encoded_like
from hf_moe_lmc.formats.integers import Integers
from hf_moe_lmc.formats.protocol import CODES
from hf_moe_lmc.formats.recognition import Storage
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.proof.checks import SCALE, difference, parts, reloaded, restricted, write
from hf_moe_lmc.proof.stored_miniature import FILE, StoredMiniature, stored_miniature
from hf_moe_lmc.proof.verdict import StorageCheck, StorageProof
from hf_moe_lmc.runtime.progress import quiet_transformers
from hf_moe_lmc.runtime.threads import suited
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.writing.carried import unmovable
from hf_moe_lmc.writing.formats import OutputFormat, model_merge, model_moved
from hf_moe_lmc.writing.interpolation import interpolate

# What is moved in the format itself: the check, and the parts of the group that it is made of.
ORDER, SIGNS = "expert order", "signs"
CARRIED = {ORDER: ("expert order",), SIGNS: ("signs of hidden units", "shared expert: signs")}
Describe = Callable[[PreTrainedConfig], MoEFamily]


@suited()
def prove_storage(
    checkpoint: DecodedCheckpoint, config: PreTrainedConfig, describe: Describe, *, seed: int = 0
) -> StorageProof:
    """Runs the checks of a quantized checkpoint's storage format; of the checkpoint, headers are read alone.

    Args:
        config: of the checkpoint.
        describe: gives the family of a small configuration.

    Raises:
        FamilyError: what was stored is not read, or not loaded, as what it is.
    """
    kind = checkpoint.storage.kind
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="hf_moe_lmc-") as folder, ExitStack() as stack:
        try:
            made = stored_miniature(checkpoint, config, Path(folder), seed)
        except (FamilyError, ForeignError) as error:
            return StorageProof(kind, (), (f"no small model can be stored as this one is: {error}",))
        if not made.like.weights:
            return StorageProof(kind, (), made.like.missed)
        family = describe(made.built.config)
        a, b = (read_model(stack.enter_context(Checkpoint.open(one)), family) for one in (made.a, made.b))
        tried = _Tried(made, a, b, Path(folder), seed)
        checks = tuple(tried.checks())
    return StorageProof(kind, checks, (*made.like.missed, *tried.left_out))


@dataclass
class _Tried:
    """Two small quantized models, and what is done with them.

    Attributes:
        left_out: sentences on what is not checked, known once all checks have run.
    """

    made: StoredMiniature
    a: MoEModel
    b: MoEModel
    folder: Path
    seed: int
    left_out: list[str] = field(default_factory=list)

    def checks(self) -> Iterator[StorageCheck]:
        yield self._recognised()
        generator = torch.Generator().manual_seed(self.seed)
        exact, scaled = self.a.random(generator), self.a.random(generator, scale=SCALE)
        storage = _storage(self.a)
        problems = unmovable(self.a, storage)
        if problems:
            self.left_out.append(f"the order of experts, which cannot change byte for byte:\n{listing(problems)}")
        else:
            yield from self._carried(exact)
        yield from self._plain(exact)
        yield from self._merged(scaled)

    def _recognised(self) -> StorageCheck:
        """The share of quantized weights that are not read as they were stored."""
        like, found = self.made.like.weights, _storage(self.a).weights
        wrong = [name for name, one in like.items() if name not in found or found[name].format != one.format]
        return _exact("quantized weights are recognised again", (len(wrong) + len(found.keys() - like.keys())) / len(like))

    # --- what moves in the format -------------------------------------------------------------------------------------

    def _carried(self, g: ModelSymmetry) -> Iterator[StorageCheck]:
        """Parts of the group moved in the format; and the first of them with the scales left, which must be found."""
        expected = self._outputs(self.a.checkpoint, "as-stored")
        known = parts(self.a, g)  # that of a further bank has its name in front
        for what, names in CARRIED.items():
            elements = [one for name, one in known.items() if name.endswith(names)]
            if not elements:
                continue
            element = reduce(matmul, elements)
            if what == SIGNS and any(isinstance(one, Integers) for one in _storage(self.a).formats):
                what = "signs where no code is the lowest"
            moved = self._moved(element, "b", what)
            with Checkpoint.open(moved) as other:
                again = read_model(other, self.a.family).checkpoint
                yield _exact(f"{what}: values", _apart(self.a, self.a.acted(element.layers), again))
                found = difference(self._outputs(again, f"{what}-again"), expected)
                yield StorageCheck(f"{what}: outputs", found, control=False)
            if what == ORDER:
                yield from self._scales_left(moved, expected)

    def _scales_left(self, moved: Path, expected: Tensor) -> Iterator[StorageCheck]:
        broken = Path(shutil.copytree(moved, self.folder / "scales-left"))
        if not _leave_scales(self.a, self.made.a, broken):
            self.left_out.append("experts that move without their scales: no scale is one expert's alone")
            return
        with Checkpoint.open(broken) as other:
            again = read_model(other, self.a.family).checkpoint
            found = difference(self._outputs(again, "scales-left-again"), expected)
        yield StorageCheck("experts moved, scales left", found, control=True)

    # --- what is written anew -----------------------------------------------------------------------------------------

    def _plain(self, g: ModelSymmetry) -> Iterator[StorageCheck]:
        """Hidden units and all else, moved in bfloat16. Without scales nothing is rounded again."""
        plain = self._moved(self.a.identity(), "bf16", "plain")
        moved = self._moved(g, "bf16", "everything")
        with Checkpoint.open(plain) as before, Checkpoint.open(moved) as after:
            what = "everything at once with --format bf16"
            yield _exact(f"{what}: values", _apart(self.a, self.a.acted(g.layers), after))
            expected = self._outputs(before, "plain-again")
            yield StorageCheck(
                f"{what}: outputs", difference(self._outputs(after, "everything-again"), expected), control=False
            )

    def _merged(self, g: ModelSymmetry) -> Iterator[StorageCheck]:
        """Merges of A and B, B in the coordinates of `g`, in A's format."""
        identity = self.a.identity()
        layers = {
            index: restricted("order of hidden units", one, identity.layers[index])
            if "expert_table" in self.a.layers[index].roles  # the table of A and B is one, and no merge interpolates it
            else one
            for index, one in g.layers.items()
        }
        for t, what in ((0.0, "bytes of A"), (0.5, "decoded, interpolated in float32, stored again")):
            output = write(model_merge(self.a, self.b, layers, (t,), "a"), self.folder / f"merged-{t}")
            found = {name: one for file in sorted(output.glob("*.safetensors")) for name, one in load_file(file).items()}
            expected = load_file(self.made.a / FILE) if t == 0 else self._between(self.b.acted(layers), t)
            yield _exact(f"merge at t = {t:g}: {what}", _other_bytes(found, expected))

    def _between(self, acted: Mapping[int, LayerSource], t: float) -> dict[str, Tensor]:
        """The tensors on disk of the point at t, whole weight by whole weight."""
        found: dict[str, Tensor] = {}
        for name, info in self.a.checkpoint.tensors.items():
            layer = self.a.layer_of.get(name)
            b = _assembled(self.a, name, acted[layer.index]) if layer else self.b.checkpoint.read(name)
            values = interpolate(self.a.checkpoint.read(name), b.view(-1), t).view(info.shape)
            weight = self.made.like.weights.get(name)
            found |= encoded_like(weight, name, values) if weight else {name: values.to(info.dtype)}
        return found

    # --- steps --------------------------------------------------------------------------------------------------------

    def _moved(self, element: ModelSymmetry, form: OutputFormat, what: str) -> Path:
        return write(model_moved(self.a, element.layers, form), self.folder / what)

    def _outputs(self, checkpoint: Checkpoint, what: str) -> Tensor:
        """What transformers computes with the numbers that a checkpoint stands for."""
        folder = self.folder / what
        folder.mkdir()
        self.made.built.config.save_pretrained(folder)
        tensors = {name: checkpoint.read(name).view(info.shape).clone() for name, info in checkpoint.tensors.items()}
        save_file(tensors, folder / FILE, {"format": "pt"})
        return reloaded(self.made.built, folder)


def _exact(name: str, difference: float) -> StorageCheck:
    return StorageCheck(name, difference, control=False, exact=True)


def _storage(model: MoEModel) -> Storage:
    if model.storage is None:
        raise FamilyError(f"{model.checkpoint.name}: its weights are read as plain ones; expected quantized ones")
    return model.storage


def _assembled(model: MoEModel, name: str, source: LayerSource) -> Tensor:
    """A tensor of a block as a source has it, a row in the layout of `model`."""
    layer = model.layer_of[name]
    return torch.cat([layer.assemble(name, piece, source) for piece in layer.pieces(name)])


def _apart(model: MoEModel, acted: Mapping[int, LayerSource], other: Checkpoint) -> float:
    """The largest difference between what layers are to be and what a checkpoint holds in their place, in its dtype."""
    apart = 0.0
    for name, layer in model.layer_of.items():
        found = other.read(name).view(-1)
        expected = _assembled(model, name, acted[layer.index]).to(found.dtype).view(-1)
        apart = max(apart, float((found.double() - expected.double()).abs().max()))
    return apart


def _other_bytes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The share of tensors that are not there, or whose dtype, shape or bytes differ."""
    names = found.keys() | expected.keys()
    alike = [name for name in found.keys() & expected.keys() if _same(found[name], expected[name])]
    return 1 - len(alike) / len(names)


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def _leave_scales(model: MoEModel, stored: Path, moved: Path) -> bool:
    """Gives a moved checkpoint the scales that it had before; whether any of them had moved."""
    weights = [weight for name, weight in _storage(model).weights.items() if name in model.layer_of]
    left = {part.info.name for weight in weights for role, part in weight.parts.items() if role != CODES}
    before = {name: one for name, one in load_file(stored / FILE).items() if name in left}
    changed = False
    for file in moved.glob("*.safetensors"):
        content = load_file(file)
        here = before.keys() & content.keys()
        changed |= any(not _same(content[name], before[name]) for name in here)
        save_file({**content, **{name: before[name] for name in here}}, file, {"format": "pt"})
    return changed
