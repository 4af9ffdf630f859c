"""Two models side by side: are they of one architecture?"""

from __future__ import annotations

from hf_moe_lmc.checkpoints.configuration import differing
from hf_moe_lmc.checkpoints.pair import not_one_architecture, shapes_of, tensor_problems
from hf_moe_lmc.moe.model import MoEModel


def check_pair(a: MoEModel, b: MoEModel, *, ignore_extra_layers: bool = False) -> list[str]:
    """Checks that two models are of one architecture, from headers and configurations alone.

    Args:
        ignore_extra_layers: multi-token-prediction layers may be present in one of them only.

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
            ("experts per token", a.top_k, b.top_k),
            ("binding expert groups", a.groups, b.groups),
            ("quantization", a.quantization, b.quantization),
            *((f"size of axis {word}", a.sizes[word], b.sizes.get(word)) for word in a.sizes),
        )
        if in_a != in_b
    ]
    problems = [differences]
    if a.family is b.family:
        problems += [_layer_problems(a, b), *_outside_problems(a, b, ignore_extra_layers)]
    if any(problems):
        raise not_one_architecture(a.checkpoint, b.checkpoint, problems)
    return differing(a.config.to_dict(), b.config.to_dict())


def _regular(model: MoEModel) -> list[int]:
    return [index for index in model.layers if index < model.num_layers]


def _layer_problems(a: MoEModel, b: MoEModel) -> list[str]:
    problems = []
    for i in [i for i in _regular(a) if i in b.layers]:
        layer_a, layer_b = a.layers[i], b.layers[i]
        for word in [word for word in a.sizes if a.sizes[word] == b.sizes.get(word)]:
            if layer_a.sizes[word] != layer_b.sizes[word]:
                problems.append(f"layer {i}: size of axis {word}: A has {layer_a.sizes[word]}, B has {layer_b.sizes[word]}")
        if not a.quantization and set(layer_a.roles) != set(layer_b.roles):
            problems.append(f"layer {i}: in one of the two only: {', '.join(set(layer_a.roles) ^ set(layer_b.roles))}")
    return problems


def _outside_problems(a: MoEModel, b: MoEModel, ignore_extra_layers: bool) -> list[list[str]]:
    problems = []
    if a.extra_layers != b.extra_layers and not ignore_extra_layers:
        problems.append(
            f"multi-token-prediction layers: A has {list(a.extra_layers)}, B has {list(b.extra_layers)}; "
            "remove them from the one that has them, or add them to the other"
        )
    skip_extra = ignore_extra_layers or bool(problems)
    names_a, names_b = ({name for name in m.outside if not (skip_extra and m.is_extra(name))} for m in (a, b))
    if names_a != names_b and shapes_of(a.checkpoint, names_a) == shapes_of(b.checkpoint, names_b):
        other_names = (
            "outside the MoE blocks they hold the same tensors under other names: one is in the Hub's layout, the other in "
            f"that of transformers' memory ({sorted(names_a - names_b)[0]}, {sorted(names_b - names_a)[0]}); load one of "
            "them with transformers and save it with save_original_format=True (the Hub's) or False"
        )
        return [problems, [other_names]]
    return [problems, *tensor_problems(a.checkpoint, b.checkpoint, names_a, names_b)]
