"""What was reached and what was missed, in one sentence each; a missed target is said with its distance."""

from __future__ import annotations

from collections.abc import Callable

from nni_prune_ext.report import number_text
from nni_prune_ext.report.facts import RunReport, TargetFacts
from nni_prune_ext.report.gate_verdicts import gate_verdicts
from nni_prune_ext.report.page_parts import Figure, Verdict
from nni_prune_ext.report.rows import Row

_METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "macs": ("MACs", number_text.count),
    "params": ("Parameters", number_text.count),
    "memory": ("Weights", number_text.size),
    "ratio": ("Share of channels removed", number_text.percent),
    "sparsity": ("Share of weights masked", number_text.percent),
    "latency": ("Latency", number_text.milliseconds),
}
SHARES = ("ratio", "sparsity")
"""Metrics that say how much goes: lower bounds, counted in points, without a value for the dense network."""


def verdicts(report: RunReport) -> list[Verdict]:
    """Returns one sentence per target, then certificate and parity."""
    targets = [target_verdict(target) for target in report.targets]
    if not targets:
        targets = [Verdict("", "No target was asked for.")]
    return [*targets, *gate_verdicts(report), certificate_verdict(report), parity_verdict(report)]


def is_met(target: TargetFacts) -> bool | None:
    """Says whether a target was met, or ``None`` if the report does not."""
    return None if target.achieved is None else target.met


def target_name(target: TargetFacts) -> str:
    """Returns the metric in words."""
    return _METRICS.get(target.metric, (target.metric, number_text.plain))[0]


def target_number(target: TargetFacts, value: float | None) -> str:
    """Returns a value in the metric's unit."""
    return "unknown" if value is None else _METRICS.get(target.metric, ("", number_text.plain))[1](value)


def distance(target: TargetFacts) -> str:
    """Returns how far the achieved value is from the one asked for, with its direction."""
    if target.achieved is None or target.asked is None:
        return "unknown"
    gap = target.achieved - target.asked
    if gap == 0:
        return "exactly as asked"
    side = "above" if gap > 0 else "below"
    if target.metric in SHARES:
        return f"{100 * abs(gap):.2g} points {side}"
    relative = f" ({_two_digits(100 * abs(gap) / target.asked)} %)" if target.asked else ""
    return f"{target_number(target, abs(gap))}{relative} {side}"


def target_verdict(target: TargetFacts) -> Verdict:
    """Returns asked, achieved and the verdict of one target as a sentence."""
    name, met = target_name(target), is_met(target)
    bound = "at least" if target.metric in SHARES else "at most"
    asked = f"asked for {bound} {target_number(target, target.asked)} ({target.target})"
    if target.achieved is None:
        return Verdict("missing", f"{name}: {asked}; what was achieved was not measured.")
    achieved = f"achieved {target_number(target, target.achieved)}"
    if met is None:
        return Verdict("missing", f"{name}: {asked}, {achieved}, {distance(target)}; whether that counts is unknown.")
    if met and target.metric == "latency" and target.asked is not None and target.achieved > target.asked:
        text = f"target met, as far as can be measured. {_sentence(asked)}, {achieved}, {distance(target)}"
        return Verdict("good", f"{name}: {text}.")
    if met:
        return Verdict("good", f"{name}: target met. {_sentence(asked)}, {achieved}, {distance(target)}.")
    return Verdict("bad", f"{name}: target MISSED, {distance(target)} the bound. {_sentence(asked)}, {achieved}.")


def nothing_cut(report: RunReport) -> bool:
    """Says whether every network of the run has the costs of the dense one, gates and their heads left out."""
    return all(report.is_uncut(row) for row in report.rows if report.kind(row) != "gated")


def certificate_verdict(report: RunReport) -> Verdict:
    """Says whether removal was proven equal to silencing."""
    found = report.certificate
    if nothing_cut(report) and (found is None or found.exact is None):
        return Verdict("", "Certificate: nothing was cut, so there was nothing to certify.")
    if found is None or found.exact is None:
        return Verdict("missing", "Certificate: none was made, so it is unknown whether the removal is exact.")
    error = "unknown" if found.max_relative_error is None else number_text.error(found.max_relative_error)
    bound = "unknown" if found.bound is None else number_text.error(found.bound)
    if found.exact:
        return Verdict("good", f"Certificate: the removal is exact. Largest relative error {error}, bound {bound}.")
    return Verdict("bad", f"Certificate: NOT exact. Largest relative error {error}, bound {bound}.")


def parity_verdict(report: RunReport) -> Verdict:
    """Says whether the ONNX files answer as PyTorch does."""
    checked = [row for row in report.rows if row.parity is not None]
    if not checked:
        return Verdict("missing", "Parity: not measured, so it is unknown whether ONNX Runtime agrees with PyTorch.")
    worst = max(checked, key=lambda row: row.parity or 0.0)
    error = number_text.error(worst.parity or 0.0)
    broken = [
        row.name for row in checked if row.parity_limit is not None and not (row.parity or 0.0) <= row.parity_limit
    ]
    if broken:
        return Verdict("bad", f"Parity: BROKEN for {', '.join(broken)}. Largest relative error {error}.")
    left_out = len(report.networks) - len(checked)
    rest = f"; not measured for {left_out} of {len(report.networks)} networks" if left_out else ""
    return Verdict("good", f"Parity: ONNX Runtime agrees with PyTorch to {error}{rest}.")


def key_figures(report: RunReport) -> list[Figure]:
    """Returns the numbers that stand out; none unless there is exactly one pruned network."""
    pruned = [row for row in report.networks if report.kind(row) == "pruned"]
    if len(pruned) != 1:
        return []
    dense, row = report.rows[0], pruned[0]
    return [
        _cost("MACs left", row.macs, dense.macs, number_text.count),
        _cost("Parameters left", row.params, dense.params, number_text.count),
        *([] if row.weight_sparsity is None else [_masked(row.weight_sparsity)]),
        _accuracy(report, row),
        _latency(row, dense),
        _cost("ONNX file", row.onnx_bytes, dense.onnx_bytes, number_text.size),
    ]


def _cost(label: str, after: float | None, before: float | None, text: Callable[[float], str]) -> Figure:
    if after is None or before is None:
        return Figure(label, "–", "not measured")
    return Figure(label, number_text.share(after, before), f"{text(after)} of {text(before)}")


def _masked(share: float) -> Figure:
    return Figure("Weights at zero", f"{100 * share:.1f} %", "of the parameters left")


def _accuracy(report: RunReport, row: Row) -> Figure:
    label = "Top-1" if report.metric is None else report.metric_name
    if row.top1 is None:
        return Figure(label, "–", "not measured")
    difference = number_text.accuracy_difference(report.metric_name)
    others = [other for other in report.rows if report.kind(other) != "pruned" and other.top1 is not None]
    gaps = [f"{difference(row.top1 - (other.top1 or 0.0))} to {other.name}" for other in others]
    return Figure(label, number_text.accuracy(report.metric_name)(row.top1), "; ".join(gaps) or "dense not measured")


def _latency(row: Row, dense: Row) -> Figure:
    if row.latency_ms is None:
        return Figure("Latency", "–", "not measured")
    ratio = "–" if row.latency_ratio is None else f"× {row.latency_ratio:.2f}"
    before = "not measured" if dense.latency_ms is None else f"{dense.latency_ms:.2f} ms"
    return Figure("Latency", ratio, f"{row.latency_ms:.2f} ms; dense {before}")


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
