"""The symmetry of MoE layers as a value: experts and hidden units permuted, hidden units flipped in sign and scaled.

Convention, used everywhere: new[i] = old[permutation[i]]. The group of a bank of experts is the wreath product of the hidden
units' symmetries by the permutations of the experts. Where routing is group-limited, these move within and with their groups.

    new expert i, unit k  =  old expert e = expert_order[i], unit unit_order[i, k],
    its up row times unit_scale[i, k], its down column divided by it.

The group of a layer is the product of those of its banks and of that of its shared expert's units.

The translation of a softmax router (paper, Sec. 3) is deliberately absent: it moves all interpolated logits by one
common amount, so it cannot change a barrier (paper, Prop. D.1).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_moe_lmc.errors import SymmetryError
from hf_moe_lmc.symmetry import storage
from hf_moe_lmc.symmetry.banks import FIRST, in_bank, qualified
from hf_moe_lmc.symmetry.elements import BankSymmetry, UnitSymmetry
from hf_moe_lmc.symmetry.storage import BANK_FIELDS, FIELDS, StoredSymmetry


@dataclass(frozen=True, eq=False)
class LayerSymmetry:
    """A group element of one MoE layer.

    Attributes:
        banks: by name of the bank, the first one ('') first; nearly all models have that one only.
        shared: of the shared expert's hidden units; of no units where there is no shared expert.

    Example:
        Two experts of two hidden units change places, and a unit of the new first one changes its sign:

        >>> g = LayerSymmetry({"": BankSymmetry(
        ...     expert_order=torch.tensor([1, 0]),
        ...     unit_order=torch.tensor([[0, 1], [0, 1]]),
        ...     unit_scale=torch.tensor([[-1.0, 1.0], [1.0, 1.0]]),
        ... )})
        >>> g.sizes
        {'expert': 2, 'unit': 2, 'shared': 0}
        >>> g @ g.inverse() == LayerSymmetry.identity(experts=2, units=2)
        True
        >>> (g @ g).banks[""].expert_order.tolist(), (g @ g).banks[""].unit_scale.tolist()
        ([0, 1], [[-1.0, 1.0], [-1.0, 1.0]])
    """

    banks: Mapping[str, BankSymmetry]
    shared: UnitSymmetry = field(default_factory=lambda: UnitSymmetry.identity(0))

    @classmethod
    def identity(cls, experts: int, units: int, shared: int = 0) -> LayerSymmetry:
        """The identity of a layer with one bank."""
        return cls({FIRST: BankSymmetry.identity(experts, units)}, UnitSymmetry.identity(shared))

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
        """A random element of a layer with one bank; see BankSymmetry.random."""
        bank = BankSymmetry.random(experts, units, groups=groups, signs=signs, scale=scale, generator=generator)
        return cls({FIRST: bank}, UnitSymmetry.random(shared, signs=signs, scale=scale, generator=generator))

    @property
    def expert_order(self) -> Tensor:
        """Of the first bank: `expert_order`, `unit_order` and `unit_scale` of the layer are those of `banks[""]`."""
        return self.banks[FIRST].expert_order

    @property
    def unit_order(self) -> Tensor:
        return self.banks[FIRST].unit_order

    @property
    def unit_scale(self) -> Tensor:
        return self.banks[FIRST].unit_scale

    @property
    def sizes(self) -> dict[str, int]:
        """Experts and hidden units of each bank, as `expert` and `bank.expert`, and `shared` hidden units."""
        sizes = {"expert": 0, "unit": 0, "shared": len(self.shared.order)}
        for name, bank in self.banks.items():
            experts, units = bank.unit_order.shape
            sizes |= {qualified(name, "expert"): experts, qualified(name, "unit"): units}
        return sizes

    @property
    def is_lossless(self) -> bool:
        """Whether it changes no magnitude: then every dtype carries it, and its inverse restores the bytes."""
        return self.shared.is_lossless and all(bank.is_lossless for bank in self.banks.values())

    def with_bank(self, name: str, bank: BankSymmetry) -> LayerSymmetry:
        """The same with another element of one bank."""
        return replace(self, banks={**self.banks, name: bank})

    def inverse(self) -> LayerSymmetry:
        return LayerSymmetry({name: bank.inverse() for name, bank in self.banks.items()}, self.shared.inverse())

    def __matmul__(self, first: LayerSymmetry) -> LayerSymmetry:
        """`(g @ f)` acts as f, then as g."""
        if self.sizes != first.sizes:
            raise SymmetryError(f"cannot compose symmetries of sizes {self.sizes} and {first.sizes}")
        return LayerSymmetry({name: bank @ first.banks[name] for name, bank in self.banks.items()}, self.shared @ first.shared)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerSymmetry) and self.shared == other.shared and dict(self.banks) == dict(other.banks)

    def isclose(self, other: LayerSymmetry, tolerance: float = 1e-5) -> bool:
        """Equal permutations and signs, scales equal to a relative `tolerance`."""
        return (
            self.banks.keys() == other.banks.keys()
            and self.shared.isclose(other.shared, tolerance)
            and all(bank.isclose(other.banks[name], tolerance) for name, bank in self.banks.items())
        )

    def validate(self, where: str, groups: int = 1) -> None:
        """Raises SymmetryError, naming `where`, unless this is an element of the group.

        Args:
            groups: groups of the first bank's experts that bind.
        """
        for name, bank in self.banks.items():
            bank.validate(in_bank(where, name), groups if name == FIRST else 1)
        self.shared.validate(f"{where}, shared expert")

    def fields(self) -> dict[str, dict[str, Tensor]]:
        """bank -> field -> tensor, as files hold it: the first bank stands with the shared expert, others with none."""
        shared = {name: self.shared if name == FIRST else UnitSymmetry.identity(0) for name in self.banks}
        return {
            name: {
                **{field: getattr(bank, field) for field in BANK_FIELDS},
                "shared_order": shared[name].order,
                "shared_scale": shared[name].scale,
            }
            for name, bank in self.banks.items()
        }

    @classmethod
    def of_fields(cls, banks: Mapping[str, Mapping[str, Tensor]]) -> LayerSymmetry:
        """The inverse of `fields`."""
        return cls(
            {name: BankSymmetry(*(fields[field] for field in BANK_FIELDS)) for name, fields in banks.items()},
            UnitSymmetry(banks[FIRST]["shared_order"], banks[FIRST]["shared_scale"]),
        )


@dataclass(frozen=True, eq=False)
class ModelSymmetry:
    """One group element per MoE layer of a model.

    Attributes:
        family: name of the family whose layers it acts on.
        groups: number of expert groups that bind (1: none).
        layers: by layer index.
        metadata: where it came from (method, fingerprints or commits of the inputs); no part of the group element.
            `b_fingerprint` is that of the checkpoint it acts on, `aligned_fingerprint` that of the result.

    Example:
        Saved, loaded and undone:

        >>> import tempfile
        >>> generator = torch.Generator().manual_seed(0)
        >>> g = ModelSymmetry("mixtral", 1, {0: LayerSymmetry.random(8, 4, generator=generator)}, {"order": "best"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     g.save(f"{folder}/symmetry.safetensors")
        ...     loaded = ModelSymmetry.load(folder)
        >>> loaded == g, loaded.metadata["order"], (loaded.inverse() @ g).layers[0] == LayerSymmetry.identity(8, 4)
        (True, 'best', True)
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
        """Equal permutations and signs in every layer, scales equal to a relative `tolerance`."""
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
        """Writes it to a safetensors file; see `storage` for the names of its tensors."""
        layers = {index: layer.fields() for index, layer in self.layers.items()}
        storage.save(path, StoredSymmetry(self.family, self.groups, layers, self.metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelSymmetry:
        """Reads and validates what `save` wrote (or a folder that holds it as symmetry.safetensors).

        Raises:
            SymmetryError: no such file, another format, or no group element.
        """
        file = storage.locate(path)
        stored = storage.load(file)
        layers = {index: LayerSymmetry.of_fields(banks) for index, banks in stored.layers.items()}
        symmetry = cls(stored.family, stored.groups, layers, stored.metadata)
        symmetry.validate(str(file))
        return symmetry


def digest(symmetry: ModelSymmetry) -> str:
    """Hash of the group elements, whatever their metadata."""
    hashed = hashlib.sha256()
    for index, layer in sorted(symmetry.layers.items()):
        for bank, fields in layer.fields().items():
            for name in FIELDS:
                values = fields[name]
                hashed.update(f"{index} {bank} {name} {list(values.shape)} ".encode() + values.contiguous().numpy().tobytes())
    return hashed.hexdigest()
