"""What the cards of the parents say: their licences, languages, task and library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import RepoCard

from hf_moe_lmc.errors import shown
from hf_moe_lmc.publishing.finished import CARD

if TYPE_CHECKING:
    from hf_moe_lmc.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class Licence:
    """A licence as a card names it; `name` and `link` go with the identifier `other`."""

    identifier: str
    name: str | None = None
    link: str | None = None

    def in_words(self) -> str:
        """For a sentence.

        Example:
            >>> Licence("other", name="qwen").in_words(), Licence("mit").in_words()
            ('other (qwen)', 'mit')
        """
        return shown(f"{self.identifier} ({self.name})" if self.name else self.identifier)


@dataclass(frozen=True)
class ParentCard:
    """The metadata of one parent's card; None or empty: it does not say."""

    licence: Licence | None = None
    languages: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    library_name: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ParentCard:
        """Reads the card beside a checkpoint. One that is absent, or that the Hub could not read either, says nothing."""
        if CARD not in checkpoint.source.files():
            return cls()
        return cls.read(metadata_of(checkpoint.source.path(CARD).read_bytes()))

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> ParentCard:
        """From the metadata block of a card. Values of another kind than the Hub documents are passed over.

        Example:
            >>> ParentCard.read({"license": "mit", "language": ["en", False], "pipeline_tag": 7}).languages
            ('en', 'no')
        """
        texts = {key: value for key, value in metadata.items() if isinstance(value, str) and value}
        language = metadata.get("language")
        listed = language if isinstance(language, list) else [language]
        named = ["no" if one is False else one for one in listed]  # YAML reads the code of Norwegian as a boolean
        licence = (
            Licence(texts["license"], texts.get("license_name"), texts.get("license_link")) if "license" in texts else None
        )
        return cls(
            licence,
            tuple(dict.fromkeys(one for one in named if isinstance(one, str) and one)),
            texts.get("pipeline_tag"),
            texts.get("library_name"),
        )


@dataclass(frozen=True)
class Inherited:
    """What a checkpoint inherits from its parents: what all of their cards say alike, and the languages of any.

    Attributes:
        licences: of each parent, by how the card calls it.
    """

    licences: Mapping[str, Licence | None]
    languages: tuple[str, ...]
    pipeline_tag: str | None
    library_name: str | None

    @classmethod
    def of(cls, cards: Mapping[str, ParentCard]) -> Inherited:
        """From the cards of the parents, by how the new card calls them.

        Example:
            >>> cards = {"A": ParentCard(Licence("mit"), ("en",), "text-generation"), "B": ParentCard(Licence("mit"), ("de",))}
            >>> found = Inherited.of(cards)
            >>> found.licence, found.languages, found.pipeline_tag
            (Licence(identifier='mit', name=None, link=None), ('en', 'de'), None)
        """
        return cls(
            {name: card.licence for name, card in cards.items()},
            tuple(dict.fromkeys(language for card in cards.values() for language in card.languages)),
            _common([card.pipeline_tag for card in cards.values()]),
            _common([card.library_name for card in cards.values()]),
        )

    @property
    def licence(self) -> Licence | None:
        """What all parents name; None unless all name the same."""
        found = list(self.licences.values())
        return found[0] if found and all(one == found[0] for one in found) else None

    def differing(self) -> str:
        """Which licences there are, where they are not one, as a sentence.

        Example:
            >>> Inherited({"A": Licence("mit"), "B": None}, (), None, None).differing()
            'A is under mit; B names no licence.'
        """
        said = [
            f"{name} is under {one.in_words()}" if one else f"{name} names no licence" for name, one in self.licences.items()
        ]
        return "; ".join(said) + "."


def metadata_of(card: bytes) -> dict[str, Any]:
    """The metadata block of a card; one that the Hub could not read either says nothing.

    Example:
        >>> metadata_of(b"---\\nlicense: mit\\n---\\n# A model\\n"), metadata_of(b"---\\ntags: [moe\\n---\\n")
        ({'license': 'mit'}, {})
    """
    try:
        return RepoCard(card.decode(errors="replace"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}


def _common(values: Sequence[str | None]) -> str | None:
    return values[0] if values and all(value == values[0] for value in values) else None
