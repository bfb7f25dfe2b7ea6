"""What lies in an artefact folder, and how it gets there: complete or not at all, never mixed with an earlier run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nni_prune_ext.errors import ModelError, OutputError
from nni_prune_ext.export.example_structure import ExampleStructure
from nni_prune_ext.text_files import flush, write_text

MANIFEST = "manifest.json"
PLAN = "plan.json"
WEIGHTS = "model.safetensors"
ONNX = "model.onnx"
SPEC = "model.json"
MASKS = "masks.safetensors"
GATED = "gated.safetensors"
REPORT = "report.json"
REPORT_PAGE = "report.html"
READ_PARTS = (PLAN, WEIGHTS, ONNX, f"{ONNX}.data", SPEC, MASKS, GATED)
"""The parts that this package reads back; texts such as reports may lie beside them."""
_FILES = (MANIFEST, *READ_PARTS, REPORT, REPORT_PAGE)
_DRAFT = ".unfinished-"
_DAY_SECONDS = 86400


class ModelSpec(BaseModel):
    """How the original model is built and called; immutable.

    Attributes:
        model: a specification for ``build_model``; ``None`` where the model came from code that has no name here.
        num_classes: outputs of the classifier; ``None`` for the model's own default.
        input_shape: shape of an example input, ``(N, C, …)``.
        example: shapes and dtypes of all example inputs; ``None`` if they are more than a flat row of tensors.
        mean: per channel, subtracted from pixels in 0–1 before they enter the network; ``None`` if not known.
        std: per channel, by which the result is divided; ``None`` if not known.
        format: version of this format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    num_classes: int | None = None
    input_shape: tuple[int, ...] = Field(min_length=2)
    example: ExampleStructure | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    format: Literal[1] = 1

    def save(self, folder: Path) -> None:
        """Writes the specification into an artefact folder, atomically."""
        write_text(folder / SPEC, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ModelSpec | None:
        """Reads the specification of an artefact folder; ``None`` if it holds none.

        Raises:
            ModelError: there is one, but it cannot be read.
        """
        path = folder / SPEC
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise ModelError(
                f"'{path}' is not a usable model specification ({reason}). Expected what `nni-prune-ext prune` writes. "
                "Delete it and give --num-classes and --input-shape instead."
            ) from error


def check_writable(folder: Path) -> None:
    """Makes sure that a folder can be created and written to, before any work; leaves nothing behind.

    Drafts that killed runs left in it are removed.

    Raises:
        OutputError: it cannot.
    """
    try:
        _remove_stale_drafts(_nearest_existing(folder))
        with tempfile.TemporaryDirectory(dir=_nearest_existing(folder), prefix=_draft_prefix()):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def check_unused(folder: Path) -> None:
    """Makes sure that a folder is empty or absent, and that it can be written to.

    Raises:
        OutputError: it cannot, or it holds something.
    """
    check_writable(folder)
    found = next(folder.iterdir(), None) if folder.exists() else None
    if found is not None:
        raise OutputError(
            f"The folder '{folder}' already holds '{found.name}', expected an empty or new folder: two runs would mix. "
            "Choose another folder with --out, or replace the earlier run with --overwrite."
        )


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yields an empty folder on the same file system; its files move to ``folder`` if the block ends without an error.

    Drafts that killed runs left in the same place are removed first. Of every folder the manifest moves last, so that
    what a kill leaves half-moved is refused when it is read.

    Raises:
        OutputError: the files cannot be written or moved.
    """
    parent = _nearest_existing(folder)
    try:
        _remove_stale_drafts(parent)
        draft = tempfile.TemporaryDirectory(dir=parent, prefix=_draft_prefix())
    except OSError as error:
        raise _unwritable(folder, error) from error
    with draft as name:
        yield Path(name)
        try:
            _move_into(folder, Path(name))
        except OSError as error:
            raise _unwritable(folder, error) from error


def remove_earlier_run(folder: Path) -> None:
    """Removes the reports of an earlier run and the artefacts of the networks in it; all other files stay."""
    try:
        rows = json.loads((folder / REPORT).read_bytes())["rows"]
        names = [str(row["name"]) for row in rows]
    except (OSError, ValueError, LookupError, TypeError):  # no earlier run, or a report that is not ours
        return
    (folder / REPORT).unlink()
    (folder / REPORT_PAGE).unlink(missing_ok=True)
    for artefacts in (folder / name for name in names if Path(name).name == name):
        remove_artefacts(artefacts)
        if artefacts.is_dir() and not any(artefacts.iterdir()):
            artefacts.rmdir()


def remove_artefacts(folder: Path) -> None:
    """Removes the files that an artefact folder may hold, the manifest first; all other files stay."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def _nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _draft_prefix() -> str:
    """Names the owner of a draft: this machine and this process."""
    return f"{_DRAFT}{socket.gethostname()}-{os.getpid()}-"


def _remove_stale_drafts(parent: Path) -> None:
    """Removes the drafts of processes that have ended on this machine, and those a day old of unknown owners."""
    for draft in parent.glob(f"{_DRAFT}*"):
        if draft.is_dir() and not _in_use(draft):
            shutil.rmtree(draft, ignore_errors=True)


def _in_use(draft: Path) -> bool:
    host, _, rest = draft.name.removeprefix(_DRAFT).rpartition("-")[0].rpartition("-")
    if host != socket.gethostname() or not rest.isdigit() or os.name == "nt":  # there os.kill would end the process
        return time.time() - draft.stat().st_mtime < _DAY_SECONDS
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _move_into(target: Path, source: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
        if path.is_dir():
            _move_into(target / path.name, path)
        else:
            flush(path)
            path.replace(target / path.name)
    flush(target)


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"Cannot write to '{folder}': {error.strerror or error}. Expected a folder that you may write to. Choose "
        "another one with --out."
    )
