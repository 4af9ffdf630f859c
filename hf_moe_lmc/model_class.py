"""Which class of transformers runs the model of a configuration."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_moe_lmc.errors import FamilyError

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


def language_model_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that predicts the next token of a text with this model; None: there is none."""
    return _mapped(config, LANGUAGE_MODELS)


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model that one would evaluate, else its base.

    Raises:
        FamilyError: transformers has no model for the configuration.
    """
    found = _mapped(config, (*LANGUAGE_MODELS, *OTHERS)) or _tower(config)
    if found is None:
        raise FamilyError(
            f"transformers has no model of {type(config).__name__} (model type {config.model_type!r}). Expected: a class in "
            "its auto mappings, or one in the same module. Pass the configuration of the text model or of the whole model "
            "instead."
        )
    return found


def _mapped(config: PreTrainedConfig, mappings: Iterable[Mapping[Any, Any]]) -> type[PreTrainedModel] | None:
    for mapping in mappings:
        found: Any = mapping.get(type(config), ())
        for model_class in found if isinstance(found, (tuple, list)) else (found,):
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
