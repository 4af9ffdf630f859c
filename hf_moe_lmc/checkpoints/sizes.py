"""Sizes in config.json against those of the tensors, as far as names tell them without knowing the family."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.joint import EMBEDDING, HEAD, embedding_of
from hf_moe_lmc.checkpoints.mtp import COUNTS, MARKS, ONLY_EXTRA
from hf_moe_lmc.checkpoints.tensor_names import SENTENCES, check_whole
from hf_moe_lmc.errors import CheckpointError, FamilyError, Faults, listing

LAYER = re.compile(r"((?:.*?\.)?(?:layers|blocks|h)\.)(\d{1,6})\.")
_EXPERT = re.compile(r"((?:.*\.)?experts\.)(\d{1,6})\..+")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "hidden_size_per_layer_input")
_ZEROS = ("zero_expert_num",)  # experts without weights, which some files have names for
_TWO_MODALITIES = ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text")  # whose layers have that many experts for each
_SPEAKING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")  # classes with a head over the vocabulary
_TOWERS = re.compile(r".*_text|step3p5")  # model types that transformers has no class with a head for
_MORE_ROWS = ("moshi", "kyutai_speech_to_text")  # whose embeddings have a row besides the vocabulary
ADVICE = "Fetch the checkpoint again, whole, with the config.json that these weights came with"


def text_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The settings of the language model, which a composite model keeps in a configuration of their own."""
    inner = checkpoint.config.get("text_config")
    return inner if isinstance(inner, Mapping) else checkpoint.config


def check_headed(checkpoint: Checkpoint) -> None:
    """As `check_whole`, where nothing is known of the model but what config.json says: text towers have no head."""
    if not _TOWERS.fullmatch(str(checkpoint.config.get("model_type"))):
        check_whole(checkpoint.name, checkpoint.tensors, checkpoint.source.files())
        states = {place.get("tie_word_embeddings", True) for place in (checkpoint.config, text_settings(checkpoint))}
        check_head(checkpoint, tied=states != {False})


def check_head(checkpoint: Checkpoint, *, tied: bool) -> None:
    """Refuses what is said to be a language model and has no head, which transformers would fill with random numbers.

    Args:
        tied: the head is the embedding.

    Raises:
        CheckpointError: naming the embedding, and the way out.
    """
    embedding = embedding_of(checkpoint, checkpoint.tensors)
    classes = checkpoint.config.get("architectures")
    speaks = isinstance(classes, list) and any(str(one).endswith(_SPEAKING) for one in classes)
    if tied or embedding is None or not speaks or SENTENCES in checkpoint.source.files():
        return
    shape = checkpoint.tensors[embedding].shape  # a head may have another name, but hardly another shape
    if any(HEAD.fullmatch(name) or info.shape == shape for name, info in checkpoint.tensors.items() if name != embedding):
        return
    raise CheckpointError(
        f"{checkpoint.name}: no head among the tensors (lm_head.weight), and config.json says that the embedding "
        f"({embedding}) is none (tie_word_embeddings is false); transformers would fill it with random numbers. Save the "
        "whole model again, or set tie_word_embeddings to true if the head was tied"
    )


def check_sizes(checkpoint: Checkpoint) -> None:
    """Compares layers, experts and the tables over the vocabulary with config.json.

    Raises:
        FamilyError: a fault for each kind of size that differs: transformers would not load this, or leave tensors out.
    """
    faults = Faults()
    with faults.gather():
        check_layers(checkpoint)
    problems = [*_table_problems(checkpoint), *_expert_problems(checkpoint)]
    if problems:
        faults.add(FamilyError(f"{checkpoint.name}: config.json and the shards disagree:\n{listing(problems)}\n{ADVICE}"))
    faults.check()


def check_layers(checkpoint: Checkpoint) -> None:
    """Compares the number of layers in config.json with the layers that hold experts, or, without experts, with all.

    Raises:
        FamilyError: there are more in the shards, which transformers would leave out without a word, or fewer.
    """
    text = text_settings(checkpoint)
    count, extra = text.get("num_hidden_layers"), [text[key] for key in COUNTS if type(text.get(key)) is int]
    found: dict[str, set[int]] = {}
    holding: dict[str, int] = {}
    marked: set[tuple[str, int]] = set()  # layers for multi-token prediction, by what they alone hold
    for name in checkpoint.tensors:
        if match := LAYER.match(name):
            found.setdefault(match[1], set()).add(int(match[2]))
            holding[match[1]] = holding.get(match[1], 0) + ("expert" in name)
            if MARKS.fullmatch(name[match.end() :]):
                marked.add((match[1], int(match[2])))
    if not found or type(count) is not int:
        return
    prefix = max(found, key=lambda stem: (holding[stem], len(found[stem])))
    layers = found[prefix]
    allowed = count + max(extra, default=0)
    problems = [f"layer {index} is missing" for index in range(count) if index not in layers]
    problems += [
        f"layer {index} is one too many" + ("" if index >= allowed else f", as it holds nothing that {ONLY_EXTRA}")
        for index in sorted(layers)
        if index >= allowed or (index >= count and (prefix, index) not in marked)
    ]
    if problems:
        raise FamilyError(
            f"{checkpoint.name}: config.json says {count} layers; in the shards ({prefix}N.):\n{listing(problems)}\n{ADVICE}"
        )


def _table_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Embeddings and head of the language model: a row for each token id, as wide as the model."""
    text = text_settings(checkpoint)
    rows = text.get("vocab_size")
    widths = [text[key] for key in _WIDTHS if type(text.get(key)) is int]
    embedding = embedding_of(checkpoint, checkpoint.tensors)
    if text.get("model_type") in _MORE_ROWS or embedding is None:
        return
    prefix = EMBEDDING.fullmatch(embedding) and embedding.removesuffix("embed_tokens.weight").removesuffix("model.")
    heads = [name for name in checkpoint.tensors if HEAD.fullmatch(name) and name.startswith(prefix or "")]
    unpadded = text.get("unpadded_vocab_size")  # rows of a head that was cut to its tokens
    for name in [embedding, *(name for name in heads if "shared_head" not in name)]:
        shape = checkpoint.tensors[name].shape
        if type(rows) is int and shape[:1] != (rows,) and not (name in heads and shape[:1] == (unpadded,)):
            yield f"{name}: shape {list(shape)}, but vocab_size is {rows}"
        elif len(shape) == 2 and widths and shape[1] not in widths:
            yield f"{name}: shape {list(shape)}, but hidden_size is {widths[0]}"


def _expert_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Experts that stand one by one, where config.json has one number of them for all layers."""
    text = text_settings(checkpoint)
    stated = {key: text[key] for key in _EXPERTS if key in text}
    if not stated or any(type(value) is not int for value in stated.values()):
        return
    zeros = sum(text[key] for key in _ZEROS if type(text.get(key)) is int)
    times = 2 if text.get("model_type") in _TWO_MODALITIES else 1
    allowed = {count for value in stated.values() for count in (value, value + zeros, times * value)}
    found: dict[str, set[int]] = {}
    for name in checkpoint.tensors:
        if match := _EXPERT.fullmatch(name):
            found.setdefault(match[1], set()).add(int(match[2]))
    for prefix, numbers in found.items():
        if "shared" not in prefix and len(numbers) not in allowed:
            key, value = next(iter(stated.items()))
            yield f"{prefix}N: {len(numbers)} experts, but {key} is {value}"
