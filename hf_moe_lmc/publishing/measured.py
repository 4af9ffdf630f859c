"""What a card says of a measured barrier: the verdict, the losses of checkpoint and parents, and results for the Hub."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult

from hf_moe_lmc.checkpoints.source import looks_local
from hf_moe_lmc.errors import shown
from hf_moe_lmc.runtime.tables import aligned, markdown_table

OTHERS = ("naive", "aligned", "repaired", "ensemble")  # what a checkpoint is compared with besides its parents
MEASURES = {"loss": (1, ".4f", "+.4f"), "accuracy": (100, ".1f", "+.1f"), "cloze": (100, ".1f", "+.1f")}  # scale, forms
SAID = (
    "Losses are in nats per token, accuracy (next tokens) and cloze (questions from the same text) in percent. A loss is "
    "better where it is below the better parent's, a share where it is above."
)
SAME_POINT = 1e-9  # values of t no further apart are one point


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measured barrier, as far as the card of a checkpoint on its path needs it.

    Attributes:
        report: the content of report.json (`BarrierReport.to_dict`, or the file).
        verdict: sentences, the answer first; empty: the barriers of the paths are said.
        t: the checkpoint is this point of the path; None: it is none of them.
        path: `aligned` or `naive`, the path that it is on.
        plot: a picture that lies beside the card, by its name there.
    """

    report: Mapping[str, Any]
    verdict: Sequence[str] = ()
    t: float | None = None
    path: str = "aligned"
    plot: str | None = None

    def section(self) -> str:
        """The section of the card, in Markdown."""
        said = list(self.verdict) or [self._barrier(name) for name in self.report["paths"]]
        mind = [f"**Mind:** {shown(one, 1000)}.\n" for one in self.cautions()] if self.verdict else []
        parts = ["## Results\n", *self._void(), *(f"{sentence}\n" for sentence in said), *mind]
        if self.plot:
            parts.append(f"![Loss along the path from A to B]({self.plot})\n")
        parts += [self._losses(), self._text()]
        return "\n".join(parts)

    def _void(self) -> list[str]:
        """What comes first where the figures are not to be relied on."""
        because = self.report.get("disagreement")
        return [f"**Not to be relied on:** {shown(because, 1000)}.\n"] if because else []

    def cautions(self) -> list[str]:
        """What to know before relying on the sentences of the verdict, besides what makes it void."""
        found = (self.report.get("verdict") or {}).get("cautions", [])
        return [one for one in found if one != self.report.get("disagreement")]

    def results(self) -> list[EvalResult]:
        """Perplexity and loss of the checkpoint on each text, for the metadata of the card; empty where it was not measured."""
        evaluation = self.report["evaluation"]
        text = evaluation["text"]
        arguments = {key: evaluation[key] for key in ("context", "stride", "tokens_scored") if key in evaluation}
        common: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text generation", "dataset_args": arguments}
        common["dataset_type"] = "text"
        if text["kind"] == "dataset":
            common |= {f"dataset_{key}": text.get(key) for key in ("config", "split", "revision")}
            common["dataset_type"] = "text" if _is_local(text["name"]) else text["name"]
        return [
            EvalResult(
                metric_type=kind,
                metric_name=metric,
                metric_value=round(value, 6),
                dataset_name=name,
                **{"dataset_config": name, **common},  # which tells files apart: the Hub takes results of one name together
            )
            for name, loss in self._own_losses().items()
            if math.isfinite(loss)
            for kind, metric, value in (
                ("perplexity", "Perplexity", math.exp(loss)),
                ("nll", "Loss, nats per token", loss),
            )
        ]

    def _own_losses(self) -> dict[str, float]:
        """Of the checkpoint on each text, nats per token."""
        if texts := self._by_text():
            return {name: losses[self.path] for name, losses in texts.items() if losses.get(self.path) is not None}
        index = self._index()
        loss = None if index is None else self.report["paths"][self.path]["nll"][index]
        return {} if loss is None else {_text_name(self.report["evaluation"]["text"]): loss}

    def _compared(self) -> Mapping[str, Any] | None:
        """Parents and merges by text at the point of the checkpoint, as in report.json; None: the report has them elsewhere."""
        for key in ("verdict", "references"):
            found: Mapping[str, Any] | None = self.report.get(key)
            if found and self.t is not None and abs(found["t"] - self.t) <= SAME_POINT:
                return found
        return None

    def _by_text(self) -> Mapping[str, Mapping[str, Any]]:
        """Losses by text and model at the point of the checkpoint; empty where there is one text, or the point is another."""
        found = self._compared()
        texts: Mapping[str, Mapping[str, Any]] = found["texts"] if found else {}
        return texts if len(texts) > 1 else {}

    def _index(self) -> int | None:
        """Where the checkpoint stands on its path."""
        curve = self.report["paths"].get(self.path)
        if self.t is None or curve is None:
            return None
        near = [i for i, t in enumerate(curve["t"]) if abs(t - self.t) <= SAME_POINT]
        return near[0] if near else None

    def _losses(self) -> str:
        """The checkpoint beside its parents and the other merges, in nats per token."""
        found = self._compared()
        beside = [] if found is None else [self._beside(found)]
        if self._by_text():
            return "".join(beside)
        reference = "naive" if "naive" in self.report["paths"] else "aligned"
        rows = [["A", *self._row(reference, 0)], ["B", *self._row(reference, -1)]]
        index = self._index()
        if index is not None:
            rows.append(["this checkpoint", *self._row(self.path, index)])
        level = 100 * self.report["statistics"]["level"]
        return "\n".join([markdown_table(["", "loss, nats per token", f"{level:g} % interval", "perplexity"], rows), *beside])

    def table(self) -> list[str]:
        """The checkpoint beside its parents and the other merges, for a terminal; empty where that is not known."""
        found = self._compared()
        head, *rows = self._rows_beside(found) if found else [[]]
        return [*aligned([head, *rows], align=">"), "", SAID] if rows else []

    def _beside(self, found: Mapping[str, Any]) -> str:
        """The checkpoint beside its parents and the other merges, in Markdown."""
        head, *rows = self._rows_beside(found)
        return f"{markdown_table(head, rows)}\n{SAID}\n" if rows else ""

    def _rows_beside(self, found: Mapping[str, Any]) -> list[list[str]]:
        """A head, a row for each text, and one for their mean where there are several; with right answers if counted."""
        same = {self.path} if (self.report.get("repair") or {"accepted": True})["accepted"] else {self.path, "repaired"}
        others = [name for name in OTHERS if name not in same and found["mean"].get(name) is not None]
        head = ["", "A", "B", "mean of A, B", "better", "this checkpoint", "less the better", *others]
        scopes = {**found["texts"], **({"mean": found["mean"]} if len(found["texts"]) > 1 else {})}
        rows = []
        for measure, (scale, form, signed) in MEASURES.items():
            for name, on in scopes.items():
                figures = on if measure == "loss" else on.get(measure)
                if not figures or "parents" not in figures:  # an earlier release has not measured it
                    continue
                values = [figures.get(key) for key in ("a", "b", "parents", self.path, *others)]
                a, b, parents, own, *rest = ("" if value is None else format(scale * value, form) for value in values)
                less = _difference(figures["differences"].get(self.path, {}).get("better"), scale, signed)
                better = "equal" if figures["a"] == figures["b"] else figures["better"].upper()
                rows.append([f"{measure}, {name}", a, b, parents, better, own, less, *rest])
        return [head, *rows]

    def _row(self, path: str, index: int) -> list[str]:
        curve = self.report["paths"][path]
        interval = (curve.get("nll_interval") or [None])[index] if curve.get("nll_interval") else None
        brackets = f"[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "not known"
        return [_number(curve["nll"][index], ".4f"), brackets, _number(curve["perplexity"][index], ".2f")]

    def _barrier(self, path: str) -> str:
        curve = self.report["paths"][path]
        interval = curve.get("barrier_interval")
        brackets = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
        return (
            f"Barrier on the {path} path: {_number(curve['barrier'], '.4f')} nats per token{brackets}, at t = "
            f"{_number(curve['barrier_t'], '.3g')}."
        )

    def _text(self) -> str:
        evaluation = self.report["evaluation"]
        return (
            f"Measured on {_text_name(evaluation['text'])}: {evaluation['tokens_scored']:,} tokens in windows of "
            f"{evaluation['context']:,}, in {evaluation['dtype']}.\n"
        )


def _text_name(text: Mapping[str, Any]) -> str:
    """The text of an evaluation for a reader elsewhere: no local path is in it."""
    if text["kind"] != "dataset":
        return ", ".join(file["name"] for file in text["files"])
    name = PurePath(text["name"]).name if _is_local(text["name"]) else text["name"]
    parts = [text.get("config"), text.get("split")]
    return f"{name} ({', '.join(part for part in parts if part)})" if any(parts) else name


def _is_local(name: str) -> bool:
    return os.sep in name and looks_local(name)


def _difference(found: Mapping[str, Any] | None, scale: float, form: str) -> str:
    """A difference with its interval; empty where it is not known."""
    if found is None or found["value"] is None:
        return ""
    interval = found["interval"] if found["interval"] and None not in found["interval"] else None
    brackets = f" [{', '.join(format(scale * end, form) for end in interval)}]" if interval else ""
    return f"{scale * found['value']:{form}}{brackets}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None or not math.isfinite(value) else format(value, form)
