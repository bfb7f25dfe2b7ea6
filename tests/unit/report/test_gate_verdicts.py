"""What a report says about gates that missed what was asked of them."""

from __future__ import annotations

import copy

import pytest
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
