"""The tables that the documentation makes from settings show every field, its default and its range."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from markdown_blocks import ROOT
from pydantic import BaseModel

from nni_prune_ext import Distillation, ParameterGroup, TrainingSettings
from nni_prune_ext.methods.lottery_jackpots_options import JackpotOptions


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[BaseModel]], dict[str, tuple[str, ...]]]:
    pytest.importorskip("docutils")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.delitem(sys.modules, "field_table", raising=False)
    from field_table import field_rows

    return lambda model: {name.strip("`"): rest for name, *rest in field_rows(model)}


@pytest.mark.parametrize("model", [TrainingSettings, ParameterGroup, Distillation, JackpotOptions])
def test_every_field_is_there_and_says_what_it_means(model, rows) -> None:
    table = rows(model)

    assert list(model.model_fields) == list(table)
    assert all(meaning for *_, meaning in table.values())


def test_defaults_and_ranges_are_those_of_the_class(rows) -> None:
    table = rows(TrainingSettings)

    assert ["`float`", "`0.9`", "≥ 0, < 1"] == table["momentum"][:3]
    assert ["`str`", "`sgd`", "`sgd`, `adamw`"] == table["optimizer"][:3]
    assert "–" == table["patience"][1]
    assert "required" == rows(ParameterGroup)["pattern"][1]


@pytest.mark.parametrize("name", ["TrainingSettings", "ParameterGroup", "Distillation"])
def test_the_page_of_training_settings_has_the_table(name: str) -> None:
    page = (ROOT / "docs" / "reference" / "training_settings.md").read_text(encoding="utf-8")

    assert f"{{field-table}} nni_prune_ext.{name}\n" in page
