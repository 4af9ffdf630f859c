"""Two models side by side: are they of one architecture?"""

from __future__ import annotations

from hf_moe_lmc.checkpoints.configuration import differing, settings
from hf_moe_lmc.checkpoints.joint import EMBEDDING, HEAD, IGNORED
from hf_moe_lmc.checkpoints.pair import not_one_architecture, shapes_of, tensor_problems
from hf_moe_lmc.moe.model import MoEModel


def check_pair(a: MoEModel, b: MoEModel, *, inside_only: bool = False) -> list[str]:
    """Checks that two models are of one architecture, from headers and configurations alone.

    Args:
        inside_only: tables over the vocabulary, heads and ignored buffers may differ, as nothing is done with them.

    Returns:
        Warnings: configuration fields that differ although they may change what the weights compute.

    Raises:
        MismatchError: listing every difference with both values.
    """
    differences = [
        f"{what}: A has {in_a}, B has {in_b}"
        for what, in_a, in_b in (
            ("family", a.family.name, b.family.name),
            ("layers", a.num_layers, b.num_layers),
            ("MoE layers", _regular(a), _regular(b)),
            ("binding expert groups", a.groups, b.groups),
            *((f"size of axis {word}", a.sizes[word], b.sizes.get(word)) for word in a.sizes),
        )
        if in_a != in_b and not (inside_only and what == "size of axis token")
    ]
    problems = [differences]
    if a.family is b.family:
        problems += [_layer_problems(a, b), *_outside_problems(a, b, inside_only)]
    if any(problems):
        raise not_one_architecture(a.checkpoint, b.checkpoint, problems)
    return differing(a.config.to_dict(), b.config.to_dict())


def function_settings(a: MoEModel, b: MoEModel) -> list[str]:
    """Keys of the configurations that differ although they may change what the same weights compute."""
    of_a, of_b = settings(a.config.to_dict()), settings(b.config.to_dict())
    return [key for key in sorted(of_a.keys() | of_b.keys()) if (of_a.get(key) or None) != (of_b.get(key) or None)]


def _regular(model: MoEModel) -> list[int]:
    return [index for index in model.layers if index < model.num_layers]


def _layer_problems(a: MoEModel, b: MoEModel) -> list[str]:
    problems = []
    for i in [i for i in _regular(a) if i in b.layers]:
        layer_a, layer_b = a.layers[i], b.layers[i]
        for word in [word for word in a.sizes if a.sizes[word] == b.sizes.get(word)]:
            if layer_a.sizes[word] != layer_b.sizes[word]:
                problems.append(f"layer {i}: size of axis {word}: A has {layer_a.sizes[word]}, B has {layer_b.sizes[word]}")
        if set(layer_a.roles) != set(layer_b.roles):
            problems.append(f"layer {i}: in one of the two only: {', '.join(set(layer_a.roles) ^ set(layer_b.roles))}")
    return problems


def _outside_problems(a: MoEModel, b: MoEModel, inside_only: bool) -> list[list[str]]:
    """Differences outside the MoE blocks, those apart that `join` takes care of."""

    def names(model: MoEModel, other: MoEModel) -> set[str]:
        alone = set(model.outside) - set(other.outside)
        free = {name for name in alone if IGNORED.fullmatch(name) or model.is_extra(name)}
        if inside_only:
            free |= {name for name in model.outside if EMBEDDING.fullmatch(name) or HEAD.fullmatch(name)}
        return set(model.outside) - free

    names_a, names_b = names(a, b), names(b, a)
    if names_a != names_b and shapes_of(a.checkpoint, names_a) == shapes_of(b.checkpoint, names_b):
        other_names = (
            "outside the MoE blocks they hold the same tensors under other names: one is in the Hub's layout, the other in "
            f"that of transformers' memory ({sorted(names_a - names_b)[0]}, {sorted(names_b - names_a)[0]}); load one of "
            "them with transformers and save it with save_original_format=True (the Hub's) or False"
        )
        return [[other_names]]
    return tensor_problems(a.checkpoint, b.checkpoint, names_a, names_b)
