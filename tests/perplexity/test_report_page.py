"""docs/report.md and docs/documents.md are the pages that the schemas give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import ValidationError

from tests.perplexity.reports import on_documents
from tests.scripts import script

renderer = script("render_report")
ROOT = Path(__file__).resolve().parents[2]
PAGES = {page: (ROOT / "docs" / page).read_text(encoding="utf-8") for page in renderer.SCHEMAS}


@pytest.mark.parametrize("page", PAGES)
def test_the_committed_pages_are_those_that_the_schemas_give(page: str) -> None:
    assert renderer.markdown(page) == PAGES[page], "run: python scripts/render_report.py"


def test_a_new_key_changes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    report, alignment = renderer.read("report.md")
    report["properties"]["another"] = {
        "type": ["array", "null"],
        "items": {"type": "number"},
        "unit": "m",
        "description": "New.",
    }
    monkeypatch.setattr(renderer, "read", lambda page: [report, alignment])
    assert "| `another` *optional* | list of numbers or null | m | New. |\n" in renderer.markdown("report.md")


def described(schema: dict[str, Any]) -> set[tuple[str, str]]:
    """All keys with their descriptions."""
    found = set()
    for part in (schema, *schema["$defs"].values()):
        found |= {(key, below["description"]) for key, below in part.get("properties", {}).items()}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_a_row_for_every_key_and_its_links_lead_somewhere(page: str) -> None:
    text = PAGES[page]
    rows = {
        (key.split(".")[-1], meaning.replace("\\|", "|"))
        for key, meaning in re.findall(r"^\| `([^`]+)`[^\n]* \| ([^\n]*) \|$", text, re.MULTILINE)
    }
    expected = set().union(*map(described, renderer.read(page)))
    assert expected <= rows and len(expected) > 70
    titles = [re.sub(r"[^a-z0-9 ]", "", title.lower()) for title in re.findall(r"^##+ (.*)$", text, re.MULTILINE)]
    assert len(titles) == len(set(titles))
    assert set(re.findall(r"\(#([^)]+)\)", text)) <= {title.replace(" ", "-") for title in titles}


def test_the_example_on_the_page_validates_a_report(tmp_path: Path) -> None:
    page = PAGES["report.md"]
    example = page[page.index("```python\n") + 10 :]
    example = example[: example.index("```")].replace("DIR/", f"{tmp_path}/")
    content = json.loads(on_documents().to_json())
    (tmp_path / "report.json").write_text(json.dumps(content))
    exec(example, {})
    del content["paths"]["aligned"]["t"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValidationError, match="'t' is a required property"):
        exec(example, {})
