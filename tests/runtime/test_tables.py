from __future__ import annotations

import doctest

import pytest

from hf_moe_lmc.runtime import tables
from hf_moe_lmc.runtime.tables import aligned, definitions, markdown_table, wrapped

ROWS = [("name", "value", "unit"), ("a", "-1.5", "nats"), ("longer", "22", "")]


def test_the_examples_hold() -> None:
    result = doctest.testmod(tables)
    assert result.attempted >= 5 and result.failed == 0


@pytest.mark.parametrize("align", ["<", ">", "^"])
@pytest.mark.parametrize("least", [(), (9,), (1, 12)])
@pytest.mark.parametrize("gap", [" ", "  ", " | "])
def test_columns_start_or_end_below_each_other(align: str, least: tuple[int, ...], gap: str) -> None:
    lines = aligned(ROWS, align=align, least=least, gap=gap)
    widths = [max([6, *least[:1]]), max([5, *least[1:]]), 4]
    whole = sum(widths) + 2 * len(gap)
    assert not any(line.endswith(" ") for line in lines) and max(map(len, lines)) == whole
    for line, row in zip((line.ljust(whole) for line in lines), ROWS, strict=True):
        start = 0
        for cell, width in zip(row, widths, strict=True):
            assert line[start : start + width] == f"{cell:{align}{width}}"
            start += width + len(gap)
    assert aligned([], least=(3,)) == []


def test_long_cells_are_broken_within_their_columns() -> None:
    row = ("one two three four", "x", "sub-word stays whole")
    lines = wrapped(row, (9, 3, 8))
    assert all(len(line) <= 9 + 3 + 8 + 4 for line in lines)
    for number, (start, width) in enumerate(((0, 9), (11, 3), (16, 8))):
        assert " ".join(line[start : start + width].strip() for line in lines).split() == row[number].split()
    assert wrapped(("", "x"), (4, 4)) == ["      x"]


def test_terms_have_their_texts_beside_them() -> None:
    texts = {"a": "word " * 12, "longer": "short"}
    lines = definitions(texts, width=30)
    assert all(len(line) <= 30 for line in lines) and lines[-1] == "  longer  short"
    assert lines[0].startswith("  a       word") and all(line.startswith(" " * 10 + "word") for line in lines[1:-1])
    assert " ".join(line[10:] for line in lines).split() == ["word"] * 12 + ["short"]


def test_a_markdown_table_escapes_bars_and_may_have_another_rule() -> None:
    text = markdown_table(["a", "b"], [["x|y", "1"], ["", "2"]])
    assert text == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n|  | 2 |\n"
    assert markdown_table(["a"], [["1"]], rule="|---|") == "| a |\n|---|\n| 1 |\n"
