"""An NNI experiment: which of all methods, and how small, on the digits of scikit-learn; nothing is downloaded.

    python examples/nni_experiment.py                    # 12 trials; about ten minutes on two CPU cores
    python examples/nni_experiment.py --smoke            # one short trial per registered method
    python examples/nni_experiment.py --resume           # after Ctrl-C, or after the machine went down

Every trial is a whole job: prune, certify, recover, export, check, measure. NNI's web portal shows it while it runs. At
the end the best trial's network is built again from its artefact. A method's own epochs of search are few here, and its
tuning is the recovery, the same for all methods.
"""

from __future__ import annotations

import argparse
import urllib.request
from pathlib import Path

from rich.console import Console

import nni_prune_ext as npe
from nni_prune_ext.deployment import load_pruned
from nni_prune_ext.experiments import (
    ExperimentSettings,
    Trial,
    results_table,
    run_trials,
    search_space_for,
    silence_nni,
)
from nni_prune_ext.recipes import recipe_from
from nni_prune_ext.registry import plugins
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
        list(plugins("pruners")),
        ["macs=0.5"] if smoke else ["macs=0.3", "macs=0.5", "macs=0.7"],
        tune={
            "search_epochs": (1, 1) if smoke else (2, 8),
            "tune_epochs": (0, 0),
            "epochs": (2, 2) if smoke else (4, 12),
            "decoder_epochs": (1, 1) if smoke else (4, 12),
            "rounds": (1, 1) if smoke else (2, 4),
            "round_epochs": (1, 1) if smoke else (1, 3),
        }
        | ({} if smoke else {"steps": (1, 3)}),
    )
    trials = len(plugins("pruners")) if smoke else 12
    settings = ExperimentSettings(
        trials=trials, tuner="GridSearch" if smoke else "TPE", port=options.port, cost_weight=0.1
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
        rebuild(result.best)


def rebuild(best: Trial) -> None:
    """Builds the best trial's network from its artefact folder and measures it again, on the validation split."""
    data = npe.open_data("digits")
    model = load_pruned(npe.build_model("resnet20", num_classes=data.num_classes, in_channels=1), Path(best.artefact))
    print(f"rebuilt: validation {npe.accuracy(model, npe.split_batches(data, 'val', 500)):.4f}")


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
    parser.add_argument("--smoke", action="store_true", help="one short trial per method")
    parser.add_argument("--resume", action="store_true", help="go on with the experiment in --out")
    parser.add_argument("--port", type=int, default=0, help="of the web portal; 0 finds a free one")
    parser.add_argument("--out", default="nni_experiment")
    return parser


if __name__ == "__main__":
    main()
