"""What a report says about gates that missed what was asked of them."""

from __future__ import annotations

import copy

import pytest
from gated_reports import gated_sample, gating, without_compact
from sample_reports import sample

from nni_prune_ext.report import RunReport
from nni_prune_ext.report.gate_verdicts import gate_verdicts
from nni_prune_ext.report.verdicts import verdicts


def report(**facts: float) -> RunReport:
    return RunReport.model_validate(copy.deepcopy(sample()) | {"facts": facts})


def test_a_run_without_gates_says_nothing_about_them() -> None:
    assert [] == gate_verdicts(report(dense_macs=1.0))


@pytest.mark.parametrize(("left", "tone"), [(0.9, "bad"), (0.56, "bad"), (0.54, "good"), (0.3, "good")])
def test_macs_that_gates_leave_are_compared_with_what_was_asked(left: float, tone: str) -> None:
    own = report(expected_macs_asked=0.5, expected_macs_share=left, filters_varying=7.0)

    [verdict] = gate_verdicts(own)

    assert tone == verdict.tone
    assert ("MISSED" in verdict.text) == (tone == "bad")
    assert f"{100 * left:.1f}%" in verdict.text
    assert "50.0% were asked for" in verdict.text
    assert verdict in verdicts(own)


def test_gates_that_open_the_same_for_all_images_are_called_constant() -> None:
    [verdict] = gate_verdicts(report(filters_varying=0.0, expected_macs_share=0.7))

    assert ("bad", "No filter is switched per image: all gates are constant.") == (verdict.tone, verdict.text)


def said(*entries: dict[str, object], **options: object) -> list[tuple[str, str]]:
    found = gate_verdicts(RunReport.model_validate(gated_sample(*entries, **options) | {"facts": {}}))
    return [(verdict.tone, verdict.text) for verdict in found]


def test_gates_that_gain_are_not_complained_about() -> None:
    assert [] == said(gating())


def test_a_compact_file_that_gathers_nothing_gains_nothing() -> None:
    assert [("bad", "No layer of ftwt-compact gains from its gate: none computes its open filters only.")] == said(
        gating(gathered=[])
    )


DENSE, STATIC = "the dense network (× {:.2f})", "the static network ftwt (× {:.2f})"


@pytest.mark.parametrize(
    ("times", "fastest", "lost"),
    [
        ((1.0, 1.1, 0.75, 0.7), "ftwt-compact", [STATIC.format(0.75 / 0.7)]),
        ((1.0, 1.1, 0.75, 0.757), "ftwt-compact", [STATIC.format(0.75 / 0.757)]),  # within the error
        ((1.0, 1.1, 0.75, 0.759), "ftwt-compact", []),
        ((1.0, 1.1, 1.2, 0.7), "ftwt-mask", [DENSE.format(1.1), STATIC.format(1.1 / 0.7)]),
        ((1.0, 1.3, 1.2, 1.4), "ftwt-compact", [DENSE.format(1.2)]),
    ],
)
def test_gates_that_are_no_faster_are_said_to_be_with_the_ratio(
    times: tuple[float, ...], fastest: str, lost: list[str]
) -> None:
    text = f"Gates are no faster than {' or '.join(lost)}; {fastest} is the fastest gated file."

    assert ([("bad", text)] if lost else []) == said(gating(), times=times)


def test_without_a_measurement_nothing_is_said_about_time() -> None:
    content = gated_sample(gating(), times=(1.0, 2.0, 2.0, 1.0)) | {"facts": {}}
    unmeasured = {**content, "latency": None}
    other = {**content, "latency": {"rows": [{"name": "dense", "p50_ms": 1.0}]}}

    assert 1 == len(gate_verdicts(RunReport.model_validate(content)))
    assert [] == gate_verdicts(RunReport.model_validate(unmeasured))
    assert [] == gate_verdicts(RunReport.model_validate(other))


def test_a_file_that_could_not_be_written_is_missed() -> None:
    found = said(without_compact(gating()), times=(1.0, 0.5, 0.5, 1.0))

    assert [("bad", "There is no row ftwt-compact, its file could not be written: see Gates per input.")] == found
