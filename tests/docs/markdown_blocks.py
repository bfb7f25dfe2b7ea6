"""Reads the fenced blocks of Markdown pages, with the marker comment that stands above each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])

_BLOCK = re.compile(
    r"(?:^<!-- (?P<marker>[^\n]*?) -->\n\n?)?^```(?P<language>[\w-]+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: path from the root of the repository.
        line: line of its first line of text, from 1.
        marker: the HTML comment directly above it, without the brackets; empty if there is none.
    """

    page: str
    line: int
    language: str
    marker: str
    text: str


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page_name(page),
            text.count("\n", 0, found.start("text")) + 1,
            found["language"],
            found["marker"] or "",
            found["text"],
        )
        for found in _BLOCK.finditer(text)
    ]


def commands_of(block: Block) -> list[str]:
    """Returns the commands of a console block: lines after ``$``, with continued lines joined."""
    joined = block.text.replace("\\\n", " ")
    return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]
