"""From a checkpoint to its model: by the data of a known family, or by a description that is derived and proved first."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.formats.decoded import DecodedCheckpoint, decoded
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import model_type, read_config, read_model
from hf_moe_lmc.moe.registry import aliases, families, get_family, refusals
from hf_moe_lmc.runtime.notices import warn

if TYPE_CHECKING:
    from hf_moe_lmc.proof.verdict import SelfTest

# Model types whose text tower is proved alone: transformers writes the whole under names that are not those on the Hub, and
# does not read them again (5.23: `blocks` in place of the text tower's `layers`, too).
_BY_TOWER = ("kimi_k25",)

_PROVED: dict[str, MoEFamily] = {}  # derived families by what was proved: the configuration


def recognise(checkpoint: Checkpoint) -> MoEModel:
    """Recognises a checkpoint; one of a model type that no data file describes, by a derived family.

    Raises:
        CheckpointError: the configuration cannot be read.
        FamilyError: the model type is refused, its family cannot be derived or fails its self-test, or the tensors do not
            form the blocks that the family describes.
    """
    checkpoint = decoded(checkpoint)
    family, config = family_of(checkpoint)
    model = read_model(checkpoint, family)
    found = checkpoint.config.get("model_type")
    if config.model_type != found and found in aliases():
        from hf_moe_lmc.proof.fit import check_tensors  # see `_derived`

        check_tensors(model)
        warn(
            f"{checkpoint.name}: model type {found!r} is read as {config.model_type!r}: all keys of its configuration and "
            "all tensors fit that class; code of its own is never run"
        )
    return model


def family_of(checkpoint: Checkpoint) -> tuple[MoEFamily, PreTrainedConfig]:
    """The family of a checkpoint, derived and proved if need be, and its configuration; see `recognise`."""
    config = read_config(checkpoint)
    name = model_type(config)
    if _is_listed(name):
        return get_family(name, checkpoint.name), config
    key = config.to_json_string(use_diff=False)
    if key not in _PROVED:
        family, proof = _derived(config, checkpoint.name)
        if not proof.passed:
            raise FamilyError(
                f"{checkpoint.name}: no data file describes model type {name!r}, and the description derived from transformers "
                f"fails its self-test, so nothing is done with it:\n{proof.table()}"
            )
        warn(_notice(checkpoint.name, name, proof))
        _PROVED[key] = family
    return _PROVED[key], config


def _is_listed(name: str) -> bool:
    """Whether a model type is described by a data file, or refused by name."""
    return name in families().keys() | refusals().keys()


def _derived(config: PreTrainedConfig, where: str) -> tuple[MoEFamily, SelfTest]:
    """A description derived for `config`, and the self-test of its twin for the miniature."""
    from hf_moe_lmc.proof.checks import prove
    from hf_moe_lmc.proof.derivation import derive  # with transformers' models behind it, which most commands do not need
    from hf_moe_lmc.proof.small_config import shrink

    family = derive(config, where)
    small = shrink(config)
    twin = derive(small, where)
    for what in ("weights", "router", "units", "bank_units"):
        if getattr(twin, what) != getattr(family, what):
            raise FamilyError(f"{where}: the description derived for a miniature has other {what}; register a family (README)")
    return family, prove(twin, small)


def selftest(model: str | os.PathLike[str]) -> SelfTest:
    """Proves on small random models of the same configuration that this checkpoint's symmetry is understood.

    Of a quantized checkpoint, a small model is also stored as its weights are, with its scales and its quantization_config.
    It is then moved and merged in that format. `storage` of the result says what of the checkpoint that does not cover.

    Args:
        model: a local folder or a Hub id; its configuration and the headers of its shards are read, no weights.

    Raises:
        InputError: not a checkpoint that this package reads; the message says why.

    Example:
        >>> import hf_moe_lmc as lmc
        >>> found = lmc.selftest("model-a")
        >>> found.passed, found.checks[0].name
        (True, 'everything at once, as on the Hub')
    """
    from hf_moe_lmc.proof.checks import prove  # see `_derived`

    with Checkpoint.open(model) as opened:
        config = read_config(opened)
        if config.model_type in _BY_TOWER:
            config = config.get_text_config()
        checkpoint = decoded(opened)
        name, where = model_type(config), opened.name
        found = prove(get_family(name, where), config) if _is_listed(name) else _derived(config, where)[1]
        if not isinstance(checkpoint, DecodedCheckpoint):
            return found
        from hf_moe_lmc.proof.storage_checks import prove_storage

        return replace(found, storage=prove_storage(checkpoint, config, partial(_described, where)))


def _described(where: str, small: PreTrainedConfig) -> MoEFamily:
    """The family of a small configuration: by data, or derived."""
    from hf_moe_lmc.proof.derivation import derive  # see `_derived`

    name = model_type(small)
    return get_family(name, where) if _is_listed(name) else derive(small, where)


def _notice(where: str, name: str, proof: SelfTest) -> str:
    return (
        f"{where}: no data file describes model type {name!r}; its description was derived from transformers and passed "
        f"{len(proof.checks)} checks on a small random model (hf-moe-lmc selftest shows them)"
    )
