"""Which class of transformers runs the model of a configuration."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_moe_lmc.errors import FamilyError, ForeignError, InputError, MoELMCError, shown
from hf_moe_lmc.moe.model import MoEModel

# In each list the first that knows the configuration's class is used.
LANGUAGE_MODELS = (  # they predict the next token of a text; composite ones included
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
)
OTHERS = (
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_MAPPING,
)


# Composite models whose text goes through a part that is a language model of its own: its name in the whole model.
# Their own forward wants images or sound (qwen3_omni_moe), or fails without them (llama4 in transformers 5.24).
TEXT_READERS = {"llama4": "language_model", "qwen3_omni_moe": "thinker"}


def text_reader(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that takes token ids to the logits of the next token: the model itself but for TEXT_READERS."""
    part = TEXT_READERS.get(str(model.config.model_type))
    return model if part is None else cast("PreTrainedModel", model.get_submodule(part))


@contextmanager
def foreign(model_class: type, doing: str) -> Iterator[None]:
    """Runs code of a transformers class: whatever it raises becomes one error that names class and release.

    Args:
        doing: what was asked of it, as in "cannot be built from its configuration".

    Raises:
        ForeignError: for every exception but this package's own.
    """
    try:
        yield
    except MoELMCError:
        raise
    except Exception as error:  # foreign code raises whatever its parts raise; reading.read_config has the other broad except
        kind = getattr(getattr(model_class, "config_class", None), "model_type", None)
        raise ForeignError(
            f"{model_class.__name__} of transformers {transformers.__version__} (model type {kind!r}) {doing}: "
            f"{type(error).__name__}: {shown(error, 400)}. Expected: no failure there. Try another release of transformers"
        ) from error


def language_model_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that predicts the next token of a text with this model; None: there is none."""
    return _mapped(config, LANGUAGE_MODELS)


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model that one would evaluate, else its base.

    Raises:
        FamilyError: transformers has no model for the configuration.
    """
    model_class = _mapped(config, (*LANGUAGE_MODELS, *OTHERS)) or _tower(config)
    if model_class is None:
        raise FamilyError(
            f"transformers has no model of {type(config).__name__} (model type {config.model_type!r}). Expected: a class in "
            "its auto mappings, or one in the same module. Pass the configuration of the text model or of the whole model "
            "instead."
        )
    return model_class


def _mapped(config: PreTrainedConfig, mappings: Iterable[Mapping[Any, Any]]) -> type[PreTrainedModel] | None:
    for mapping in mappings:
        classes: Any = mapping.get(type(config), ())
        for model_class in classes if isinstance(classes, (tuple, list)) else (classes,):
            # wrappers are also mapped to their text model, which takes a part of the configuration
            if model_class.config_class is type(config):
                return cast("type[PreTrainedModel]", model_class)
    return None


def _tower(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Text towers that only occur inside a wrapper are in no mapping."""
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    towers = (
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.config_class is type(config)
        and not name.endswith("PreTrainedModel")
    )
    return next(towers, None)


def language_model_class(model: MoEModel) -> type[PreTrainedModel]:
    """The class of transformers that predicts the next token of a text with this model, composite ones included.

    Raises:
        InputError: there is none, so that perplexity has no meaning for it.
    """
    model_class = language_model_of(model.config)
    if model_class is not None:
        return model_class
    raise InputError(
        f"{model.checkpoint.name}: transformers has no language model of {type(model.config).__name__} that reads a text from "
        "left to right, so it has no perplexity; align, apply and merge work without one"
    )
