"""Long work shows bars on a terminal, one line per epoch in a pipe, and JSON lines to machines."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from nni_prune_ext.cli.progress import EpochLines, JsonLines, progress_watcher
from nni_prune_ext.training.settings import EpochLog, StepLog, Watcher


def work(watcher: Watcher) -> None:
    """What a short training reports: two phases, the last epoch with a loss that is no number."""
    watcher.phase("sparsity", 2, done=0, total=3)
    for step in (1, 5, 10):
        watcher.step(StepLog("sparsity", 0, 2, step, 10, 0.5, 0, 3))
    watcher.epoch(EpochLog("sparsity", 0, 0.75, 0.1, 12.4, metric=0.875))
    watcher.note("the loader yields [odd] sizes")
    watcher.step(StepLog("sparsity", 1, 2, 5, None, 0.25, 1, 3))
    watcher.epoch(EpochLog("sparsity", 1, 0.2, 0.1, 12.4, metric=0.9))
    watcher.phase("recovery", 1, done=2, total=3)
    watcher.epoch(EpochLog("recovery", 0, float("nan"), 0.01, 3.0))


def screen(text: str) -> str:
    """Returns what was drawn, without the codes of the terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def terminal() -> Console:
    return Console(force_terminal=True, file=io.StringIO(), width=160, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_shows_epochs_batches_loss_and_validation(capsys: pytest.CaptureFixture[str]) -> None:
    console = terminal()

    with progress_watcher(json=False, console=console) as watcher:
        watcher.phase("sparsity", 2, done=0, total=3)
        watcher.step(StepLog("sparsity", 0, 2, 5, 10, 0.5, 0, 3))
        watcher.progress.refresh()  # type: ignore[attr-defined]
        first = screen(written(console))
        work(watcher)
        watcher.progress.refresh()  # type: ignore[attr-defined]
    drawn = screen(written(console))

    assert re.search(r"sparsity .* 0/3", first)
    assert re.search(r"epoch 1 of 2 .* 5/10 .*loss 0\.5000", first)
    assert re.search(r"recovery .* 3/3 .*loss nan", drawn)
    assert "the loader yields [odd] sizes" in drawn
    assert ("", "") == capsys.readouterr()


def test_the_bars_carry_what_was_last_validated_and_the_pace() -> None:
    clock = [0.0]
    console = Console(force_terminal=True, file=io.StringIO(), width=160, color_system=None, get_time=lambda: clock[0])

    with progress_watcher(json=False, console=console) as watcher:
        watcher.phase("fit", 4, done=0, total=4)
        for step in range(1, 11):
            clock[0] += 0.5
            watcher.step(StepLog("fit", 0, 4, step, 10, 0.5, 0, 4))
        watcher.progress.refresh()  # type: ignore[attr-defined]
        during = screen(written(console))
        watcher.epoch(EpochLog("fit", 0, 0.4, 0.1, 5.0, metric=0.9))
        watcher.progress.refresh()  # type: ignore[attr-defined]
        after = screen(written(console))[len(during) :]

    assert "2.0 batches/s" in during
    assert "0:00:15 left" in during
    assert "loss 0.4000, validation 0.9000" in after
    assert "epoch 1 of 4" not in after.splitlines()[-1]


def test_the_bars_disappear_at_the_end_even_of_a_failure() -> None:
    console = terminal()

    def interrupted() -> None:
        with progress_watcher(json=False, console=console) as watcher:
            work(watcher)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert written(console).endswith("\x1b[1A\x1b[2K")
    assert "\x1b[?25h" in written(console), "the cursor is back"


def test_a_second_stage_begins_a_bar_of_its_own() -> None:
    console = terminal()

    with progress_watcher(json=False, console=console) as watcher:
        work(watcher)
        before = watcher.progress.tasks[0].id  # type: ignore[attr-defined]
        watcher.phase("control", 3, done=0, total=3)
        tasks = watcher.progress.tasks  # type: ignore[attr-defined]

        assert [("control", 0, 3)] == [(task.description, task.completed, task.total) for task in tasks]
        assert before != tasks[0].id, "the pace of one stage says nothing about the next"


def test_the_bar_of_the_stage_moves_within_an_epoch() -> None:
    with progress_watcher(json=False, console=terminal()) as watcher:
        watcher.phase("fit", 4, done=2, total=4)
        watcher.step(StepLog("fit", 2, 4, 5, 10, 0.5, 2, 4))

        assert [2.5, 5] == [task.completed for task in watcher.progress.tasks]  # type: ignore[attr-defined]


def test_a_pipe_gets_one_line_per_epoch_and_note_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_watcher(json=False) as watcher:
        work(watcher)

    out, err = capsys.readouterr()
    assert "" == out
    assert [
        "sparsity epoch 1: loss 0.7500, validation 0.8750, 12 s",
        "the loader yields [odd] sizes",
        "sparsity epoch 2: loss 0.2000, validation 0.9000, 12 s",
        "recovery epoch 1: loss nan, 3 s",
    ] == err.splitlines()


def test_machines_get_one_object_per_line_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_watcher(json=True) as watcher:
        work(watcher)

    out, err = capsys.readouterr()
    events = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert "" == err
    assert ["phase", "epoch", "note", "epoch", "phase", "epoch"] == [event["event"] for event in events]
    assert {"event": "phase", "name": "recovery", "epochs": 1, "done": 2, "total": 3} == events[4]
    assert {"text", "event"} == events[2].keys()
    assert {
        "event": "epoch",
        "phase": "sparsity",
        "epoch": 0,
        "loss": 0.75,
        "learning_rate": 0.1,
        "seconds": 12.4,
        "metric": 0.875,
    } == events[1]
    assert (None, None) == (events[5]["loss"], events[5]["metric"])


def long_epoch(watcher: Watcher, clock: list[float]) -> None:
    """An epoch of 25 s with a step every second, after a cut that trains nothing; then a short one."""
    watcher.phase("cut 1", 0, done=0, total=2)
    watcher.phase("recovery", 2, done=0, total=2)
    for step in range(1, 26):
        clock[0] += 1
        watcher.step(StepLog("recovery", 0, 2, step, None, float("nan") if step == 20 else 0.5, 0, 2))
    watcher.epoch(EpochLog("recovery", 0, 0.5, 0.1, 25.0))
    for step in range(1, 9):
        clock[0] += 1
        watcher.step(StepLog("recovery", 1, 2, step, 8, 0.25, 1, 2))
    watcher.epoch(EpochLog("recovery", 1, 0.25, 0.1, 8.0))


def test_machines_see_a_long_epoch_advance_and_a_phase_without_epochs_as_a_note() -> None:
    clock, stream = [0.0], io.StringIO()

    long_epoch(JsonLines(stream, clock=lambda: clock[0]), clock)

    events = [json.loads(line, parse_constant=pytest.fail) for line in stream.getvalue().splitlines()]
    assert ["note", "phase", "step", "step", "epoch", "epoch"] == [event["event"] for event in events]
    assert {"event": "note", "text": "cut 1: no epochs"} == events[0]
    step = {"event": "step", "phase": "recovery", "epoch": 0, "epochs": 2, "steps": None, "done": 0, "total": 2}
    assert [{**step, "step": 10, "loss": 0.5}, {**step, "step": 20, "loss": None}] == events[2:4]


def test_a_pipe_shows_a_long_epoch_advance_every_ten_seconds() -> None:
    clock, console = [0.0], Console(file=io.StringIO(), width=160)

    long_epoch(EpochLines(console, clock=lambda: clock[0]), clock)

    assert [
        "cut 1: no epochs",
        "recovery epoch 1 of 2, batch 10: loss 0.5000",
        "recovery epoch 1 of 2, batch 20: loss nan",
        "recovery epoch 1: loss 0.5000, 25 s",
        "recovery epoch 2: loss 0.2500, 8 s",
    ] == written(console).splitlines()


def test_a_terminal_shows_a_phase_without_epochs_as_a_note_and_no_bar_for_it() -> None:
    console = terminal()

    with progress_watcher(json=False, console=console) as watcher:
        watcher.phase("cut 1", 0, done=0, total=2)
        assert [] == watcher.progress.tasks  # type: ignore[attr-defined]
        watcher.phase("recovery", 2, done=0, total=2)
        watcher.phase("cut 2", 0, done=2, total=2)

        assert ["recovery"] == [task.description for task in watcher.progress.tasks]  # type: ignore[attr-defined]

    assert "cut 1: no epochs" in screen(written(console))
    assert "cut 2: no epochs" in screen(written(console))
