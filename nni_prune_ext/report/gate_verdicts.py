"""What per-input gates missed, in one sentence each: MACs, any difference between images, files, time."""

from __future__ import annotations

from collections.abc import Iterator

from nni_prune_ext.report.facts import LatencyRowFacts, RunReport
from nni_prune_ext.report.gate_facts import GatingFacts
from nni_prune_ext.report.page_parts import Verdict

_GATES_MAY_MISS = 0.05
"""By how much expected MACs may lie above what was asked for, as a share of the dense MACs."""


def gate_verdicts(report: RunReport) -> list[Verdict]:
    """Says what per-input gates missed: the MACs that were asked for, any difference between images, files, time."""
    asked, real = report.facts.get("expected_macs_asked"), report.facts.get("expected_macs_share")
    found = []
    if asked is not None and real is not None:
        missed = real - asked > _GATES_MAY_MISS
        text = f"Gates leave {real:.1%} of the dense MACs on training images, {asked:.1%} were asked for"
        found.append(Verdict("bad", f"{text}: MISSED.") if missed else Verdict("good", f"{text}."))
    if report.facts.get("filters_varying") == 0:
        found.append(Verdict("bad", "No filter is switched per image: all gates are constant."))
    for own in report.gating:
        found += [*_missing_files(own), *_nothing_gathered(own), *_no_faster(report, own)]
    return found


def _missing_files(own: GatingFacts) -> Iterator[Verdict]:
    for name in own.failed:
        yield Verdict("bad", f"There is no row {name}, its file could not be written: see Gates per input.")


def _nothing_gathered(own: GatingFacts) -> Iterator[Verdict]:
    for file in own.files:
        if file.flavour == "compact" and not file.gathered:
            yield Verdict("bad", f"No layer of {file.name} gains from its gate: none computes its open filters only.")


def _no_faster(report: RunReport, own: GatingFacts) -> Iterator[Verdict]:
    """Compares the fastest gated file with the dense and the static network, measured in the same go."""
    rows = {row.name: row for row in report.latency.rows} if report.latency else {}
    gated = [(time, file.name) for file in own.files if (time := _time(rows.get(file.name))) is not None]
    if not gated or report.latency is None:
        return
    best, name = min(gated)
    against = {
        "the dense network": _time(rows.get(report.rows[0].name)),
        f"the static network {own.network}": _time(rows.get(own.network)),
    }
    least = 1 - (report.latency.error_bar or 0.0)
    lost = [f"{said} (× {best / time:.2f})" for said, time in against.items() if time and best >= time * least]
    if lost:
        yield Verdict("bad", f"Gates are no faster than {' or '.join(lost)}; {name} is the fastest gated file.")


def _time(row: LatencyRowFacts | None) -> float | None:
    return None if row is None else row.p50_ms
