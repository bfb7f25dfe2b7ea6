"""What several processes do in ``test_processes.py``: started by torchrun, and called in one process for comparison.

Every job is a function of the number of batches per optimizer step and process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import safetensors.torch
import torch
from small_task import BATCH_SIZE, LOADERS, another_process, dataset, everything, small_arrays, small_batches, small_net
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nni_prune_ext.checkpoints import Checkpoints, Json, Saved
from nni_prune_ext.data.batches import BatchLoader
from nni_prune_ext.latency import start
from nni_prune_ext.latency.layers import find_layers
from nni_prune_ext.latency.stopwatch import LayerAt, NetworkTimes, Stopwatch
from nni_prune_ext.methods.base import Batch
from nni_prune_ext.methods.baselines import L1
from nni_prune_ext.pipeline import prune
from nni_prune_ext.testing.method_bench import Bench, Interrupted
from nni_prune_ext.training import EpochLog, Watcher, checked_settings, cross_entropy, fit, recalibrate_batchnorm

Result = tuple[dict[str, object], dict[str, Tensor]]
RANK = int(os.environ.get("RANK", "0"))


def pruned(
    batches: object, accumulation: int, *, method: str = "l1", between: int = 1, checkpoints: Checkpoints | None = None,
    target: str = "macs=0.6",
) -> Result:  # fmt: skip
    """Prunes in two steps with training between them and after them."""
    bench = Bench.of(L1, {})
    settings = checked_settings(learning_rate=0.05, accumulation_steps=accumulation)
    result = prune(
        bench.model, bench.example, method=method, target=target, options={"steps": 2, "epochs_per_step": between},
        train_batches=batches, recover_epochs=1, settings=settings, groups=bench.groups,
        checkpoints=checkpoints,
    )  # fmt: skip
    recalibrate_batchnorm(result.model, small_batches())
    losses = [log.loss for log in result.logs]
    rates = [log.learning_rate for log in result.logs]
    facts: dict[str, object] = {"plan": result.plan.to_json(), "losses": losses, "rates": rates}
    if result.latency is not None:
        facts["latency"] = result.latency.to_dict()
    return facts, everything(result.model)


def fitted(batches: object, accumulation: int, epochs: int = 2, **options: object) -> Result:
    """Trains the small network."""
    model = small_net(dropout=0.0)
    settings = checked_settings(learning_rate=0.05, accumulation_steps=accumulation, max_gradient_norm=1.0)
    logs = fit(model, batches, epochs=epochs, settings=settings, **options)
    recalibrate_batchnorm(model, small_batches())
    return {"losses": [log.loss for log in logs], "metrics": [log.metric for log in logs]}, everything(model)


def odd_package(accumulation: int) -> Result:
    """Prunes on five batches of the package's own loader."""
    return pruned(BatchLoader(small_arrays(), BATCH_SIZE, shuffle=True, augment="shift", seed=5), accumulation)


def odd_torch(accumulation: int) -> Result:
    """Prunes on five batches of a torch loader, the last one smaller."""
    generator = torch.Generator().manual_seed(6)
    return pruned(DataLoader(dataset(19), batch_size=BATCH_SIZE, shuffle=True, generator=generator), accumulation)


def data_driven(accumulation: int) -> Result:
    """Prunes by gradients on a torch loader that draws its order from the global generator.

    There is no training between the cuts: gradients are read by the running statistics of batch norm, and these are
    averages over processes, not what one process would have.
    """
    return pruned(LOADERS["torch"](), accumulation, method="taylor", between=0)


def workers(accumulation: int) -> Result:
    """Trains on batches that worker processes load."""
    return fitted(DataLoader(dataset(18), batch_size=4, shuffle=True, num_workers=1), accumulation)


def shaken(accumulation: int) -> Result:
    """Trains on data that draws from numpy and Python."""
    return fitted(LOADERS["numpy and python"](), accumulation)


def one_batch(accumulation: int) -> Result:
    """Trains on a single batch: one process has none."""
    return fitted(DataLoader(dataset(4), batch_size=4), accumulation)


def three_of_eight(accumulation: int) -> Result:
    """Trains on three batches with up to eight in a step."""
    return fitted(small_batches(3), 4 * accumulation)


class Slow(Checkpoints):
    """Checkpoints that one process finds later than the other, when that one has gone on."""

    def stage(self, name: str, identity: Mapping[str, Json] | None = None) -> Checkpoints:
        """Returns the checkpoints of a stage, which are found late as well."""
        own = super().stage(name, identity)
        return Slow(own.folder, own.identity)

    def latest(self) -> Saved | None:
        """Looks late."""
        time.sleep(RANK * 0.5)
        return super().latest()


def late(accumulation: int) -> Result:
    """Prunes with checkpoints that the second process reads when the first would have written the next one."""
    checkpoints = Slow(Path(sys.argv[1]) / "late", {}) if "RANK" in os.environ else None
    return pruned(small_batches(), accumulation, checkpoints=checkpoints)


