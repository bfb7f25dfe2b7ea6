"""Writes files that are complete or absent, also after the power has gone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from nni_prune_ext.errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8, mode by the user's umask) under its name only once it is complete.

    Raises:
        OutputError: the file cannot be written; nothing is left behind.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise OutputError(
            f"Cannot write '{path}': {error.strerror or error}. Expected a file name in an existing, writable folder. "
            "Choose another place."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # already moved, or never made
            unfinished.unlink()


def flush(path: Path) -> None:
    """Puts a file's contents, or a folder's entries, onto the disk."""
    if path.is_dir():
        if os.name == "posix":
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        return
    with path.open("rb+") as opened:  # Windows flushes only what is open for writing
        os.fsync(opened.fileno())
