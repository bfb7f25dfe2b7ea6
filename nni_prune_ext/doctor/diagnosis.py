"""``diagnose``: why is the pruned network not faster, and what is the smallest change that helps?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nni_prune_ext.allocation import Limits
from nni_prune_ext.deployment import runtime as named_runtime
from nni_prune_ext.doctor.advice import Advice, Advised, Trials, advise
from nni_prune_ext.doctor.findings import Finding, find_reasons
from nni_prune_ext.doctor.layer_times import KindRow, LayerRow, ProfiledNetwork, Time, kind_rows, layer_rows
from nni_prune_ext.doctor.measuring import empty_node_ms, profile_in_turns, profiling
from nni_prune_ext.doctor.network import Network
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.evaluation import LatencyReport, measure_latency
from nni_prune_ext.runtimes.base import Array, RunnableModel
from nni_prune_ext.runtimes.onnxruntime_profile import load_profile, read_profile

FEWEST_ROUNDS = 20
"""Medians of nodes over fewer runs mean little."""


@dataclass(frozen=True)
class Diagnosis:
    """Where the time of a pruned network goes, and why.

    Attributes:
        runtime: what it was measured on; ``recorded`` for profiles that were given.
        latency: dense and pruned network side by side, by the usual protocol; ``None`` for profiles that were given.
        before: time in all nodes of the dense network.
        after: the same of the pruned one.
        layers: every layer before and after the cut, in the order of the graph.
        others: nodes without weights by operator.
        findings: reasons why it is not faster, the most expensive first; none is below its error bar.
        advice: widths to round, best first; empty where nothing was found to gain, or nothing was tried.
        limits: the advice as limits for the next plan.
        floor_ms: time of an empty node; ``None`` for profiles that were given.
        num_runs: runs behind every median.
        no_advice: why there is none; empty where there is.
    """

    runtime: str
    latency: LatencyReport | None
    before: Time
    after: Time
    layers: tuple[LayerRow, ...]
    others: tuple[KindRow, ...]
    findings: tuple[Finding, ...]
    advice: tuple[Advice, ...]
    limits: Limits | None
    floor_ms: float | None
    num_runs: int
    no_advice: str

    @property
    def macs_ratio(self) -> float:
        """MACs after by MACs before, over the layers that both networks have."""
        return sum(row.after.layer.macs for row in self.layers) / sum(row.before.layer.macs for row in self.layers)

    def sentences(self) -> tuple[str, ...]:
        """Returns the diagnosis in words: the whole, the reasons, the advice."""
        macs = f"{self.macs_ratio:.2f}"
        if self.latency is None:
            whole = f"{self.after.ms:.3f} ms in nodes, {self.before.ms:.3f} ms before the cut, for {macs} of the MACs."
        else:
            dense, pruned = self.latency.rows
            whole = (
                f"{pruned.ratio:.2f} of the time for {macs} of the MACs (median over runs in turns; medians of each: "
                f"{pruned.p50_ms:.3f} ms, {dense.p50_ms:.3f} ms before the cut). The dense network differs from itself "
                f"by {100 * self.latency.error_bar:.1f} %."
            )
        reasons = [f"{index}. {finding.sentence}" for index, finding in enumerate(self.findings, start=1)]
        nothing = "Nothing was found above the error bar that keeps it from being faster."
        return (whole, *(reasons or [nothing]), *(advice.sentence for advice in self.advice))

    def to_dict(self) -> dict[str, Any]:  # JSON values
        """Returns the diagnosis as JSON-ready values."""
        return {
            "runtime": self.runtime,
            "latency": self.latency.to_dict() if self.latency else None,
            "macs_ratio": self.macs_ratio,
            "node_time": {"before": asdict(self.before), "after": asdict(self.after)},
            "layers": [row.to_dict() for row in self.layers],
            "others": [asdict(row) for row in self.others],
            "findings": [asdict(finding) for finding in self.findings],
            "advice": [advice.to_dict() for advice in self.advice],
            "no_advice": self.no_advice,
            "limits": self.limits.model_dump(mode="json", exclude_unset=True) if self.limits else None,
            "empty_node_ms": self.floor_ms,
            "runs": self.num_runs,
        }


def diagnose(
    dense: Path,
    pruned: Path,
    inputs: Sequence[Sequence[Array]],
    *,
    on: str = "onnxruntime-cpu",
    rounds: int = 30,
    min_seconds: float = 2.0,
    threads: int | None = 1,
    multiple: int = 16,
    seed: int = 0,
) -> Diagnosis:
    """Profiles two ONNX files in turns and says what keeps the pruned one from being faster.

    Args:
        dense: what ``export_onnx`` wrote before the cut.
        pruned: what it wrote after the cut.
        inputs: sets of input arrays, all of one shape; rounds rotate over them.
        on: a registered runtime that can record nodes.
        rounds: fewest runs of each network, at least 20.
        min_seconds: shortest time of each latency measurement.
        threads: CPU threads of one run.
        multiple: what the advice rounds widths to; 0 gives no advice.
        seed: of the order within rounds.

    Raises:
        ConfigError: too few rounds, no inputs, or a runtime that cannot record nodes.
        ModelError: a file is damaged, not of this package, or the two are not one network before and after a cut.
        RuntimeUnavailableError: the runtime cannot be used here.
    """
    if rounds < FEWEST_ROUNDS or not inputs:
        raise ConfigError(
            f"Nothing can be said from {rounds} rounds over {len(inputs)} inputs, expected at least {FEWEST_ROUNDS} "
            "rounds and one input. Ask for more."
        )
    runtime = named_runtime(on)
    recorder = profiling(runtime)
    networks = [Network.load(path, [array.shape for array in inputs[0]]) for path in (dense, pruned)]
    latency = measure_latency(
        {name: (runtime, RunnableModel(onnx_path=path)) for name, path in (("dense", dense), ("pruned", pruned))},
        inputs, rounds=rounds, min_seconds=min_seconds, threads=threads, seed=seed,
    )  # fmt: skip
    profiles = profile_in_turns(recorder, [dense, pruned], inputs, rounds=rounds, threads=threads, seed=seed)
    joined = [ProfiledNetwork(n, nodes, latency.error_bar) for n, nodes in zip(networks, profiles)]
    rows = layer_rows(*joined)
    floor_ms = empty_node_ms(recorder, rounds=rounds, threads=threads)
    advised: Advised = ((), None, f"none was asked for, with the multiple {multiple}")
    if multiple > 1:
        trials = Trials(runtime, inputs, rounds, min_seconds, threads, seed)
        advised = advise(networks[1], rows, trials, multiple=multiple)
    return _diagnosis(on, latency, joined, rows, advised, floor_ms)


def diagnose_recorded(
    dense: Path, pruned: Path, profiles: tuple[Path, Path], input_shapes: Sequence[Sequence[int]]
) -> Diagnosis:
    """Says the same from profiles that ONNX Runtime recorded elsewhere; nothing is timed, and no advice is given.

    Args:
        dense: what ``export_onnx`` wrote before the cut.
        pruned: what it wrote after the cut.
        profiles: of the dense and of the pruned network, over several runs each; the first run does not count.
        input_shapes: of the inputs of these runs.

    Raises:
        ModelError: a file is damaged, or a profile does not belong to its network; see also ``diagnose``.
    """
    networks = [Network.load(path, input_shapes) for path in (dense, pruned)]
    joined = [ProfiledNetwork(n, read_profile(load_profile(path))) for n, path in zip(networks, profiles)]
    nothing_timed: Advised = ((), None, "nothing is timed where profiles are given")
    return _diagnosis("recorded", None, joined, layer_rows(*joined), nothing_timed, None)


def _diagnosis(
    runtime: str,
    latency: LatencyReport | None,
    joined: Sequence[ProfiledNetwork],
    rows: tuple[LayerRow, ...],
    advised: Advised,
    floor_ms: float | None,
) -> Diagnosis:
    (before, after), (advice, limits, no_advice) = joined, advised
    return Diagnosis(
        runtime=runtime,
        latency=latency,
        before=before.total(),
        after=after.total(),
        layers=rows,
        others=kind_rows(before, after),
        findings=find_reasons(before, after, rows, floor_ms),
        advice=advice,
        limits=limits,
        floor_ms=floor_ms,
        num_runs=min(len(network.nodes[0].ms) for network in joined),
        no_advice=no_advice,
    )
