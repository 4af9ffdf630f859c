"""The table of faults is what the script recorded, and what the script recorded still happens."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORD = json.loads((ROOT / "scripts" / "faults.json").read_text(encoding="utf-8"))
AGAIN = (
    "a truncated shard",
    "a header that names a tensor twice",
    "weight_map leads to ../",
    "fewer layers in config.json than in the shards",
    "quantised by GPTQ",
    "another vocabulary",
    "B without tokenizer",
    "a symmetry with an expert twice",
    "faults in A, in B and in the output at once",
    "NaN in an expert of B",
    "another process writes there",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", ROOT / "scripts" / "faults.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepared(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.prepare(tmp_path_factory.mktemp("faults"))


def test_the_table_is_rendered_from_the_record(script: ModuleType) -> None:
    assert (ROOT / "docs" / "faults.md").read_text(encoding="utf-8") == script.render(RECORD)
    assert [row["fault"] for rows in RECORD["sections"].values() for row in rows] == [row.fault for row in script.rows()]


def test_what_is_refused_leaves_nothing() -> None:
    for row in [row for rows in RECORD["sections"].values() for row in rows]:
        assert row["code"] in (0, 1, 2) and not any("Traceback" in line for line in row["message"]), row
        if "--dry-run" in row["command"] or "--overwrite" in row["command"] or "--allow" in row["command"]:
            continue
        assert row["message"][0].startswith("error: ") and row["left"] == [] if row["code"] else row["left"], row


@pytest.mark.parametrize("fault", AGAIN)
def test_it_happens_again(script: ModuleType, prepared: Path, fault: str) -> None:
    (row,) = [row for row in script.rows() if row.fault == fault]
    recorded = next(row for rows in RECORD["sections"].values() for row in rows if row["fault"] == fault)
    assert script.attempt(row, prepared) == recorded
