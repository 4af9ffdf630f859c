"""Model cards: a published checkpoint, its inputs, and how it was made. No card holds a local path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import yaml
from huggingface_hub import ModelCardData, RepoCard

from hf_moe_lmc.checkpoints.source import Repository

if TYPE_CHECKING:
    from hf_moe_lmc.checkpoints.checkpoint import Checkpoint

PROJECT = "hf_moe_lmc"
PAPER = "https://arxiv.org/abs/2509.11348"
_ALONE = {
    "report": "# A perplexity barrier\n\nMeasured with hf_moe_lmc; `report.json` holds the results.\n",
    "symmetry": "# A symmetry\n\n`symmetry.safetensors` holds an order of experts and hidden units, with signs and scales. It "
    "keeps the function of a model. Apply it with `hf-moe-lmc apply SYMMETRY B -o OUT`.\n",
}


def model_card(
    *,
    title: str,
    summary: str,
    inputs: Mapping[str, Checkpoint],
    base: Sequence[Checkpoint],
    relation: str,
    command: str,
    alignment: Mapping[str, float] | None,
    vocabulary: Mapping[str, int] | None = None,
) -> str:
    """The text of README.md.

    Args:
        inputs: the checkpoints by the letters that summary and command use.
        base: those of them that become `base_model` (Hub ids only).
        relation: the Hub's `base_model_relation`.
        alignment: totals of the alignment, where one was computed.
        vocabulary: rows of the embeddings by where they come from, where the vocabularies differ.
    """
    data = ModelCardData(
        base_model=[checkpoint.source.repo_id for checkpoint in base if isinstance(checkpoint.source, Repository)] or None,
        base_model_relation=relation if any(isinstance(checkpoint.source, Repository) for checkpoint in base) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=_common_license(base),
        tags=[*(["merge"] if relation == "merge" else []), "moe", "mixture-of-experts", PROJECT],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}\n",
        f"{summary}\n",
        "| | checkpoint | revision or fingerprint |\n|---|---|---|\n"
        + "\n".join(f"| {letter} | {_link(checkpoint)} | `{_version(checkpoint)}` |" for letter, checkpoint in inputs.items())
        + "\n",
    ]
    if alignment:
        parts.append(_statistics(alignment))
    if vocabulary:
        parts.append(_rows(vocabulary))
    parts.append(
        f"## How it was made\n\n```\n{command}\n```\n\nMatching of experts and hidden units as in "
        f"[On Linear Mode Connectivity of Mixture-of-Experts Architectures]({PAPER}), with {PROJECT}.\n"
    )
    if data.license is None:
        parts.append(
            "## Licence\n\nNot stated here: the inputs name no common licence. Their terms hold; "
            "add the licence before publishing.\n"
        )
    return "\n".join(parts)


def card_without_weights(kind: Literal["report", "symmetry"], text: str | None) -> str:
    """The card of a repository that holds a report or a symmetry, and no model.

    Args:
        text: what it says; None: what such a repository holds.
    """
    data = ModelCardData(tags=["moe", "mixture-of-experts", PROJECT, kind])
    return f"---\n{data.to_yaml()}\n---\n\n{_ALONE[kind] if text is None else text}"


def _statistics(totals: Mapping[str, float]) -> str:
    return (
        "## Alignment of B to A\n\n| | |\n|---|---|\n"
        f"| experts moved | {totals['experts_moved']} of {totals['experts']} |\n"
        f"| hidden units moved | {totals['units_moved']} of {totals['units']} |\n"
        f"| signs flipped | {totals['signs']} |\n"
        f"| experts whose scales were kept | {totals['scales_kept']} |\n"
        f"| distance of the expert weights, relative to A: before | {totals['relative_distance_before']:.4f} |\n"
        f"| after the order of the experts | {totals['relative_distance_after_order']:.4f} |\n"
        f"| after the hidden units | {totals['relative_distance_after_units']:.4f} |\n\n"
        "Per layer: `alignment/alignment.json`.\n"
    )


def _rows(vocabulary: Mapping[str, int]) -> str:
    return (
        "## Vocabulary\n\nThe vocabularies of A and B differ. The rows of embeddings and head:\n\n| rows | |\n|---|---|\n"
        f"| of tokens that both have, interpolated | {vocabulary['interpolated']} |\n"
        f"| of tokens of A alone, A's | {vocabulary['only_in_a']} |\n"
        f"| of tokens of B alone, B's | {vocabulary['only_in_b']} |\n"
        f"| without a token, padding | {vocabulary['padding']} |\n"
        f"| all | {vocabulary['rows']} |\n"
    )


def _link(checkpoint: Checkpoint) -> str:
    if isinstance(checkpoint.source, Repository):
        return f"[{checkpoint.source.repo_id}](https://huggingface.co/{checkpoint.source.repo_id})"
    return f"{checkpoint.display_name} (local)"


def _version(checkpoint: Checkpoint) -> str:
    return checkpoint.source.commit or checkpoint.fingerprint()[:16]


def _common_license(checkpoints: Sequence[Checkpoint]) -> str | None:
    """The licence that all cards name; None unless all name the same."""
    licenses = {_license(checkpoint) for checkpoint in checkpoints}
    return licenses.pop() if len(licenses) == 1 else None


def _license(checkpoint: Checkpoint) -> str | None:
    if "README.md" not in checkpoint.source.files():
        return None
    try:
        card = RepoCard(checkpoint.source.path("README.md").read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError):  # a card that the Hub could not read either names no licence
        return None
    named = card.data.get("license")
    return named if isinstance(named, str) else None
