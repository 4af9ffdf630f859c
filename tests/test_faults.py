"""Each fault ends as scripts/faults.json records it, and docs/faults.md shows that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import script

faults = script("faults")
RECORD = json.loads(faults.RECORD.read_text(encoding="utf-8"))
RECORDED = {row["fault"]: row for rows in RECORD["sections"].values() for row in rows}
# What writes an output, though something is wrong or stands there.
ALLOWED = ("--dry-run", "--overwrite", "--allow")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(faults.prepare(tmp_path_factory.mktemp("faults")))


def attempt(row: Any, prepared: Path) -> dict[str, Any]:
    try:
        return dict(faults.attempt(row, prepared))
    except PermissionError as error:
        pytest.skip(str(error))


def test_the_table_is_rendered_from_the_record() -> None:
    assert faults.TABLE.read_text(encoding="utf-8") == faults.render(RECORD)
    assert list(RECORDED) == [row.fault for row in faults.rows()]


@pytest.mark.parametrize("fault", RECORDED)
def test_it_happens_again_and_what_is_refused_leaves_nothing(prepared: Path, fault: str) -> None:
    (row,) = [row for row in faults.rows() if row.fault == fault]
    found = attempt(row, prepared)
    assert found == RECORDED[fault]
    assert found["code"] in (0, 1, 2) and not any("Traceback" in line for line in found["message"])
    if found["code"]:
        assert found["message"][0].startswith("error: ") and (found["left"] == [] or "--overwrite" in row.command)
    else:
        assert bool(found["left"]) != ("--dry-run" in row.command)


def test_the_check_fails_where_something_ends_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--check", "--only", "truncated"]
    assert faults.main(words) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err == "1 faults tried, 0 differences from faults.json\n"
    altered = tmp_path / "faults.json"
    altered.write_text(
        faults.RECORD.read_text(encoding="utf-8").replace("fetch it again", "throw it away", 1), encoding="utf-8"
    )
    monkeypatch.setattr(faults, "RECORD", altered)
    assert faults.main(words) == 1
    said = capsys.readouterr()
    assert "--- a truncated shard: recorded" in said.out and "faults.md is not what faults.json gives" in said.out
    assert [line[0] for line in said.out.splitlines() if "a truncated shard" not in line and line.startswith(("-", "+"))] == [
        "-",
        "+",
    ]
    assert "2 differences" in said.err
