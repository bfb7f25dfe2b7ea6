"""Text files appear complete, as the user's umask says, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nni_prune_ext.errors import OutputError
from nni_prune_ext.text_files import write_text


def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "table.md", "× dense")
    finally:
        os.umask(before)

    assert 0o644 == (tmp_path / "table.md").stat().st_mode & 0o777
    assert "× dense" == (tmp_path / "table.md").read_text(encoding="utf-8")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()

    with pytest.raises(OutputError, match="taken"):
        write_text(tmp_path / "taken", "text")

    assert [tmp_path / "taken"] == list(tmp_path.iterdir())
