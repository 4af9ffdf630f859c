"""A measurement for its readers: a table for the terminal, and report.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_moe_lmc.perplexity.bootstrap import Bootstrap, Interval
from hf_moe_lmc.perplexity.curve import BarrierCurve
from hf_moe_lmc.perplexity.drawing import POOLED, path_names
from hf_moe_lmc.perplexity.references import MEASURES, MERGES, REPAIRED, Comparison, Difference, References
from hf_moe_lmc.perplexity.results import PathResult, Span, Summary
from hf_moe_lmc.perplexity.verdict import MIDPOINT, MergedAt, Verdict
from hf_moe_lmc.perplexity.wording import capital, no_barrier, of_excess
from hf_moe_lmc.plots.values import layers_in_words
from hf_moe_lmc.runtime.tables import aligned, markdown_table

Paths = Mapping[str, PathResult]  # by name; all share their windows and their bootstrap
Layers = Mapping[Span, PathResult]  # by first and last layer
Own = Mapping[str, Mapping[str, Any]]  # by side: nll, because
Routing = Sequence[Mapping[str, Any]]  # records as in report.json

BARRIERS = ("path", "barrier, nats", "at t", "over the worse end", "perplexity ratio", "area", "nll of A", "nll of B")
LAYERS = ("layers", "barrier, nats", "at t")


def void(disagreement: str | None) -> list[str]:
    """What comes before the sentences of a verdict that is not to be relied on; nothing where there is no disagreement.

    Example:
        >>> void("the two paths do not end in one model"), void(None)
        (['Not to be relied on: the two paths do not end in one model.'], [])
    """
    return [] if disagreement is None else [f"Not to be relied on: {disagreement}."]


def verdict(found: Verdict, disagreement: str | None = None) -> list[str]:
    """The sentences of a verdict, then what makes them uncertain; what makes them void comes first."""
    return [
        *void(disagreement),
        *found.sentences,
        *(f"Mind: {caution}." for caution in found.cautions if caution != disagreement),
    ]


def called(name: str, left: str) -> str:
    """A path or a merge in words; `left`: what merges that have left the straight line are called."""
    return left if name == REPAIRED else name


def by_text(found: References, left: str = REPAIRED) -> list[str]:
    """The models on each text and on their mean, then how far merges are from the better parent, for a terminal."""
    figures, differences = figure_rows(found, left), difference_rows(found, left)
    return [
        f"at t = {found.t:.3g}: losses in nats per token{_of_shares(found)}{_of_ensemble(found)}",
        *aligned(figures, align=">"),
        "",
        f"less the better parent on that text, at t = {found.t:.3g}{_of_signs(found)}",
        *aligned(differences, align=">"),
    ]


def _of_shares(found: References) -> str:
    what = {"accuracy": "next tokens that are the first choice in %", "cloze": "cloze questions answered right in %"}
    return "".join(f"; {what[measure]}" for measure in MEASURES if measure in found.beside.shares)


def _of_signs(found: References) -> str:
    """Which sign of a difference is good, where that is not the same everywhere."""
    return "; of losses, below 0 is better, of shares above 0" if any(found.beside.shares.values()) else ""


def _of_ensemble(found: References) -> str:
    """What is averaged in the ensemble, and with which weights."""
    kinds = found.ensemble_of
    if not kinds:
        return ""
    weights = "equal weights" if found.t == MIDPOINT else f"weights {1 - found.t:.3g} of A and {found.t:.3g} of B"
    taken = set(kinds.values())
    of = next(iter(taken)) if len(taken) == 1 else ", ".join(f"{kind} on {name}" for name, kind in kinds.items())
    return f"; ensemble: mean of {of}, {weights}"


def _compared(found: References) -> Iterator[tuple[str, Comparison]]:
    """A title and a comparison for each row: losses by text, then the shares that were measured."""
    for name, scope in found.scopes:
        yield name, found.mean if scope is None else found.texts[scope]
    for measure in MEASURES:
        for name, scope in found.scopes:
            shares = found.shares(measure, scope)
            if shares is not None:
                yield f"{measure}, {name}", shares


def _merges(found: References) -> list[str]:
    """The merges that were measured, the ensemble included."""
    return [name for name in MERGES if found.mean.values[name] is not None]


def figure_rows(found: References, left: str = REPAIRED) -> list[list[str]]:
    """Parents, their mean, the better one and merges, with a head; a row for each text, and one for their mean."""
    merges = _merges(found)
    rows = [["text", "A", "B", "mean of A, B", "better", *(called(merge, left) for merge in merges)]]
    for title, on in _compared(found):
        form = _percent if on.higher else _nats
        values = [on.loss("a"), on.loss("b"), on.parents]
        better = "equal" if on.loss("a") == on.loss("b") else on.better.upper()
        rows.append([title, *map(form, values), better, *(form(on.loss(merge)) for merge in merges)])
    return rows


def difference_rows(found: References, left: str = REPAIRED) -> list[list[str]]:
    """How far merges are from the better parent, with paired intervals and a head; rows as in `figure_rows`."""
    merges = _merges(found)
    rows = [["text", *(called(merge, left) for merge in merges)]]
    for title, on in _compared(found):
        scale, form = (100, "+.1f") if on.higher else (1, "+.4f")
        differences = [on.differences.get(merge) for merge in merges]
        rows.append(
            [
                title,
                *("" if not d else _difference(on.to_better(m), scale, form) for m, d in zip(merges, differences, strict=True)),
            ]
        )
    return rows


def _difference(found: Difference, scale: float, form: str) -> str:
    interval = found.interval and (scale * found.interval[0], scale * found.interval[1])
    return f"{scale * found.value:{form}}{_brackets(interval, form)}"


def _nats(loss: float) -> str:
    return f"{loss:.4f}"


def _percent(share: float) -> str:
    """A share in percent; empty where it was not measured."""
    return "" if math.isnan(share) else f"{100 * share:.1f}"


def table(paths: Paths, summary: Summary, *, several: bool = False, left: str = REPAIRED) -> list[str]:
    """Losses at each point in columns, then a sentence for each path; nats per token.

    Args:
        several: whether the losses are over several texts.
        left: what merges that have left the straight line are called.
    """
    curves = [path.curve for path in paths.values()]
    rows = [["t", *(title for name in paths for title in (f"{called(name, left)} nll", "perplexity"))]]
    for t in curves[0].t:
        rows.append([f"{t:.3f}", *(cell for curve in curves for cell in _loss_cells(curve, t))])
    lines = [POOLED] if several else []
    lines += [*aligned(rows, align=">", least=(6, *[12] * (len(rows[0]) - 1))), ""]
    lines += [sentence(name, path, summary, left) for name, path in paths.items() if name != REPAIRED or _differ(paths)]
    bootstrap = _bootstrap(paths)
    if summary.difference is not None and bootstrap.count > 1:
        lines.append(f"naive - aligned: {summary.difference:.4f}{_brackets(summary.difference_interval, '.4f')}")
    if bootstrap.count > 1:
        lines.append(f"brackets: {100 * bootstrap.level:g} % intervals over {bootstrap.count} {bootstrap.unit}s")
    return lines


def _differ(paths: Paths) -> bool:
    """Whether any merge has left the straight line: where all repairs were refused, none has."""
    path = paths.get(REPAIRED)
    lines = [each for name, each in paths.items() if name == "aligned" or (name == "naive" and "aligned" not in paths)]
    if path is None:
        return False
    return any(path.curve.nll != tuple(line.curve.nll[line.curve.t.index(t)] for t in path.curve.t) for line in lines)


def _loss_cells(curve: BarrierCurve, t: float) -> tuple[str, str]:
    """Loss and perplexity of a path; empty where it was not measured."""
    if t not in curve.t:
        return "", ""
    i = curve.t.index(t)
    return f"{curve.nll[i]:.4f}", f"{curve.perplexity[i]:.4f}"


def layer_rows(layers: Layers) -> list[str]:
    """The barriers of single layers and of ranges, for a terminal."""
    return [
        "one layer, or the layers of a range together, from A to aligned B; all else stays A",
        *aligned([LAYERS, *_layer_cells(layers)], align=">"),
    ]


def own_losses(own: Own) -> list[str]:
    """The losses of the models by themselves, where their configuration or vocabulary is not that of the path.

    Example:
        >>> own_losses({"b": {"nll": 2.5, "because": ["num_experts_per_tok"]}})
        ['B by itself: 2.5000 nats per token (its own num_experts_per_tok)']
    """
    return [
        f"{side.upper()} by itself: {values['nll']:.4f} nats per token (its own {', '.join(values['because'])})"
        for side, values in own.items()
    ]


def sentence(name: str, path: PathResult, summary: Summary, left: str = REPAIRED) -> str:
    """The barrier of one path; of merges that lie on no straight line, how far they are above it."""
    curve, percent = path.curve, summary.aligned_percent_of_naive
    if name == REPAIRED:
        return of_excess(left, curve, path.barrier_interval)
    if (none := no_barrier(curve)) is not None:
        return f"barrier, {name} path: {none}; area {round(curve.area, 4) + 0.0:+.4f}"
    text = f"barrier, {name} path: {curve.barrier:.4f} nats per token{_brackets(path.barrier_interval, '.4f')}"
    text += f" at t = {curve.barrier_t:.3g}; area {curve.area:+.4f}"
    return text + (f"; {percent:.1f} % of the naive barrier" if name == "aligned" and percent is not None else "")


def markdown(
    names: tuple[str, str],
    paths: Paths,
    summary: Summary,
    *,
    verdict: Verdict,
    evaluation: Mapping[str, Any],
    layers: Layers | None,
    routing: Routing,
    disagreement: str | None = None,
    own: Own,
    merged_at: MergedAt | None = None,
    repair: Sequence[str] = (),
) -> str:
    """The content of report.md.

    Args:
        names: of A and B.
        verdict: what is said first.
        evaluation: as in report.json.
        layers: None: not measured.
        disagreement: what makes the figures void.
        own: losses of the models by themselves, by side.
        merged_at: the merge that the report is about; where its t was given there is no curve, and no plot.
        repair: what was done to leave the straight line, in sentences; empty: nothing.
    """
    a, b = names
    title = f"Perplexity barrier between {a} and {b}" if merged_at is None else f"Merge of {a} and {b} at t = {merged_at.t:.6g}"
    path = paths["aligned" if "aligned" in paths else "naive"]
    parts = [
        f"# {title}\n",
        *([] if disagreement is None else [f"**Not to be relied on.** {capital(disagreement)}.\n"]),
        *(
            f"{'**' if number == 0 else ''}{line}{'**' if number == 0 else ''}\n"
            for number, line in enumerate(verdict.sentences)
        ),
        *(f"**Mind:** {line}.\n" for line in verdict.cautions if line != disagreement),
    ]
    if merged_at is not None and not merged_at.chosen:
        parts += [
            _references(verdict, stored=True),
            *_repair(repair),
            *_own_lines(own),
            "## What is measured\n",
            f"{_tokens(path, evaluation)}\n",
        ]
        return "\n".join([*parts, _uncertainty(_bootstrap(paths), drawn=False)])
    parts += [
        "![loss along the path](barrier.png)\n",
        _references(verdict, stored=merged_at is not None),
        "## The barrier\n",
        *([f"Of {POOLED}.\n"] if verdict.references.several else []),
        _table_of_barriers(paths),
        *_comparison(summary),
        *_repair(repair, paths, verdict.left),
        *_own_lines(own),
        _measurement(path, evaluation, aligned="aligned" in paths),
        _uncertainty(_bootstrap(paths)),
    ]
    if layers is not None:
        parts.append(_layers(layers))
    if routing:
        parts.append(_routing(routing))
    return "\n".join(parts)


def _repair(said: Sequence[str], paths: Paths | None = None, left: str = REPAIRED) -> Iterator[str]:
    """What was done to leave the straight line and, where there is a curve, how far the merges are above that line."""
    if not said:
        return
    yield f"## {'Widening' if left != REPAIRED else 'Repair'}\n"
    yield "\n".join(f"- {capital(sentence.removeprefix('repair: '))}." for sentence in said) + "\n"
    if paths is not None and _differ(paths):
        found = of_excess(left, paths[REPAIRED].curve, paths[REPAIRED].barrier_interval)
        yield f"{capital(found)}. They lie on no straight line, so this is not the barrier above.\n"


def _own_lines(own: Own) -> Iterator[str]:
    yield from (f"{capital(line)}.\n" for line in own_losses(own))


def _references(verdict: Verdict, *, stored: bool = False) -> str:
    """Losses by text at the t of the sentences, and halfway where that is another.

    Args:
        stored: merges are as an output stores them.
    """
    merges = " Merges have their weights as the output stores them.\n" if stored else "\n"
    mean = " `mean` is the unweighted mean of the texts." if verdict.references.several else ""
    parts = [
        "## Beside the parents\n\nLosses in nats per token. Each parent is by itself, under its own configuration and over "
        f"its own vocabulary.{mean}{merges}Differences are from the better parent on that text, with paired intervals.\n"
    ]
    for found in (verdict.compared, *([verdict.references] if verdict.references.t != verdict.t else [])):
        for title, (header, *rows) in (
            ("", figure_rows(found, verdict.left)),
            (f", less the better parent{_of_signs(found)}", difference_rows(found, verdict.left)),
        ):
            parts.append(f"At t = {found.t:.3g}{title}:\n\n{markdown_table(header, rows)}")
        if found.ensemble_of:
            parts.append(f"{capital(_of_ensemble(found).removeprefix('; '))}.\n")
        parts += _of_measures(found)
    return "\n".join(parts)


def _of_measures(found: References) -> list[str]:
    """What the rows of shares are."""
    said = {
        "accuracy": "`accuracy` is the share of the scored tokens that are the model's first choice, in percent.\n",
        "cloze": "`cloze` is the share of questions answered right, in percent: which of four continuations follows? The "
        "questions are made from\nthe evaluated text itself.\n",
    }
    return [said[measure] for measure in MEASURES if measure in found.beside.shares]


def _table_of_barriers(paths: Paths) -> str:
    rows = []
    for name in reversed([name for name in paths if name != REPAIRED]):
        path, curve = paths[name], paths[name].curve
        rows.append(
            [
                name,
                f"{curve.barrier:.4f}{_brackets(path.barrier_interval, '.4f')}",
                f"{curve.barrier_t:.3g}",
                f"{curve.barrier_worse_end:.4f}",
                f"{curve.perplexity_ratio:.4f}",
                f"{curve.area:+.4f}{_brackets(path.area_interval, '+.4f')}",
                f"{curve.nll[0]:.4f}",
                f"{curve.nll[-1]:.4f}",
            ]
        )
    return markdown_table(BARRIERS, rows, rule=f"| {'|'.join(['---'] * len(BARRIERS))} |")


def _comparison(summary: Summary) -> Iterator[str]:
    if summary.difference is not None:
        brackets = _brackets(summary.difference_interval, ".4f")
        yield f"Alignment lowers the barrier by {summary.difference:.4f} nats per token{brackets}.\n"
    if summary.aligned_percent_of_naive is not None:
        yield f"The aligned barrier is {summary.aligned_percent_of_naive:.1f} % of the naive one.\n"
    if summary.endpoint_change is not None:
        change = f"{summary.endpoint_change:+.1e} nats (it should not beyond rounding)"
        yield f"Alignment changed the loss of B itself by {change}.\n"


def _measurement(path: PathResult, evaluation: Mapping[str, Any], *, aligned: bool = True) -> str:
    per_byte = path.bits_per_byte
    moved = ", the aligned one takes B with its experts and hidden units moved to where A has theirs" if aligned else ""
    ends = f" The ends have {per_byte[0]:.4f} and {per_byte[-1]:.4f} bits per byte." if per_byte else ""
    return (
        "## What is measured\n\n"
        "The barrier is the largest rise of the loss, in nats per token, above the straight line between the losses of "
        "the two ends, over the points of the grid: max over t of L((1 - t) A + t B') - [(1 - t) L(A) + t L(B')]. "
        f"The naive path takes B as it is{moved}. "
        f"These are {len(path.t)} points on the same text. {_tokens(path, evaluation)}{ends} "
        "A low barrier here says that the line between these two checkpoints is passable on this text; it does not prove "
        "that the models are connected in general.\n"
    )


def _tokens(path: PathResult, evaluation: Mapping[str, Any]) -> str:
    """What was evaluated on, in a sentence."""
    overlap = " that overlap (each scored where the one before ended)" if path.windows.context_only else ""
    bos = "each opened by a BOS token" if evaluation["bos"] else "without BOS"
    return (
        f"All models see the same {evaluation['tokens_scored']} predicted tokens in {evaluation['windows']} windows of at most "
        f"{evaluation['context']} tokens{overlap}, {bos}, in {evaluation['dtype']}."
    )


def _uncertainty(bootstrap: Bootstrap, *, drawn: bool = True) -> str:
    band = (
        " The band in the plot is the pointwise interval of the excess: each resample has its own line between the ends, so "
        "the band has no width there."
    )
    caveat = f" Mind: {bootstrap.caveat}." if bootstrap.caveat else ""
    if bootstrap.count < 2:
        return f"## How sure\n\nNo intervals.{caveat}\n"
    return (
        "## How sure\n\n"
        f"Intervals in brackets hold {100 * bootstrap.level:g} %: a paired bootstrap over {bootstrap.count} {bootstrap.unit}s "
        f"({bootstrap.replicates} resamples, seed {bootstrap.seed}), the same resample at all points of all paths, means "
        "weighted by token, percentiles. They tell how figures would vary with other text of the same kind, not with other "
        f"models.{band if drawn else ''}{caveat}\n"
    )


def _layer_cells(layers: Layers) -> list[tuple[str, str, str]]:
    return [
        (
            layers_in_words(*span),
            f"{path.curve.barrier:.4f}{_brackets(path.barrier_interval, '.4f')}",
            f"{path.curve.barrier_t:.3g}",
        )
        for span, path in layers.items()
    ]


def _layers(layers: Layers) -> str:
    return (
        "## Layer by layer\n\n![barrier of each layer](layerwise.png)\n\n"
        "The barrier where one layer, or the layers of a range together, go from A to aligned B and all else stays A.\n\n"
        + markdown_table(LAYERS, _layer_cells(layers), rule="|---|---|---|")
    )


def _routing(routing: Routing) -> str:
    images = "".join(
        f"![routing, {path} path](routing-{path}.png)\n![load, {path} path](load-{path}.png)\n" for path in path_names(routing)
    )
    return (
        f"## Routing along the path\n\n{images}\n"
        "Agreement is the share of the experts chosen for a token that A, or B in the coordinates of the path, would "
        "choose for it as well. Where both fall on the way, tokens meet experts that neither model would choose for them.\n"
    )


def _bootstrap(paths: Paths) -> Bootstrap:
    return next(iter(paths.values())).bootstrap


def _brackets(interval: Interval | None, form: str) -> str:
    """An interval in brackets, to follow a number; empty where there is none."""
    return "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"
