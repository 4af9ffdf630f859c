"""What is trained and measured: sizes, settings, and the lists of them behind each table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

POINTS = 25  # of a path, as in the paper
INIT_STD = 0.02
PLACES = ("first", "last", "all")
SWEEP = (2, 4, 6, 8, 16)
DEPTHS = (2, 4, 6)
TABLE_2 = (0, 3, 7, 11)  # the layers 1, 4, 8 and 12 of a 12-layer ViT
CLASSES = ("mixtral_dense", "mixtral", "qwen2_moe", "deepseek_v3")


@dataclass(frozen=True)
class Recipe:
    """AdamW with a warm-up of 20 steps and a cosine decay to a tenth of the rate."""

    steps: int
    learning_rate: float
    batch: int
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of its training.

    Attributes:
        dense: units of the feed-forward networks that stay as they are; expert: of one expert.
    """

    hidden: int
    heads: int
    dense: int
    expert: int
    base: Recipe
    block: Recipe


@dataclass(frozen=True)
class Setting:
    """A pair of models to be, but for their seeds.

    Attributes:
        data: name of a data set.
        kind: `paper`, or one of CLASSES.
        gating: see `models`; of the real classes, their own.
        layers: of the model.
        moe: the layers whose MoE blocks are drawn anew and trained, everything else being frozen.
    """

    data: str
    kind: str
    gating: str
    experts: int
    layers: int
    moe: tuple[int, ...]

    @property
    def base(self) -> str:
        """Name of the model that is trained first."""
        own = f"-{self.experts}" if self.kind != "paper" else ""
        return f"base-{self.data}-{self.kind}{own}-L{self.layers}"

    @property
    def name(self) -> str:
        at = "_".join(map(str, self.moe))
        return f"{self.data}-{self.kind}-{self.gating}-n{self.experts}-L{self.layers}-at{at}"

    @property
    def place(self) -> str:
        if len(self.moe) == self.layers > 1:
            return "all"
        return {0: "first", self.layers - 1: "last"}.get(self.moe[0], str(self.moe[0] + 1))


@dataclass(frozen=True)
class Run:
    """Everything that one call trains and measures.

    Attributes:
        orders: whether the rank among all orders is measured, of settings with at most four experts and one trained block.
    """

    name: str
    seeds: tuple[int, ...]
    text: tuple[str, ...]
    vision: tuple[str, ...]
    sizes: dict[str, Size]
    deep: Size
    test_tokens: int
    layers: int = 4

    def size_of(self, setting: Setting) -> Size:
        return self.deep if setting.layers == 12 else self.sizes["text" if setting.data in self.text else "vision"]

    def facts(self) -> dict[str, Any]:
        return asdict(self)


QUICK = Run(
    name="quick",
    seeds=(1, 2),
    text=("docs",),
    vision=("digits",),
    sizes={
        "text": Size(64, 4, 256, 128, Recipe(1200, 3e-3, 16), Recipe(300, 2e-3, 16)),
        "vision": Size(48, 4, 192, 96, Recipe(900, 3e-3, 64), Recipe(300, 2e-3, 64)),
    },
    deep=Size(32, 4, 128, 64, Recipe(900, 3e-3, 64), Recipe(300, 2e-3, 64)),
    test_tokens=4096,
)
FULL = replace(
    QUICK,
    name="full",
    seeds=(1, 2, 3),
    sizes={
        "text": Size(128, 4, 512, 256, Recipe(2000, 2e-3, 32), Recipe(1000, 1e-3, 32)),
        "vision": Size(64, 4, 256, 128, Recipe(1500, 1e-3, 64), Recipe(600, 1e-3, 64)),
    },
    deep=Size(64, 4, 256, 128, Recipe(1500, 1e-3, 64), Recipe(600, 1e-3, 64)),
    test_tokens=16384,
)
FULL_GPU = replace(
    FULL,
    sizes={
        "text": Size(256, 8, 1024, 512, Recipe(4000, 1e-3, 64), Recipe(2000, 1e-3, 64)),
        "vision": Size(192, 6, 768, 384, Recipe(4000, 5e-4, 128), Recipe(1500, 5e-4, 128)),
    },
    deep=Size(192, 6, 768, 384, Recipe(4000, 5e-4, 128), Recipe(1500, 5e-4, 128)),
    test_tokens=65536,
)
GATINGS = ("dense", "sparse", "shared")


def at(place: str, layers: int) -> tuple[int, ...]:
    """The layers of a place: `first`, `last`, `all`."""
    return {"first": (0,), "last": (layers - 1,), "all": tuple(range(layers))}[place]


def places(run: Run) -> Iterator[Setting]:
    """Tables 1 and 5, and Figures 1 and 2: each gating, place and data set."""
    for data in (*run.text, *run.vision):
        for gating in GATINGS:
            for place in PLACES:
                yield Setting(data, "paper", gating, 4, run.layers, at(place, run.layers))


def sweep(run: Run) -> Iterator[Setting]:
    """The number of experts: with `quick`, the first block of the language model and a sparse gate."""
    every = [(data, gating) for data in (*run.text, *run.vision) for gating in GATINGS]
    for data, gating in every if run.name == "full" else [(run.text[0], "sparse")]:
        for experts in SWEEP:
            yield Setting(data, "paper", gating, experts, run.layers, (0,))


def ranks(run: Run) -> Iterator[Setting]:
    """Table 2: a 12-layer ViT, four experts, one block at a time."""
    for data in run.vision if run.name == "full" else run.vision[:1]:
        for gating in GATINGS if run.name == "full" else ("dense",):
            for layer in TABLE_2:
                yield Setting(data, "paper", gating, 4, 12, (layer,))


def depths(run: Run) -> Iterator[Setting]:
    """Tables 3 and 11 to 13: the number of layers, the MoE at every position."""
    every = [(data, gating) for data in (*run.text, *run.vision) for gating in GATINGS]
    for data, gating in every if run.name == "full" else [(run.vision[0], "dense")]:
        for layers in DEPTHS:
            for layer in range(layers):
                yield Setting(data, "paper", gating, 4, layers, (layer,))


def classes(run: Run) -> Iterator[Setting]:
    """Real classes of transformers, on text."""
    for kind in CLASSES:
        for place in PLACES if run.name == "full" else ("first",):
            for data in run.text if run.name == "full" else run.text[:1]:
                experts = 4 if kind.startswith("mixtral") else 8
                yield Setting(data, kind, kind, experts, 3, at(place, 3))


# In the order of the work: what takes longest comes first.
TABLES = {"ranks": ranks, "places": places, "classes": classes, "sweep": sweep, "depths": depths}


def all_settings(run: Run) -> dict[str, Setting]:
    """By name, each once."""
    return {setting.name: setting for table in TABLES.values() for setting in table(run)}


def in_tables(run: Run) -> dict[str, list[str]]:
    """The names of the settings behind each table."""
    return {name: [setting.name for setting in table(run)] for name, table in TABLES.items()}
