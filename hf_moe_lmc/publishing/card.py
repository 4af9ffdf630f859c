"""Model cards: a published checkpoint, its parents, and how it was made. No card holds a local path."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import ModelCardData

from hf_moe_lmc.checkpoints.source import Folder, Repository
from hf_moe_lmc.errors import InputError, shown
from hf_moe_lmc.publishing.measured import Measured
from hf_moe_lmc.publishing.parents import Inherited, Licence, ParentCard
from hf_moe_lmc.publishing.usage import TASKS, auto_class, how_to_load

if TYPE_CHECKING:
    from hf_moe_lmc.checkpoints.checkpoint import Checkpoint

PROJECT = "hf_moe_lmc"
PAGE = "https://pypi.org/project/hf_moe_lmc/"
PAPER = "https://arxiv.org/abs/2509.11348"
UNPUBLISHED = "out"  # what a command on a card calls an output that has no name of its own
OUT = "OUT"  # in a command: where the output goes
TAGS = ("moe", "mixture-of-experts", PROJECT)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_ALONE = {
    "report": "# A perplexity barrier\n\nMeasured with hf_moe_lmc; `report.json` holds the results.\n",
    "symmetry": "# A symmetry\n\n`symmetry.safetensors` holds an order of experts and hidden units, with signs and scales. It "
    "keeps the function of a model. Apply it with `hf-moe-lmc apply SYMMETRY B -o OUT`.\n",
}


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where an output is going to stand.

    Attributes:
        name: Hub id, or UNPUBLISHED.
        license: what its card names; None: what all parents have in common.
    """

    name: str
    license: str | None = None


def check_license(identifier: str | None) -> None:
    """Raises InputError for what cannot be an identifier of a licence on the Hub; None is fine."""
    if identifier is not None and not _LICENCE.fullmatch(identifier):
        raise InputError(
            f"{shown(identifier)}: not an identifier of a licence; expected one that the Hub knows, such as apache-2.0, mit or "
            "other (https://huggingface.co/docs/hub/repositories-licenses)"
        )


@dataclass(frozen=True, kw_only=True)
class CardContent:
    """What the card of a checkpoint says.

    Attributes:
        title: what it is, such as "Merge of {A} and {B} at t = 0.5", where the letters of `inputs` stand for the names; a push
            takes it as its commit message.
        inputs: the checkpoints by the letters that summary and command use.
        base: letters of those that become `base_model` (Hub ids only) and whose cards it inherits from.
        relation: the Hub's `base_model_relation`.
        command: the words behind `hf-moe-lmc`. A letter of `inputs` stands for that checkpoint, OUT for the output.
        template: whose layout, dtypes and configuration the output has.
        alignment: what was aligned, in sentences.
        matched: it was found by weight matching, so that the paper is named.
        vocabulary: rows of the embeddings by where they come from, where the vocabularies differ.
        measured: a barrier on whose path the checkpoint lies; None: none was measured.
        repair: what was done to leave the straight line, in words; None: nothing.
    """

    title: str
    summary: str
    inputs: Mapping[str, Checkpoint]
    base: Sequence[str]
    relation: Literal["merge", "finetune"]
    command: Sequence[str]
    template: Checkpoint
    destination: Destination
    alignment: Sequence[str] = ()
    matched: bool = False
    vocabulary: Mapping[str, int] | None = None
    measured: Measured | None = None
    repair: str | None = None


def model_card(content: CardContent) -> str:
    """The text of README.md."""
    inputs, template, destination = content.inputs, content.template, content.destination
    names = distinct_names(inputs)
    parents = {letter: ParentCard.of(inputs[letter]) for letter in content.base}
    inherited = Inherited.of({f"{letter} ({names[letter]})": card for letter, card in parents.items()})
    licence = Licence(destination.license) if destination.license else inherited.licence
    heading = content.title.format(**names)
    name = heading if destination.name == UNPUBLISHED else destination.name.rpartition("/")[2]
    data = _metadata(content, inherited, licence, name)
    words = {letter: reference(checkpoint, names[letter]) for letter, checkpoint in inputs.items()}
    words[OUT] = destination.name.rpartition("/")[2]
    parts = [f"---\n{data.to_yaml()}\n---\n", f"# {heading}\n", f"{content.summary}\n", _parents(inputs, names)]
    if content.measured:
        parts.append(content.measured.section())
    parts.append(how_to_load(template, template.side_files(), destination.name))
    if content.alignment:
        parts.append("## What was aligned\n\n" + "\n".join(f"- {sentence}" for sentence in content.alignment) + "\n")
    if content.vocabulary:
        parts.append(_rows(content.vocabulary))
    if content.repair:
        parts.append(f"## Repair\n\n{content.repair[0].upper()}{content.repair[1:]}\n")
    chosen = ["--license", destination.license] if destination.license else []
    parts.append(_origin([*(words.get(word, word) for word in content.command), *chosen], matched=content.matched))
    if licence is None:
        parts.append(_no_licence(inherited))
    return "\n".join(parts)


