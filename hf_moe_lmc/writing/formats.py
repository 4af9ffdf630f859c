"""The output that a verb writes, in the storage format that was asked for: A's, B's, or plain bfloat16."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import InputError
from hf_moe_lmc.formats.decoded import storage_of
from hf_moe_lmc.formats.templates import output_template
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.writing.encoded import EncodedStream, EncodedStreams
from hf_moe_lmc.writing.held import Held
from hf_moe_lmc.writing.output import FolderWriter, TensorStream
from hf_moe_lmc.writing.spans import Copied, Interpolated, PlainStream

if TYPE_CHECKING:  # a merge that knows nothing of models does without transformers
    from hf_moe_lmc.moe.action import Elements
    from hf_moe_lmc.moe.model import MoEModel
    from hf_moe_lmc.symmetry.group import ModelSymmetry
    from hf_moe_lmc.writing.streams import Merging

OutputFormat = Literal["a", "b", "bf16"]
REPORT = "quantization.json"


def format_option(form: str, default: str) -> list[str]:
    """The words of a command line that ask for a format."""
    return [] if form == default else ["--format", form]


def format_facts(form: str, default: str) -> dict[str, str]:
    """What the shards of an output depend on, where it is not in the default format."""
    return {} if form == default else {"format": form}


def check_format(form: str, *allowed: str) -> None:
    """Raises InputError unless a verb can write this format."""
    if form not in (allowed or get_args(OutputFormat)):
        raise InputError(f"format {form!r}: expected one of {', '.join(allowed or get_args(OutputFormat))}")


def plain_merge(a: Checkpoint, b: Checkpoint, t: Sequence[float], form: OutputFormat) -> TensorStream:
    """The points `t` between two checkpoints that hold the same tensors, read as numbers."""
    layout = b if form == "b" else a
    if storage_of(layout) is None and form != "b":
        return PlainStream(a, b, tuple(t))
    template = output_template(layout, a, plain=form == "bf16")
    held = Held()
    streams = [
        EncodedStream(template, layout.stored, _sides(a, b, at, form), Interpolated(a, b, (at,), held), None, _side(form))
        for at in t
    ]
    return EncodedStreams(template, tuple(streams), held)


def model_merge(
    a: MoEModel, b: MoEModel, elements: Elements, t: Sequence[float], form: OutputFormat, merging: Merging | None = None
) -> TensorStream:
    """The points `t` between A and B', where B' is `b` in the coordinates that group elements give it.

    Args:
        merging: how they are made; None: on the straight line.
    """
    from hf_moe_lmc.writing.streams import STRAIGHT, interpolated

    if storage_of(a.checkpoint) is None and form != "b":
        return interpolated(a, b, elements, tuple(t), rounded=True, merging=merging or STRAIGHT)
    return _encoded_merge(a, b, elements, t, form, merging or STRAIGHT)


def written_merge(
    a: MoEModel, b: MoEModel, elements: Elements, t: float, form: OutputFormat, merging: Merging | None = None
) -> MoEModel:
    """The point `t` of `model_merge`, read as if it had been written."""
    from hf_moe_lmc.writing.as_written import as_written
    from hf_moe_lmc.writing.streams import STRAIGHT

    (stream,) = _encoded_merge(a, b, elements, (t,), form, merging or STRAIGHT).streams
    return as_written(b if form == "b" else a, stream)


def _encoded_merge(
    a: MoEModel, b: MoEModel, elements: Elements, t: Sequence[float], form: OutputFormat, merging: Merging
) -> EncodedStreams:
    from hf_moe_lmc.writing.blocks import ModelBlocks

    model = b if form == "b" else a
    acted = b.acted(elements)
    layout = model.checkpoint
    template = output_template(layout, a.checkpoint, plain=form == "bf16")
    between = {index: merging.between(layer) for index, layer in a.layers.items()}
    held = Held()

    def point(at: float) -> EncodedStream:
        layers = {
            index: between[index](index, a.layers[index], acted[index], at) if index in a.layers and index in acted else layer
            for index, layer in model.layers.items()
        }
        blocks = ModelBlocks(model, layers, template.storage, layout.stored, held)
        sides = _sides(a.checkpoint, b.checkpoint, at, form)
        outside = merging.outside(Interpolated(a.checkpoint, b.checkpoint, (at,), held))
        return EncodedStream(template, layout.stored, sides, outside, blocks, _side(form))

    return EncodedStreams(template, tuple(map(point, t)), held)


def model_moved(b: MoEModel, elements: Elements, form: OutputFormat) -> TensorStream:
    """`b` in the coordinates that group elements give it; where it stays quantized, as far as its formats carry them.

    Raises:
        FamilyError: its experts cannot change places in its formats.
    """
    from hf_moe_lmc.writing.blocks import ModelBlocks
    from hf_moe_lmc.writing.carried import carried_layers
    from hf_moe_lmc.writing.streams import rewritten

    storage = storage_of(b.checkpoint)
    if storage is None:
        return rewritten(b, elements)
    template = output_template(b.checkpoint, b.checkpoint, plain=form == "bf16")
    layers = b.acted(elements) if form == "bf16" else carried_layers(b, elements, storage)
    blocks = ModelBlocks(b, layers, template.storage, b.checkpoint.stored)
    return EncodedStream(template, b.checkpoint.stored, (b.checkpoint,), Copied(b.checkpoint), blocks, _side(form))


def check_moves(b: MoEModel, form: OutputFormat) -> None:
    """Raises FamilyError where a format cannot carry what `model_moved` would write: experts that change places."""
    from hf_moe_lmc.writing.carried import check_movable

    storage = storage_of(b.checkpoint)
    if storage is not None and form != "bf16":
        check_movable(b, storage)


def write_beside(
    writer: FolderWriter,
    stream: TensorStream,
    number: int = 0,
    folder: str = "",
    *,
    speaker: Checkpoint | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes the configuration and side files of an output. Where it is quantized, also what storing weights anew has added.

    Args:
        number: of the output, among those of the stream.
        folder: in which it stands.
        speaker: as in `FolderWriter.write_checkpoint_files`.
        more: further facts about what is quantized.
    """
    writer.write_checkpoint_files(stream.template, speaker, folder=folder)
    if isinstance(stream, EncodedStreams):
        stream = stream.streams[number]
    if isinstance(stream, EncodedStream) and stream.storage is not None:
        found = {"format": stream.storage.kind, **(more or {}), "tensors": stream.errors.to_dict()}
        writer.write_text(posixpath.join(folder, REPORT), json.dumps(found, indent=2) + "\n")


