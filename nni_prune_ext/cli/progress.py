"""What long work shows: bars on a terminal, lines per epoch (within long ones too) elsewhere, or JSON for machines.

With ``json=True`` every line on standard output is one object with the key ``event``:

* ``{"event": "phase", "name", "epochs", "done", "total"}``: a phase begins; ``done`` of the stage's ``total`` epochs
  lie behind;
* ``{"event": "step", "phase", "epoch", "epochs", "step", "steps", "loss", "done", "total"}``: an epoch (0-based, of
  the phase's ``epochs``) is under way, at batch ``step`` of ``steps`` (``null`` where the data does not say); at most
  every 10 seconds, so that short epochs have none; ``loss`` is that of the last batch;
* ``{"event": "epoch", "phase", "epoch", "loss", "learning_rate", "seconds", "metric"}``: an epoch (0-based) is done;
  ``metric`` is the validation metric, ``null`` where none was measured; a ``loss`` that is no number is ``null``;
* ``{"event": "note", "text"}``: something that a person should know; among it phases without epochs, such as a cut.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Final, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from nni_prune_ext.cli.json_lines import json_line
from nni_prune_ext.training.settings import EpochLog, StepLog, Watcher

STEP_SECONDS: Final = 10.0
"""Shortest time between two lines about steps; on a terminal the bars move all the time."""


@contextmanager
def progress_watcher(json: bool, *, console: Console | None = None) -> Iterator[Watcher]:
    """Yields what training reports to, for the length of a ``with`` block.

    Args:
        json: one JSON object per event on standard output, nothing else.
        console: where people read; standard error by default. Bars are drawn if it is a terminal, and disappear at the
            end; otherwise there is one line per epoch.
    """
    shown = console or Console(stderr=True)
    if json:
        yield JsonLines(sys.stdout)
    elif shown.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Pace(),
            TextColumn("{task.fields[facts]}"),
            console=shown,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what is printed into a pipe or file stays there
        ) as progress:
            yield Bars(progress)
    else:
        yield EpochLines(shown)


class Notes(Watcher):
    """Prints notes to standard error, and nothing else."""

    def note(self, text: str) -> None:
        """Prints a note."""
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


class JsonLines(Watcher):
    """Writes phases, steps of long epochs, epochs and notes as JSON, one object per line."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._pause = _Pause(clock)

    def phase(self, name: str, epochs: int, *, done: int, total: int) -> None:
        """Writes that a phase begins; a note if it has no epochs."""
        self._pause.begin()
        if not epochs:
            self.note(_without_epochs(name))
            return
        self._write("phase", {"name": name, "epochs": epochs, "done": done, "total": total})

    def step(self, log: StepLog) -> None:
        """Writes where a long epoch stands."""
        if self._pause.is_over():
            self._write("step", asdict(log))

    def epoch(self, log: EpochLog) -> None:
        """Writes that an epoch is done."""
        self._pause.begin()
        self._write("epoch", asdict(log))

    def note(self, text: str) -> None:
        """Writes a note."""
        self._write("note", {"text": text})

    def _write(self, event: str, values: dict[str, object]) -> None:
        self._stream.write(json_line(event, values) + "\n")
        self._stream.flush()


class EpochLines(Watcher):
    """Writes one line per epoch, per phase without epochs and per note, and lines within long epochs."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._pause = _Pause(clock)

    def phase(self, name: str, epochs: int, *, done: int, total: int) -> None:
        """Writes the line of a phase without epochs; those with epochs are in the lines of these."""
        self._pause.begin()
        if not epochs:
            self.note(_without_epochs(name))

    def step(self, log: StepLog) -> None:
        """Writes where a long epoch stands."""
        if self._pause.is_over():
            of = "" if log.steps is None else f" of {log.steps}"
            self._line(f"{log.phase} epoch {log.epoch + 1} of {log.epochs}, batch {log.step}{of}: loss {log.loss:.4f}")

    def epoch(self, log: EpochLog) -> None:
        """Writes the line of an epoch."""
        self._pause.begin()
        self._line(f"{log.phase} epoch {log.epoch + 1}: {_epoch_facts(log)}, {log.seconds:.0f} s")

    def note(self, text: str) -> None:
        """Writes a note."""
        self._line(text)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bars(Watcher):
    """Draws one bar for the epochs of a stage and one for the batches of an epoch."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._stage: TaskID | None = None
        self._batches: TaskID | None = None
        self._done = self._total = 0

    def phase(self, name: str, epochs: int, *, done: int, total: int) -> None:
        """Names the phase on the bar of the stage; another stage begins a new bar. One without epochs is a note."""
        self._close_batches()
        if not epochs:
            self.note(_without_epochs(name))
            return
        if self._stage is not None and (done < self._done or total != self._total):
            self.progress.remove_task(self._stage)
            self._stage = None
        self._done, self._total = done, total
        self._move_stage(name, float(done))

    def step(self, log: StepLog) -> None:
        """Moves both bars."""
        if self._batches is None:
            name = f"  epoch {log.epoch + 1} of {log.epochs}"
            self._batches = self.progress.add_task(name, total=log.steps, completed=log.step, batches=True, facts="")
        self.progress.update(self._batches, completed=log.step, total=log.steps, facts=f"loss {log.loss:.4f}")
        self._done, self._total = log.done, log.total
        self._move_stage(log.phase, log.done + (min(log.step / log.steps, 1.0) if log.steps else 0.0))

    def epoch(self, log: EpochLog) -> None:
        """Ends the bar of the epoch; its facts stay beside the bar of the stage."""
        self._close_batches()
        self._done += 1
        self._move_stage(log.phase, float(self._done), _epoch_facts(log))

    def note(self, text: str) -> None:
        """Writes a note above the bars."""
        self.progress.console.print(text, markup=False, highlight=False)

    def _move_stage(self, name: str, completed: float, facts: str | None = None) -> None:
        if self._stage is None:
            self._stage = self.progress.add_task(
                "", total=self._total, completed=int(completed), batches=False, facts=""
            )
        self.progress.update(self._stage, description=escape(name), completed=completed, total=self._total)
        if facts is not None:
            self.progress.update(self._stage, facts=facts)

    def _close_batches(self) -> None:
        if self._batches is not None:
            self.progress.remove_task(self._batches)
            self._batches = None


class _Pause:
    """The time since something was last written."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()

    def begin(self) -> None:
        """Begins again."""
        self._since = self._clock()

    def is_over(self) -> bool:
        """Says whether it was long enough, and begins again if it was."""
        if self._clock() - self._since < STEP_SECONDS:
            return False
        self.begin()
        return True


class _Pace(ProgressColumn):
    """Batches per second for the bar of an epoch, time left for the bar of a stage."""

    def render(self, task: Task) -> Text:
        """Returns the text of one bar; empty as long as nothing is known."""
        if task.fields["batches"]:
            return Text("" if task.speed is None else f"{task.speed:.1f} batches/s")
        left = task.time_remaining
        return Text("" if left is None else f"{timedelta(seconds=int(left))} left")


def _epoch_facts(log: EpochLog) -> str:
    validation = "" if log.metric is None else f", validation {log.metric:.4f}"
    return f"loss {log.loss:.4f}{validation}"


def _without_epochs(name: str) -> str:
    return f"{name}: no epochs"
