from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import CONFIG_MAPPING

import hf_moe_lmc as lmc
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.moe import reading
from hf_moe_lmc.moe.registry import aliases, families, first_releases
from tests import zoo


def test_the_installed_release_has_what_the_data_says() -> None:
    there = {name for name in first_releases() if zoo.is_installed(name)}
    assert there <= set(CONFIG_MAPPING)
    missing = {model_type for model_type, _ in zoo.ALL.values()} - set(CONFIG_MAPPING)
    assert missing <= first_releases().keys(), "what is missing came later, and the data says when"


def test_releases_are_of_known_model_types_and_within_the_bounds() -> None:
    known = families().keys() | {model_type for model_type, _ in zoo.ALL.values()}
    assert first_releases().keys() <= known
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [bound] = [Requirement(text) for text in project["dependencies"] if text.startswith("transformers")]
    [oldest] = [Version(one.version) for one in bound.specifier if one.operator == ">="]
    assert all(oldest < Version(release) < Version("6") for release in first_releases().values())


@pytest.mark.parametrize("name", ["glm4_moe_lite", "kimi_k2"])
def test_a_model_type_that_came_later_is_refused_with_its_release(
    name: str, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    known_as = aliases()[name].known_as if name in aliases() else name
    assert known_as is not None
    folder = copy("mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": name}))
    monkeypatch.setattr(reading, "first_releases", lambda: {known_as: "5.900"})
    with pytest.raises(FamilyError) as caught:
        lmc.inspect(folder)
    message = str(caught.value)
    assert transformers.__version__ in message and "needs transformers 5.900 or later" in message
    assert f"'{known_as}'" in message and "pip install 'transformers>=5.900,<6'" in message


def test_an_installed_model_type_is_not_refused(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "first_releases", lambda: {"mixtral": transformers.__version__})
    assert lmc.inspect(copy("mixtral")).family == "mixtral"
