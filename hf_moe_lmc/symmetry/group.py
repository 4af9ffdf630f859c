"""The symmetry of MoE layers as a value: which experts and hidden units change places, which change sign and scale.

Convention, used everywhere: new[i] = old[order[i]]. The group of one layer is the wreath product of the hidden units'
symmetries by the permutations of the experts (within and of groups, where routing is group-limited):

    new expert i, unit k  =  old expert e = expert_order[i], unit unit_order[i, k],
    its up row times unit_scale[i, k], its down column divided by it.

A layer that has further banks of experts, which move among themselves only, has one such element for each of them.

The translation of a softmax router (paper, Sec. 3) is deliberately absent: it moves all interpolated logits by one
common amount, so it cannot change a barrier (paper, Prop. D.1).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_moe_lmc.checkpoints.header import read_shard
from hf_moe_lmc.errors import CheckpointError, SymmetryError, listing, shown

FORMAT_VERSION = "1"
_KEY = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(.+)")
FIELDS = ("expert_order", "unit_order", "unit_scale", "shared_order", "shared_scale")


@dataclass(frozen=True, eq=False)
class LayerSymmetry:
    """A group element of one MoE layer.

    Attributes:
        expert_order: int64 [expert], a permutation.
        unit_order: int64 [expert, unit], a permutation in each row.
        unit_scale: float32 [expert, unit], finite and not zero; -1 is a flipped sign.
        shared_order: int64 [shared], of the shared expert's units; empty where there is none.
        shared_scale: float32 [shared].
        others: the elements of further banks of experts by their names.
    """

    expert_order: Tensor
    unit_order: Tensor
    unit_scale: Tensor
    shared_order: Tensor
    shared_scale: Tensor
    others: Mapping[str, LayerSymmetry] = field(default_factory=dict)

    @classmethod
    def identity(
        cls, experts: int, units: int, shared: int = 0, *, others: Mapping[str, LayerSymmetry] | None = None
    ) -> LayerSymmetry:
        return cls(
            expert_order=torch.arange(experts),
            unit_order=torch.arange(units).repeat(experts, 1),
            unit_scale=torch.ones(experts, units),
            shared_order=torch.arange(shared),
            shared_scale=torch.ones(shared),
            others=others or {},
        )

    def bank(self, name: str) -> LayerSymmetry:
        """The element of one bank: '' is the first, which this itself describes."""
        return self.others[name] if name else self

    @classmethod
    def random(
        cls,
        experts: int,
        units: int,
        shared: int = 0,
        *,
        groups: int = 1,
        signs: bool = True,
        scale: float = 1.0,
        generator: torch.Generator,
    ) -> LayerSymmetry:
        """A random element: orders, `signs` unless turned off, and scales log-uniform between 1/`scale` and `scale`."""

        def scales(*shape: int) -> Tensor:
            sign = torch.randint(2, shape, generator=generator) * 2.0 - 1.0 if signs else torch.ones(shape)
            return sign * scale ** (torch.rand(shape, generator=generator) * 2 - 1)

        def orders(count: int, size: int) -> Tensor:
            return torch.rand(count, size, generator=generator).argsort(dim=1)

        members = experts // groups
        within = orders(groups, members)
        return cls(
            expert_order=(orders(1, groups)[0][:, None] * members + within).flatten(),
            unit_order=orders(experts, units),
            unit_scale=scales(experts, units),
            shared_order=orders(1, shared)[0],
            shared_scale=scales(shared),
        )

    @property
    def sizes(self) -> dict[str, int]:
        experts, units = self.unit_order.shape
        return {"expert": experts, "unit": units, "shared": len(self.shared_order)}

    @property
    def is_lossless(self) -> bool:
        """Whether it changes no magnitude: then every dtype carries it, and its inverse restores the bytes."""
        own = (self.unit_scale.abs() == 1).all() and (self.shared_scale.abs() == 1).all()
        return bool(own) and all(other.is_lossless for other in self.others.values())

    def inverse(self) -> LayerSymmetry:
        expert = self.expert_order.argsort()
        unit = self.unit_order.argsort(dim=1)
        shared = self.shared_order.argsort()
        return LayerSymmetry(
            expert_order=expert,
            unit_order=unit[expert],
            unit_scale=(1 / self.unit_scale.gather(1, unit))[expert],
            shared_order=shared,
            shared_scale=1 / self.shared_scale[shared],
            others={name: other.inverse() for name, other in self.others.items()},
        )

    def __matmul__(self, first: LayerSymmetry) -> LayerSymmetry:
        """`(g @ f)` acts as f, then as g."""
        if self.sizes != first.sizes or self.others.keys() != first.others.keys():
            raise SymmetryError(f"cannot compose symmetries of sizes {self.sizes} and {first.sizes}")
        return LayerSymmetry(
            expert_order=first.expert_order[self.expert_order],
            unit_order=first.unit_order[self.expert_order].gather(1, self.unit_order),
            unit_scale=first.unit_scale[self.expert_order].gather(1, self.unit_order) * self.unit_scale,
            shared_order=first.shared_order[self.shared_order],
            shared_scale=first.shared_scale[self.shared_order] * self.shared_scale,
            others={name: other @ first.others[name] for name, other in self.others.items()},
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, LayerSymmetry)
            and all(torch.equal(getattr(self, name), getattr(other, name)) for name in FIELDS)
            and dict(self.others) == dict(other.others)
        )

    def isclose(self, other: LayerSymmetry, tolerance: float = 1e-5) -> bool:
        """Equal orders and signs, scales equal to a relative `tolerance`."""
        orders = ("expert_order", "unit_order", "shared_order")
        return (
            self.sizes == other.sizes
            and all(torch.equal(getattr(self, name), getattr(other, name)) for name in orders)
            and torch.allclose(self.unit_scale, other.unit_scale, rtol=tolerance, atol=0)
            and torch.allclose(self.shared_scale, other.shared_scale, rtol=tolerance, atol=0)
            and self.others.keys() == other.others.keys()
            and all(mine.isclose(other.others[name], tolerance) for name, mine in self.others.items())
        )

    def validate(self, where: str, groups: int = 1) -> None:
        """Raises SymmetryError, naming `where`, unless this is an element of the group."""
        experts, units = self.unit_order.shape
        if self.unit_scale.shape != (experts, units) or self.expert_order.shape != (experts,):
            raise SymmetryError(f"{where}: orders and scales disagree about {experts} experts of {units} units")
        if self.shared_scale.shape != self.shared_order.shape or self.shared_order.ndim != 1:
            raise SymmetryError(f"{where}: order and scale of the shared expert's units differ in length")
        for name in ("expert_order", "unit_order", "shared_order"):
            order = getattr(self, name)
            if not torch.equal(order.sort(dim=-1).values, torch.arange(order.shape[-1]).expand_as(order)):
                raise SymmetryError(f"{where}: {name} is not a permutation")
        for name in ("unit_scale", "shared_scale"):
            scale = getattr(self, name)
            if not bool((scale.isfinite() & (scale != 0)).all()):
                raise SymmetryError(f"{where}: {name} has entries that are zero or not finite")
        if groups > 1:
            if experts % groups:
                raise SymmetryError(f"{where}: {experts} experts do not divide into {groups} groups")
            group = (self.expert_order // (experts // groups)).view(groups, -1)
            if not bool((group == group[:, :1]).all()):
                raise SymmetryError(f"{where}: expert_order tears the {groups} expert groups apart")
        for name, other in self.others.items():
            other.validate(f"{where}, bank {name}")


@dataclass(frozen=True, eq=False)
class ModelSymmetry:
    """One group element per MoE layer of a model.

    Attributes:
        family: name of the family whose layers it acts on.
        groups: number of expert groups that bind (1: none).
        layers: by layer index.
        metadata: where it came from (method, fingerprints or commits of the inputs); no part of the group element.
            `b_fingerprint` is that of the checkpoint it acts on, `aligned_fingerprint` that of the result.
    """

    family: str
    groups: int
    layers: Mapping[int, LayerSymmetry]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_lossless(self) -> bool:
        return all(layer.is_lossless for layer in self.layers.values())

    def inverse(self) -> ModelSymmetry:
        """Undoes it; the recorded fingerprints of what it acts on and what that gives change places."""
        layers = {index: layer.inverse() for index, layer in self.layers.items()}
        swapped = {"b_fingerprint": "aligned_fingerprint", "aligned_fingerprint": "b_fingerprint"}
        metadata = {swapped.get(key, key): value for key, value in self.metadata.items()}
        return ModelSymmetry(self.family, self.groups, layers, metadata)

    def __matmul__(self, first: ModelSymmetry) -> ModelSymmetry:
        """`(g @ f)` acts as f, then as g; where it came from is forgotten."""
        for what in ("family", "groups"):
            if getattr(self, what) != getattr(first, what):
                raise SymmetryError(f"cannot compose symmetries of {what} {getattr(self, what)} and {getattr(first, what)}")
        if self.layers.keys() != first.layers.keys():
            raise SymmetryError(f"cannot compose symmetries of layers {sorted(self.layers)} and {sorted(first.layers)}")
        layers = {index: layer @ first.layers[index] for index, layer in self.layers.items()}
        return ModelSymmetry(self.family, self.groups, layers)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ModelSymmetry)
            and (self.family, self.groups) == (other.family, other.groups)
            and dict(self.layers) == dict(other.layers)
        )

    def isclose(self, other: ModelSymmetry, tolerance: float = 1e-5) -> bool:
        """Equal orders and signs in every layer, scales equal to a relative `tolerance`."""
        return (
            (self.family, self.groups) == (other.family, other.groups)
            and self.layers.keys() == other.layers.keys()
            and all(layer.isclose(other.layers[index], tolerance) for index, layer in self.layers.items())
        )

    def validate(self, where: str = "symmetry") -> None:
        """Raises SymmetryError unless every layer is an element of the group."""
        for index, layer in self.layers.items():
            layer.validate(f"{where}, layer {index}", self.groups)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: `layers.{layer}.{field}`, in further banks `layers.{layer}.{bank}.{field}`.

        Orders are int32; family and origin stand in its metadata.
        """
        tensors = {
            f"layers.{index}.{bank}{name}": getattr(part, name).to(torch.int32 if name.endswith("order") else torch.float32)
            for index, layer in self.layers.items()
            for bank, part in {"": layer, **{f"{name}.": other for name, other in layer.others.items()}}.items()
            for name in FIELDS
        }
        metadata = {
            **self.metadata,
            "format": "pt",
            "hf_moe_lmc": "symmetry",
            "format_version": FORMAT_VERSION,
            "family": self.family,
            "groups": str(self.groups),
        }
        # bytes through an ordinary file: save_file would make it readable by its owner alone
        Path(path).write_bytes(_in_order(safetensors.torch.save(tensors, metadata)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelSymmetry:
        """Reads and validates what `save` wrote (or a folder that holds it as symmetry.safetensors).

        Raises:
            SymmetryError: no such file, another format, or no group element.
        """
        file = _locate(Path(path))
        try:
            _, infos = read_shard(file, file.name, str(file))  # stricter than the library
            with safe_open(file, "pt") as opened:
                metadata = dict(opened.metadata() or {})
                _check_metadata(metadata, file)
                _check_tensors({info.name: info.dtype for info in infos}, str(file))
                tensors = {info.name: opened.get_tensor(info.name) for info in infos}
        except (SafetensorError, CheckpointError) as error:
            raise SymmetryError(f"{file}: not a readable safetensors file ({error})") from error
        symmetry = cls(metadata["family"], int(metadata["groups"]), _layers(tensors, str(file)), metadata)
        symmetry.validate(str(file))
        return symmetry


def digest(symmetry: ModelSymmetry) -> str:
    """Hash of the group elements, whatever their metadata."""
    found = hashlib.sha256()
    for index, layer in sorted(symmetry.layers.items()):
        for bank, part in {"": layer, **layer.others}.items():
            for name in FIELDS:
                values = getattr(part, name)
                found.update(f"{index} {bank} {name} {list(values.shape)} ".encode() + values.contiguous().numpy().tobytes())
    return found.hexdigest()


def _check_metadata(metadata: Mapping[str, str], file: Path) -> None:
    if metadata.get("hf_moe_lmc") != "symmetry":
        raise SymmetryError(f"{file}: a safetensors file, but no symmetry saved by hf_moe_lmc")
    found = metadata.get("format_version")
    if found != FORMAT_VERSION:
        raise SymmetryError(f"{file}: format version {shown(found)}, this release reads {FORMAT_VERSION}; update hf_moe_lmc")
    if "family" not in metadata or not re.fullmatch("[1-9][0-9]{0,5}", metadata.get("groups", "")):
        raise SymmetryError(f"{file}: its metadata lack the family or the number of expert groups")


def _check_tensors(dtypes: Mapping[str, torch.dtype], where: str) -> None:
    """Raises SymmetryError, before values are read, unless these are the fields of layers."""
    for key, dtype in dtypes.items():
        name = key.rpartition(".")[2]
        if not _KEY.fullmatch(key) or name not in FIELDS:
            raise SymmetryError(f"{where}: unexpected tensor {shown(key)}")
        expected = (torch.int32, torch.int64) if name.endswith("order") else (torch.float32,)
        if dtype not in expected:
            raise SymmetryError(f"{where}: {shown(key)}: dtype {dtype}, expected {expected[0]}")


def _in_order(file: bytes) -> bytes:
    """A safetensors file with sorted metadata, which the library writes in random order: equal contents, equal bytes."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data + file[end:]


def _locate(path: Path) -> Path:
    candidates = [path / "symmetry.safetensors", path / "alignment" / "symmetry.safetensors"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise SymmetryError(f"{path}: no symmetry here; looked for\n{listing([str(candidate) for candidate in candidates])}")


def _layers(tensors: Mapping[str, Tensor], where: str) -> dict[int, LayerSymmetry]:
    found: dict[int, dict[str, dict[str, Tensor]]] = {}  # layer, bank, field
    for key, tensor in tensors.items():
        index, _, rest = key.removeprefix("layers.").partition(".")
        bank, _, name = rest.rpartition(".")
        values = tensor.to(torch.int64 if name.endswith("order") else torch.float32)
        found.setdefault(int(index), {"": {}}).setdefault(bank, {})[name] = values
    for number, banks in found.items():
        for bank, fields in banks.items():
            named = f"layer {number}" + (f", bank {bank}" if bank else "")
            if missing := [name for name in FIELDS if name not in fields]:
                raise SymmetryError(f"{where}: {named} lacks {', '.join(missing)}")
            if fields["unit_order"].ndim != 2:
                raise SymmetryError(f"{where}: {named}: unit_order must be [expert, unit]")
    layers = {}
    for number in sorted(found):
        parts = {
            bank: LayerSymmetry(
                expert_order=fields["expert_order"],
                unit_order=fields["unit_order"],
                unit_scale=fields["unit_scale"],
                shared_order=fields["shared_order"],
                shared_scale=fields["shared_scale"],
            )
            for bank, fields in found[number].items()
        }
        own = parts.pop("")
        layers[number] = replace(own, others=parts)
    return layers
