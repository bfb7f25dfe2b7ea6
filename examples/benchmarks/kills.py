"""Kills runs with SIGKILL at random moments, resumes them, and compares what they end with; says what a kill costs.

One uninterrupted run of a small recipe is the reference. Then, per kill: a fresh run is killed at a uniformly random
moment of the reference's duration, resumed, and must end with the same plan and bit for bit the same weights of every
network. Finished kills are kept in the results file, so the script itself can be stopped and started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from nni_prune_ext.evaluation import environment
from nni_prune_ext.text_files import write_text

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "kills.yaml"
METHODS = {"l1": ["method=l1", "options={steps: 3, epochs_per_step: 2}"]}
METHODS["controller"] = ["method=nni_prune_ext.testing.toy_controller:CONTROLLER", "options={epochs: 6, cut_after: 4}"]
METHODS["lottery_jackpots"] = [
    "method=lottery_jackpots",
    "options={search_epochs: 3, freeze_epochs: 2, tune_epochs: 3}",
]
METHODS["psap"] = ["method=psap", "options={epochs: 6, soft_share: 0.7, probe_batches: 2}"]
METHODS["reconstruction"] = ["method=reconstruction", "options={decoder_epochs: 3, rounds: 2, round_epochs: 2}"]
METHODS["ftwt"] = [
    "method=ftwt",
    "options={head_epochs: 2, epochs: 4, core_epochs: 2, softmax: false, calibration_batches: 4}",
]
PARTS = ("plan.json", "model.safetensors", "gated.safetensors")


def main() -> None:
    """Runs the reference once per method, then the kills that the results file does not hold yet."""
    options = _parser().parse_args()
    out, work = Path(options.out), Path(options.work)
    results = json.loads(out.read_text()) if out.exists() else {}
    for method in options.method:
        entry = results.setdefault(method, {"kills": []})
        if "reference" not in entry:
            began = time.perf_counter()
            completed(start(method, work / method / "reference"))
            entry["seconds"] = time.perf_counter() - began
            entry["reference"] = prints(work / method / "reference")
        while sum(kill["killed"] for kill in entry["kills"]) < options.kills:
            entry["kills"].append(kill_once(method, len(entry["kills"]), entry, work / method))
            results["environment"] = environment()
            write_text(out, json.dumps(results, indent=1) + "\n")
            print(method, json.dumps(entry["kills"][-1]), flush=True)
        entry.update(summary(entry))
        write_text(out, json.dumps(results, indent=1) + "\n")
        print(method, json.dumps({key: value for key, value in entry.items() if key != "kills"}, indent=1))
        if not entry["all_equal"]:
            sys.exit(1)


def kill_once(method: str, number: int, entry: dict, folder: Path) -> dict:
    """Kills one run at a random moment, resumes it, and says whether it ended like the reference."""
    run = folder / f"kill_{number}"
    shutil.rmtree(run, ignore_errors=True)
    moment = random.Random(f"{method} {number}").uniform(0, entry["seconds"])
    began = time.perf_counter()
    process = start(method, run)
    try:
        process.wait(timeout=moment)
        killed = False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed = True
    before = time.perf_counter() - began
    saved = sorted(str(path.parent.relative_to(run)) for path in run.glob("checkpoints/**/state.json"))
    began = time.perf_counter()
    completed(start(method, run, "--resume"))
    after = time.perf_counter() - began
    left_over = [str(path.relative_to(run)) for path in run.rglob("*unfinished*")]
    same = prints(run) == entry["reference"] and not left_over
    if same:
        shutil.rmtree(run)
    lost = before + after - entry["seconds"]
    return {"killed_after_s": round(before, 2), "killed": killed, "checkpoints": saved, "resumed_s": round(after, 2),
            "lost_s": round(lost, 2), "equal": same, "left_over": left_over}  # fmt: skip


def start(method: str, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """Starts the command line in a process group of its own."""
    settings = [part for text in METHODS[method] for part in ("--set", text)]
    command = [sys.executable, "-m", "nni_prune_ext", "run", str(RECIPE), "--out", str(out), *settings, *more]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def completed(process: subprocess.Popen[bytes]) -> None:
    """Waits for a run that must succeed."""
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"a run ended with exit code {process.returncode}:\n{errors.decode()}")


def prints(run: Path) -> dict[str, str]:
    """Returns hashes of the plan and of all weights of a run."""
    paths = [path for name in PARTS for path in sorted(run.glob(f"*/{name}"))]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def summary(entry: dict) -> dict:
    """Says how many kills hit, whether all ended alike, and what they cost."""
    hits = [kill for kill in entry["kills"] if kill["killed"]]
    lost = [kill["lost_s"] for kill in hits] or [0.0]
    return {"hits": len(hits), "all_equal": all(kill["equal"] for kill in entry["kills"]),
            "median_lost_s": statistics.median(lost), "max_lost_s": max(lost)}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--kills", type=int, default=10, help="per method")
    parser.add_argument("--work", default="kills_work", help="folder for the runs")
    parser.add_argument("--out", default=str(HERE / "results" / "resume_kills.json"))
    return parser


if __name__ == "__main__":
    main()
