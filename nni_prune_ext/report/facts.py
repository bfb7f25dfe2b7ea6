"""``report.json``: everything that one run reports, written atomically and read back with every key checked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nni_prune_ext.errors import ArtefactError
from nni_prune_ext.report import number_text
from nni_prune_ext.report.gate_facts import GatingFacts
from nni_prune_ext.report.rows import Kind, Row
from nni_prune_ext.text_files import write_text

FORMAT = 1
FILE_NAME = "report.json"
MANIFEST = "manifest.json"
"""Of an artefact folder; read here as plain JSON, because its own reader needs torch."""


class _Facts(BaseModel):
    """Immutable; keys that a later version adds are let pass."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TargetFacts(_Facts):
    """One target, in the metric's own unit."""

    target: str
    dense: float | None = None
    asked: float | None = None
    achieved: float | None = None
    met: bool | None = None

    @property
    def metric(self) -> str:
        """Returns what is counted: ``macs`` of ``macs=0.5``."""
        return self.target.split("=")[0].strip()


class CertificateFacts(_Facts):
    """A certificate; see ``nni_prune_ext.certificate.Certificate``."""

    max_relative_error: float | None = None
    bound: float | None = None
    probes: int | None = None
    seed: int | None = None
    dtype: str | None = None
    input_effect: float | None = None
    removal_effect: float | None = None
    exact: bool | None = None


class LatencyRowFacts(_Facts):
    """The latency of one network; see ``nni_prune_ext.evaluation.LatencyRow``."""

    name: str
    runtime: str | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    ratio: float | None = None
    runs_per_sample: int | None = None
    providers: tuple[str, ...] = ()
    node_placement: dict[str, int] = {}
    gpu_memory_bytes: int | None = None


class LatencyFacts(_Facts):
    """Latencies measured side by side, and how; see ``nni_prune_ext.evaluation.LatencyReport``."""

    rows: tuple[LatencyRowFacts, ...] = ()
    aa_ratio: float | None = None
    error_bar: float | None = None
    clock: str | None = None
    rounds: int | None = None
    threads: int | None = None
    batch_size: int | None = None
    seed: int | None = None


class LatencyTargetFacts(_Facts):
    """How a latency target was aimed at; see ``nni_prune_ext.latency.LatencyEvidence``."""

    asked_ms: float | None = None
    achieved_ms: float | None = None
    dense_ms: float | None = None
    predicted_ms: float | None = None
    sentences: tuple[str, ...] = ()


class WidthFacts(_Facts):
    """Output channels of one prunable layer, or single weights of a masked one."""

    layer: str
    before: int = Field(ge=0)
    after: int = Field(ge=0)


class ProtectedFacts(_Facts):
    """A layer that stays whole, and why."""

    root: str
    width: int | None = None
    reason: str = "unknown"


class EpochFacts(_Facts):
    """One finished epoch; ``metric`` is the validation metric, higher is better."""

    phase: str = ""
    epoch: int
    loss: float | None = None
    learning_rate: float | None = None
    seconds: float | None = None
    metric: float | None = None