def card_without_weights(kind: Literal["report", "symmetry"], text: str | None) -> str:
    """The card of a repository that holds a report or a symmetry, and no model.

    Args:
        text: what it says; None: what such a repository holds.
    """
    data = ModelCardData(tags=[*TAGS, kind])
    return f"---\n{data.to_yaml()}\n---\n\n{_ALONE[kind] if text is None else text}"


def distinct_names(inputs: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Hub ids, and names of local folders; folders of one name are told apart by the one that they are in."""
    names, distinct = {letter: checkpoint.display_name for letter, checkpoint in inputs.items()}, {}
    roots = {
        letter: checkpoint.source.root.resolve()
        for letter, checkpoint in inputs.items()
        if isinstance(checkpoint.source, Folder)
    }
    for letter, root in roots.items():
        if any(one.name == root.name and one != root for one in roots.values()):
            distinct[letter] = f"{root.parent.name}/{root.name}"
    return {**names, **distinct}


def reference(checkpoint: Checkpoint, name: str) -> str:
    """A checkpoint as a command names it: a Hub id at its commit, or a folder's name."""
    if isinstance(checkpoint.source, Repository):
        return f"{checkpoint.source.repo_id}@{checkpoint.source.commit}"
    return name


def _metadata(content: CardContent, inherited: Inherited, licence: Licence | None, name: str) -> ModelCardData:
    base, measured = [content.inputs[letter] for letter in content.base], content.measured
    ids = list(dict.fromkeys(one.source.repo_id for one in base if isinstance(one.source, Repository)))
    results = measured.results() if measured else []
    languages = list(inherited.languages)
    named: dict[str, Any] = {"base_model_relation": content.relation if ids else None}
    return ModelCardData(
        license=licence.identifier if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        language=languages[0] if len(languages) == 1 else languages or None,
        base_model=ids or None,
        library_name=inherited.library_name or "transformers",
        pipeline_tag=inherited.pipeline_tag or TASKS.get(auto_class(content.template.config)),
        tags=[*(["merge"] if content.relation == "merge" else []), *TAGS],
        model_name=name if results else None,
        eval_results=results or None,
        **named,
    )


def _parents(inputs: Mapping[str, Checkpoint], names: Mapping[str, str]) -> str:
    rows = []
    for letter, checkpoint in inputs.items():
        if isinstance(checkpoint.source, Repository):
            page, commit = f"https://huggingface.co/{checkpoint.source.repo_id}", checkpoint.source.commit
            rows.append(
                f"| {letter} | [{checkpoint.source.repo_id}]({page}) | commit [`{commit[:12]}`]({page}/tree/{commit}) |"
            )
        else:
            rows.append(f"| {letter} | `{names[letter]}`, a local folder | fingerprint `{checkpoint.fingerprint()[:16]}` |")
    return "\n".join(["| | checkpoint | revision |", "|---|---|---|", *rows, ""])


def _rows(vocabulary: Mapping[str, int]) -> str:
    return (
        "## Vocabulary\n\nThe vocabularies of A and B differ. The rows of embeddings and head:\n\n| rows | |\n|---|---|\n"
        f"| of tokens that both have, interpolated | {vocabulary['interpolated']:,} |\n"
        f"| of tokens of A alone, A's | {vocabulary['only_in_a']:,} |\n"
        f"| of tokens of B alone, B's | {vocabulary['only_in_b']:,} |\n"
        f"| without a token, padding | {vocabulary['padding']:,} |\n"
        f"| all | {vocabulary['rows']:,} |\n"
    )


def _origin(command: Sequence[str], *, matched: bool) -> str:
    method = (
        " Experts and hidden units were matched as in [On Linear Mode Connectivity of Mixture-of-Experts "
        f"Architectures]({PAPER}); `alignment/alignment.json` has the figures of each layer."
    )
    return (
        f"## How it was made\n\n```bash\npip install {PROJECT}=={version(PROJECT)}\n"
        f"hf-moe-lmc {shlex.join(command)}\n```\n\n"
        f"Made with [{PROJECT}]({PAGE}) {version(PROJECT)}.{method if matched else ''}\n"
    )


def _no_licence(inherited: Inherited) -> str:
    return (
        f"## Licence\n\nNot chosen yet: {inherited.differing()} Choose one that the terms of all parents allow, and name it in "
        "the first lines of this file as `license`.\n"
    )
