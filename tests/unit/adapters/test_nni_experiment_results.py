"""Records of trials, the Pareto front and the best trial, by hand-made jobs of NNI."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from nni_prune_ext.adapters.nni_experiment_results import (
    Trial,
    best_trial,
    pareto_front,
    results_table,
    trials_of,
    write_results,
)


def trial(number: int, metric: float | None, macs: float, **more) -> Trial:
    metrics = {} if metric is None else {"default": metric, "metric": metric, "macs": macs, **more}
    status = "FAILED" if metric is None else "SUCCEEDED"
    parameters = {"method": {"_name": "l1", "steps": number}, "target": "macs=0.5"}
    return Trial(f"T{number}", number, status, parameters, metrics, error=None if metric else "it broke")


def job(name: str, status: str, start: int, **more) -> SimpleNamespace:
    parameters = SimpleNamespace(parameters={"method": {"_name": "l1"}, "target": "macs=0.5"})
    return SimpleNamespace(
        **{"trialJobId": name, "status": status, "startTime": start, "endTime": -1, "sequenceId": 0,
           "hyperParameters": [parameters], "finalMetricData": [], **more}
    )  # fmt: skip


def report(kind: str, data: object, when: int) -> SimpleNamespace:
    return SimpleNamespace(type=kind, data=data, timestamp=when)


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    trials = [trial(1, 0.9, 100), trial(2, 0.8, 50), trial(3, 0.7, 60), trial(4, 0.8, 50), trial(5, None, 1)]

    assert ["T1", "T2"] == [one.id for one in pareto_front(trials, "macs")]


def test_a_cost_that_was_not_measured_has_an_empty_front() -> None:
    assert () == pareto_front([trial(1, 0.9, 100)], "latency_ms")


def test_the_best_trial_met_its_target() -> None:
    trials = [trial(1, 0.9, 100, target_met=0.0), trial(2, 0.8, 50, target_met=1.0), trial(3, 0.7, 10, target_met=1.0)]

    assert "T2" == best_trial(trials).id


def test_the_best_of_trials_that_all_missed_is_the_highest() -> None:
    assert "T1" == best_trial([trial(2, 0.8, 50, target_met=0.0), trial(1, 0.9, 100, target_met=0.0)]).id


def test_without_a_result_there_is_no_best_trial() -> None:
    assert best_trial([trial(1, None, 1)]) is None


def test_trials_are_numbered_by_their_start_because_numbers_of_nni_begin_again(tmp_path: Path) -> None:
    jobs = [job("late", "SUCCEEDED", 3000, sequenceId=0), job("early", "SUCCEEDED", 1000, sequenceId=2)]

    assert [(1, "early"), (2, "late")] == [(one.number, one.id) for one in trials_of(jobs, {}, tmp_path)]


def test_a_record_holds_what_was_reported_and_what_the_trial_left_behind(tmp_path: Path) -> None:
    left = tmp_path / "environments" / "local-env" / "trials" / "A"
    left.mkdir(parents=True)
    (left / "result.json").write_text(json.dumps({"artefact": "there/l1"}))
    reports = [report("PERIODICAL", 0.6, 20), report("PERIODICAL", 0.5, 10), report("FINAL", {"default": 0.7}, 30)]

    (found,) = trials_of([job("A", "SUCCEEDED", 1000, endTime=3500)], {"A": reports}, tmp_path)

    assert ((0.5, 0.6), {"default": 0.7}, 2.5) == (found.intermediate, found.metrics, found.seconds)
    assert ("there/l1", None) == (found.artefact, found.error)


def test_epochs_before_an_interruption_count_although_nni_lost_their_reports(tmp_path: Path) -> None:
    left = tmp_path / "environments" / "local-env" / "trials" / "A"
    left.mkdir(parents=True)
    (left / "result.json").write_text(json.dumps({"intermediate": [0.4, 0.5, 0.6]}))

    (found,) = trials_of([job("A", "SUCCEEDED", 1)], {"A": [report("PERIODICAL", 0.6, 1)]}, tmp_path)

    assert (0.4, 0.5, 0.6) == found.intermediate


def test_what_the_trial_ran_wins_over_what_nni_has_on_record(tmp_path: Path) -> None:
    left = tmp_path / "environments" / "remote" / "trials" / "A"
    left.mkdir(parents=True)
    (left / "result.json").write_text(json.dumps({"parameters": {"target": "macs=0.9"}}))

    (found,) = trials_of([job("A", "SUCCEEDED", 1)], {}, tmp_path)

    assert {"target": "macs=0.9"} == found.parameters


def test_a_trial_that_failed_says_why_and_a_half_written_file_says_nothing(tmp_path: Path) -> None:
    for name, text in (("A", json.dumps({"error": "no such key"})), ("B", '{"err')):
        place = tmp_path / "environments" / "local-env" / "trials" / name
        place.mkdir(parents=True)
        (place / "result.json").write_text(text)

    found = trials_of([job("A", "FAILED", 1), job("B", "FAILED", 2)], {}, tmp_path)

    assert ["no such key", None] == [one.error for one in found]


def test_results_are_written_as_json_and_flat_csv(tmp_path: Path) -> None:
    write_results(tmp_path, [trial(1, 0.9, 100), trial(2, 0.8, 200), trial(3, None, 0)], {"identity": "x"})

    content = json.loads((tmp_path / "trials.json").read_text())
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert ("x", "T1", ["T1"]) == (content["identity"], content["best"], content["pareto"]["macs"])
    assert [("l1", "1", "1"), ("l1", "2", "0"), ("l1", "3", "0")] == [
        (row["method"], row["method.steps"], row["pareto_macs"]) for row in rows
    ]
    assert ["0.9", "0.8", ""] == [row["metric"] for row in rows]
    assert "it broke" == rows[2]["error"]


def test_the_table_shows_the_best_first_and_failed_ones_last() -> None:
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as shown:
        console.print(results_table([trial(3, None, 0), trial(2, 0.8, 50), trial(1, 0.9, 100, dense_macs=200)]))

    lines = [line for line in shown.get().splitlines() if " T" in line]
    assert ["T1", "T2", "T3"] == [next(word for word in line.split() if word.startswith("T")) for line in lines]
    assert "90.00 %" in lines[0]
    assert "100 (50.0 %)" in lines[0]
    assert "failed" in lines[2]


def test_the_table_begins_with_the_dense_network_and_shows_what_share_of_its_costs_is_left() -> None:
    dense = {"dense_metric": 0.95, "dense_macs": 200, "dense_params": 80, "dense_latency_ms": 4.0}
    console = Console(width=160)
    with console.capture() as shown:
        console.print(results_table([trial(2, None, 0), trial(1, 0.9, 100, params=20, latency_ms=3.0, **dense)]))

    first, *others = [line for line in shown.get().splitlines() if "dense" in line or " T" in line]
    assert ["dense", "95.00", "%", "200", "80", "4.00"] == first.replace("│", " ").split()
    assert "100 (50.0 %)" in others[0]
    assert "20 (25.0 %)" in others[0]
    assert "3.00 (75.0 %)" in others[0]
