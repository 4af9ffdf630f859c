"""docs/report.md is the page that the schemas give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import ValidationError

from tests.perplexity.reports import on_documents
from tests.schemas import ALIGNMENT, REPORT
from tests.scripts import script

renderer = script("render_report")
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")


def test_the_committed_page_is_the_one_that_the_schemas_give(monkeypatch: pytest.MonkeyPatch) -> None:
    assert renderer.markdown() == PAGE, "run: python scripts/render_report.py"
    report, alignment = renderer.read()
    report["properties"]["another"] = {
        "type": ["array", "null"],
        "items": {"type": "number"},
        "unit": "m",
        "description": "New.",
    }
    monkeypatch.setattr(renderer, "read", lambda: [report, alignment])
    assert "| `another` *optional* | list of numbers or null | m | New. |\n" in renderer.markdown()


def described(schema: dict[str, Any]) -> set[tuple[str, str]]:
    """All keys with their descriptions."""
    found = set()
    for part in (schema, *schema["$defs"].values()):
        found |= {(key, below["description"]) for key, below in part.get("properties", {}).items()}
    return found


def test_the_page_has_a_row_for_every_key_and_its_links_lead_somewhere() -> None:
    rows = {
        (key.split(".")[-1], meaning.replace("\\|", "|"))
        for key, meaning in re.findall(r"^\| `([^`]+)`[^\n]* \| ([^\n]*) \|$", PAGE, re.MULTILINE)
    }
    expected = described(REPORT) | described(ALIGNMENT)
    assert expected <= rows and len(expected) > 120
    titles = [re.sub(r"[^a-z0-9 ]", "", title.lower()) for title in re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)]
    assert len(titles) == len(set(titles))
    assert set(re.findall(r"\(#([^)]+)\)", PAGE)) <= {title.replace(" ", "-") for title in titles}


def test_the_example_on_the_page_validates_a_report(tmp_path: Path) -> None:
    example = PAGE[PAGE.index("```python\n") + 10 :]
    example = example[: example.index("```")].replace("DIR/", f"{tmp_path}/")
    content = json.loads(on_documents().to_json())
    (tmp_path / "report.json").write_text(json.dumps(content))
    exec(example, {})
    del content["paths"]["aligned"]["t"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValidationError, match="'t' is a required property"):
        exec(example, {})
