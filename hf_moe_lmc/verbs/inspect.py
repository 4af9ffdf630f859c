"""What a checkpoint is, from its configuration and shard headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.joint import embedding_of
from hf_moe_lmc.checkpoints.source import Repository
from hf_moe_lmc.moe.counting import Parameters, count_parameters, ignored_buffers, short, tied_heads
from hf_moe_lmc.moe.experts import Bank
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.notation import (
    EXPERT_ROLES,
    EXPERT_VECTORS,
    UnitKind,
    is_expert_role,
)
from hf_moe_lmc.moe.ties import numbers, router_ties
from hf_moe_lmc.proof.recognition import recognise
from hf_moe_lmc.runtime.tables import aligned
from hf_moe_lmc.symmetry.banks import FIRST


@dataclass(frozen=True)
class Inspection:
    """The facts that `inspect` reports; `symmetry` describes the group of one MoE layer in words.

    Sizes and the router are those of the first MoE layer.

    Attributes:
        text_model_type: model type of the text tower; that of the model itself where it is not a composite one.
        tower: what the keys of a composite model's text tower begin with; None where the model is not a composite one.
        moe_layers: numbers of the MoE layers; those from num_layers on are for multi-token prediction.
        unit_kinds: what hidden units of the experts allow, of all layers; shared_kinds: those of the shared expert.
        banks: sizes and unit kind of further banks of experts, by name.
        companions: roles that move with the experts, besides their weights and router rows.
        quantisation: method of a quantized checkpoint, as declared (`fp8`, `mxfp4`, `compressed-tensors`, `modelopt`).
        formats: elements of its quantized weights by storage format.
        layouts: how the experts lie on disk, `per-expert` or `fused` tensors.
        dtypes: bytes by dtype.
        parameters: numbers of them, see `Parameters`: `total`, `active` per token, those of the `input_embedding` among them,
            and, apart, those for `multi_token_prediction`.
        router_ties: experts whose router rows are equal, by layer; None where the weights are not here to be looked at.
        tied_embeddings: whether the head is the input embedding, by the configuration.
        redundant_head: whether the file of tied embeddings holds a head all the same: `equal` or `different` (transformers
            then uses it), or `not compared` where the weights are not here; None where there is none.
        ignored_buffers: tensors that no model reads.
        read_as: the model type that the checkpoint is read as, where config.json has another.
    """

    source: str
    commit: str | None
    family: str
    model_type: str
    text_model_type: str
    tower: str | None
    num_layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    router: str
    expert_groups: int
    shared_units: int
    shared_kinds: tuple[str, ...]
    units: int
    unit_kinds: tuple[str, ...]
    width: int
    banks: Mapping[str, Mapping[str, Any]]
    companions: tuple[str, ...]
    quantisation: str | None
    formats: dict[str, int]
    layouts: tuple[str, ...]
    dtypes: dict[str, int]
    bytes: int
    tensors: int
    shards: int
    symmetry: tuple[str, ...]
    parameters: Parameters
    router_ties: Mapping[str, Sequence[Sequence[str | int]]] | None
    tied_embeddings: bool
    redundant_head: str | None
    ignored_buffers: tuple[str, ...]
    read_as: str | None

    def to_dict(self) -> dict[str, Any]:
        content = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {**content, "parameters": asdict(self.parameters)}

    def table(self) -> str:
        """The facts for a terminal."""
        extra = [index for index in self.moe_layers if index >= self.num_layers]
        layers = f"{len(self.moe_layers) - len(extra)} of {self.num_layers} layers"
        dtypes = ", ".join(f"{dtype} {size / 1e9:.3f}" for dtype, size in self.dtypes.items())
        of = self.model_type + (
            f", read as {self.text_model_type}" if self.tower is None and self.model_type != self.text_model_type else ""
        )
        of += f", text tower {self.text_model_type}" if self.tower is not None else ""
        banks = [
            f"{name}: {bank['experts']} expert{'s' if bank['experts'] > 1 else ''}"
            + (f", {bank['units']} units ({bank['unit_kind']})" if bank["units"] else "")
            for name, bank in self.banks.items()
        ]
        shared = f"{self.shared_units} hidden units ({' or '.join(self.shared_kinds)})"
        rows = {
            "checkpoint": self.source + (f" at {self.commit[:12]}" if self.commit else ""),
            "family": f"{self.family} (model type {of})",
            "text tower": f"{self.tower}*; everything else is copied" if self.tower else "",
            "read as": f"{self.read_as}, which every tensor fits" if self.read_as else "",
            "parameters": str(self.parameters),
            "MoE layers": layers + (f", and for multi-token prediction {', '.join(map(str, extra))}" if extra else ""),
            "experts": f"{self.experts}, top-{self.top_k}, {self.router} router",
            "further banks": "; ".join(banks),
            "expert groups": f"{self.expert_groups} that bind" if self.expert_groups > 1 else "none that bind",
            "hidden units": f"{self.units} per expert ({' or '.join(self.unit_kinds)}), width {self.width}",
            "shared expert": shared if self.shared_units else "none",
            "router ties": self._ties_in_words(),
            "embeddings": _HEADS[self.redundant_head] if self.tied_embeddings else "",
            "buffers": _buffers_in_words(self.ignored_buffers),
            "quantisation": f"{self.quantisation}: {_share(self.formats)}" if self.quantisation else "",
            "on disk": f"{' and '.join(self.layouts)} tensors; {self.tensors} tensors in {self.shards} shard(s)",
            "size": f"{self.bytes / 1e9:.3f} GB ({dtypes})",
            "symmetry": self.symmetry[0],
        }
        facts = [(name, value) for name, value in rows.items() if value]
        return "\n".join(aligned([*facts, *(("", line) for line in self.symmetry[1:])], least=(14,), gap=" "))

    def _ties_in_words(self) -> str:
        """Nothing where there is none."""
        if self.router_ties is None:
            return "not looked at: the weights are not on this machine"
        layers = [f"layer {index}: {'; '.join(numbers(tie, ' = ') for tie in t)}" for index, t in self.router_ties.items()]
        more = f"; and {len(layers) - SHOWN} layers more" if len(layers) > SHOWN else ""
        return "experts with equal rows in " + "; ".join(layers[:SHOWN]) + more if layers else ""


SHOWN = 4  # layers with ties, buffers that nothing reads
_HEADS = {
    None: "tied: the head is the input embedding",
    "equal": "tied: the head is the input embedding; the file holds a copy of it",
    "different": "tied by config.json, but the file holds another head, which transformers uses",
    "not compared": "tied by config.json, but the file holds a head; transformers uses it where it is another",
}


def _buffers_in_words(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: no model reads them" if names else ""


def inspect(model: str | os.PathLike[str]) -> Inspection:
    """Describes a local folder or a Hub id (OWNER/NAME[@REVISION]); of a Hub id, only headers are downloaded.

    Raises:
        InputError: not a checkpoint that this package reads; the message says why.

    Example:
        >>> import hf_moe_lmc as lmc
        >>> found = lmc.inspect("model-a")
        >>> found.family, found.experts, found.top_k
        ('mixtral', 6, 2)
        >>> print(found.symmetry[0])
        experts in any order (S_6), each with its router row
    """
    with Checkpoint.open(model) as checkpoint:
        return _describe(recognise(checkpoint))


def _describe(model: MoEModel) -> Inspection:
    checkpoint = model.checkpoint
    composite = model.text_config is not model.config
    every, first = model.layers.values(), next(iter(model.layers.values()))
    heads = tied_heads(model)
    head = _redundant(model, heads)
    own_type = str(checkpoint.config["model_type"])
    return Inspection(
        source=checkpoint.name,
        commit=checkpoint.source.commit if isinstance(checkpoint.source, Repository) else None,
        family=model.family.name,
        model_type=own_type,
        text_model_type=str(model.text_config.model_type),
        tower=model.towers[0] if composite else None,
        num_layers=model.num_layers,
        moe_layers=tuple(model.layers),
        experts=model.sizes["expert"],
        top_k=model.top_k,
        router=first.router,
        expert_groups=model.groups,
        shared_units=model.sizes.get("shared", 0),
        shared_kinds=_distinct(layer.shared.kind.name for layer in every if layer.sizes.get("shared")),
        units=model.sizes["unit"],
        unit_kinds=_distinct(layer.banks[FIRST].kind.name for layer in every),
        width=model.sizes["model"],
        banks={
            name: {"experts": bank.experts, "units": bank.unit_count, "unit_kind": bank.kind.name}
            for name, bank in first.banks.items()
            if name != FIRST
        },
        companions=_distinct(
            role
            for layer in every
            for role in layer.banks[FIRST].roles
            if role in (*EXPERT_VECTORS, "expert_table") and role != "router"
        ),
        quantisation=model.storage.quantization.method if model.storage else None,
        formats={form.kind: count for form, count in model.storage.formats.items()} if model.storage else {},
        layouts=layouts_of(model),
        dtypes=bytes_by_dtype(checkpoint),
        bytes=checkpoint.stored.nbytes,
        tensors=len(checkpoint.stored.tensors),
        shards=len(checkpoint.shards),
        symmetry=_symmetry_in_words(model),
        parameters=count_parameters(model, heads if head != "different" else ()),
        router_ties=_ties(model) if checkpoint.is_downloaded else None,
        tied_embeddings=bool(getattr(model.text_config, "tie_word_embeddings", False)),
        redundant_head=head,
        ignored_buffers=ignored_buffers(model),
        read_as=str(model.config.model_type) if str(model.config.model_type) != own_type else None,
    )


def bytes_by_dtype(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the tensors in the files of a checkpoint, by dtype."""
    found: dict[str, int] = {}
    for info in checkpoint.stored.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + info.nbytes
    return found


