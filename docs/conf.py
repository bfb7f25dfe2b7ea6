"""Sphinx configuration: Markdown pages, and reference pages made from the docstrings."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nni_prune_ext

sys.path.insert(0, str(Path(__file__).parent))
from field_table import FieldTable

project = "nni_prune_ext"
author = "the nni_prune_ext authors"
release = version = nni_prune_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"nni_prune_ext {release}"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # a function as a default would not parse
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True

_LITERAL = re.compile(r"(``.*?``)")


def escape_bars(app: object, what: str, name: str, subject: object, options: object, lines: list[str]) -> None:
    """Escapes ``|`` outside of literals: the docstrings mean absolute values, reStructuredText would substitute."""
    for number, line in enumerate(lines):
        parts = _LITERAL.split(line)
        lines[number] = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)


def setup(app: object) -> None:
    """Connects the hook above and the directive beside this file."""
    app.connect("autodoc-process-docstring", escape_bars)
    app.add_directive("field-table", FieldTable)
