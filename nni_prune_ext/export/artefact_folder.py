"""What lies in an artefact folder, and how it gets there: complete or not at all, never mixed with an earlier run."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

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
REDUCED_ONNX = {"int8": "model.int8.onnx", "fp16": "model.fp16.onnx"}
"""Precision → the ONNX file of lower precision beside ``model.onnx``."""
READ_PARTS = (PLAN, WEIGHTS, ONNX, f"{ONNX}.data", *REDUCED_ONNX.values(), SPEC, MASKS, GATED)
"""The parts that this package reads back; texts such as reports may lie beside them."""
_DRAFT = ".unfinished-"
_DRAFT_NAME = re.compile(r"\.unfinished-(?P<host>.+)-(?P<pid>[1-9][0-9]*)-[a-z0-9_]{8}")
_MARKER = "draft-of-nni_prune_ext"
_CONTENT = "files"


def _whole_number(value: object) -> object:
    if type(value) is not int:
        raise ValueError(f"{json.dumps(value)} is no whole number")
    return value


FormatOne: TypeAlias = Annotated[Literal[1], BeforeValidator(_whole_number)]
"""Version 1 of a format; unlike a plain ``Literal[1]`` it refuses ``true``, which equals 1 in Python."""


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
    format: FormatOne = 1

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
                "Copy the whole folder again from where it was made."
            ) from error


def check_writable(folder: Path) -> None:
    """Makes sure that a folder can be created and written to, before any work; makes and removes nothing.

    Raises:
        OutputError: it cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=_nearest_existing(folder)):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def check_unused(folder: Path) -> None:
    """Makes sure that a folder is empty or absent, and that it can be written to; makes and removes nothing.

    What a killed run of this package has left unfinished there does not count.

    Raises:
        OutputError: it cannot, or it holds something.
    """
    check_writable(folder)
    found = first_foreign(folder)
    if found is not None:
        raise OutputError(
            f"The folder '{folder}' already holds '{found.name}', expected an empty or new folder: two runs would mix. "
            "Choose another folder with --out, or replace the earlier run with --overwrite."
        )


def first_foreign(folder: Path, known: Collection[str] = ()) -> Path | None:
    """Returns something in a folder that has none of the known names and is no draft of a killed run, if any.

    A folder that is not there holds nothing.
    """
    paths = sorted(folder.iterdir()) if folder.exists() else []
    return next((path for path in paths if path.name not in known and not _is_of_killed_run(path)), None)


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yields an empty folder on the same file system; its files move to ``folder`` if the block ends without an error.

    Drafts that killed runs of this package left in the same place are removed first. Of every folder the manifest
    moves first, so that what a kill leaves half-moved lacks parts and is refused, and is known as ours when it is
    written again.

    Raises:
        OutputError: the files cannot be written or moved.
    """
    parent = _nearest_existing(folder)
    try:
        _remove_drafts_of_killed_runs(parent)
        draft = tempfile.TemporaryDirectory(dir=parent, prefix=_draft_prefix())
    except OSError as error:
        raise _unwritable(folder, error) from error
    with draft as name:
        content = Path(name) / _CONTENT
        with _explained(folder):
            (Path(name) / _MARKER).write_text(Path(name).name, encoding="utf-8")
            content.mkdir()
        try:
            yield content
        except (OSError, OutputError) as error:
            full = disk_full(error)
            if full is None:
                raise
            raise _unwritable(folder, full) from error
        with _explained(folder):
            _move_into(folder, content)


def disk_full(error: BaseException | None) -> OSError | None:
    """Returns the error beneath another one that says that no space, or no quota of this user, is left, if any."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__
    return None


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, error) from error


def _nearest_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _draft_prefix() -> str:
    """Names the owner of a draft: this machine and this process."""
    return f"{_DRAFT}{socket.gethostname()}-{os.getpid()}-"


def _remove_drafts_of_killed_runs(parent: Path) -> None:
    for path in parent.glob(f"{_DRAFT}*"):
        if _is_of_killed_run(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_of_killed_run(path: Path) -> bool:
    """Says whether a folder is beyond doubt the draft of a process of this package that ended on this machine.

    The name must be one that we give, the marker in it must repeat that name, nothing else may lie beside what we put
    there, and the process must have ended here. Whatever else looks like it is somebody else's, however old it is.
    """
    named = _DRAFT_NAME.fullmatch(path.name)
    if not named or named["host"] != socket.gethostname() or path.is_symlink() or not path.is_dir():
        return False
    try:
        marked = (path / _MARKER).read_text(encoding="utf-8") == path.name
        return marked and {_MARKER, _CONTENT} >= set(os.listdir(path)) and _has_ended(int(named["pid"]))
    except (OSError, UnicodeDecodeError):
        return False


def _has_ended(pid: int) -> bool:
    if os.name == "nt":  # there os.kill would end the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _move_into(target: Path, source: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: (path.name != MANIFEST, path.name)):
        if path.is_dir():
            _move_into(target / path.name, path)
        else:
            flush(path)
            path.replace(target / path.name)
    flush(target)


def _unwritable(folder: Path, error: OSError) -> OutputError:
    if disk_full(error):
        return OutputError(
            f"Cannot write to '{folder}': no space left ({error.strerror}). Expected room for all files of the run; "
            "what lay there before is as it was. Make space on that disk, then go on with --resume (from Python: call "
            "again)."
        )
    return OutputError(
        f"Cannot write to '{folder}': {error.strerror or error}. Expected a folder that you may write to. Choose "
        "another one with --out."
    )
