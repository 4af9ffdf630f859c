"""Draws docs/architecture.svg from the imports of the package, and writes the map of its rooms in docs/architecture.md.

    python scripts/render_architecture.py

The rows are those of the import rules in pyproject.toml. An arrow goes from a room to one that it imports; arrows that
follow from two others are left out. The map takes the first sentence of each module's docstring.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import grimp
from render_readme import fill

from hf_moe_lmc.runtime.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_moe_lmc"
PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.svg"
DATA = "families"  # a file for each group of model types: the map does not list them

WIDTH, HEIGHT, ROW, LEFT, STEP = 172, 46, 82, 20, 110  # of a box; from row to row; margin; from column to column
COLUMNS = {1: (2.0,), 2: (1.0, 3.0), 3: (0.0, 2.0, 4.0), 4: (0.0, 4 / 3, 8 / 3, 4.0)}  # places of the boxes of a row, in steps
ASIDE = LEFT + 4 * STEP + WIDTH + 24  # where an arrow goes down that would cross a box
FILL, LINE, TEXT, FAINT = "#eef3fb", "#34558b", "#14213d", "#5a6478"


@dataclass(frozen=True)
class Box:
    """A room in the picture; x and y are those of its upper left corner."""

    room: str
    x: float
    y: float

    @property
    def middle(self) -> float:
        return self.x + WIDTH / 2


def rows() -> list[list[str]]:
    """The rooms, from the top down, as the import rules have them."""
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = [rule["layers"] for rule in rules if rule["name"] == "rooms"]
    found = [[room.strip().removeprefix(f"{PACKAGE}.") for room in layer.split("|")] for layer in layers]
    return [row for row in found if row != ["__main__"]]


def imports(rooms: Sequence[str]) -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports the second, those that follow from two other pairs left out."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    public = graph.find_modules_directly_imported_by(PACKAGE)  # whoever imports the package itself reaches these
    found = {
        (room, other)
        for room in rooms
        for other in rooms
        if room != other and graph.direct_import_exists(importer=_full(room), imported=_full(other), as_packages=True)
    }
    for room in rooms:
        modules = {_full(room), *graph.find_descendants(_full(room))}
        if any(PACKAGE in graph.find_modules_directly_imported_by(module) for module in modules):
            found |= {(room, name.split(".")[1]) for name in public} - {(room, room)}
    return {pair for pair in found if pair[1] not in _reached(pair[0], found - {pair})}


def _full(room: str) -> str:
    return f"{PACKAGE}.{room}"


def _reached(room: str, pairs: Iterable[tuple[str, str]]) -> set[str]:
    found: set[str] = set()
    left = [room]
    while left:
        one = left.pop()
        new = {other for first, other in pairs if first == one} - found
        found |= new
        left += new
    return found


def svg() -> str:
    """The picture."""
    layers = rows()
    boxes = {
        room: Box(room, LEFT + STEP * column, LEFT + ROW * number)
        for number, row in enumerate(layers)
        for room, column in zip(row, COLUMNS[len(row)], strict=True)
    }
    lines = sorted(imports(list(boxes)), key=lambda pair: [list(boxes).index(room) for room in pair])
    width, height = ASIDE + LEFT, LEFT * 2 + ROW * (len(layers) - 1) + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
        "<title>The rooms of hf_moe_lmc. An arrow goes from a room to one that it imports.</title>",
        f'<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *(_arrow(boxes[one], boxes[other], boxes.values()) for one, other in lines),
        *(line for box in boxes.values() for line in _drawn(box)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _drawn(box: Box) -> Iterator[str]:
    yield f'<rect x="{box.x:g}" y="{box.y:g}" width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{FILL}" stroke="{LINE}"/>'
    yield f'<text x="{box.middle:g}" y="{box.y + 20:g}" font-size="15" font-weight="bold" fill="{TEXT}">{box.room}</text>'
    yield f'<text x="{box.middle:g}" y="{box.y + 36:g}" font-size="11" fill="{FAINT}">{escape(_contents(box.room))}</text>'


def _contents(room: str) -> str:
    count = len(modules(room))
    return f"{count} files of data" if room == DATA else f"{count} modules" if count > 1 else "one module"


def _arrow(one: Box, other: Box, boxes: Iterable[Box]) -> str:
    """Straight down, or along the right margin where a box stands in the way."""
    start, end = one.y + HEIGHT, other.y
    shift = 14 * ((one.middle < other.middle) - (one.middle > other.middle))  # so that arrows do not meet in one point
    between = [box for box in boxes if start < box.y < end]
    at = {box: one.middle + (other.middle - one.middle) * (box.y - start) / (end - start) for box in between}
    if any(box.x - 8 < x < box.x + WIDTH + 8 for box, x in at.items()):
        path = f"M{one.x + WIDTH:g} {one.y + HEIGHT / 2:g} H{ASIDE} V{other.y + HEIGHT / 2:g} H{other.x + WIDTH:g}"
    else:
        path = f"M{one.middle + shift:g} {start:g} L{other.middle - shift:g} {end:g}"
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.4" marker-end="url(#head)"/>'


def modules(room: str) -> list[Path]:
    """The files of a room in the order of their names; none where it is a single module."""
    return sorted(path for path in (ROOT / PACKAGE / room).glob("*.py") if path.stem != "__init__")


def says(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".")


def rooms_map() -> str:
    """Each room with its modules, from the top down."""
    parts = []
    for room in [room for row in rows() for room in row]:
        files = modules(room)
        home = ROOT / PACKAGE / room / "__init__.py" if files else ROOT / PACKAGE / f"{room}.py"
        parts.append(f"### {room}\n\n{says(home)}.\n")
        if room != DATA and files:
            listed = [(f"[`{path.stem}`](../{PACKAGE}/{room}/{path.name})", says(path)) for path in files]
            parts.append(markdown_table(("module", "what it holds"), listed))
    return "\n".join(parts)


def main() -> None:
    PICTURE.write_text(svg(), encoding="utf-8")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), {"rooms": rooms_map}), encoding="utf-8")
    print(f"written: {PICTURE} and {PAGE}")


if __name__ == "__main__":
    main()
