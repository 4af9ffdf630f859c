"""The verb `compare`: the verdict before anything is downloaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.mtp import has_own_prefix
from hf_moe_lmc.checkpoints.pair import same_weights
from hf_moe_lmc.checkpoints.source import Repository
from hf_moe_lmc.errors import InputError, MoELMCWarning
from hf_moe_lmc.lineage.judging import Findings, judge_all_routers, judge_layers
from hf_moe_lmc.lineage.outside import OutsideSample, sample_outside
from hf_moe_lmc.lineage.verdict import LayerVerdict, finding_and_advice
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.verbs.comparison import SECOND, Closeness, Compared, Comparison, Difference, Outlook, PairVerdict, letters
from hf_moe_lmc.verbs.inputs import Model
from hf_moe_lmc.verbs.inspect import bytes_by_dtype, layouts_of
from hf_moe_lmc.verbs.outlook import SharedOpener, outlooks

Findable = Mapping[tuple[int, int], Findings]


def compare(a: Model, b: Model, *others: Model) -> Comparison:
    """Says whether models belong together, before anything is downloaded.

    Of a Hub id are fetched: configuration, tokenizer files, headers and router rows, by HTTP ranges; and a small sample of
    rows outside the MoE blocks and, where routers do not tell, of experts. Nothing is written.

    Args:
        a, b, others: local folders or Hub ids (OWNER/NAME[@REVISION]); each is compared with the first.

    Returns:
        For each pair the lineage of every MoE layer, what differs, and what each verb would do.

    Raises:
        InputError: a model cannot be opened: it is not there, or damaged.
        HubError: the Hub cannot be reached.

    Example:
        >>> import hf_moe_lmc as lmc
        >>> found = lmc.compare("model-a", "model-b")
        >>> print(found.sentence)
        B is of the same lineage as A, 3 of 3 layers shuffled: align first
        >>> found.makes_sense, found.bytes_fetched
        (True, 0)
    """
    names = [a, b, *others]
    with ExitStack() as stack:
        opener = SharedOpener(stack)
        checkpoints = [opener.open(name, torch.float32) for name in names]
        models, problems = _recognised(opener, checkpoints)
        known = [i for i, model in enumerate(models) if model is not None]
        routers = _routers(models, known)
        pairs = []
        for i in range(1, len(names)):
            outside = sample_outside(checkpoints[0], checkpoints[i], _outside(checkpoints[0], models[0]))
            layers = _layers(models[0], models[i], routers.get((0, i)))
            verbs = outlooks(names[0], names[i], opener)
            pairs.append(_pair(i, checkpoints, models, tuple(layers), outside, verbs))
        closest = sorted((_closeness(i, j, routers.get((i, j), {})) for i, j in combinations(known, 2)), key=_distance)
        compared = [_compared(i, checkpoints[i], models[i], problems[i]) for i in range(len(names))]
        return Comparison(tuple(compared), tuple(pairs), tuple(closest))


def _recognised(opener: SharedOpener, checkpoints: Sequence[Checkpoint]) -> tuple[list[MoEModel | None], list[str | None]]:
    """The models, None where one is not a mixture of experts that is known; and the reasons for that."""
    models: list[MoEModel | None] = []
    problems: list[str | None] = []
    for checkpoint in checkpoints:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MoELMCWarning)  # each verb says it
            try:
                models.append(opener.recognise(checkpoint))
                problems.append(None)
            except InputError as error:
                models.append(None)
                problems.append(str(error))
    return models, problems


def _routers(models: Sequence[MoEModel | None], known: Sequence[int]) -> Findable:
    """What routers say of each pair of models that are known."""
    there = [model for model in models if model is not None]
    found = judge_all_routers(there) if len(there) > 1 else {}
    return {(known[i], known[j]): findings for (i, j), findings in found.items()}


def _outside(checkpoint: Checkpoint, model: MoEModel | None) -> Sequence[str]:
    """Names of the tensors outside the MoE blocks; of a model that is not known, all of them."""
    return list(checkpoint.tensors) if model is None else model.outside


def _layers(a: MoEModel | None, b: MoEModel | None, routers: Findings | None) -> list[LayerVerdict]:
    return judge_layers(a, b, routers) if a is not None and b is not None and routers else []


def _pair(
    number: int,
    checkpoints: Sequence[Checkpoint],
    models: Sequence[MoEModel | None],
    layers: tuple[LayerVerdict, ...],
    outside: OutsideSample,
    verbs: tuple[Outlook, ...],
) -> PairVerdict:
    letter = letters(number + 1)[number]
    merges = [outlook for outlook in verbs if outlook.verb.startswith("merge")]
    possible = any(outlook.possible for outlook in merges)
    fitting = any(outlook.possible for outlook in verbs)
    finding, advice = finding_and_advice(layers, outside, letter)
    said = f"{finding}: {advice}"
    if same_weights(checkpoints[0], checkpoints[number]):
        said = f"A and {letter} are the same checkpoint: a merge changes nothing"
    elif not possible and not (fitting and outside.unrelated):
        refused = _in_one_line(merges[0].reasons[0], letter)
        found = f"{finding}; but no merge is possible" if fitting else f"A and {letter} cannot be merged"
        said = f"{found}: {refused}"
    return PairVerdict(
        a="A",
        b=letter,
        sentence=said,
        makes_sense=possible and not outside.unrelated,
        layers=layers,
        outside=outside,
        differences=tuple(_differences(checkpoints[0], checkpoints[number], models[0], models[number])),
        verbs=verbs,
    )


def _in_one_line(reason: str, letter: str) -> str:
    """A reason of several lines in one: its heading, and the first of what it lists. Verbs call the other model B."""
    head, *more = [line.strip() for line in reason.splitlines()]
    renamed = "" if letter == SECOND else f"with {letter} for {SECOND}, "
    return renamed + (f"{head} {more[0]}" if more else head)


def _differences(a: Checkpoint, b: Checkpoint, model_a: MoEModel | None, model_b: MoEModel | None) -> list[Difference]:
    """Facts of the files that differ, which the verbs take care of."""
    sides = ((a, model_a), (b, model_b))
    facts = {
        "model type": [str(one.config.get("model_type")) for one, _ in sides],
        "dtypes": [", ".join(sorted(bytes_by_dtype(one))) for one, _ in sides],
        "quantization": [_quantization(one) for one, _ in sides],
        "layout": [" and ".join(layouts_of(model)) if model else "" for _, model in sides],
        "multi-token prediction": [_extra(one, model) for one, model in sides],
        "side files": [", ".join(sorted(set(one.side_files()) - set(other.side_files()))) for one, other in ((a, b), (b, a))],
    }
    return [Difference(what, one or "none", other or "none") for what, (one, other) in facts.items() if one != other]


def _quantization(checkpoint: Checkpoint) -> str:
    found = checkpoint.stored.quantization
    return found.method if found else ""


def _extra(checkpoint: Checkpoint, model: MoEModel | None) -> str:
    """How many tensors belong to multi-token prediction."""
    is_extra = model.is_extra if model else has_own_prefix
    count = sum(map(is_extra, checkpoint.tensors))
    return f"{count} tensors" if count else ""


def _closeness(i: int, j: int, findings: Findings) -> Closeness:
    names = letters(max(i, j) + 1)
    sums = [finding.distance for finding in findings.values() if finding.distance is not None]
    apart, norm = (sum(values) for values in zip(*sums, strict=True)) if sums else (0.0, 0.0)
    related = sum(finding.says in ("in place", "shuffled", "alike") for finding in findings.values())
    return Closeness(names[i], names[j], math.sqrt(apart / norm) if norm else None, len(findings), related)


def _distance(one: Closeness) -> float:
    return math.inf if one.router_distance is None else one.router_distance


def _compared(number: int, checkpoint: Checkpoint, model: MoEModel | None, problem: str | None) -> Compared:
    source = checkpoint.source
    return Compared(
        letter=letters(number + 1)[number],
        source=checkpoint.name,
        commit=source.commit,
        family=model.family.name if model else None,
        moe_layers=len(model.layers) if model else 0,
        experts=model.sizes["expert"] if model else None,
        nbytes=checkpoint.stored.nbytes,
        bytes_fetched=source.traffic.nbytes if isinstance(source, Repository) else 0,
        ranges=source.traffic.ranges if isinstance(source, Repository) else 0,
        problem=problem,
    )
