"""Interrupts an NNI experiment twice, once with Ctrl-C and once by killing NNI's manager, resumes it, and counts.

    python examples/benchmarks/experiment_resume.py

Six trials (three methods × two targets, one at a time) on the digits that ship with scikit-learn. After two trials the
command gets Ctrl-C while a third one runs; it is resumed; after four, NNI's manager is killed; it is resumed again.
Nothing is lost if every combination has been tried once, every trial succeeded, and all metrics are those of an
experiment that nobody interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import psutil

from nni_prune_ext.evaluation import environment
from nni_prune_ext.text_files import write_text

HERE = Path(__file__).resolve().parent
METHODS, TARGETS = ("l1", "fpgm", "taylor"), ("macs=0.5", "macs=0.7")
RECIPE = """\
model: resnet20
data: {source: digits, batch_size: 32, limit_images: 400}
train: {epochs: 4, learning_rate: 0.1}
training: {learning_rate: 0.02}
recovery: 4
measure: false
"""


def main() -> None:
    """Runs the three parts and writes what was found."""
    options = _parser().parse_args()
    work = Path(options.work).resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    began, parts = time.perf_counter(), []
    whole = part(work, "nobody interrupts", until=None, end=None)
    expected = metrics_of(work)
    (work / "out").rename(work / "reference")
    parts.append(part(work, "Ctrl-C after 2 trials", until=2, end=interrupt))
    parts.append(part(work, "manager killed after 4 trials", until=4, end=kill_manager))
    parts.append(part(work, "to the end", until=None, end=None))
    found = verdict(work, parts, expected)
    found |= {"seconds": round(time.perf_counter() - began, 1), "parts": [whole, *parts], "environment": environment(),
              "nni": version("nni"), "date": datetime.now(timezone.utc).date().isoformat()}  # fmt: skip
    write_text(Path(options.out), json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "parts"}, indent=1))
    if not found["nothing_lost"]:
        sys.exit(1)


def part(work: Path, name: str, *, until: int | None, end) -> dict:
    """Runs the command until so many trials have ended in all and one more runs, then ends it that way."""
    resume = (work / "out" / "experiment.json").exists()
    choices = [word for m in METHODS for word in ("--method", m)] + [word for t in TARGETS for word in ("--target", t)]
    command = [sys.executable, "-m", "nni_prune_ext", "experiment", "recipe.yaml", "--out", "out", "--port", "0",
               "--tuner", "GridSearch", *choices, *(["--resume"] if resume else ["--trials", "6"])]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=lambda: [*map(lines.put, process.stderr), lines.put(None)], daemon=True).start()
    facts: dict = {"part": name, "resumed": resume, "messages": []}
    succeeded = 0  # a resumed experiment tells of earlier trials again
    while (line := lines.get()) is not None:
        facts["messages"].append(line.strip())
        print(f"{time.perf_counter() - began:6.1f} s  {line}", end="", flush=True)
        if "web portal at" in line:
            facts["portal_answers"] = portal(line.split()[-1])
        succeeded += " succeeded" in line
        if until is not None and succeeded >= until:
            facts["running_when_ended"] = wait_for_epoch(work)
            end(process, work)
            until = None
    facts |= {"exit_code": process.wait(), "seconds": round(time.perf_counter() - began, 1)}
    facts["results"] = {path.parent.name: json.loads(path.read_text()).get("metrics")
                        for path in (work / "out").glob("nni/*/environments/*/trials/*/result.json")}  # fmt: skip
    return facts


def portal(url: str) -> int:
    """Returns the status of NNI's web portal."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.status


def wait_for_epoch(work: Path) -> str:
    """Waits until a trial without a metric has trained for an epoch, so that there is something to lose; its name."""
    while True:
        for state in (work / "out").glob("nni/*/environments/*/trials/*/run/checkpoints/**/state.json"):
            trial = next(parent for parent in state.parents if parent.parent.name == "trials")
            if "metrics" not in json.loads((trial / "result.json").read_text()):
                return trial.name
        time.sleep(0.1)


def interrupt(process: subprocess.Popen, work: Path) -> None:
    """Presses Ctrl-C."""
    process.send_signal(signal.SIGINT)


def kill_manager(process: subprocess.Popen, work: Path) -> None:
    """Kills NNI's manager, the way a crash or the machine's memory killer does."""
    identity = json.loads((work / "out" / "experiment.json").read_text())["identity"]
    for child in psutil.Process(process.pid).children(recursive=True):
        if "main.js" in " ".join(child.cmdline()) and identity in child.cmdline():
            os.kill(child.pid, signal.SIGKILL)


def metrics_of(work: Path) -> dict[str, float]:
    """Returns the metric of every combination; of those that were cancelled none."""
    trials = json.loads((work / "out" / "trials.json").read_text())["trials"]
    return {f"{t['parameters']['method']['_name']} {t['parameters']['target']}": t["metrics"]["metric"]
            for t in trials if t["status"] == "SUCCEEDED"}  # fmt: skip


def verdict(work: Path, parts: list[dict], expected: dict[str, float]) -> dict:
    """Says whether anything was lost between the parts."""
    final = json.loads((work / "out" / "trials.json").read_text())
    cancelled = [trial["id"] for trial in final["trials"] if trial["status"] == "USER_CANCELED"]  # repeats
    trials = {trial["id"]: trial for trial in final["trials"] if trial["id"] not in cancelled}
    tried = [(t["parameters"]["method"]["_name"], t["parameters"]["target"]) for t in trials.values()]
    kept = [
        before == trials[name]["metrics"]
        for one in parts
        for name, before in one["results"].items()
        if before and name in trials
    ]
    epochs = {name: len(trials[one["running_when_ended"]]["intermediate"]) for one in parts if
              (name := one.get("running_when_ended"))}  # fmt: skip
    every = sorted((m, t) for m in METHODS for t in TARGETS)
    found = {
        "trials": len(trials),
        "succeeded": sum(trial["status"] == "SUCCEEDED" for trial in trials.values()),
        "cancelled_repeats": len(cancelled),
        "every_combination_once": sorted(tried) == every,
        "finished_results_unchanged": all(kept),
        "metrics_as_without_interruption": metrics_of(work) == expected,
        "metrics": metrics_of(work),
        "interrupted_trials_and_their_epochs_reported": epochs,
        "portal_answered_in_every_part": all(one.get("portal_answers") == 200 for one in parts),
        "exit_codes": [one["exit_code"] for one in parts],
        "best": final["best"],
    }
    found["nothing_lost"] = (
        found["succeeded"] == len(trials) == len(every)
        and found["every_combination_once"]
        and found["finished_results_unchanged"]
        and found["metrics_as_without_interruption"]
    )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="experiment_resume_work", help="folder for the experiment; replaced")
    parser.add_argument("--out", default=str(HERE / "results" / "experiment_resume.json"))
    return parser


if __name__ == "__main__":
    main()
