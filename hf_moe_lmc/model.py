"""A checkpoint as a model: its family, its MoE layers as views, and the tensors outside of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from hf_moe_lmc.checkpoint import Checkpoint
from hf_moe_lmc.errors import CheckpointError, FamilyError, MismatchError, SymmetryError, listing
from hf_moe_lmc.family import MoEFamily, get_family
from hf_moe_lmc.layer import ActedLayer, LayerSource, MoELayer, claim_block
from hf_moe_lmc.symmetry import LayerSymmetry, ModelSymmetry

# Differences in these say nothing about the function that the weights compute.
COSMETIC_CONFIG = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "name_or_path", "num_nextn_predict_layers", "output_router_logits", "pad_token_id", "router_aux_loss_coef", "torch_dtype",
    "transformers_version", "use_cache", "_attn_implementation", "_experts_implementation", "attention_dropout",
    "router_jitter_noise", "aux_loss_alpha", "seq_aux", "pretraining_tp", "ep_size",
}  # fmt: skip


@dataclass(frozen=True)
class MoEModel:
    """A checkpoint whose every tensor has been accounted for, from headers alone.

    Attributes:
        config: as AutoConfig reads it.
        sizes: size of every axis word that the family has.
        groups: number of expert groups that bind (1: none).
        top_k: experts per token.
        layers: the MoE layers by number, multi-token-prediction layers included.
    """

    checkpoint: Checkpoint
    family: MoEFamily
    config: PreTrainedConfig
    sizes: Mapping[str, int]
    groups: int
    top_k: int
    layers: Mapping[int, MoELayer]

    @cached_property
    def layer_of(self) -> dict[str, MoELayer]:
        """The MoE layer that claims a tensor, by tensor name; names outside the MoE blocks are absent."""
        return {name: layer for layer in self.layers.values() for name in layer.claims}

    @cached_property
    def outside(self) -> tuple[str, ...]:
        """Names of the tensors outside the MoE blocks."""
        return tuple(name for name in self.checkpoint.tensors if name not in self.layer_of)

    @property
    def num_hidden_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @cached_property
    def extra_layers(self) -> tuple[int, ...]:
        """The multi-token-prediction layers that are present."""
        return tuple(index for index in self.layers if index >= self.num_hidden_layers)

    def is_extra(self, name: str) -> bool:
        """Whether a tensor belongs to a multi-token-prediction layer."""
        match = self.family.layer_pattern.fullmatch(name)
        return match is not None and int(match["layer"]) >= self.num_hidden_layers

    def identity(self) -> ModelSymmetry:
        """The identity of this model's group."""
        layers = {
            index: LayerSymmetry.identity(layer.experts, layer.sizes["unit"], layer.sizes.get("shared", 0))
            for index, layer in self.layers.items()
        }
        return ModelSymmetry(self.family.name, self.groups, layers)

    def check_symmetry(self, symmetry: ModelSymmetry) -> None:
        """Raises SymmetryError unless `symmetry` acts on this model."""
        where = self.checkpoint.name
        if symmetry.family != self.family.name:
            raise SymmetryError(f"the symmetry is of family {symmetry.family}, {where} is of family {self.family.name}")
        expected = self.identity()
        problems = [
            f"layer {index}: {'absent from the model' if index not in expected.layers else 'absent from the symmetry'}"
            for index in sorted(symmetry.layers.keys() ^ expected.layers.keys())
        ]
        problems += [
            f"layer {index}: expected {expected.layers[index].sizes}, found {layer.sizes}"
            for index, layer in symmetry.layers.items()
            if index in expected.layers and layer.sizes != expected.layers[index].sizes
        ]
        if problems:
            raise SymmetryError(f"the symmetry does not have the shapes of {where}:\n{listing(problems)}")
        ModelSymmetry(symmetry.family, self.groups, symmetry.layers).validate(f"the symmetry for {where}")

    def acted(self, symmetry: ModelSymmetry) -> dict[int, LayerSource]:
        """The MoE layers in the coordinates that `symmetry` gives them."""
        return {index: ActedLayer(layer, symmetry.layers[index]) for index, layer in self.layers.items()}


@dataclass(frozen=True)
class ModelStream:
    """A checkpoint in the layout of `model` with the values of other sources, computed piece by piece.

    Attributes:
        layers: where the values of each MoE layer come from.
        outside: the values of a tensor outside the MoE blocks, as (first element, values).
    """

    model: MoEModel
    layers: Mapping[int, LayerSource]
    outside: Callable[[str], Iterator[tuple[int, Tensor]]]

    @property
    def template(self) -> Checkpoint:
        return self.model.checkpoint

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        layer = self.model.layer_of.get(name)
        if layer is None:
            yield from self.outside(name)
            return
        for piece in layer.pieces(name):
            yield piece.first, layer.assemble(name, piece, self.layers[layer.index])


