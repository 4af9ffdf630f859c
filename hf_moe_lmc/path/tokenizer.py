"""The tokenizer that two models share."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_moe_lmc.checkpoints.token_ids import tokenizer_mismatch
from hf_moe_lmc.checkpoints.vocabulary import Vocabulary, read_vocabulary
from hf_moe_lmc.errors import CheckpointError, InputError
from hf_moe_lmc.moe.model import MoEModel

DEFAULT_CONTEXT = 2048


def context_length(model: MoEModel, context: int | None) -> int:
    longest = getattr(model.text_config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    if context is not None and context > longest:
        raise InputError(f"context {context}: {model.checkpoint.name} has positions for {longest} tokens")
    return context or min(DEFAULT_CONTEXT, longest)


def common_tokenizer(a: MoEModel, b: MoEModel) -> PreTrainedTokenizerBase:
    """A's tokenizer; B's may have other tokens, of which the ids in common have been compared.

    Raises:
        CheckpointError: A has none that transformers can load.
        MismatchError: what their files could not tell, their vocabularies as transformers loads them, differs.
    """
    found = _tokenizer(a)
    if found is None:
        raise CheckpointError(f"{a.checkpoint.name}: no tokenizer here; copy its files from the model it was made from")
    vocabularies = [read_vocabulary(model.checkpoint) for model in (a, b)]
    if all(vocabulary is None or vocabulary.tokens is not None for vocabulary in vocabularies):
        return found
    if same_opaque(*vocabularies):
        return found
    other = _tokenizer(b)
    if other is not None and found.get_vocab() != other.get_vocab():
        raise tokenizer_mismatch(a.checkpoint, b.checkpoint, [["vocabulary, as transformers loads it"]])
    return found


def same_opaque(a: Vocabulary | None, b: Vocabulary | None) -> bool:
    """Whether two tokenizers have a file in another format in common, byte for byte."""
    return a is not None and b is not None and any(a.opaque.get(name) == digest for name, digest in b.opaque.items())


def _tokenizer(model: MoEModel) -> PreTrainedTokenizerBase | None:
    if read_vocabulary(model.checkpoint) is None:
        return None
    model.checkpoint.source.download(model.checkpoint.side_files())
    folder = model.checkpoint.source.path("config.json").parent
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{model.checkpoint.name}: transformers cannot load its tokenizer ({error})") from error
    return tokenizer
