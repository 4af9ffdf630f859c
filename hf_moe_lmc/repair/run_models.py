"""What a calibrated run works with: both parents and what lies between them, the module that they run in, and the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.endpoints import Endpoints
from hf_moe_lmc.path.skeleton import Skeleton
from hf_moe_lmc.perplexity.windows import Windows
from hf_moe_lmc.repair.sites import Site, sites_of
from hf_moe_lmc.writing.streams import ModelStream, whole

PATH = "aligned"


@dataclass(frozen=True)
class Calibration:
    """Text that repairs are fitted and compared on.

    Attributes:
        windows: of all texts; they do not overlap.
        domains: names of the texts that A, and that B', was trained on; both may have all.
    """

    windows: Windows
    domains: tuple[frozenset[str], frozenset[str]]

    def of_parent(self, numbers: Sequence[int], parent: int) -> list[int]:
        """Those windows that are of a parent's own domain."""
        names = self.windows.text_of
        return [i for i in numbers if names[i] in self.domains[parent]]


@dataclass(frozen=True)
class RunModels:
    """Both parents, the merges between them, and the module that all of them run in.

    Attributes:
        ends: weights of A and, on PATH, of B'.
        t: of the merge.
        streams: merges that a repair without data gives, by its name.
    """

    a: MoEModel
    ends: Endpoints
    t: float
    streams: Mapping[str, ModelStream]
    calibration: Calibration
    options: EvaluationOptions

    @property
    def skeleton(self) -> Skeleton:
        return self.ends.skeleton

    @cached_property
    def sites(self) -> dict[int, Site]:
        """The MoE blocks by decoder layer; raises UnsuitedError."""
        return sites_of(self.skeleton.module, self.a)

    def place_start(self, start: str, names: Sequence[str]) -> None:
        """Puts parameters of the merge that a candidate starts from into the module; their ends are loaded."""
        self.ends.place(names, PATH, self.t)
        stream = self.streams.get(start)
        if stream is None:
            return
        conversion, claimed = self.ends.conversions[0], self.a.layer_of.keys()
        for group in dict.fromkeys(conversion.group_of[name] for name in names if name in conversion.group_of):
            if any(key in claimed for key in group.keys):
                self.skeleton.place(conversion.convert(group, partial(whole, stream)))
