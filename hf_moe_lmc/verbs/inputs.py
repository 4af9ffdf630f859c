"""Opening, recognising and comparing what the user gave: all problems are reported together."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint, download_checkpoints
from hf_moe_lmc.checkpoints.joint import rows_of
from hf_moe_lmc.checkpoints.pair import check_plain_pair, join_plain, same_weights
from hf_moe_lmc.checkpoints.sizes import check_headed, check_sizes
from hf_moe_lmc.checkpoints.token_ids import TokenIds, agreement_of, tokenizer_mismatch
from hf_moe_lmc.errors import Faults
from hf_moe_lmc.formats.decoded import decoded
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.runtime.processes import process_group
from hf_moe_lmc.writing.workspace import check_output

# Models are recognised with transformers, which takes seconds to import and a plain merge does without.
if TYPE_CHECKING:
    from hf_moe_lmc.moe.model import MoEModel
    from hf_moe_lmc.symmetry.group import ModelSymmetry

Model = str | os.PathLike[str]


@dataclass(frozen=True)
class Pair:
    """Two models of one architecture, brought to one set of tensors.

    Attributes:
        symmetry: acts on B; None: none was given.
        ids: of their vocabularies.
        alone: the two as their files have them.
    """

    a: MoEModel
    b: MoEModel
    symmetry: ModelSymmetry | None
    ids: TokenIds
    alone: tuple[MoEModel, MoEModel]


class Opener:
    """How models are opened and recognised: anew by each call."""

    def open(self, model: Model, dtype: torch.dtype) -> Checkpoint:
        """A model as numbers, quantized weights in a dtype."""
        return decoded(Checkpoint.open(model), dtype)

    def recognise(self, checkpoint: Checkpoint) -> MoEModel:
        from hf_moe_lmc.proof.recognition import recognise

        return recognise(checkpoint)


class Inputs:
    """What one call reads, opened from headers and small files alone.

    Each method raises InputError with everything that is wrong with what it opens, with the output, and between them.

    Args:
        stack: closes what has been opened.
        output: checked as well; None: nothing is written.
        dtype: that quantized weights are read in.
        opener: opens and recognises the models.
    """

    def __init__(
        self,
        stack: ExitStack,
        output: Model | None = None,
        *,
        overwrite: bool = False,
        dtype: str = "float32",
        opener: Opener | None = None,
    ) -> None:
        self._opener = opener or Opener()
        self._stack = stack
        self._output = output
        self._overwrite = overwrite
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._faults = Faults()

    def check_first(self, check: Callable[[], object]) -> None:
        """A check of something else; what is wrong there is reported with the rest."""
        with self._faults.gather():
            check()

    def pair(
        self,
        a: Model,
        b: Model,
        *,
        symmetry: Model | ModelSymmetry | None = None,
        each: Callable[[MoEModel], object] = lambda model: None,
        inside_only: bool = False,
    ) -> Pair:
        """Two models of one architecture, and the symmetry that acts on the second, where one is given.

        Args:
            each: a further check of either model.
            inside_only: nothing but experts and routers is used: vocabularies may differ, and neither model is extended.
        """
        from hf_moe_lmc.moe.joining import join_models
        from hf_moe_lmc.moe.pair import check_pair

        warnings: list[str] = []
        checkpoints = [opened for opened in (self._open(model) for model in (a, b)) if opened]
        self._check_output(checkpoints)
        given = self._load(symmetry) if symmetry is not None else None
        models = [model for model in map(self._recognise, checkpoints) if model]
        agreement = None
        if len(checkpoints) == 2:
            with self._faults.gather():
                agreement = agreement_of(checkpoints[0], checkpoints[1], *(rows_of(one, one.tensors) for one in checkpoints))
                warnings += agreement.warnings
                if agreement.problems and not inside_only:
                    raise tokenizer_mismatch(checkpoints[0], checkpoints[1], agreement.problems)
                if agreement.problems:
                    warnings.append(
                        "the tokenizers of A and B differ; align moves no embeddings, but merge and barrier refuse them"
                    )
        for model in models:
            with self._faults.gather():
                each(model)
        alone = models
        if len(models) == 2 and agreement:
            with self._faults.gather():
                if not inside_only:
                    model_a, model_b, notes = join_models(models[0], models[1], agreement.ids)
                    models, warnings = [model_a, model_b], [*warnings, *notes]
                warnings += check_pair(*models, inside_only=inside_only)
        self._faults.check()
        assert agreement is not None
        for warning in [*same_weights(*checkpoints), *warnings]:
            warn(warning)
        model_a, model_b = models
        if given is not None:
            model_b.check_symmetry(given)
            if model_b.checkpoint.is_downloaded:
                model_b.check_ties(given)
        return Pair(model_a, model_b, given, agreement.ids, (alone[0], alone[1]))

    def plain_pair(self, a: Model, b: Model) -> tuple[Checkpoint, Checkpoint, TokenIds] | None:
        """Two checkpoints with the same tensors, whatever they are; None if they hold other ones."""
        checkpoints = [opened for opened in (self._open(model) for model in (a, b)) if opened]
        whole = len(checkpoints) == 2
        for checkpoint in checkpoints:
            with self._faults.gather():
                check_headed(checkpoint)
        whole = whole and not self._faults.found
        warnings: list[str] = []
        ids = None
        faults = Faults()
        if whole:
            with faults.gather():
                joined, agreement = join_plain(*checkpoints)
                ids, warnings = agreement.ids, [*agreement.warnings, *joined.notes]
                if joined.a.tensors.keys() != joined.b.tensors.keys():
                    return None
                for checkpoint in checkpoints:
                    with faults.gather():
                        check_sizes(checkpoint)
                checkpoints = [joined.a, joined.b]
                if agreement.problems:
                    faults.add(tokenizer_mismatch(checkpoints[0], checkpoints[1], agreement.problems))
        self._check_output(checkpoints)
        for fault in faults.found:
            self._faults.add(fault)
        if whole:
            with self._faults.gather():
                warnings += check_plain_pair(*checkpoints)
        self._faults.check()
        for warning in warnings:
            warn(warning)
        assert ids is not None
        return checkpoints[0], checkpoints[1], ids

    def single(self, model: Model, symmetry: Model | ModelSymmetry, *, inverse: bool = False) -> tuple[MoEModel, ModelSymmetry]:
        """A model, and the symmetry (or with `inverse` its inverse) that acts on it."""
        checkpoint = self._open(model)
        self._check_output([checkpoint] if checkpoint else [])
        recognised = self._recognise(checkpoint) if checkpoint else None
        given = self._load(symmetry)
        self._faults.check()
        assert recognised is not None and given is not None
        given = given.inverse() if inverse else given
        recognised.check_symmetry(given)
        if recognised.checkpoint.is_downloaded:
            recognised.check_ties(given)
        return recognised, given

    def _open(self, model: Model) -> Checkpoint | None:
        with self._faults.gather():
            return self._stack.enter_context(self._opener.open(model, self._dtype))
        return None

    def _recognise(self, checkpoint: Checkpoint) -> MoEModel | None:
        with self._faults.gather():
            return self._opener.recognise(checkpoint)
        return None

    def _load(self, symmetry: Model | ModelSymmetry) -> ModelSymmetry | None:
        from hf_moe_lmc.symmetry.group import ModelSymmetry

        with self._faults.gather():
            return symmetry if isinstance(symmetry, ModelSymmetry) else ModelSymmetry.load(symmetry)
        return None

    def _check_output(self, checkpoints: list[Checkpoint]) -> None:
        if self._output is not None and process_group().is_main:
            with self._faults.gather():
                check_output(self._output, [checkpoint.folder for checkpoint in checkpoints], overwrite=self._overwrite)


def download(*models: MoEModel, given: ModelSymmetry | None = None) -> None:
    """Fetches the weights, once everything has been checked from headers.

    Warns where a `given` symmetry was recorded for other weights than those of the last model, which it acts on.

    Raises:
        SymmetryError: it moves experts that ties between router rows keep in their places.
    """
    download_checkpoints(*(model.checkpoint for model in models))
    model = models[-1]
    if given is not None:
        model.check_ties(given)
    recorded = given.metadata.get("b_fingerprint") if given else None
    if recorded is not None and recorded != model.checkpoint.fingerprint():
        warn(f"{model.checkpoint.name}: the symmetry was recorded for another checkpoint (fingerprint {recorded[:12]})")
