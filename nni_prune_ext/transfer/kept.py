"""The folder of a comparison: whose it is, what is finished, and what is under way."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nni_prune_ext.checkpoints import Checkpoints, Json
from nni_prune_ext.errors import CheckpointError, ConfigError, OutputError
from nni_prune_ext.export.artefact_folder import check_unused
from nni_prune_ext.models.weights import save_weights
from nni_prune_ext.training.processes import from_main, is_main
from nni_prune_ext.transfer.results import REPORT, TransferReport, TransferRow

STATE = "state"
PAGE = "report.html"


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes sure that a comparison may be written to a folder; makes and removes nothing.

    Raises:
        ConfigError: going on and starting anew are both asked for.
        OutputError: it holds something else, or a comparison and neither was asked for.
    """
    if resume and overwrite:
        raise ConfigError("Both --resume and --overwrite were given, expected at most one. Go on, or start anew.")
    if not _is_ours(out):
        check_unused(out)
    elif not resume and not overwrite:
        raise OutputError(
            f"The folder '{out}' holds a comparison, expected an empty or new one. Go on with it (--resume), "
            "replace it (--overwrite), or choose another folder with --out."
        )


def weights_file(network: str, seed: int) -> str:
    """Returns the name of the file with the weights of a row."""
    return f"{network}-seed{seed}.safetensors"


@dataclass
class Kept:
    """What is finished, and where it is kept; the main process writes, all know the rows.

    Attributes:
        identity: what decides about the results, as JSON values.
    """

    folder: Path | None
    identity: dict[str, Json]
    rows: list[TransferRow]

    @classmethod
    def opened(cls, folder: Path | None, identity: dict[str, Json], *, anew: bool) -> Kept:
        """Claims a folder, or finds what is finished there.

        Args:
            anew: an earlier comparison is removed.

        Raises:
            OutputError: the folder holds another comparison, or cannot be written.
        """
        if folder is None:
            return cls(None, identity, [])
        problem, rows = from_main(_opened(folder, identity, anew=anew) if is_main() else (None, []))
        if problem is not None:
            raise OutputError(problem)
        return cls(folder, identity, list(rows))

    def has(self, name: str, seed: int) -> bool:
        """Says whether a network is finished."""
        return any(row.network == name and row.seed == seed for row in self.rows)

    def checkpoints(self, name: str, seed: int) -> Checkpoints | None:
        """Returns where the state of an unfinished network is kept."""
        if self.folder is None:
            return None
        return Checkpoints(self.folder / STATE / f"{name}-{seed}", {**self.identity, "network": name, "seed": seed})

    def add(self, row: TransferRow, model: nn.Module, metric: str, facts: Mapping[str, object]) -> None:
        """Keeps a finished network: its weights first, then its row, then its state goes."""
        self.rows.append(row)
        if self.folder is None or not is_main():
            return
        save_weights(model, self.folder / weights_file(row.network, row.seed))
        self.save(metric, facts)
        shutil.rmtree(self.folder / STATE / f"{row.network}-{row.seed}", ignore_errors=True)

    def save(self, metric: str, facts: Mapping[str, object]) -> None:
        """Writes all rows, also those of seeds that were not asked for this time."""
        if self.folder is not None and is_main():
            TransferReport(tuple(self.rows), metric, facts, _hash(self.identity)).save(self.folder / REPORT)


def _opened(folder: Path, identity: dict[str, Json], *, anew: bool) -> tuple[str | None, list[TransferRow]]:
    """Returns what is wrong, or the rows that are finished."""
    try:
        if anew and _is_ours(folder):
            _clear(folder)
        Checkpoints(folder / STATE, identity).claim()
        if not (folder / REPORT).exists():
            return None, []
        report = TransferReport.load(folder / REPORT)
    except (OutputError, CheckpointError) as error:
        return str(error), []
    if report.identity != _hash(identity):
        return (
            f"'{folder / REPORT}' holds the results of another comparison, expected those of these networks, data and "
            "settings. Choose another folder, or start anew with --overwrite."
        ), []
    for row in report.rows:
        shutil.rmtree(folder / STATE / f"{row.network}-{row.seed}", ignore_errors=True)  # killed before it went
    return None, list(report.rows)


def _is_ours(out: Path) -> bool:
    """Says whether a folder holds a comparison, by what its files say."""
    return _identity_file(out) is not None or _report(out) is not None


def _identity_file(out: Path) -> Path | None:
    path = out / STATE / "identity.json"
    try:
        job = json.loads(path.read_text(encoding="utf-8"))["job"]
        return path if {"networks", "head", "epochs"} <= set(job) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _report(out: Path) -> TransferReport | None:
    try:
        return TransferReport.load(out / REPORT)
    except OutputError:
        return None


def _clear(out: Path) -> None:
    """Removes a comparison from its folder; what else lies there stays."""
    report, identity = _report(out), _identity_file(out)
    if report is not None:
        for row in report.rows:
            (out / weights_file(row.network, row.seed)).unlink(missing_ok=True)
        (out / PAGE).unlink(missing_ok=True)
        (out / REPORT).unlink()
    if identity is not None:
        for path in identity.parent.iterdir():
            if (path / "identity.json").exists():  # the state of an unfinished network
                shutil.rmtree(path, ignore_errors=True)
        identity.unlink()


def _hash(identity: Mapping[str, Json]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