def read_model(checkpoint: Checkpoint) -> MoEModel:
    """Recognises a checkpoint: family, sizes, MoE layers; every tensor under an MoE block claimed exactly once.

    Raises:
        CheckpointError: the configuration cannot be read.
        FamilyError: an unknown family, missing or extra tensors or layers, shapes that contradict the configuration.
    """
    family = get_family(str(checkpoint.config.get("model_type")), checkpoint.name)
    config = _read_config(checkpoint)
    sizes = {word: int(family.evaluate(expression, config) or 0) for word, expression in family.sizes.items()}
    layers = {
        index: claim_block(checkpoint, family, index, names, sizes)
        for index, names in _blocks(checkpoint, family, config).items()
    }
    if not layers:
        raise FamilyError(f"{checkpoint.name}: no MoE layer in it: config.json ({family.moe_layers}) makes every layer dense")
    return MoEModel(
        checkpoint=checkpoint,
        family=family,
        config=config,
        sizes=sizes,
        groups=int(family.evaluate(family.groups, config)),
        top_k=int(family.evaluate(family.top_k, config)),
        layers=layers,
    )


def _read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    folder = checkpoint.source.path("config.json").parent
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{checkpoint.name}/config.json: transformers cannot read it ({error})") from error


def _blocks(checkpoint: Checkpoint, family: MoEFamily, config: PreTrainedConfig) -> dict[int, dict[str, str]]:
    """Names of the tensors under each MoE block: {layer: {key below the layer: name}}.

    Raises:
        FamilyError: layers missing or in excess, or an MoE tensor in a layer that the configuration makes dense.
    """
    layers: dict[int, dict[str, str]] = {}
    for name in checkpoint.tensors:
        if match := family.layer_pattern.fullmatch(name):
            layers.setdefault(int(match["layer"]), {})[match["rest"]] = name
    count = int(config.num_hidden_layers)
    extra = int(family.evaluate(family.extra_layers, config) or 0)
    problems = [f"layer {index} is missing" for index in range(count) if index not in layers]
    problems += [f"layer {index} is one too many" for index in sorted(layers) if index >= count + extra]
    if problems:
        raise FamilyError(
            f"{checkpoint.name}: config.json says {count} layers"
            + (f" and up to {extra} for multi-token prediction" if extra else "")
            + f"; in the shards ({family.layer_prefix.format(layer='N')}):\n{listing(problems)}"
        )
    blocks = {}
    for index in sorted(layers):
        names = {key: name for key, name in layers[index].items() if key.startswith(family.block_prefixes)}
        if index >= count or family.evaluate(family.moe_layers, config, layer=index):
            blocks[index] = names
        elif wrong := [name for key, name in names.items() if any(t.pattern.fullmatch(key) for t in family.templates)]:
            raise FamilyError(
                f"{checkpoint.name}: config.json ({family.moe_layers}) makes layer {index} dense, but it holds\n"
                + listing(wrong)
            )
    return blocks


def check_pair(a: MoEModel, b: MoEModel, *, ignore_extra_layers: bool = False) -> list[str]:
    """Checks that two models are of one architecture, from headers and configurations alone.

    Args:
        ignore_extra_layers: multi-token-prediction layers may be present in one of them only.

    Returns:
        Warnings: configuration fields that differ although they may change what the weights compute.

    Raises:
        MismatchError: listing every difference with both values.
    """
    problems = []
    for what, of_a, of_b in (
        ("family", a.family.name, b.family.name),
        ("layers", a.num_hidden_layers, b.num_hidden_layers),
        ("MoE layers", _regular(a), _regular(b)),
        ("experts per token", a.top_k, b.top_k),
        ("binding expert groups", a.groups, b.groups),
        *((f"size of axis {word}", a.sizes[word], b.sizes.get(word)) for word in a.sizes),
    ):
        if of_a != of_b:
            problems.append(f"{what}: A has {of_a}, B has {of_b}")
    if a.family is b.family:
        problems += _outside_problems(a, b, ignore_extra_layers)
    if problems:
        raise MismatchError(
            f"A ({a.checkpoint.name}) and B ({b.checkpoint.name}) are not of one architecture:\n{listing(problems)}"
        )
    of_a, of_b = a.config.to_dict(), b.config.to_dict()
    return [
        f"config.json: {key} is {of_a.get(key)!r} in A and {of_b.get(key)!r} in B; the path and a merge take A's"
        for key in sorted(of_a.keys() | of_b.keys())
        if key not in COSMETIC_CONFIG and of_a.get(key) != of_b.get(key)
    ]


def _regular(model: MoEModel) -> list[int]:
    return [index for index in model.layers if index < model.num_hidden_layers]


def _outside_problems(a: MoEModel, b: MoEModel, ignore_extra_layers: bool) -> list[str]:
    problems = []
    if a.extra_layers != b.extra_layers and not ignore_extra_layers:
        problems.append(
            f"multi-token-prediction layers: A has {list(a.extra_layers)}, B has {list(b.extra_layers)}; "
            "remove them from the one that has them, or add them to the other"
        )
    skip_extra = ignore_extra_layers or bool(problems)
    names_a, names_b = ({name for name in m.outside if not (skip_extra and m.is_extra(name))} for m in (a, b))
    for name in sorted(names_a ^ names_b):
        holder, other = ("A", "B") if name in names_a else ("B", "A")
        problems.append(f"{name}: in {holder}, not in {other}")
    for name in sorted(names_a & names_b):
        of_a, of_b = a.checkpoint.tensors[name], b.checkpoint.tensors[name]
        if of_a.shape != of_b.shape:
            problems.append(f"{name}: A has shape {list(of_a.shape)}, B has {list(of_b.shape)}")
        elif of_a.dtype.is_floating_point != of_b.dtype.is_floating_point:
            problems.append(f"{name}: A has dtype {of_a.dtype}, B has {of_b.dtype}")
    return problems
