"""The file that a command writes must not replace another one, unless it may."""

from __future__ import annotations

from pathlib import Path


def refuse_existing(out: Path, overwrite: bool, *, example: str) -> None:
    """Refuses a folder as the file to write, and a file that is there already.

    Args:
        example: how such a file could be called, for the message.

    Raises:
        OutputError: it is one of these.
    """
    from nni_prune_ext.errors import OutputError  # imported here to keep --help instant

    if out.is_dir():
        raise OutputError(f"--out is '{out}', a folder, expected the name of a file, for example {out / example}.")
    if out.exists() and not overwrite:
        raise OutputError(
            f"The file '{out}' exists, expected a new name. Choose another one with --out, or replace it with "
            "--overwrite."
        )
