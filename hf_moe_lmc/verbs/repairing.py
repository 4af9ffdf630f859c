"""What a merge has in place of the points of the straight line: a repair by name, or one chosen on calibration text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.measurement import evaluation_options
from hf_moe_lmc.path.options import ComputeOptions
from hf_moe_lmc.path.tokenizer import common_tokenizer, context_length
from hf_moe_lmc.perplexity.overlap import check_apart
from hf_moe_lmc.perplexity.text import Text
from hf_moe_lmc.perplexity.windows import Windows, cut_texts
from hf_moe_lmc.repair.calibrated_run import Calibrated, Calibration
from hf_moe_lmc.repair.choice import choose
from hf_moe_lmc.repair.data_free import REPAIRS, check_gated, starts
from hf_moe_lmc.repair.fitted_merging import merging_of
from hf_moe_lmc.repair.halves import halves_of
from hf_moe_lmc.repair.methods import methods_of
from hf_moe_lmc.repair.options import TEXTS, Line, RepairOptions, line_of
from hf_moe_lmc.repair.ridge import DOUBLE
from hf_moe_lmc.runtime.notices import note
from hf_moe_lmc.runtime.processes import process_group
from hf_moe_lmc.runtime.progress import size_of
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.inputs import Pair
from hf_moe_lmc.verbs.measuring import check_ids
from hf_moe_lmc.verbs.options import filled
from hf_moe_lmc.verbs.planning import Leaving
from hf_moe_lmc.writing.streams import STRAIGHT, Merging
from hf_moe_lmc.writing.workspace import Workspace

ENDS = (0.0, 1.0)


@dataclass(frozen=True)
class Repaired:
    """What one merge has in place of the point of the straight line.

    Attributes:
        merging: how it is made; that of the straight line where no repair was accepted.
        record: the `repair` of report.json.
        options: words of the command line that ask for it; files are named as they are on a card.
    """

    merging: Merging
    record: Mapping[str, Any]
    options: Sequence[str]

    @classmethod
    def of(cls, merging: Merging, record: Mapping[str, Any], sentence: str, options: Sequence[str]) -> Repaired:
        """With the sentence in the record as well."""
        return cls(merging, {**record, "sentence": sentence}, options)

    @property
    def sentence(self) -> str:
        """What was done."""
        return str(self.record["sentence"])

    @property
    def accepted(self) -> bool:
        return bool(self.record["accepted"])

    def facts(self) -> dict[str, Any]:
        """What the written weights depend on besides the options."""
        return {"chosen": self.record.get("chosen"), "accepted": self.accepted}


@dataclass(frozen=True)
class Repairing:
    """A repair that was asked for, checked against the two models.

    Attributes:
        calibration: text to fit and to decide on; None: the repair is made whatever it gives.
        evaluation: how the models run on it.
        texts: as they were read.
        measured: the repaired merge is measured on another text.
        line: what the merge on the straight line is called.
    """

    pair: Pair
    options: RepairOptions
    calibration: Calibration | None = None
    evaluation: EvaluationOptions | None = None
    texts: Sequence[Text] = field(default=())
    measured: bool = False
    line: Line = "aligned"

    @classmethod
    def of(cls, pair: Pair, options: RepairOptions, given: Mapping[str, Any]) -> Repairing | None:
        """Reads the calibration text, as far as it is needed; None where the merge stays on the straight line.

        Args:
            given: the options of a verb: how the models run, and whether B is aligned.

        Raises:
            InputError: the text or the models do not fit.
        """
        if options.does_nothing:
            if options.repair == "auto":
                note("repair auto has no text to decide on and does nothing; give it --calibration TEXT")
            return None
        line = line_of(align=given.get("align", True))
        if not options.is_calibrated:
            check_gated(pair.a, options.repair)
            measured = bool(given.get("text") or given.get("dataset"))
            if not measured:
                note(f"repair {options.repair} is made without text: nothing says whether it is better than the {line} merge")
            return cls(pair, options, measured=measured, line=line)
        if process_group().count > 1:
            raise InputError("a repair with calibration text works in one process; start it without torchrun")
        compute = filled(ComputeOptions, given)
        model_class, context = language_model_class(pair.a), context_length(pair.a, given.get("context"))
        texts = options.texts()
        calibration = _calibration(texts, pair, context, options.calibration_tokens)
        check_ids(calibration.windows, pair)
        halves_of(calibration.windows)
        masked = None if pair.ids.alike else ~torch.from_numpy(pair.ids.common)
        evaluation = evaluation_options(model_class, compute, context, masked)
        found = cls(pair, options, calibration, evaluation, texts, line=line)
        if options.repair != "auto" and all(method.fit is not None for method in methods_of(options.repair)):
            found._outline.check_sites()
        return found

    def check_apart(self, evaluation: Windows) -> None:
        """Raises InputError where a text to evaluate on shares passages with the calibration text."""
        if self.calibration is not None:
            check_apart(evaluation, self.calibration.windows, common_tokenizer(self.pair.a, self.pair.b))

    @property
    def name(self) -> str:
        return self.options.repair

    @property
    def data_free(self) -> Merging | None:
        """The repair that is made whatever it gives, at every t; None: text decides."""
        return REPAIRS[self.name] if self.calibration is None else None

    @property
    def words(self) -> list[str]:
        """The options of the command line, with the names of the texts alone."""
        given = [option for option in TEXTS if getattr(self.options, option)]
        found = ["--repair", self.name]
        for option, text in zip(given, self.texts, strict=True):
            for file in text.describe()["files"]:
                found += [f"--{option.replace('_', '-')}", file["name"]]
        if self.calibration is not None:
            found += ["--calibration-tokens", str(self.options.calibration_tokens)]
            found += ["--context", str(self.calibration.windows.context)]
        return found

    def plan(self, count: int) -> Leaving:
        """What so many repairs take."""
        return Leaving(words=self._plan_in_words(count), memory=self.memory(), passes=self.passes(count))

    def _plan_in_words(self, count: int) -> str:
        if self.calibration is None:
            return f"{self.name}, without text: made while the weights are read, at no further cost"
        tokens = sum(len(row) for row in self.calibration.windows.rows)
        words = f"{self.name}: {len(methods_of(self.name))} candidates on {tokens:,} tokens of calibration text"
        if any(method.fit == "ridge" for method in methods_of(self.name)):
            words += f", {size_of(self._equations(tokens))} of memory for equations"
        return f"{words}; reads both models {self.passes(1)} times{f' for each of {count} t' if count > 1 else ''}"

    def passes(self, count: int) -> int:
        """How often so many repairs read both models before anything is written."""
        if self.calibration is None:
            return 0
        first, _ = halves_of(self.calibration.windows)
        together = self._outline.together(len(first))
        return count * (math.ceil((len(methods_of(self.name)) + 1) / together) + 1)

    def memory(self) -> int:
        """Bytes that fitting and choosing take, about; 0 where nothing is fitted."""
        if self.calibration is None:
            return 0
        methods, windows = methods_of(self.name), self.calibration.windows
        first, _ = halves_of(windows)
        fits = any(method.fit == "ridge" for method in methods)
        equations = self._equations(sum(len(row) for row in windows.rows)) if fits else 0
        return self._outline.memory(methods, len(first)) + equations

    def _equations(self, tokens: int) -> int:
        """Bytes for the ridge regression of a block on half of the calibration text, about."""
        columns = max(
            sum(bank.experts * bank.unit_count for bank in layer.banks.values()) + layer.shared.unit_count
            for layer in self.pair.a.layers.values()
        )
        unknowns = min(tokens // 2, columns)
        return 3 * unknowns**2 * (8 if unknowns <= DOUBLE else 4)

    def facts(self) -> dict[str, Any]:
        """What weights depend on."""
        if self.calibration is None:
            return {"repair": self.name}
        assert self.evaluation is not None
        return {
            "repair": self.name,
            "calibration": self.calibration.windows.describe(),
            "domains": [sorted(names) for names in self.calibration.domains],
            "dtype": str(self.evaluation.dtype),
            "batch_size": self.evaluation.batch_size,
        }

    def at(self, symmetry: ModelSymmetry, t: float, workspace: Workspace | None) -> Repaired:
        """The repair of the merge at one t.

        Args:
            symmetry: takes B to B'.
            workspace: keeps what has been fitted, layer by layer, for a call that continues.

        Raises:
            InputError: as `choose`.
        """
        if t in ENDS:
            end = "A" if t == 0 else "B" if self.line == "naive" else "B'"
            record = {"asked": self.name, "t": t, "accepted": False, "chosen": self.line, "tried": []}
            return Repaired.of(STRAIGHT, record, f"t = {t:g} is {end} itself, of which there is nothing to repair", self.words)
        if self.calibration is None:
            record = {"asked": self.name, "t": t, "accepted": True, "chosen": self.name, "tried": []}
            because = (
                "whatever it gives"
                if self.measured
                else f"so that nothing says whether it is better than the {self.line} merge"
            )
            sentence = f"{self.name}, made without calibration text, {because}"
            return Repaired.of(REPAIRS[self.name], record, sentence, self.words)
        assert workspace is not None
        run = self._run(symmetry, t)
        kept = workspace.results("repair", {**run.facts(), "repair": self.name})
        choice = choose(run, self.name, kept, line=self.line)
        record = {**choice.record, "calibration": [text.describe() for text in self.texts]}
        return Repaired.of(merging_of(choice, self.pair.a), record, choice.sentence, self.words)

    @cached_property
    def _outline(self) -> Calibrated:
        """A run on B as it is: what a run takes, and whether it can be, do not depend on the symmetry."""
        return self._run(self.pair.b.identity(), 0.5)

    def _run(self, symmetry: ModelSymmetry, t: float) -> Calibrated:
        assert self.calibration is not None and self.evaluation is not None
        a, b = self.pair.a, self.pair.b
        return Calibrated(a, b, symmetry, t, self.calibration, self.evaluation, starts(a, b, symmetry.layers, t))


def _calibration(texts: Sequence[Text], pair: Pair, context: int, tokens: int) -> Calibration:
    """Windows of the text of both models, or of that of A and that of B.

    Raises:
        InputError: a text is too short.
    """
    names = [list(text.names) for text in texts]
    if len(texts) == 2 and set(names[0]) & set(names[1]):
        names = [[f"{name} ({side})" for name in own] for side, own in zip("ab", names, strict=True)]
    windows: Windows = cut_texts(
        chain.from_iterable(text.texts() for text in texts),
        common_tokenizer(pair.a, pair.b),
        context=context,
        max_tokens=tokens,
        names=[name for own in names for name in own],
    )
    return Calibration(windows, (frozenset(names[0]), frozenset(names[-1])))
