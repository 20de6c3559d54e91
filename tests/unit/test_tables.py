"""One table in three forms: aligned text, Markdown that no cell breaks out of, and rich, which obeys no markup."""

import io

import pytest
from rich.console import Console

from qlora_neft.display.tables import Table

TABLE = Table(("", "loss"), (("[red]a[/red]", "1.5"), ("b", "12.25")), title="what was measured")


def shown(table, *, framed=True):
    console = Console(file=io.StringIO(), width=60, highlight=False)
    console.print(table.rich(framed=framed))
    return console.file.getvalue()


def test_numbers_end_and_labels_begin_in_one_column():
    assert TABLE.plain().splitlines() == ["               loss", "[red]a[/red]    1.5", "b             12.25"]


@pytest.mark.parametrize(("align", "line"), [("l", "a  b  cc"), ("r", "aa  b   c"), ("lrl", "a   b  c")])
def test_the_last_letter_holds_for_all_other_columns(align, line):
    rows = {"l": (("a", "b", "cc"),), "r": (("aa", "b", " c"),), "lrl": (("a", " b", "c"),)}[align]
    assert Table((), rows, align=align).plain() == line


def test_a_table_without_a_heading_has_rows_alone():
    assert Table((), (("a", "bc"), ("abc", "")), align="l").plain() == "a    bc\nabc"


def test_markdown_marks_numbers_only_if_asked():
    assert TABLE.markdown().splitlines()[1] == "| --- | --- |"
    assert TABLE.markdown(aligned=True).splitlines()[1] == "| --- | ---: |"


@pytest.mark.parametrize("framed", [True, False])
def test_markup_in_cells_is_text(framed):
    assert "[red]a[/red]" in shown(TABLE, framed=framed) and "what was measured" in shown(TABLE, framed=framed)
    assert ("┃" in shown(TABLE, framed=framed)) == framed


def test_a_rule_follows_the_rows_of_a_section():
    plain, ruled = (shown(Table(TABLE.columns, TABLE.rows, sections=at)).splitlines() for at in ((), (0,)))
    assert len(ruled) == len(plain) + 1
