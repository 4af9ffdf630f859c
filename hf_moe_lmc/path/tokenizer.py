"""The tokenizer that two models share."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_moe_lmc.checkpoints.vocabulary import compare_tokenizers, different, read_vocabulary
from hf_moe_lmc.errors import CheckpointError, InputError
from hf_moe_lmc.moe.model import MoEModel

DEFAULT_CONTEXT = 2048


def context_length(model: MoEModel, context: int | None) -> int:
    longest = getattr(model.text_config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    if context is not None and context > longest:
        raise InputError(f"context {context}: {model.checkpoint.name} has positions for {longest} tokens")
    return context or min(DEFAULT_CONTEXT, longest)


def common_tokenizer(a: MoEModel, b: MoEModel) -> PreTrainedTokenizerBase:
    """A's tokenizer, B's being the same: what their files could not tell (see `open_models`) is compared once they are loaded.

    Raises:
        CheckpointError: A has none that transformers can load.
        MismatchError: vocabulary or special tokens differ.
    """
    of_a = _tokenizer(a)
    if of_a is None:
        raise CheckpointError(f"{a.checkpoint.name}: no tokenizer here; copy its files from the model it was made from")
    if compare_tokenizers(a.checkpoint, b.checkpoint).complete:
        return of_a
    of_b = _tokenizer(b)
    if of_b is not None and (of_a.get_vocab(), of_a.all_special_ids) != (of_b.get_vocab(), of_b.all_special_ids):
        raise different(a.checkpoint, b.checkpoint, "  vocabulary or special ids, as transformers loads them")
    return of_a


def _tokenizer(model: MoEModel) -> PreTrainedTokenizerBase | None:
    if read_vocabulary(model.checkpoint) is None:
        return None
    model.checkpoint.source.fetch(model.checkpoint.side_files())
    folder = model.checkpoint.source.path("config.json").parent
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{model.checkpoint.name}: transformers cannot load its tokenizer ({error})") from error
    return tokenizer
