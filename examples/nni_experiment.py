"""An NNI experiment: which method, and how small, on the digits that ship with scikit-learn; nothing is downloaded.

    python examples/nni_experiment.py                    # 12 trials; about ten minutes on two CPU cores
    python examples/nni_experiment.py --smoke            # 4 short trials
    python examples/nni_experiment.py --resume           # after Ctrl-C, or after the machine went down

Every trial is a whole job: prune, certify, recover, export, check, measure. NNI's web portal shows it while it runs.
"""

from __future__ import annotations

import argparse
import urllib.request
from pathlib import Path

from rich.console import Console

from nni_prune_ext.experiments import (
    ExperimentSettings,
    results_table,
    run_trials,
    search_space_for,
    silence_nni,
)
from nni_prune_ext.recipes import recipe_from
from nni_prune_ext.training import EpochLog, Watcher


def main() -> None:
    options = _parser().parse_args()
    smoke = options.smoke
    recipe = recipe_from(
        {
            "model": "resnet20",
            "data": {"source": "digits", "batch_size": 64, **({"limit_images": 300} if smoke else {})},
            "train": {"epochs": 2 if smoke else 12, "learning_rate": 0.1},
            "method": "l1",
            "training": {"learning_rate": 0.02},
            "recovery": 1 if smoke else 3,
            "measure": {"rounds": 3, "min_seconds": 0} if smoke else True,
        },
        complete=False,
    )
    space = search_space_for(
        ["l1", "taylor"] if smoke else ["l1", "fpgm", "taylor"],
        ["macs=0.4", "macs=0.7"] if smoke else ["macs=0.3", "macs=0.5", "macs=0.7"],
        tune={} if smoke else {"steps": (1, 3)},
    )
    settings = ExperimentSettings(
        trials=4 if smoke else 12, tuner="GridSearch" if smoke else "TPE", port=options.port, cost_weight=0.1
    )
    silence_nni()
    result = run_trials(
        recipe, space, Path(options.out), settings, resume=options.resume, watcher=Told(), started=check_portal
    )
    console = Console(width=160)
    console.print(results_table(result.trials))
    for trial in result.pareto("macs"):
        console.print(f"on the Pareto front of accuracy and MACs: {trial.label}, {trial.artefact}", soft_wrap=True)
    if result.best is not None:
        console.print(f"best: {result.best.label}, {result.best.artefact}", soft_wrap=True)


def check_portal(port: int) -> None:
    """Opens NNI's web portal as a browser would."""
    with urllib.request.urlopen(f"http://localhost:{port}", timeout=30) as answer:
        print(f"the web portal answers with {answer.status}")


class Told(Watcher):
    """Tells of epochs and notes."""

    def epoch(self, log: EpochLog) -> None:
        """Tells of an epoch of the dense network."""
        print(f"{log.phase} epoch {log.epoch + 1}: loss {log.loss:.4f}")

    def note(self, text: str) -> None:
        """Tells of a note."""
        print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="4 short trials")
    parser.add_argument("--resume", action="store_true", help="go on with the experiment in --out")
    parser.add_argument("--port", type=int, default=0, help="of the web portal; 0 finds a free one")
    parser.add_argument("--out", default="nni_experiment")
    return parser


if __name__ == "__main__":
    main()
