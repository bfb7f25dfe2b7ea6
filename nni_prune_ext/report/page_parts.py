"""What a page is made of: cells, tables, charts and sections, without any HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from nni_prune_ext.report import number_text

Tone: TypeAlias = Literal["", "good", "bad", "missing"]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        exact: shown when the reader points at the cell.
        mark: class of a sign before the text.
        run: number of the run whose badge stands before the text; 0 for none.
    """

    text: str
    tone: Tone = ""
    exact: str = ""
    mark: str = ""
    run: int = 0


@dataclass(frozen=True)
class Column:
    """One column; numbers stand to the right.

    Attributes:
        wraps: holds sentences.
        narrow: holds words that may break, so that several such columns fit a phone.
        run: number of the run whose badge stands before the heading; 0 for none.
    """

    heading: str
    numeric: bool = True
    wraps: bool = False
    narrow: bool = False
    run: int = 0


@dataclass(frozen=True)
class Group:
    """Rows that belong together, under the name and the badge of a run if there are several."""

    rows: Sequence[Sequence[Cell]]
    name: str = ""
    run: int = 0


@dataclass(frozen=True)
class Table:
    """A table; ``caption`` says what it shows, ``note`` what is to be known about it."""

    caption: str
    columns: Sequence[Column]
    groups: Sequence[Group]
    note: str = ""
    folded: bool = False
    headless: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart as SVG text, with the words under it."""

    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the page; tables follow charts, and code comes last."""

    title: str
    paragraphs: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    code: str = ""
    beside: bool = False
    marks: bool = False
    gated: bool = False


@dataclass(frozen=True)
class Verdict:
    """One sentence that says what was reached or missed."""

    tone: Tone
    text: str


@dataclass(frozen=True)
class Figure:
    """One number that stands out, with what it is compared to."""

    label: str
    value: str
    beside: str


def cell(value: float | None, text: Callable[[float], str], missing: str = "not measured") -> Cell:
    """Returns a number with its exact value, or says that it is missing."""
    if value is None:
        return Cell(missing, "missing")
    return Cell(text(value), exact=number_text.plain(value) if abs(value) >= 1000 else f"{value:.6g}")


def words(value: object, missing: str = "unknown") -> Cell:
    """Returns any JSON value as text."""
    if value is None or value in ("", [], {}, ()):
        return Cell(missing if value is None or value == "" else "none", "missing")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, (int, float)):
        return Cell(number_text.plain(value) if abs(value) >= 1e5 else f"{value:g}")
    if isinstance(value, Mapping):
        return Cell(", ".join(f"{key}: {words(item, missing).text}" for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return Cell(", ".join(words(item, missing).text for item in value))
    return Cell(str(value))


def pairs(caption: str, content: Mapping[str, object], *, note: str = "", missing: str = "unknown") -> Table:
    """Returns names and values as a table of two columns without headings."""
    rows = [[Cell(str(key)), words(value, missing)] for key, value in content.items()]
    columns = (Column("name", numeric=False), Column("value", numeric=False, wraps=True))
    return Table(caption, columns, [Group(rows)], note=note, headless=True)
