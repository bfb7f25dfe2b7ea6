"""What differs between the recipes of several runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeAlias

from nni_prune_ext.report.charts import elided
from nni_prune_ext.report.facts import RunReport
from nni_prune_ext.report.page_parts import Cell, Column, Group, Section, Table, words
from nni_prune_ext.report.run_names import folder_names

Key: TypeAlias = tuple[str, ...]
_LEFT_OUT: Final = (("out",), ("title",))
"""Keys that change nothing in the run; the page shows folder and title as the run's name."""
_LONGEST = 28
_ABSENT: Final = object()


def differences_section(reports: Sequence[RunReport]) -> Section:
    """Returns the recipe keys in which the runs differ, one column per run, or says that they do not."""
    title = "What differs"
    unknown = [str(number) for number, report in enumerate(reports, start=1) if not report.recipe]
    lead = [f"No recipe was recorded for run {', '.join(unknown)}."] if unknown else []
    if len(reports) - len(unknown) < 2:
        return Section(title, [*lead, "It takes two recipes to say what differs."])
    keys = differing_keys([report.recipe for report in reports if report.recipe])
    if not keys:
        return Section(title, [*lead, "The recipes are the same, but for title and folder."])
    names = folder_names(reports)
    columns = [Column("recipe key", numeric=False)]
    columns += [
        Column(name or report.heading, numeric=False, narrow=True, run=number)
        for number, (name, report) in enumerate(zip(names, reports), start=1)
    ]
    rows = [[Cell(".".join(key)), *(_value(report.recipe, key) for report in reports)] for key in keys]
    table = Table("Recipe keys that differ", columns, [Group(rows)])
    return Section(
        title, [*lead, "All other keys agree, but for title and folder, which name the runs."], tables=[table]
    )


def differing_keys(recipes: Sequence[Mapping[str, object]]) -> list[Key]:
    """Returns the keys whose values are not the same in all recipes, in the recipes' order.

    Where some recipes have a block and others do not, its keys count that differ between the recipes that have it; if
    there are none, the block as a whole does.
    """
    return list(_differing(recipes, ()))


def _differing(contents: Sequence[Mapping[str, object]], above: Key) -> Iterator[Key]:
    for name in dict.fromkeys(name for content in contents for name in content):
        key = (*above, str(name))
        values = [content.get(name, _ABSENT) for content in contents]
        if key in _LEFT_OUT or all(value == values[0] for value in values):
            continue
        blocks = [value for value in values if isinstance(value, Mapping) and value]
        yield from list(_differing(blocks, key)) or [key]


def _found(recipe: Mapping[str, object], key: Key) -> object:
    """Returns the value of a key; ``None`` if a key above it is ``None``, as in ``distillation: null``."""
    value: object = recipe
    for name in key:
        if value is None:
            return None
        value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value


def _value(recipe: Mapping[str, object] | None, key: Key) -> Cell:
    value = _ABSENT if recipe is None else _found(recipe, key)
    if value is _ABSENT:
        return Cell("not recorded" if recipe is None else "not given", "missing")
    shown = words(value, "none")
    if isinstance(value, Mapping) and len(shown.text) > 2 * _LONGEST:
        return Cell(f"{shown.text[: 2 * _LONGEST]}…", exact=shown.text)
    if isinstance(value, Mapping) or len(shown.text) <= _LONGEST:
        return shown
    return Cell(elided(shown.text, _LONGEST), exact=shown.text)