def layouts_of(model: MoEModel) -> tuple[str, ...]:
    """How the experts lie on disk, `per-expert` or `fused` tensors, or both."""
    found = {
        "per-expert" if claim.template.is_per_expert else "fused"
        for layer in model.layers.values()
        for claim in layer.claims.values()
        if is_expert_role(claim.template.spec.roles[0])
    }
    return tuple(sorted(found, reverse=True))


def _ties(model: MoEModel) -> dict[str, list[list[str | int]]]:
    """Experts whose router rows are equal, by layer; those of further banks with the bank's name."""
    found = {str(index): router_ties(layer) for index, layer in model.layers.items()}
    return {
        index: [[number if bank == FIRST else f"{bank}.{number}" for bank, number in tie] for tie in ties]
        for index, ties in found.items()
        if ties
    }


def _redundant(model: MoEModel, heads: Sequence[str]) -> str | None:
    """How the head that stands in the file of tied embeddings compares with them; see `Inspection.redundant_head`."""
    checkpoint = model.checkpoint
    embedding = embedding_of(checkpoint, model.outside)
    if not heads or embedding is None:
        return None
    if not checkpoint.is_downloaded:
        return "not compared"
    infos = [checkpoint.tensors[name] for name in (embedding, heads[0])]
    if (infos[0].dtype, infos[0].shape) != (infos[1].dtype, infos[1].shape):
        return "different"
    chunks = checkpoint.chunks(embedding)
    same = all(torch.equal(values, checkpoint.read(heads[0], first, len(values))) for first, values in chunks)
    return "equal" if same else "different"


