"""What stands behind a latency that is reported: conditions, machine, and the networks measured on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from nni_prune_ext.allocation import LATENCY_TOLERANCE
from nni_prune_ext.latency.conditions import LatencyConditions


@dataclass(frozen=True)
class MeasuredNetwork:
    """One network on the way to the target, beside the dense one.

    Attributes:
        network: how it was cut.
        predicted_ms: by the tables and what was known before it was measured; ``None`` for those that fit the curve.
        measured_ms: as a share of the dense network in the same rounds, times ``dense_ms``.
        dense_ms: of the dense network.
        error_bar: A/A: smaller differences, as a share of ``dense_ms``, mean nothing.
    """

    network: str
    predicted_ms: float | None
    measured_ms: float
    dense_ms: float
    error_bar: float


@dataclass(frozen=True)
class LatencyEvidence:
    """How a latency target was aimed at and what came of it.

    Attributes:
        conditions: under which everything was measured.
        asked_ms: the bound; of a share, that of the dense network's last measurement.
        achieved_ms: of the compact network, measured afresh at the very end.
        dense_ms: of the dense network, in the same rounds.
        predicted_ms: of the compact network, before that measurement.
        error_bar: of that measurement (A/A).
        clock: ``cpu`` or ``wall``.
        rounds: of that measurement.
        networks: all that were measured on the way, in order.
        multiple: widths were kept at multiples of this.
        probe: offset from a multiple of 16 → penalty that the probe found; empty where the user set the multiple.
        layers_measured: layers that were timed for this run.
        layers_known: layers whose times came from the cache.
        remark: why the achieved latency is not the one asked for, where it is not; that the dense one is, where it is.
        environment: machine and versions.
        p95_ms: 95th percentile of the compact network in that measurement; ``None`` where it is not known.
        p99_ms: 99th percentile, likewise.
    """

    conditions: LatencyConditions
    asked_ms: float
    achieved_ms: float
    dense_ms: float
    predicted_ms: float
    error_bar: float
    clock: str
    rounds: int
    networks: tuple[MeasuredNetwork, ...]
    multiple: int
    layers_measured: int
    layers_known: int
    probe: Mapping[int, float] = field(default_factory=dict)
    remark: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    p95_ms: float | None = None
    p99_ms: float | None = None

    @property
    def met(self) -> bool:
        """Says whether the bound holds, as far as can be measured."""
        return self.achieved_ms <= self.asked_ms * (1 + LATENCY_TOLERANCE)

    @property
    def distance(self) -> tuple[bool, float]:
        """Returns what is smaller for what is better: missed or not, then how far off, as a share."""
        return not self.met, abs(self.achieved_ms / self.asked_ms - 1)

    def to_dict(self) -> dict[str, object]:
        """Returns everything as JSON-ready values."""
        plain = {key: value for key, value in vars(self).items() if key not in ("conditions", "networks", "probe")}
        return {
            **plain,
            "conditions": self.conditions.model_dump(mode="json"),
            "networks": [asdict(network) for network in self.networks],
            "probe": {str(offset): penalty for offset, penalty in self.probe.items()},
            "environment": dict(self.environment),
            "sentences": self.sentences(),
        }

    def outcome(self) -> str:
        """Returns what was asked for and achieved, how that was measured, and why it is another latency, if it is."""
        tails = ((95, self.p95_ms), (99, self.p99_ms))
        known = ", ".join(f"p{percent} {ms:.4g} ms" for percent, ms in tails if ms is not None)
        how = f"{self.conditions}, {self.clock} time, A/A error {100 * self.error_bar:.1f} %, {self.rounds} rounds"
        verdict = "met" if self.met else "MISSED"
        return (
            f"latency: asked for at most {self.asked_ms:.4g} ms, achieved {self.achieved_ms:.4g} ms ({how}"
            f"{'; ' if known else ''}{known}): {verdict}{', ' if self.remark else ''}{self.remark}"
        )

    def sentences(self) -> list[str]:
        """Returns how the latency was measured and aimed at, for people."""
        probed = ", as the probe of this runtime suggests" if self.probe else ""
        texts = [self.outcome(), f"widths at multiples of {self.multiple}{probed}"]
        for network in self.networks:
            foreseen = "" if network.predicted_ms is None else f"predicted {network.predicted_ms:.4g} ms, "
            texts.append(
                f"{network.network}: {foreseen}measured {network.measured_ms:.4g} ms of {network.dense_ms:.4g} ms dense"
            )
        return texts
