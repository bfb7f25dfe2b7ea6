"""The reference is complete: every public name, plugin, command line option, error and reason is in it."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_blocks import PAGES, ROOT, page_name

import nni_prune_ext
from nni_prune_ext import errors
from nni_prune_ext.cli import app
from nni_prune_ext.models.builtin import builtin_names
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.registry import Kind, plugins

PACKAGE = ROOT / "nni_prune_ext"
VERBS = typer.main.get_command(app).commands


def leaves(command: Any) -> list[Any]:
    """Returns the commands under a verb, or the verb itself."""
    inner = getattr(command, "commands", None)
    return [command] if inner is None else [leaf for own in inner.values() for leaf in leaves(own)]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in nni_prune_ext.__all__ if name != "__version__"])
def test_public_name_has_an_entry_made_from_its_docstring(name: str) -> None:
    assert re.search(rf"auto(class|function):: nni_prune_ext\.{name}$", page("reference/python_api.md"), re.MULTILINE)


@pytest.mark.parametrize("name", [name for name, value in vars(errors).items() if inspect.isclass(value)])
def test_error_has_an_entry(name: str) -> None:
    assert f"autoexception:: nni_prune_ext.errors.{name}\n" in page("reference/errors.md")


@pytest.mark.parametrize(
    "name", [name for name, plugin in plugins("pruners").items() if plugin.distribution == "nni_prune_ext"]
)
def test_method_has_a_page_with_all_its_options(name: str) -> None:
    text = page(f"reference/methods/{name}.md")

    options = method_spec(name).options
    assert method_spec(name).reference in text
    assert f"{{field-table}} {options.__module__}.{options.__name__}\n" in text or all(
        f"`{option}`" in text + page("reference/methods/index.md") for option in options.model_fields
    )
    assert f"\n{name}\n" in page("reference/methods/index.md"), "missing in the table of contents"


@pytest.mark.parametrize("kind", ["schedulers", "runtimes"])
def test_plugin_has_an_entry(kind: Kind) -> None:
    text = page(f"reference/{kind}.md")

    names = [name for name, plugin in plugins(kind).items() if plugin.distribution == "nni_prune_ext"]

    assert [] == [name for name in names if f"`{name}`" not in text]


def test_built_in_models_are_listed() -> None:
    assert [] == [name for name in builtin_names() if f"`{name}`" not in page("reference/models_and_data.md")]


@pytest.mark.parametrize("verb", VERBS)
def test_verb_has_an_entry_with_all_its_options(verb: str) -> None:
    section = page("reference/cli.md").partition(f"## {verb}\n")[2].partition("\n## ")[0]
    shared = page("reference/cli.md").partition("## Options of several verbs\n")[2].partition("\n## ")[0]

    options = {
        o
        for command in leaves(VERBS[verb])
        for parameter in command.params
        for o in (*parameter.opts, *parameter.secondary_opts)
        if o.startswith("--")
    }

    assert section
    assert set() == {option for option in options - {"--help"} if f"`{option}`" not in section + shared}


def test_reference_names_no_option_that_does_not_exist() -> None:
    existing = {
        o
        for verb in VERBS.values()
        for command in leaves(verb)
        for parameter in command.params
        for o in (*parameter.opts, *parameter.secondary_opts)
    }

    named = set(re.findall(r"^\| `(--[a-z-]+)`", page("reference/cli.md"), re.MULTILINE))

    assert set() == named - existing - {"--version", "--help"}


def reason_fragments() -> list[str]:
    """Returns what the first column of the table of reasons quotes."""
    table = page("how-to/protect_and_understand.md").partition("## What the reasons mean\n")[2].partition("\n## ")[0]
    return [
        part for cell in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for part in re.findall(r"`(.+?)`", cell)
    ]


def test_table_of_reasons_quotes_the_program() -> None:
    files = [*sorted((PACKAGE / "graph").glob("*.py")), PACKAGE / "certificate.py"]
    source = "".join(file.read_text(encoding="utf-8") for file in files)

    fragments = reason_fragments()

    assert fragments
    assert [] == [fragment for fragment in fragments if fragment not in source]


def test_table_of_reasons_is_complete() -> None:
    """Every message of the tracer that names a place is a reason."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted((PACKAGE / "graph").glob("*.py"))]
    strings = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    reasons = {
        "".join(part.value if isinstance(part, ast.Constant) else "…" for part in string.values)
        for string in strings
        if any(isinstance(part, ast.Attribute) and part.attr == "place" for part in ast.walk(string))
    }

    assert len(reasons) > 20
    assert [] == [reason for reason in sorted(reasons) if not any(part in reason for part in reason_fragments())]


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)

    targets = [
        target.partition("#")[0]
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not target.startswith(("http", "#"))
    ]

    assert [] == [target for target in targets if not (path.parent / target).exists()]


def test_error_messages_point_to_pages_that_exist() -> None:
    source = "".join(p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py"))

    assert [] == [name for name in set(re.findall(r"docs/[\w/-]+\.md", source)) if not (ROOT / name).exists()]