def _symmetry_in_words(model: MoEModel) -> tuple[str, ...]:
    """The group, a line for each part; of lines that only some layers have, with the layers."""
    layers: dict[str, list[int]] = {}
    place: dict[str, int] = {}
    for index, layer in model.layers.items():
        for position, line in enumerate(_layer_in_words(layer, model.groups)):
            layers.setdefault(line, []).append(index)
            place[line] = min(position, place.get(line, position))
    lines = [
        line + (f" ({_ranges(layers[line])})" if len(layers[line]) < len(model.layers) else "")
        for line in sorted(layers, key=lambda line: place[line])
    ]
    if model.storage:
        lines.append(
            f"byte for byte in {model.storage.kind}: the order of experts, and signs; hidden units move in merges and with "
            "--format bf16"
        )
    return tuple(lines)


def _layer_in_words(layer: MoELayer, groups: int) -> Iterator[str]:
    for bank in layer.banks.values():
        yield _order_in_words(bank, groups)
    if "expert_table" in layer.roles:
        yield "the expert table, renamed to follow the experts"
    for bank in layer.banks.values():
        if bank.unit_count:
            of = "each expert" if bank.name == FIRST else f"each expert of bank {bank.name}"
            yield _units_in_words(of, bank.unit_count, bank.kind)
    shared = layer.shared.unit_count
    if shared:
        same = layer.shared.kind is layer.banks[FIRST].kind
        likewise = f"hidden units of the shared expert likewise (S_{shared})"
        yield likewise if same else _units_in_words("the shared expert", shared, layer.shared.kind)
    if layer.router == "softmax":
        yield "one vector added to all router rows (left alone: it cannot change a barrier)"
    else:
        yield f"no translation of the router ({layer.router})"


def _order_in_words(bank: Bank, groups: int) -> str:
    along = [role.replace("_", " ") for role in bank.roles if role in EXPERT_VECTORS and role != "router"]
    if any(role in EXPERT_ROLES and role.endswith("_bias") for role in bank.roles):
        along.append("biases")
    along = ["router row", *along]
    each = f"each with its {', '.join(along[:-1])}{' and ' if along[1:] else ''}{along[-1]}"
    number = bank.experts
    if bank.name == FIRST and groups > 1:
        size = number // groups
        return f"experts move within their group of {size} and with it among {groups} groups (S_{size} wr S_{groups}), {each}"
    if bank.name == FIRST:
        return f"experts in any order (S_{number}), {each}"
    if number == 1:
        return f"the one expert of bank {bank.name} stays where it is"
    return f"experts of bank {bank.name} in any order among themselves (S_{number}), {each}"


def _units_in_words(whose: str, number: int, kind: UnitKind) -> str:
    if not kind.permutation:
        return f"hidden units of {whose} stay where they are"
    return f"hidden units of {whose} in any order (S_{number}), {kind.words}"


def _share(formats: Mapping[str, int]) -> str:
    """Storage formats, and how many parameters are stored in each."""
    return ", ".join(f"{short(count)} in {kind}" for kind, count in formats.items())


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers of layers, runs shortened: layers 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer{'s' if numbers[1:] else ''} {listed}"
