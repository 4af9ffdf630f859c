"""Which files belong to a model besides its weights and its card: a list, since a trainer's folder holds anything."""

from __future__ import annotations

import re
from collections.abc import Iterable

GENERATION = ("generation_config.json",)
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "*.bpe", "bpe.codes",
    "tokenizer.model", "tokenizer.model.v*", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "*.tiktoken", "tiktoken.model", "chat_template.json", "chat_template.jinja", "additional_chat_templates/*",
)  # fmt: skip
PROCESSOR = (
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
    "feature_extractor_config.json", "audio_processor_config.json",
)  # fmt: skip
LICENCE = ("license*", "licence*", "notice*", "copying*", "use_policy*", "acceptable_use*", "modified_mit*", "thirdparty*")
_CODE = re.compile(r".*\.(py|so|sh|bin|safetensors|pt|pkl)", re.IGNORECASE)


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(name).replace(r"\*", "[^/]*") for name in names), re.IGNORECASE)


_OF_TOKENIZER = _pattern((*TOKENIZER, *GENERATION))
_ALL = _pattern((*TOKENIZER, *GENERATION, *PROCESSOR, *LICENCE))


def is_side_file(file: str) -> bool:
    """Whether a file goes with a model's weights, its configuration apart.

    Example:
        >>> [is_side_file(file) for file in ("tokenizer.json", "LICENSE.txt", "wandb_id.txt", "tokenization_x.py")]
        [True, True, False, False]
    """
    return _ALL.fullmatch(file) is not None and _CODE.fullmatch(file) is None


def speaks(file: str) -> bool:
    """Whether a file says how a model reads and writes text: tokenizer, chat template, generation."""
    return is_side_file(file) and _OF_TOKENIZER.fullmatch(file) is not None
