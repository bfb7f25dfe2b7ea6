"""What recovery gives back: L1 at half of the MACs, with and without distillation, beside a bare PyTorch loop.

Every arm trains the same number of epochs with the same settings, batches and seed; the validation split selects the
epoch, the test split is only reported. The bare loop is twenty lines of plain PyTorch on the same cut network: the
accuracy it reaches says whether our loop does what it should, and ``--speed`` says what our loop costs. Every arm is
saved after every epoch, so that the script can be stopped and started again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import nni_prune_ext as npe
from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.evaluation import environment
from nni_prune_ext.text_files import write_text
from nni_prune_ext.training import Distillation, EpochLog, TrainingSettings, Watcher, fit, recalibrate_batchnorm

HERE = Path(__file__).resolve().parent
DECAY, MOMENTUM = 5e-4, 0.9


def main() -> None:
    """Runs the arms that are not yet in the results file, then writes the table."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    source = npe.open_data(options.data, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), limit=options.limit)
    dense = npe.build_model(options.model, num_classes=10, in_channels=3, weights=Path(options.weights))
    bench = Bench(source, dense, options)
    out = Path(options.out)
    results = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    arms = {"dense": bench.dense_row, "dense-trained-longer": bench.longer, "l1": bench.recovered,
            "l1-distilled": bench.distilled, "l1-bare-loop": bench.bare}  # fmt: skip
    for name, arm in arms.items():
        if name not in results["rows"]:
            results["rows"][name] = arm()
            print(name, json.dumps(results["rows"][name]), flush=True)
        results["settings"] = {**vars(options), "training": bench.settings.model_dump(mode="json")}
        results["environment"] = environment()
        write_text(out, json.dumps(results, indent=1, default=str) + "\n")
    if options.speed and "speed" not in results:
        results["speed"] = bench.speed(options.speed)
        write_text(out, json.dumps(results, indent=1, default=str) + "\n")
    print(json.dumps(results.get("speed")))


