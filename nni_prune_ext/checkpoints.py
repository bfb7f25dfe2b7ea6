"""Resumable state on disk: safetensors and JSON, complete or absent, checked by hash, bounded in number.

A stage of a job (the method, the recovery, …) has a folder with numbered checkpoints, each a folder of its own that is
renamed into place once everything in it is on the disk. Killing the process at any moment, a full disk or a damaged
file cost the work since the checkpoint before, never more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nni_prune_ext.errors import CheckpointError, OutputError
from nni_prune_ext.text_files import flush, write_text

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

FORMAT = 1
_IDENTITY, _VALUES, _TENSORS = "identity.json", "state.json", "tensors.safetensors"
_SHOWN = 60
"""Characters of a value in a message."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds."""

    number: int
    values: dict[str, Json]
    tensors: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one stage of one job.

    Args:
        folder: made when the first checkpoint is written.
        identity: what the job is, as JSON values; a folder of another job is refused.
        keep: how many checkpoints stay; the newest, and those before it in case it is damaged.
        tell: is told about damaged checkpoints.

    Raises:
        CheckpointError: the folder belongs to another job; the message says what differs.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Json], *, keep: int = 2, tell: Callable[[str], None] | None = None
    ) -> None:
        self.folder = folder
        self.identity: dict[str, Json] = json.loads(json.dumps(identity))
        self.keep = max(keep, 1)
        self.tell = tell or _LOG.warning
        self._damaged: set[int] = set()
        self._check_identity()

    def stage(self, name: str, identity: Mapping[str, Json] | None = None) -> Checkpoints:
        """Returns the checkpoints of a stage of this job, in a folder inside this one.

        Args:
            identity: what else the stage depends on.
        """
        return Checkpoints(self.folder / name, {**self.identity, **(identity or {})}, keep=self.keep, tell=self.tell)

    def save(self, values: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> None:
        """Writes the next checkpoint and removes those that are too many, and those that were found damaged.

        Raises:
            OutputError: it cannot be written; the checkpoints before are untouched.
        """
        number = max(self._numbers(), default=0) + 1
        draft = self.folder / f".unfinished-{number:06d}"
        try:
            self.claim()
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            _write(draft, values, tensors)
            draft.rename(self.folder / f"{number:06d}")
            flush(self.folder)
        except (OSError, SafetensorError, OutputError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise OutputError(
                f"Checkpoint {number} cannot be written to '{self.folder}' ({error}). Expected a writable folder with "
                f"free space; the checkpoints before it are whole. Make space, then resume."
            ) from error
        whole = sorted(set(self._numbers()) - self._damaged)
        for old in {*whole[: -self.keep], *self._damaged}:
            shutil.rmtree(self.folder / f"{old:06d}", ignore_errors=True)

    def claim(self) -> None:
        """Makes the folder, if need be, and writes down to which job it belongs.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            _make_folder(self.folder)
        except OSError as error:
            raise OutputError(
                f"The folder '{self.folder}' cannot be made ({error}), expected a writable place. Choose another one."
            ) from error
        if not (self.folder / _IDENTITY).exists():
            write_text(self.folder / _IDENTITY, json.dumps({"format": FORMAT, "job": self.identity}, indent=1) + "\n")

    def latest(self) -> Saved | None:
        """Reads the newest checkpoint that is whole; ``None`` if there is none yet.

        A damaged one is reported and the one before it is read.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        numbers = sorted(self._numbers(), reverse=True)
        for number in numbers:
            try:
                return _read(self.folder / f"{number:06d}", number)
            except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
                self._damaged.add(number)
                self.tell(
                    f"checkpoint {number} in '{self.folder}' is damaged ({error}); falling back to the one before it"
                )
        if numbers:
            raise CheckpointError(
                f"All {len(numbers)} checkpoints in '{self.folder}' are damaged, expected a whole one. Delete the "
                "folder to start this stage anew."
            )
        return None

    def _numbers(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return [int(path.name) for path in self.folder.iterdir() if path.is_dir() and path.name.isdecimal()]

    def _check_identity(self) -> None:
        path = self.folder / _IDENTITY
        if not path.exists():
            if self._numbers():
                raise CheckpointError(
                    f"'{self.folder}' holds checkpoints, but no {_IDENTITY} that says of what job, expected both. "
                    " Delete the folder to start anew."
                )
            return
        try:
            found = json.loads(path.read_bytes())
            known, job = found["format"] == FORMAT, dict(found["job"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"'{path}' cannot be read ({error}), expected a job. Delete the folder to start anew."
            ) from error
        if not known:
            raise CheckpointError(f"'{path}' has format {found['format']}, expected {FORMAT}. Use the newer package.")
        different = differences(job, self.identity)
        if different:
            raise CheckpointError(
                f"The checkpoints in '{self.folder}' belong to another job: {'; '.join(different)}. Expected the same "
                "recipe and model. Undo the change, or start anew in another folder."
            )


def differences(saved: Json, now: Json, path: str = "") -> list[str]:
    """Says what differs between two JSON values, one text per difference: ``method was 'l1', is 'l2'``."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            text
            for key in sorted({*saved, *now})
            for text in differences(saved.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if saved == now else [f"{path or 'it'} was {_short(saved, now)}, is {_short(now, saved)}"]


def fingerprint(model: nn.Module) -> str:
    """Returns a hash of the names, shapes, types and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(folder: Path, values: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> None:
    path = folder / _TENSORS
    safetensors.torch.save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
    flush(path)
    text = json.dumps({"names": list(tensors), "values": values})
    hashes = {"tensors": _hash(path), "hash": hashlib.sha256(text.encode()).hexdigest()}
    write_text(folder / _VALUES, json.dumps({"format": FORMAT, **hashes, "state": text}) + "\n")
    flush(folder)


def _read(folder: Path, number: int) -> Saved:
    head = json.loads((folder / _VALUES).read_bytes())
    if head["format"] != FORMAT:
        raise ValueError(f"its format is {head['format']}, expected {FORMAT}")
    if hashlib.sha256(head["state"].encode()).hexdigest() != head["hash"]:
        raise ValueError(f"{_VALUES} does not have the hash that it states")
    if _hash(folder / _TENSORS) != head["tensors"]:
        raise ValueError(f"{_TENSORS} does not have the hash that {_VALUES} states")
    state, tensors = json.loads(head["state"]), safetensors.torch.load_file(folder / _TENSORS)
    return Saved(number, state["values"], {name: tensors[name] for name in state["names"]})  # in the order of saving


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _make_folder(folder: Path) -> None:
    """Makes a folder and its parents, each on the disk before the next one."""
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        flush(path.parent)


def _short(value: Json, other: Json) -> str:
    """Returns a text of a value that shows where it differs from another one."""
    text = repr(value)
    if len(text) <= _SHOWN:
        return text
    alike = next((k for k, (own, its) in enumerate(zip(text, repr(other))) if own != its), 0)
    start = max(alike - _SHOWN // 2, 0)
    part = text[start : start + _SHOWN]
    return f"{'…' if start else ''}{part}{'…' if start + _SHOWN < len(text) else ''}"
