"""The directive ``field-table``: the fields of a pydantic class as a table, so that no page repeats them by hand."""

from __future__ import annotations

import json
import re
from importlib import import_module
from types import UnionType
from typing import Annotated, ClassVar, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from docutils import nodes
from docutils.parsers.rst import Directive
from pydantic import BaseModel
from pydantic.fields import FieldInfo

HEADINGS = ("Setting", "Type", "Default", "Valid", "Means")
_SIGNS = {Gt: ("gt", "> "), Ge: ("ge", "≥ "), Lt: ("lt", "< "), Le: ("le", "≤ ")}


def field_rows(model: type[BaseModel]) -> list[tuple[str, str, str, str, str]]:
    """Returns name, type, default, range and description of every field; names and values between backticks."""
    return [
        (f"`{name}`", f"`{_type(info.annotation)}`", _default(info), _range(info), info.description or "")
        for name, info in model.model_fields.items()
    ]


class FieldTable(Directive):
    """``.. field-table:: package.module.Class``."""

    required_arguments = 1
    has_content = False
    option_spec: ClassVar = {}

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        group = nodes.tgroup(cols=len(HEADINGS))
        group += [nodes.colspec(colwidth=width) for width in (20, 18, 12, 12, 38)]
        group += nodes.thead("", _row(HEADINGS))
        group += nodes.tbody("", *map(_row, field_rows(getattr(import_module(module), name))))
        return [nodes.table("", group)]


def _row(cells: tuple[str, ...]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *_inline(cell))) for cell in cells))


def _inline(text: str) -> list[nodes.Node]:
    parts = re.split(r"`(.+?)`", text)
    return [nodes.literal(part, part) if index % 2 else nodes.Text(part) for index, part in enumerate(parts)]


def _type(kind: object) -> str:
    """Returns a type in short: without ``None``, ranges, and the modules that classes come from."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return type(parts[0]).__name__
    if origin is Annotated:
        return _type(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in parts if part is not type(None))
    if parts:
        inner = ", ".join("..." if part is Ellipsis else _type(part) for part in parts)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    return "–" if info.default in (None, ()) else f"`{json.dumps(info.default)}`".replace('"', "")


def _range(info: FieldInfo) -> str:
    if get_origin(info.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(info.annotation))
    parts = [part for part in get_args(info.annotation) if get_origin(part) is Annotated]  # of a list: every item's
    metadata = [*info.metadata, *(item for part in parts for field in get_args(part)[1:] for item in field.metadata)]
    signs = [(_SIGNS[type(item)], item) for item in metadata if type(item) in _SIGNS]
    return ", ".join(f"{sign}{getattr(item, name):g}" for (name, sign), item in signs)
