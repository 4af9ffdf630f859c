"""The families that are known, by model type."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.moe.alias import Alias
from hf_moe_lmc.moe.family import MoEFamily

_FAMILIES: dict[str, MoEFamily] = {}
_REFUSALS: dict[str, str] = {}
_ALIASES: dict[str, Alias] = {}
_RELEASES: dict[str, str] = {}


def register(family: MoEFamily) -> MoEFamily:
    """Makes `family` known under its model types, and returns it.

    Raises:
        FamilyError: one of them is described already; nothing is registered then.

    Example:
        >>> mine = register(MoEFamily(
        ...     name="mine",
        ...     model_types=("mine_moe",),
        ...     router="softmax",
        ...     units="swiglu",
        ...     weights={
        ...         "mlp.gate.weight": "router: expert model",
        ...         "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
        ...         "mlp.experts.down_proj": "down: expert model unit",
        ...     },
        ...     sizes={"expert": "num_experts", "unit": "moe_intermediate_size", "model": "hidden_size"},
        ... ))
        >>> get_family("mine_moe", "my checkpoint") is mine
        True
    """
    for model_type in family.model_types:
        if model_type in _FAMILIES:
            raise FamilyError(f"model type {model_type} is already described by family {_FAMILIES[model_type].name}")
    _FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


def refuse(model_type: str, reason: str) -> None:
    """Makes known that a model type is not supported, and why."""
    _REFUSALS[model_type] = reason


def register_alias(alias: Alias) -> None:
    """Makes known that a model type is one that transformers has under another name."""
    _ALIASES[alias.model_type] = alias


def added_in(release: str, *model_types: str) -> None:
    """Makes known from which release of transformers on some model types work."""
    _RELEASES.update(dict.fromkeys(model_types, release))


def first_releases() -> dict[str, str]:
    """The first release of transformers by model type, where it is later than the oldest that this package takes."""
    _load_data()
    return dict(_RELEASES)


def aliases() -> dict[str, Alias]:
    """Aliases by model type."""
    _load_data()
    return dict(_ALIASES)


def families() -> dict[str, MoEFamily]:
    """All known families by model type."""
    _load_data()
    return dict(_FAMILIES)


def refusals() -> dict[str, str]:
    """Reasons by model type that is known and refused."""
    _load_data()
    return dict(_REFUSALS)


def _load_data() -> None:
    data = import_module("hf_moe_lmc.families")  # each file registers itself
    for module in iter_modules(data.__path__):
        import_module(f"{data.__name__}.{module.name}")


def get_family(model_type: str, where: str) -> MoEFamily:
    """The family of `model_type`.

    Raises:
        FamilyError: refused, with the reason; or unknown, and the message lists what is known.
    """
    known = families()
    if model_type in _REFUSALS:
        raise FamilyError(f"{where}: model type {model_type!r} is not supported: {_REFUSALS[model_type]}")
    if model_type not in known:
        raise FamilyError(
            f"{where}: model type {model_type!r} has no MoE description here; known: {', '.join(sorted(known))}. "
            "The README says how to add a family"
        )
    return known[model_type]
