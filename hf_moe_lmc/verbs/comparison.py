"""What `compare` says of two or more models: values, a table for a terminal, a document for a program."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_moe_lmc.lineage.outside import OutsideSample
from hf_moe_lmc.lineage.verdict import LayerVerdict, counted
from hf_moe_lmc.runtime.progress import size_of
from hf_moe_lmc.runtime.tables import aligned
from hf_moe_lmc.verbs.planning import Plan, time_of

SECOND = "B"  # the letter that a verb has for the other of its two models
SHOWN = 8  # layers out of the ordinary, differences of one kind
VERSION = 1  # of the document: later versions add keys and keep these


@dataclass(frozen=True)
class Compared:
    """One of the models.

    Attributes:
        letter: A, B, C in the order in which they were given.
        family: None where it is not a mixture of experts that is known; `problem` says why.
        bytes_fetched: from the Hub, for this verdict.
        ranges: requests for parts of its files.
    """

    letter: str
    source: str
    commit: str | None
    family: str | None
    moe_layers: int
    experts: int | None
    nbytes: int
    bytes_fetched: int
    ranges: int
    problem: str | None = None


@dataclass(frozen=True)
class Difference:
    """A fact in which two models differ."""

    what: str
    a: str
    b: str


@dataclass(frozen=True)
class Outlook:
    """What a verb would do with two models: its own checks, stopped early.

    Attributes:
        reasons: why it refuses them; none: it takes them.
        warnings: what it says of them.
        plan: what it would read and write; None where it refuses them.
        seconds: of reading, writing and matching, downloads and forward passes apart; None where it refuses them.
        rates: what the seconds are reckoned from.
    """

    verb: str
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    plan: Plan | None = None
    seconds: float | None = None
    rates: str = ""

    @property
    def possible(self) -> bool:
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "verb": self.verb,
            "possible": self.possible,
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
            "bytes_to_download": plan.bytes_to_download if plan else None,
            "bytes_to_read": plan.bytes_to_read if plan else None,
            "bytes_to_write": plan.bytes_to_write if plan else None,
            "bytes_free": plan.bytes_free if plan else None,
            "peak_memory": plan.peak_memory if plan else None,
            "seconds": self.seconds,
            "rates": self.rates or None,
        }


@dataclass(frozen=True)
class PairVerdict:
    """One model beside the first.

    Attributes:
        sentence: the verdict.
        makes_sense: whether a merge does.
        layers: the lineage of each MoE layer that both have.
        outside: what stands outside the MoE blocks.
        differences: facts that differ.
        verbs: what each verb would do.
    """

    a: str
    b: str
    sentence: str
    makes_sense: bool
    layers: tuple[LayerVerdict, ...]
    outside: OutsideSample
    differences: tuple[Difference, ...]
    verbs: tuple[Outlook, ...]

    def to_dict(self) -> dict[str, Any]:
        outside = self.outside
        return {
            "a": self.a,
            "b": self.b,
            "sentence": self.sentence,
            "makes_sense": self.makes_sense,
            "counts": {name.replace(" ", "_"): count for name, count in counted(self.layers).items()},
            "layers": [layer.to_dict() for layer in self.layers],
            "outside": {
                "median_cosine": outside.median_cosine,
                "unrelated": outside.unrelated,
                "cosines": outside.cosines,
            },
            "differences": [asdict(one) for one in self.differences],
            "verbs": [one.to_dict() for one in self.verbs],
        }


@dataclass(frozen=True)
class Closeness:
    """How far apart the router rows of two models are, in the best order of their experts.

    Attributes:
        router_distance: ||A - P B|| / ||A|| over the centred rows of all layers that both have; None without any.
        layers: these.
        related: layers of the same lineage by their routers.
    """

    a: str
    b: str
    router_distance: float | None
    layers: int
    related: int


@dataclass(frozen=True)
class Comparison:
    """Two models or more, each beside the first.

    Attributes:
        pairs: the first model with each of the others.
        closest: all pairs, those with the closest routers first.
    """

    models: tuple[Compared, ...]
    pairs: tuple[PairVerdict, ...]
    closest: tuple[Closeness, ...]

    @property
    def sentence(self) -> str:
        """The verdict on the first pair."""
        return self.pairs[0].sentence

    @property
    def makes_sense(self) -> bool:
        """Whether a merge of the first model with each of the others does."""
        return all(pair.makes_sense for pair in self.pairs)

    @property
    def bytes_fetched(self) -> int:
        """From the Hub, for this verdict."""
        return sum(model.bytes_fetched for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "sentence": self.sentence,
            "makes_sense": self.makes_sense,
            "bytes_fetched": self.bytes_fetched,
            "models": [asdict(model) for model in self.models],
            "pairs": [pair.to_dict() for pair in self.pairs],
            "closest": [asdict(one) for one in self.closest],
        }

    def table(self) -> str:
        """For a terminal: the sentences first."""
        sentences = [pair.sentence for pair in self.pairs]
        blocks = ["\n".join(sentences), "\n".join(aligned([_model_row(model) for model in self.models]))]
        blocks += ["\n".join(_pair_lines(pair, len(self.pairs) > 1)) for pair in self.pairs]
        if len(self.closest) > 1:
            blocks.append("\n".join(["closest by their routers", *aligned([_closeness_row(one) for one in self.closest])]))
        return "\n\n".join(blocks)


def letters(count: int) -> list[str]:
    """A, B, C and on.

    Example:
        >>> letters(3), letters(28)[-2:]
        (['A', 'B', 'C'], ['A2', 'B2'])
    """
    alphabet = string.ascii_uppercase
    return [alphabet[i % 26] + (str(i // 26 + 1) if i >= 26 else "") for i in range(count)]


def _model_row(model: Compared) -> tuple[str, str]:
    facts = [f"{model.source}{f' at {model.commit[:12]}' if model.commit else ''}"]
    if model.family:
        facts.append(f"{model.family}, {model.moe_layers} MoE layers of {model.experts} experts")
    facts.append(size_of(model.nbytes))
    if model.bytes_fetched:
        facts.append(f"fetched {size_of(model.bytes_fetched)} of it")
    return model.letter, "; ".join(facts)


def _pair_lines(pair: PairVerdict, named: bool) -> list[str]:
    renamed = "" if pair.b == SECOND else f", which verbs call {SECOND}"
    lines = [f"{pair.a} and {pair.b}{renamed}"] if named else []
    rows: list[tuple[str, str]] = []
    for verdict, count in counted(pair.layers).items():
        if count:
            of_kind = [layer for layer in pair.layers if layer.verdict == verdict]
            rows.append((verdict, f"{count} of {len(pair.layers)} layers: {ranges([layer.layer for layer in of_kind])}"))
            rows += [("", text) for text in _shown([_layer_in_words(layer) for layer in of_kind if _is_notable(layer)])]
    if pair.outside.median_cosine is not None:
        matrices = f"median over {len(pair.outside.cosines)} matrices"
        rows.append(("outside the blocks", f"cosine {pair.outside.median_cosine:.3f}, {matrices}"))
    rows += [(one.what, f"{pair.a} has {one.a}, {pair.b} has {one.b}") for one in pair.differences]
    said: dict[tuple[str, ...], str] = {}  # refusals, by the first verb that has them
    for outlook in pair.verbs:
        first = said.setdefault(outlook.reasons, outlook.verb)
        if outlook.reasons and first != outlook.verb:
            rows.append((outlook.verb, f"refused, as {first}"))
            continue
        rows.append((outlook.verb, _outlook_in_words(outlook)))
        rows += [("", reason.replace("\n", "\n  ")) for reason in outlook.reasons]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        head, *more = text.split("\n")
        lines += [f"{name:<{width}}  {head}".rstrip(), *(f"{'':<{width}}  {line}" for line in more)]
    return lines + _warnings(pair.verbs)


def _warnings(verbs: Sequence[Outlook]) -> list[str]:
    """What verbs say of the two models, each once, with the verbs that say it."""
    said: dict[str, list[str]] = {}
    for outlook in verbs:
        for warning in outlook.warnings:
            said.setdefault(warning, []).append(outlook.verb)
    return [f"{', '.join(names)}: {warning}" for warning, names in said.items()]


def _is_notable(layer: LayerVerdict) -> bool:
    return layer.verdict == "shuffled" or bool(layer.why)


def _layer_in_words(layer: LayerVerdict) -> str:
    facts = []
    if layer.verdict == "shuffled":
        moved = "experts moved" if layer.moved is None else f"{layer.moved} of {layer.experts} experts moved"
        facts.append(moved + (f", margin {layer.margin:.2f}" if layer.by == "routers" and layer.margin is not None else ""))
    facts += [layer.why] if layer.why else []
    return f"layer {layer.layer}: {'; '.join(facts)}"


def _shown(lines: Sequence[str]) -> list[str]:
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"and {more} more"] if more > 0 else [])]


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in ascending order, runs of them shortened.

    Example:
        >>> ranges([0, 1, 2, 5, 7, 8])
        '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _outlook_in_words(outlook: Outlook) -> str:
    plan = outlook.plan
    if plan is None:
        return "refused:"
    facts: Mapping[str, str | None] = {
        "download": size_of(plan.bytes_to_download) if plan.bytes_to_download else None,
        "read": size_of(plan.bytes_to_read),
        "write": size_of(plan.bytes_to_write) if plan.bytes_to_write else None,
        "memory": size_of(plan.peak_memory),
    }
    words = [f"{name} {value}" for name, value in facts.items() if value]
    if outlook.seconds is not None:
        words.append(f"at most {time_of(outlook.seconds)}" + (f" ({outlook.rates})" if outlook.rates else ""))
    if plan.problem:
        words.append("there is no room here for the output")
    return f"possible: {', '.join(words)}"


def _closeness_row(one: Closeness) -> tuple[str, str, str]:
    distance = "no layers in common" if one.router_distance is None else f"distance {one.router_distance:.3g}"
    return f"{one.a} {one.b}", distance, f"{one.related} of {one.layers} layers of one lineage" if one.layers else ""