class Bench:
    """The arms, on one data source and one dense network."""

    def __init__(self, source: npe.DataSource, dense: nn.Module, options: argparse.Namespace) -> None:
        self.dense, self.options = dense, options
        self.train = npe.split_batches(source, "train", 128, seed=options.seed)
        self.val, self.test = (npe.split_batches(source, split, 500) for split in ("val", "test"))
        self.example = torch.zeros(1, *source.input_shape)
        self.settings = TrainingSettings(
            learning_rate=options.learning_rate, weight_decay=DECAY, momentum=MOMENTUM, precision="bf16",
            channels_last=True,
        )  # fmt: skip

    def validate(self, model: nn.Module) -> float:
        """Returns the accuracy on the validation split."""
        return npe.accuracy(model, self.val)

    def dense_row(self) -> dict:
        """Says where everything starts."""
        return self._row(self.dense, [], 0.0)

    def longer(self) -> dict:
        """Trains the dense network for as long as the others recover."""
        model, began = copy.deepcopy(self.dense), time.perf_counter()
        logs = fit(
            model, self.train, epochs=self.options.epochs, settings=self.settings, evaluate=self.validate,
            watcher=Told("dense-trained-longer"), checkpoints=self._checkpoints("longer"), seed=self.options.seed,
        )  # fmt: skip
        return self._row(model, logs, time.perf_counter() - began)

    def recovered(self) -> dict:
        """Prunes and recovers with our loop."""
        return self._pruned("l1", None)

    def distilled(self) -> dict:
        """The same, with the dense network as the teacher."""
        return self._pruned("l1-distilled", Distillation(temperature=4.0, weight=0.5))

    def bare(self) -> dict:
        """Recovers the same cut network with plain PyTorch."""
        cut = self._cut()
        recalibrate_batchnorm(cut, self.train)
        began, logs = time.perf_counter(), []
        best: tuple[float, dict[str, torch.Tensor]] = (-1.0, {})
        torch.manual_seed(self.options.seed)
        for epoch, (loss, seconds) in enumerate(bare_loop(cut, self.train, self.options.epochs, self.settings)):
            metric = self.validate(cut)
            logs.append(EpochLog("bare", epoch, loss, 0.0, seconds, metric))
            print("l1-bare-loop", logs[-1], flush=True)
            if metric > best[0]:
                best = (metric, copy.deepcopy(cut.state_dict()))
        cut.load_state_dict(best[1])
        return self._row(cut, logs, time.perf_counter() - began)

    def speed(self, rounds: int, batches: int = 40) -> dict:
        """Times one epoch of ``batches`` batches of either loop in turn, in CPU seconds of this thread."""
        data = [batch for batch, _ in zip(self.train, range(batches))]
        cut, times = self._cut(), {"ours": [], "bare": []}
        order = random.Random(0)
        for number in range(rounds + 1):
            for name in order.sample(list(times), 2):
                model, began = copy.deepcopy(cut), time.process_time()
                if name == "ours":
                    fit(model, data, epochs=1, settings=self.settings)
                else:
                    list(bare_loop(model, data, 1, self.settings))
                if number:
                    times[name].append(time.process_time() - began)
        medians = {name: statistics.median(values) for name, values in times.items()}
        return {"rounds": rounds, "batches": batches, "clock": "process CPU time", "seconds": times,
                "median_s": medians, "ratio": medians["ours"] / medians["bare"]}  # fmt: skip

    def _pruned(self, name: str, distillation: Distillation | None) -> dict:
        began = time.perf_counter()
        result = npe.prune(
            copy.deepcopy(self.dense), self.example, method="l1", target="macs=0.5", train_batches=self.train,
            limits=npe.Limits(multiple=self.options.multiple), recover_epochs=self.options.epochs,
            settings=self.settings, evaluate=self.validate, distillation=distillation, watcher=Told(name),
            checkpoints=self._checkpoints(name), seed=self.options.seed,
        )  # fmt: skip
        row = self._row(result.model, list(result.logs), time.perf_counter() - began)
        return {**row, "test_right_after_the_cut": npe.accuracy(result.removed_only, self.test)}

    def _cut(self) -> nn.Module:
        result = npe.prune(
            copy.deepcopy(self.dense), self.example, method="l1", target="macs=0.5", seed=self.options.seed,
            limits=npe.Limits(multiple=self.options.multiple),
        )  # fmt: skip
        return result.removed_only

    def _checkpoints(self, name: str) -> Checkpoints:
        return Checkpoints(Path(self.options.work) / name, {"arm": name, "epochs": self.options.epochs})

    def _row(self, model: nn.Module, logs: list[EpochLog], seconds: float) -> dict:
        best = max(logs, key=lambda log: log.metric or 0.0, default=None)
        return {
            "macs": npe.count_costs(model, self.example).macs,
            "validation": best.metric if best else self.validate(model),
            "selected_epoch": best.epoch + 1 if best else None,
            "test": npe.accuracy(model, self.test),
            "seconds": round(seconds, 1),
            "epochs": [vars(log) for log in logs],
        }


def bare_loop(
    model: nn.Module, batches: npe.BatchLoader | list, epochs: int, settings: TrainingSettings
) -> Iterator[tuple[float, float]]:
    """The loop that people write: SGD, cosine, bf16 autocast, channels last; yields mean loss and seconds per epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=MOMENTUM, weight_decay=DECAY)
    model.to(memory_format=torch.channels_last)
    total = epochs * len(batches)
    for epoch in range(epochs):
        began, losses = time.perf_counter(), []
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        model.train()
        for number, (images, labels) in enumerate(batches):
            rate = 0.5 * settings.learning_rate * (1 + math.cos(math.pi * (epoch * len(batches) + number) / total))
            optimizer.param_groups[0]["lr"] = rate
            images = images.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        yield statistics.fmean(losses), time.perf_counter() - began


class Told(Watcher):
    """Prints one line per epoch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def epoch(self, log: EpochLog) -> None:
        """Prints it."""
        print(self.name, log, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="cifar10:ROOT")
    parser.add_argument("--weights", required=True, help="of the dense network")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--multiple", type=int, default=1, help="widths stay multiples of this")
    parser.add_argument("--limit", type=int, default=None, help="images per split, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speed", type=int, default=9, help="rounds of the speed comparison; 0 for none")
    parser.add_argument("--work", default="recovery_work", help="folder for checkpoints")
    parser.add_argument("--out", default=str(HERE / "results" / "recovery_resnet20_cifar10.json"))
    return parser


if __name__ == "__main__":
    main()
