"""Model types that the Hub has under one name and transformers under another: read as the known class where all of it fits.

Code that a repository brings along is never run. So nothing but an exact fit says that the known class computes the same:
every key of the configuration is read by the class or listed here with the values that change nothing; tensors are compared
in `proof.recognition`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_moe_lmc.checkpoints.configuration import without_foreign_switches
from hf_moe_lmc.errors import CheckpointError, listing, shown

if TYPE_CHECKING:  # the list of families is data, for which neither torch nor transformers is needed
    from transformers import PreTrainedConfig

    from hf_moe_lmc.checkpoints.checkpoint import Checkpoint

# Keys of any configuration that say nothing of the model, or that transformers reads for every class.
_COMMON = {
    "_name_or_path", "add_cross_attention", "architectures", "auto_map", "dtype", "model_type", "partial_rotary_factor",
    "quantization_config", "rope_scaling", "rope_theta", "tokenizer_class", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Alias:
    """A model type that transformers knows under another name.

    Attributes:
        known_as: its name in transformers; None: there is no such class.
        keys: keys that the class does not read -> the values that change nothing; None: any value. Keys of an inner mapping
            are dotted.
        equal: keys that the class does not read -> the value that they have to have, an expression over other keys.
        reason: why there is none, or what else to know.
    """

    model_type: str
    known_as: str | None
    keys: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


def read_as(checkpoint: Checkpoint, alias: Alias) -> PreTrainedConfig:
    """The configuration of a checkpoint as the class reads it that its model type is an alias of.

    Raises:
        CheckpointError: there is no such class, or the configuration does not fit it; with all that does not.
    """
    where, known_as = f"{checkpoint.name}/config.json", alias.known_as
    if known_as is None:
        raise CheckpointError(
            f"{where}: model type {alias.model_type!r} asks for code of its own, which is never run, and no class of "
            f"transformers computes the same: {alias.reason}"
        )
    from transformers import CONFIG_MAPPING

    known: Any = CONFIG_MAPPING[known_as]
    if problems := _problems(checkpoint.config, known, alias):
        raise CheckpointError(
            f"{where}: model type {alias.model_type!r} is {known_as!r} of transformers only where all of it fits, and code of "
            f"its own is never run. What does not fit:\n{listing(problems)}"
        )
    foreign = {"auto_map", "model_type"}
    values = {key: value for key, value in without_foreign_switches(checkpoint.config).items() if key not in foreign}
    config: PreTrainedConfig = known.from_dict(values)
    checkpoint.changes = {**checkpoint.changes, "model_type": known_as}  # what is written loads under its own name
    return config


def _problems(config: Mapping[str, Any], known: Any, alias: Alias) -> list[str]:
    """Keys of a configuration that the class does not read, and that may change what the model computes."""
    read = {one.name for one in dataclasses.fields(known)} | {*known.attribute_map, *known.attribute_map.values()} | _COMMON
    problems, own = [], {key: value for key, value in config.items() if key in read - {"auto_map", "model_type"}}
    computed = vars(known.from_dict(own))  # what the class makes of the rest, and writes
    for key, value in _flat(config, alias):
        if key in alias.equal:
            expected = _value(alias.equal[key], config)
            if any(one != expected for one in (value if isinstance(value, list) else [value])):
                problems.append(f"{key} is {shown(repr(value))}, expected {alias.equal[key]}: {shown(repr(expected))}")
        elif key in alias.keys:
            allowed = alias.keys[key]
            values = value if isinstance(value, list) else [value]
            if allowed is not None and any(one not in allowed for one in values):
                problems.append(f"{key} is {shown(repr(value))}, expected {' or '.join(map(repr, allowed))}")
        elif key not in read and (key not in computed or computed[key] != value):
            problems.append(f"{shown(key)} is {shown(repr(value))}, which {known.__name__} does not read")
    return problems


def _flat(config: Mapping[str, Any], alias: Alias) -> Iterator[tuple[str, Any]]:
    """The keys of a configuration; of a mapping about whose keys the alias says something, those."""
    for key, value in config.items():
        if isinstance(value, Mapping) and any(name.startswith(f"{key}.") for name in alias.keys):
            yield from ((f"{key}.{inner}", of_inner) for inner, of_inner in value.items())
        else:
            yield key, value


def _value(expression: str, config: Mapping[str, Any]) -> Any:
    """The value of an expression of ours over a configuration, whose missing keys are None; None where it has none."""
    try:
        return eval(expression, {"__builtins__": {}}, defaultdict(lambda: None, config))
    except (TypeError, ArithmeticError):
        return None
