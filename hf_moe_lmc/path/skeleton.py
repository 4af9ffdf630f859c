"""A transformers model without weights, which are put in place part by part: the module that knows how transformers loads.

What is relied on of transformers 5 (semi-public, held by tests/test_skeleton.py): `get_model_conversion_mapping`,
`rename_source_key` and the `add_tensor` and `convert` of its transforms, which turn tensors on disk into parameters.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights

from hf_moe_lmc.errors import CheckpointError, listing
from hf_moe_lmc.moe.model_class import foreign
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.runtime.progress import quiet_transformers


@dataclass(frozen=True)
class Group:
    """Parameters that come from the same tensors on disk: one from one, or one from those of all experts.

    Attributes:
        target: name of its (first) parameter.
        keys: names on disk, in the order of the conversion.
    """

    target: str
    keys: tuple[str, ...]
    patterns: tuple[str | None, ...]


class Skeleton:
    """A model on the meta device, but for its buffers that no checkpoint holds.

    Attributes:
        module: the transformers model, in eval mode.
        state: its parameters and buffers by name, on the meta device.
    """

    def __init__(self, model_class: Any, config: Any, *, dtype: torch.dtype, device: torch.device) -> None:
        with (
            foreign(model_class, "cannot be built from its configuration"),
            quiet_transformers(),
            init_empty_weights(include_buffers=False),
            no_init_weights(),
        ):
            self.module: PreTrainedModel = model_class._from_config(copy.deepcopy(config), dtype=dtype).eval()
        self.device = device
        self._in_float32 = list(self.module._get_dtype_plan(dtype))
        self.state = {key: value.to("meta") for key, value in self.module.state_dict().items()}
        for path, buffer in list(self.module.named_buffers()):
            _put(self.module, path, buffer.to("meta" if path in self.state else device))

    @cached_property
    def tied(self) -> dict[str, str]:
        """Parameters that are others: name -> name."""
        return dict(getattr(self.module, "all_tied_weights_keys", {}) or {})

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all its weights once they are in place."""
        return self.nbytes_of(name for name in self.state if name not in self.tied)

    def nbytes_of(self, names: Iterable[str]) -> int:
        """Bytes of some weights once they are in place."""
        return sum(self.state[name].numel() * self.dtype_of(name).itemsize for name in names)

    def place(self, values: Mapping[str, Tensor]) -> None:
        """Puts values in their places, cast once to the dtype that the model keeps them in, on the model's device."""
        for name, value in values.items():
            _put(self.module, name, value.to(device=self.device, dtype=self.dtype_of(name)))
        for target, source in self.tied.items():
            if source in values:
                _put(self.module, target, self.module.get_parameter(source))

    def value(self, name: str) -> Tensor | None:
        """What stands in the place of a parameter, to be written over; None where nothing does."""
        owner, _, leaf = name.rpartition(".")
        found = getattr(self.module.get_submodule(owner), leaf)
        return None if found.is_meta else found.data

    def clear(self, names: Iterable[str]) -> None:
        """Takes values out again; whoever uses one then fails loudly."""
        gone = set(names)
        for name in [*gone, *(target for target, source in self.tied.items() if source in gone)]:
            _put(self.module, name, self.state[name])

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that transformers loads a parameter in."""
        value = self.state[name]
        if not value.is_floating_point():
            return value.dtype
        kept = self._in_float32 and build_glob_alternation(self._in_float32)[0].search(name)
        return torch.float32 if kept else value.dtype


class Conversion:
    """Which tensors of a checkpoint become which parameters of a skeleton's model.

    Attributes:
        groups: in the order of their names; group_of: by name of a parameter.
        unused: tensors that the model has no use for.

    Raises:
        CheckpointError: parameters for which the checkpoint has no tensors, or tensors of another shape.
    """

    def __init__(self, skeleton: Skeleton, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._module, self._state = skeleton.module, skeleton.state
        mapping = get_model_conversion_mapping(self._module)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.groups, self.unused = self._group(shapes)
        self.group_of = {target: group for group in self.groups for target in self._targets(group, shapes)}
        if missing := sorted(self._state.keys() - self.group_of.keys() - skeleton.tied.keys()):
            kind = type(self._module).__name__
            raise CheckpointError(f"{name}: transformers finds no tensors for these of {kind}:\n{listing(missing)}")

    def _group(self, keys: Iterable[str]) -> tuple[list[Group], list[str]]:
        prefix = self._module.base_model_prefix
        found: dict[str, list[tuple[str, str | None]]] = {}
        unused = []
        for key in sorted(keys, key=dot_natural_key):
            target, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
            if target not in self._state and key in self._state:  # a name that the model has, though a renaming fits it
                target, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=self._state)
            if target in self._state:
                found.setdefault(target, []).append((key, pattern))
            else:
                unused.append(key)
        groups = [Group(target, *map(tuple, zip(*members, strict=True))) for target, members in found.items()]
        return groups, unused

    def _targets(self, group: Group, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Parameters of a group; raises CheckpointError where what comes out of the conversion has another shape."""
        if group.patterns[0] is None:
            found = {group.target: torch.Size(shapes[group.keys[0]])}
        else:
            values = self.convert(group, lambda key: torch.empty(shapes[key], device="meta"))
            found = {name: value.shape for name, value in values.items()}
        for name, shape in found.items():
            if shape != self._state[name].shape:
                raise CheckpointError(
                    f"{name}: {list(shape)} from the checkpoint, the model has {list(self._state[name].shape)}"
                )
        return list(found)

    def _converter(self, pattern: str) -> WeightConverter:
        return next(entry for entry in self._converters if pattern in entry.source_patterns)

    def convert(self, group: Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters of a group, in the dtypes that `read` gives for its tensors on disk."""
        pattern = group.patterns[0]
        if pattern is None:
            return {group.target: read(group.keys[0])}
        transform: Any = copy.deepcopy(self._converter(pattern))
        for key, part in zip(group.keys, group.patterns, strict=True):
            transform.add_tensor(group.target, key, part, read(key))
        realised = transform.convert(group.target, model=self._module, config=self._module.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in realised.items()}


def warn_of_unused(name: str, model_class: type[PreTrainedModel], keys: Iterable[str]) -> None:
    """Says which tensors of a checkpoint the model has no use for, but for those that its class expects to be left over."""
    expected = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
    unused = sorted(key for key in keys if not any(re.search(pattern, key) for pattern in expected))
    if unused:
        warn(f"{name}: {model_class.__name__} does not use these tensors:\n{listing(unused)}")


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
