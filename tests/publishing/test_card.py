from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.source import Repository
from hf_moe_lmc.publishing.card import model_card
from tests import tiny


class OnHub(Repository):
    """A repository whose files are in a folder here."""

    def path(self, file: str) -> Path:
        return FOLDERS[self.repo_id] / file

    def files(self) -> list[str]:
        return [path.name for path in FOLDERS[self.repo_id].iterdir()]


FOLDERS: dict[str, Path] = {}


def on_hub(folder: Path, repo_id: str, license: str | None) -> Checkpoint:
    (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n# B\n" if license else "# no metadata\n")
    FOLDERS[repo_id] = folder
    return replace(Checkpoint.open(folder), source=OnHub(repo_id, "0123456789abcdef", ()))


def card(a: Checkpoint, b: Checkpoint) -> ModelCard:
    text = model_card(
        title="T", summary="S.", inputs={"A": a, "B": b}, base=[a, b], relation="merge", command="do it", alignment=None
    )
    return ModelCard(text)


@pytest.mark.parametrize(
    ("of_a", "of_b", "expected"),
    [("mit", "mit", "mit"), ("mit", "apache-2.0", None), ("mit", None, None), (None, None, None)],
)
def test_hub_inputs_are_named_pinned_and_a_licence_inherited_only_when_equal(
    copy: Callable[..., Path], of_a: str | None, of_b: str | None, expected: str | None
) -> None:
    a = on_hub(copy("mixtral", name="a"), "org/a", of_a)
    b = on_hub(copy("mixtral", "per-expert", 1, name="b"), "org/b", of_b)
    found = card(a, b)
    assert found.data.base_model == ["org/a", "org/b"] and found.data.base_model_relation == "merge"
    assert {"merge", "moe"} <= set(found.data.tags) and found.data.library_name == "transformers"
    assert found.data.license == expected
    assert ("Not stated here" in found.text) == (expected is None)
    assert "`0123456789abcdef`" in found.text and "do it" in found.text


def test_local_inputs_are_named_without_their_paths(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_model("olmoe"), tmp_path / "secret" / "my-tune", "per-expert")
    checkpoint = Checkpoint.open(folder)
    found = card(checkpoint, checkpoint)
    assert found.data.base_model is None and "my-tune (local)" in found.text
    assert "secret" not in str(found) and checkpoint.fingerprint()[:16] in found.text
