"""The wheel and the source distribution, built and installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from hf_moe_lmc import __version__
from tests.scripts import script

ROOT = Path(__file__).resolve().parents[1]
RELATIVE_LINK = re.compile(r"\]\((?!https?:|#)")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, the wheel made from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


def run(*command: object, **settings: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def package_files() -> set[str]:
    paths = [path for path in (ROOT / "hf_moe_lmc").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in paths}


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == package_files()
    assert {"hf_moe_lmc/py.typed", "hf_moe_lmc/perplexity/report.schema.json", "hf_moe_lmc/example/stages.py"} <= names
    [source] = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() | {"README.md", "LICENSE", "tests/zoo.py", "scripts/check.sh"} <= inside


def test_the_installed_command_runs_outside_the_repository(dist: Path, tmp_path: Path) -> None:
    [wheel] = dist.glob("*.whl")
    place, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", place, wheel)
    environment = {**os.environ, "PYTHONPATH": str(place)}
    assert run(place / "bin" / "hf-moe-lmc", "--version", cwd=elsewhere, env=environment) == f"hf-moe-lmc {__version__}\n"
    assert "--overwrite" in run(place / "bin" / "hf-moe-lmc", "demo", "--help", cwd=elsewhere, env=environment)
    found = run(sys.executable, "-c", "import hf_moe_lmc; print(hf_moe_lmc.__file__)", cwd=elsewhere, env=environment)
    assert Path(found.strip()).is_relative_to(place), "the control: not the repository's"


def test_an_index_shows_the_readme_without_links_to_files_beside_it(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    shown = message_from_bytes(archive.read(name)).get_payload()
    assert "# hf_moe_lmc" in shown and not RELATIVE_LINK.search(shown)
    assert RELATIVE_LINK.search((ROOT / "README.md").read_text(encoding="utf-8")), "the control: there are some"


def test_with_a_repository_links_and_pictures_are_absolute() -> None:
    for_an_index = script("hatch_readme").for_an_index
    text = "![a picture](docs/a.png) [a page](docs/a.md#part) [here](#here) [far](https://example.org/a)"
    assert for_an_index(text, "https://example.org/us", "v1") == (
        "![a picture](https://example.org/us/raw/v1/docs/a.png) [a page](https://example.org/us/blob/v1/docs/a.md#part) "
        "[here](#here) [far](https://example.org/a)"
    )
    assert for_an_index(text, None, "v1") == " a page [here](#here) [far](https://example.org/a)"
