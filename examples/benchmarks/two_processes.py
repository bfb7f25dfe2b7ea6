"""Two processes against one: do they agree, and how long does an epoch take?

One process accumulates two batches per step; two gloo processes take one batch each. Both see the same batches, so the
plan must be the same and the weights equal up to the order of additions. Every variant runs in processes of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import nni_prune_ext as npe
from nni_prune_ext.evaluation import environment
from nni_prune_ext.text_files import write_text
from nni_prune_ext.training import TrainingSettings, recalibrate_batchnorm
from nni_prune_ext.training.processes import is_main, world_size

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Starts both variants in turn and compares what they wrote."""
    options = _parser().parse_args()
    if options.worker:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        times: dict[str, list[float]] = {"one": [], "two": []}
        for turn in range(options.rounds):
            for name, count in (("one", 1), ("two", 2)):
                launch(count, Path(folder) / f"{name}_{turn}")
                facts = json.loads((Path(folder) / f"{name}_{turn}" / "facts.json").read_text())
                times[name] += facts["seconds"]
        document = {**compare(Path(folder)), "epoch_seconds": times, "environment": environment(), "job": vars(options)}
    medians = {name: statistics.median(values) for name, values in times.items()}
    document |= {"median_epoch_s": medians, "epoch_time_ratio": medians["two"] / medians["one"]}
    write_text(Path(options.out), json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: document[key] for key in document if key not in ("environment", "job")}, indent=1))


def work(options: argparse.Namespace) -> None:
    """Prunes in two steps with training in between and recovers, in every process alike."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source = npe.open_data(options.data, limit=options.limit)
    batches = npe.split_batches(source, "train", 64, seed=0)
    model = npe.build_model("resnet20", num_classes=source.num_classes, in_channels=source.input_shape[0])
    settings = TrainingSettings(learning_rate=0.02, accumulation_steps=2 // world_size())
    result = npe.prune(
        model, torch.zeros(1, *source.input_shape), method="l1", target="macs=0.5", train_batches=batches,
        options={"steps": 2, "epochs_per_step": 1}, recover_epochs=1, settings=settings,
        limits=npe.Limits(multiple=1),
    )  # fmt: skip
    recalibrate_batchnorm(result.model, batches)
    if is_main():
        out = Path(options.worker)
        out.mkdir(parents=True)
        result.plan.save(out / "plan.json")
        npe.save_weights(result.model, out / "model.safetensors")
        write_text(out / "facts.json", json.dumps({"seconds": [log.seconds for log in result.logs]}))


def launch(processes: int, out: Path) -> None:
    """Runs this script in so many processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, *sys.argv[1:], "--worker", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def compare(folder: Path) -> dict:
    """Says whether the plans agree and by how much the tensors differ."""
    one, two = (load_file(folder / f"{name}_0" / "model.safetensors") for name in ("one", "two"))
    plans = [(folder / f"{name}_0" / "plan.json").read_text() for name in ("one", "two")]
    largest = {
        kind: max(float((one[n].double() - two[n].double()).abs().max()) for n in one if ("running" in n) == buffers)
        for kind, buffers in (("weights", False), ("statistics", True))
    }
    return {"same_plan": plans[0] == plans[1], "largest_difference": largest}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--limit", type=int, default=None, help="images per split")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(HERE / "results" / "two_processes.json"))
    return parser


if __name__ == "__main__":
    main()
