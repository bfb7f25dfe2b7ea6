"""Everything that a page tells the reader to type works.

Per page, from top to bottom, in an empty folder and one namespace:

* ``python`` blocks run; one that begins with ``# name.py`` is written to that file, for later blocks to import;
* ``toml`` blocks with entry points are installed, as pip would do it, for later blocks to find;
* ``yaml`` blocks that begin with ``# name.yaml`` are written to that file; those that name a ``model:`` are sound
  recipes;
* ``console`` blocks are parsed; those marked ``<!-- run -->`` run, programs of the page in processes of their own;
* ``text`` blocks marked ``<!-- output -->`` are what the block above printed;
* blocks marked ``<!-- not run: reason -->`` are skipped and counted.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import typer
from markdown_blocks import PAGES, ROOT, Block, blocks_of, commands_of, page_name
from typer.testing import CliRunner

from nni_prune_ext.cli import app
from nni_prune_ext.recipes import load_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    tomllib = pytest.importorskip("tomli")

LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}
MAY_BE_SKIPPED = 4
"""Blocks that need a GPU or the reader's own files. A new one needs a reason here and in the page."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, importable; modules made in it are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=page_name)
def test_page_does_what_it_says(page: Path, folder: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in blocks_of(page):
        if block.marker.startswith("not run: "):
            continue
        if block.marker == "output":
            assert block.text.split() == printed.split(), f"{block.page}:{block.line}"
        elif block.language == "python":
            printed = run_python(block, folder, namespace)
        elif block.language == "toml":
            install(block, folder)
        elif block.language == "yaml":
            write_recipe(block, folder)
        elif block.language == "console":
            printed = "".join(run_command(command, block) for command in commands_of(block))


def test_few_blocks_are_skipped_and_each_says_why() -> None:
    skipped = [block for page in PAGES for block in blocks_of(page) if block.marker.startswith("not run")]

    assert all(re.fullmatch(r"not run: .{10,}", block.marker) for block in skipped)
    assert MAY_BE_SKIPPED >= len(skipped), [f"{block.page}:{block.line}" for block in skipped]


def test_every_marker_is_known() -> None:
    markers = {block.marker for page in PAGES for block in blocks_of(page)}

    assert {m for m in markers if not m.startswith("not run: ")} <= {
        "",
        "run",
        "output",
        "results:begin",
        "results:end",
    }


def run_python(block: Block, folder: Path, namespace: dict[str, object]) -> str:
    named = re.match(r"# (\w+\.py)\n", block.text)
    if named is not None:
        (folder / named[1]).write_text(block.text, encoding="utf-8")
        importlib.invalidate_caches()
        return ""
    code = compile("\n" * (block.line - 1) + block.text, str(ROOT / block.page), "exec")
    with redirect_stdout(io.StringIO()) as out:
        exec(code, namespace)
    return out.getvalue()


def write_recipe(block: Block, folder: Path) -> None:
    """Writes a named file; a text that names a model is a whole recipe and is checked."""
    named = re.match(r"# (\w+\.yaml)\n", block.text)
    path = folder / (named[1] if named else "unnamed.yaml")
    path.write_text(block.text, encoding="utf-8")
    if re.search("^model:", block.text, re.MULTILINE):
        load_recipe(path)


def install(block: Block, folder: Path) -> None:
    """Writes what pip leaves behind for a project's entry points."""
    project = tomllib.loads(block.text)["project"]
    place = folder / f"{project['name']}-{project['version']}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    sections = [
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (place / "entry_points.txt").write_text("\n".join(sections) + "\n")
    importlib.invalidate_caches()


def run_command(command: str, block: Block) -> str:
    """Checks one command; runs it if the block is marked so."""
    words = shlex.split(command.partition(" #")[0])
    where = f"{block.page}:{block.line}: {command}"
    if words[0] == "nni-prune-ext":
        return run_cli(words[1:], run=block.marker == "run", where=where)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), where
    elif words[0] in LAUNCHERS:
        return run_program(words, run=block.marker == "run", where=where)
    else:
        assert words[0] in ("git", "cd", "pip"), where
    return ""


def run_program(words: list[str], *, run: bool, where: str) -> str:
    """Checks that a program exists; runs it in processes of their own if the block is marked so."""
    programs = [word for word in words if word.endswith(".py")]
    assert programs or "-m" in words, where
    assert all(Path(name).is_file() or (ROOT / name).is_file() for name in programs), where
    if not run:
        return ""
    command = [sys.executable, *LAUNCHERS[words[0]], *words[1:]]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, (where, done.stdout, done.stderr)
    return done.stdout


def run_cli(words: list[str], *, run: bool, where: str) -> str:
    if run:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (where, result.output, result.exception)
        return result.output
    if words and not words[0].startswith("-"):
        verbs = typer.main.get_command(app).commands
        assert words[0] in verbs, where
        if "--help" not in words:
            verbs[words[0]].make_context(words[0], words[1:])
    return ""