class RunReport(_Facts):
    """Everything that one run reports; what a run does not know is ``None`` or empty.

    Attributes:
        rows: one per network; the first is the dense one.
        widths: output channels of every prunable layer, in model order.
        masked: single weights of every layer whose weights are masked.
        curves: finished epochs by stage, for example ``l1`` and ``dense-trained-longer``.
        notes: numbers that the method logged, each with its ``progress`` (0–1).
        pictures: what each shows → PNG in base64.
        gating: one entry per network whose filters are switched per input; empty in reports of versions before it.
        metric: what the accuracy columns hold, as ``module:function``; ``None`` for top-1 accuracy.
        folder: where the report was read from; not written.
    """

    format: Literal[1]
    rows: tuple[Row, ...] = Field(min_length=1)
    title: str = ""
    created: str | None = None
    package_version: str | None = None
    model: str | None = None
    data: str | None = None
    seed: int | None = None
    recipe: dict[str, object] | None = None
    method: str | None = None
    options: dict[str, object] = {}
    training: dict[str, object] = {}
    distillation: dict[str, object] | None = None
    recovery_epochs: int | None = None
    targets: tuple[TargetFacts, ...] = ()
    latency_target: LatencyTargetFacts | None = None
    certificate: CertificateFacts | None = None
    environment: dict[str, object] = {}
    latency: LatencyFacts | None = None
    widths: tuple[WidthFacts, ...] = ()
    masked: tuple[WidthFacts, ...] = ()
    protected: tuple[ProtectedFacts, ...] = ()
    rewrites: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    value_dependent: tuple[str, ...] = ()
    facts: dict[str, float | None] = {}
    curves: dict[str, tuple[EpochFacts, ...]] = {}
    notes: tuple[dict[str, float | None], ...] = ()
    pictures: dict[str, Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]] = {}
    gating: tuple[GatingFacts, ...] = ()
    metric: str | None = None
    folder: Path | None = Field(default=None, exclude=True)

    @property
    def heading(self) -> str:
        """Returns the title, or one made of model and method."""
        return self.title or f"{self.model or 'unknown model'}, {self.method or 'no method'}"

    @property
    def metric_name(self) -> str:
        """Returns what the accuracy columns hold, for a heading: ``top-1``, or the name of the metric's function."""
        return self.metric.rsplit(":", 1)[-1] if self.metric else number_text.TOP1

    @property
    def networks(self) -> tuple[Row, ...]:
        """Returns the rows of networks, without those of their files of lower precision."""
        return tuple(row for row in self.rows if row.precision == "fp32")

    def kind(self, row: Row) -> Kind:
        """Returns what a row of this run is; the first one is the dense network, whatever it says."""
        return "dense" if row is self.rows[0] else row.kind

    def is_uncut(self, row: Row) -> bool:
        """Says whether a network has the very costs of the dense one, so that there was nothing to certify."""
        return (row.macs, row.params) == (self.rows[0].macs, self.rows[0].params)

    @classmethod
    def load(cls, path: Path) -> RunReport:
        """Reads a ``report.json``, or the one in a run folder or artefact folder.

        Raises:
            ArtefactError: there is none, it is damaged or of another format, or it is not the one that the manifest
                beside it names; file and key are named.
        """
        file = path / FILE_NAME if path.is_dir() else path
        content = _read_json(file)
        _check_hash(file)
        if not isinstance(content, dict) or content.get("format") != FORMAT or "rows" not in content:
            raise ArtefactError(f"{_foreign(file, content)} Make it again with this version of nni-prune-ext.")
        try:
            return cls.model_validate(content).model_copy(update={"folder": file.resolve().parent})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            seen = "" if first["type"] == "missing" else f" is {_shortened(first['input'])}"
            raise ArtefactError(
                f"'{file}' is damaged: the key '{key}'{seen}: {first['msg']}. Expected what `nni-prune-ext prune` "
                "writes. Restore the file, or make it again."
            ) from error


def write_report(path: Path, rows: Sequence[Row], facts: Mapping[str, object]) -> None:
    """Writes rows and facts as JSON, atomically; numbers that are not finite become ``"NaN"`` and ``"Infinity"``.

    Raises:
        OutputError: the file cannot be written.
    """
    content = _strict({"format": FORMAT, **facts, "rows": [asdict(row) for row in rows]})
    write_text(path, json.dumps(content, indent=1, default=str, allow_nan=False) + "\n")


def _read_json(file: Path) -> object:
    try:
        content: object = json.loads(file.read_bytes())
    except OSError as error:
        raise ArtefactError(
            f"Cannot read '{file}': {error.strerror or error}. Expected a run folder, an artefact folder or a "
            f"{FILE_NAME}. Give the path of one."
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise ArtefactError(
            f"'{file}' is not readable as JSON: {error}. Expected the {file.name} that `nni-prune-ext prune` writes. "
            "Restore the file, or make it again."
        ) from error
    return content


def _check_hash(file: Path) -> None:
    """Compares a report in an artefact folder with the hash in the folder's manifest."""
    manifest = file.parent / MANIFEST
    if file.name != FILE_NAME or not manifest.is_file():
        return
    content = _read_json(manifest)
    parts = content.get("parts") if isinstance(content, dict) else None
    part = parts.get(FILE_NAME) if isinstance(parts, dict) else None
    expected = part.get("sha256") if isinstance(part, dict) else None
    if not isinstance(expected, str):
        raise ArtefactError(
            f"'{file}' lies in an artefact folder whose {MANIFEST} gives no hash for it, expected one: the file is not "
            "of this network. Copy the whole folder again from where it was made, or give the run folder."
        )
    seen = hashlib.sha256(file.read_bytes()).hexdigest()
    if seen != expected:
        raise ArtefactError(
            f"'{file}' is damaged or of another run: its SHA-256 is {seen[:12]}…, expected {expected[:12]}… from the "
            f"{MANIFEST} beside it. Copy the whole folder again from where it was made, or give the run folder."
        )


def _foreign(file: Path, content: object) -> str:
    expected = f"expected {FORMAT}: a {FILE_NAME} that `nni-prune-ext prune` writes."
    if not isinstance(content, dict):
        return (
            f"'{file}' is not a report: it holds a {type(content).__name__}, expected an object with 'format' {FORMAT}."
        )
    if "format" not in content:
        return f"'{file}' is not a report, or an old one: it has no key 'format', {expected}"
    if content["format"] != FORMAT:
        return f"'{file}' has another format: the key 'format' is {_shortened(content['format'])}, {expected}"
    return f"'{file}' is not a report: it has no key 'rows', expected one row per network."


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _strict(value: object) -> object:
    """Returns the value with numbers that JSON does not know as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
