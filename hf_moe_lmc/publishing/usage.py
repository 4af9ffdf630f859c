"""How a published checkpoint is loaded: the Auto class of transformers, the dtype, and what reads its text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from hf_moe_lmc.checkpoints.untrusted import read_json_object

if TYPE_CHECKING:
    from hf_moe_lmc.checkpoints.checkpoint import Checkpoint

CAUSAL, COMPOSITE = "AutoModelForCausalLM", "AutoModelForImageTextToText"
# Model types that transformers lists elsewhere than their configuration suggests.
OTHERS = {
    **dict.fromkeys(("switch_transformers", "nllb-moe"), "AutoModelForSeq2SeqLM"),
    **dict.fromkeys(
        ("glm4v_moe_text", "glm5_next_text", "mistral_large4_text", "muse_spark_text", "qwen3_vl_moe_text"), "AutoModel"
    ),
    "mistral4": COMPOSITE,
    "openai_privacy_filter": "AutoModelForTokenClassification",
    "qwen3_omni_moe": "AutoModelForMultimodalLM",
}
TASKS = {CAUSAL: "text-generation", COMPOSITE: "image-text-to-text"}
TOKENIZER = "tokenizer", "AutoTokenizer"
PROMPT = (
    'inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)',
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
)
CHAT = (
    'messages = [{"role": "user", "content": "What is the capital of France?"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
    ").to(model.device)",
    'print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]))',
)
HERE = "# this folder"
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_LINE = re.compile(rb'(## How to load it\n\n```python\n(?:(?!```).*\n)*?model_id = )"([^"\n]*)"(?:  # this folder)?\n')
_INDEX = re.compile(rb"\A(---\n(?:(?!---\n).*\n)*?model-index:\n)(- name: [^\n]*\n)")
_HEADING = re.compile(rb"^# +(.*\S)", re.MULTILINE)


def auto_class(config: Mapping[str, Any]) -> str:
    """The Auto class that loads a model with its head, from config.json alone: transformers itself takes seconds to import.

    Example:
        >>> auto_class({"model_type": "mixtral"}), auto_class({"model_type": "llama4", "text_config": {}})
        ('AutoModelForCausalLM', 'AutoModelForImageTextToText')
    """
    composite = any(isinstance(config.get(key), Mapping) for key in ("text_config", "vision_config"))
    return OTHERS.get(str(config.get("model_type")), COMPOSITE if composite else CAUSAL)


def common_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most bytes of the weights have, as `from_pretrained` takes it; quantized weights say it themselves."""
    if checkpoint.quantization:
        return "auto"
    held: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        held[str(info.dtype).removeprefix("torch.")] += info.nbytes
    return held.most_common(1)[0][0] if held else "auto"


def how_to_load(checkpoint: Checkpoint, files: Collection[str], name: str) -> str:
    """A section with the lines that load an output.

    Args:
        checkpoint: whose layout, dtypes and configuration the output has.
        files: side files of the output.
        name: Hub id of the output; anything else stands for the folder itself, until a push puts its repository there.
    """
    model, reader = auto_class(checkpoint.config), _reader(files)
    imports = ", ".join(sorted(filter(None, (model, reader and reader[1]))))
    lines = [f"from transformers import {imports}", "", f'model_id = "{name}"' if "/" in name else f'model_id = "."  {HERE}']
    if reader:
        lines.append(f"{reader[0]} = {reader[1]}.from_pretrained(model_id)")
    lines.append(f'model = {model}.from_pretrained(model_id, dtype="{common_dtype(checkpoint)}", device_map="auto")')
    if model == CAUSAL and reader == TOKENIZER:
        lines += ["", *(CHAT if _has_template(checkpoint, files) else PROMPT)]
    return "## How to load it\n\n```python\n" + "\n".join(lines) + "\n```\n"


def named_for(card: bytes, repo_id: str) -> bytes:
    """A card for a repository: the lines that load the model and the results in its metadata name that repository.

    A card without such lines is as it was. Results that somebody has given another name keep it.

    Example:
        >>> card = b'## How to load it\\n\\n```python\\nmodel_id = "merged"\\n```\\n'
        >>> named_for(card, "me/merged") == card.replace(b'"merged"', b'"me/merged"')
        True
    """
    lines, index, heading = _LINE.search(card), _INDEX.search(card), _HEADING.search(card)
    if index and lines:
        before = (lines[2].rpartition(b"/")[2], heading[1] if heading else b"")
        if index[2] in [_index_name(name.decode(errors="replace")) for name in before]:
            card = index[1] + _index_name(repo_id.rpartition("/")[2]) + card[index.end() :]
    return _LINE.sub(rb"\g<1>" + f'"{repo_id}"\n'.encode(), card, count=1)


def _index_name(name: str) -> bytes:
    """The line of a card's metadata that names the model of its results."""
    return yaml.safe_dump([{"name": name}], width=math.inf, allow_unicode=True).encode()


def _reader(files: Collection[str]) -> tuple[str, str] | None:
    """What makes token ids of a text: a variable, and its Auto class."""
    if any(file in files for file in _PROCESSORS):
        return "processor", "AutoProcessor"
    if any(file.startswith("tokenizer") or file in ("spiece.model", "vocab.json") for file in files):
        return TOKENIZER
    return None


def _has_template(checkpoint: Checkpoint, files: Collection[str]) -> bool:
    """Whether the tokenizer knows how a chat is written."""
    if any(file.startswith("chat_template.") for file in files):
        return True
    file = "tokenizer_config.json"
    return file in files and "chat_template" in read_json_object(checkpoint.source.path(file), f"{checkpoint.name}/{file}")