def left_in_place(b: MoEModel, symmetry: ModelSymmetry, stream: TensorStream) -> dict[str, int]:
    """How many hidden units of routed experts a quantized output leaves as B has them, though a symmetry moves them."""
    from hf_moe_lmc.writing.blocks import ModelBlocks
    from hf_moe_lmc.writing.carried import CarriedLayer, moved_units

    if not isinstance(stream, EncodedStream) or stream.storage is None:
        return {}
    assert isinstance(stream.blocks, ModelBlocks)
    layers = stream.blocks.layers
    written = {i: layer.acted.symmetry for i, layer in layers.items() if isinstance(layer, CarriedLayer)}
    count = moved_units({i: symmetry.layers[i] for i in written}, written)
    if count:
        warn(
            f"{b.checkpoint.name}: {count} hidden units stay as B has them: {stream.storage.kind} carries the order of experts "
            "exactly, and signs, but no order of hidden units. --format bf16 moves them, and so does a merge"
        )
    return {"hidden_units_left_in_place": count}


def _side(form: OutputFormat) -> str:
    return "" if form == "bf16" else form


def _sides(a: Checkpoint, b: Checkpoint, t: float, form: OutputFormat) -> tuple[Checkpoint, ...]:
    """The checkpoints whose activations an output has to cover: that whose bytes it has throughout alone."""
    if (form, t) == ("a", 0):
        return (a,)
    return (b,) if (form, t) == ("b", 1) else (a, b)