class OwnStopwatch(Stopwatch):
    """Times are a known function of widths, and another one in every process: only the main one's may count."""

    def _layers(self, wanted: Mapping[LayerAt, str]) -> dict[str, float]:
        self.measured += len(wanted)
        return {key: self._ms(read, written) for (_, read, written), key in wanted.items()}

    def _networks(self, networks: Mapping[str, nn.Module], as_shipped: bool) -> NetworkTimes:
        dense = self._whole(self._model)
        return NetworkTimes(dense, {k: self._whole(v) / dense for k, v in networks.items()}, 0.01, "cpu", 30)

    def _whole(self, network: nn.Module) -> float:
        tensors = dict(network.named_parameters())
        widths = (layer.widths(tensors[layer.weight].shape) for layer in find_layers(network, self.inputs))
        return 0.05 + 1.2 * sum(self._ms(*both) for both in widths)

    def _ms(self, read: int, written: int) -> float:
        return 0.001 * (read * written) ** (0.5 if RANK else 1.0)


def aimed_late(accumulation: int) -> Result:
    """Prunes to a latency with training, and with checkpoints that the second process looks for late."""
    checkpoints = Slow(Path(sys.argv[1]) / "aimed_late", {}) if "RANK" in os.environ else None
    with patch.object(start, "Stopwatch", OwnStopwatch):
        return pruned(small_batches(), accumulation, checkpoints=checkpoints, target="latency=0.6")


def aimed_again(accumulation: int) -> Result:
    """Prunes to a latency twice without training between the cuts: the method runs until its network takes the time.

    The second time the main process finds what was measured, the other one nothing.
    """
    checkpoints = Checkpoints(Path(sys.argv[1]) / f"aimed_again-{RANK}", {}) if "RANK" in os.environ else None
    with patch.object(start, "Stopwatch", OwnStopwatch):
        for _ in range(2):
            result = pruned(
                small_batches(), accumulation, method="random", between=0, target="latency=0.6", checkpoints=checkpoints
            )
    return result


def selected(accumulation: int) -> Result:
    """Trains with a metric that differs between processes: the main one's counts everywhere."""
    values = iter([0.1, 0.9, 0.5, 0.4] if RANK == 0 else [0.9, 0.1, 0.2, 0.3])
    return fitted(small_batches(), accumulation, epochs=4, evaluate=lambda model: next(values))


class Order:
    """Writes down every batch that this process trains on, with dropout that lets random states drift apart."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Trains on the batch."""
        self.seen.append(float(batch[0].sum()))
        return cross_entropy(model, batch)


class Drawn:
    """Batches in an order from torch's global generator."""

    def __iter__(self) -> Iterator[Batch]:
        """Yields five batches."""
        batches = small_batches()
        yield from (batches[k] for k in torch.randperm(5).tolist())


def orders(accumulation: int) -> Result:
    """Trains three epochs on odd numbers of batches with dropout, and says what was seen in which order."""
    found: dict[str, object] = {}
    tensors: dict[str, Tensor] = {}
    for name, batches in {"torch": LOADERS["torch"](), "drawn": Drawn()}.items():
        order, model = Order(), small_net(dropout=0.5)
        fit(model, batches, epochs=3, loss=order.loss,
            settings=checked_settings(accumulation_steps=accumulation))  # fmt: skip
        found[name] = order.seen
        tensors |= {f"{name}.{key}": tensor for key, tensor in everything(model).items() if tensor.is_floating_point()}
    return found, tensors


class StopAfter(Watcher):
    """Stops a run after an epoch."""

    def __init__(self, epoch: int) -> None:
        self.last = epoch

    def epoch(self, log: EpochLog) -> None:
        """Stops."""
        if log.epoch == self.last:
            raise Interrupted


def resumed(accumulation: int) -> Result:
    """Trains three epochs at once, and with an interruption after the second: returns how many numbers differ."""
    folder = Path(sys.argv[1]) / "checkpoints"
    whole, broken = fitted(LOADERS["torch"](), accumulation, epochs=3), None
    try:
        fitted(LOADERS["torch"](), accumulation, epochs=3, watcher=StopAfter(1), checkpoints=Checkpoints(folder, {}))
    except Interrupted:
        another_process(RANK + 10)
        broken = fitted(LOADERS["torch"](), accumulation, epochs=3, checkpoints=Checkpoints(folder, {}))
    assert broken is not None
    different = sum(int((whole[1][name] != broken[1][name]).sum()) for name in whole[1])
    return {"different": different, "same logs": whole[0] == broken[0]}, {}


JOBS: dict[str, Callable[[int], Result]] = {
    job.__name__: job
    for job in (
        odd_package,
        odd_torch,
        data_driven,
        workers,
        shaken,
        one_batch,
        three_of_eight,
        selected,
        late,
        aimed_late,
        aimed_again,
    )
}
"""Jobs of which two processes must give what one process gives with twice the accumulation."""


def failing(accumulation: int) -> Result:
    """Meets a loss that is no number, in one process only."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) * (float("nan") if RANK == 1 else 1.0)

    return fitted(small_batches(), accumulation, loss=loss)


def main(out: Path, names: list[str]) -> None:
    """Runs jobs and writes what this process got."""
    another_process(RANK + 100)
    for name in names:
        facts, tensors = globals()[name](1)
        (out / f"{name}.{RANK}.json").write_text(json.dumps(facts))
        safetensors.torch.save_file(tensors, out / f"{name}.{RANK}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
