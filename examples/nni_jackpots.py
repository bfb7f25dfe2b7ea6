"""Lottery Jackpots in NNI scripts: channels searched in frozen weights, and its short restriction around plain L1.

Both parts are NNI scripts with the pruner's class swapped. The first searches channels, speeds the network up, writes
it as ONNX and runs that. The second prunes by magnitude while the network trains, with and without the restriction,
and counts how often masks change. ``--smoke`` trains for seconds instead of minutes.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import nni
import torch
from nni.compression import TorchEvaluator
from torch import Tensor, nn
from torch.nn import functional

import nni_prune_ext as npe
from nni_prune_ext.deployment import onnx_accuracy
from nni_prune_ext.pruning import L1NormPruner, LotteryJackpotsPruner, ReplacePruner, ShortRestrictionPruner
from nni_prune_ext.speedup import ModelSpeedup
from nni_prune_ext.training import accuracy

CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
INTERVAL = 5
"""Training steps between two updates of the masks under a scheduler."""


def main() -> None:
    """Trains a network, then prunes copies of it in both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    smoke = parser.parse_args().smoke
    torch.manual_seed(0)
    data = npe.open_data("digits", image_size=8 if smoke else 16)
    train, test = npe.split_batches(data, "train", 64), npe.split_batches(data, "test", 500)
    dense = npe.build_model("resnet20", num_classes=data.num_classes, in_channels=1)
    loop, example = training_loop(train), torch.randn(8, *data.input_shape)
    loop(dense, optimizer_of(dense), loss_of, max_epochs=2 if smoke else 8)
    print(f"dense: {count(dense):,} parameters, top-1 {accuracy(dense, test):.3f}")

    searched_channels(copy.deepcopy(dense), loop, example, test, epochs=1 if smoke else 10)
    for scheduler in (ReplacePruner, ShortRestrictionPruner):
        model = copy.deepcopy(dense)
        changes = pruned_by_magnitude(scheduler, model, loop, example, updates=8 if smoke else 40)
        name = scheduler.__name__
        print(
            f"L1 under {name}: channels that came back, update by update: {changes}; top-1 {accuracy(model, test):.3f}"
        )


def searched_channels(model: nn.Module, loop: Any, example: Tensor, test: Any, *, epochs: int) -> None:
    """Searches channels, tunes what is left, removes the others, and runs the smaller network as ONNX."""
    evaluator = TorchEvaluator(loop, optimizer_of(model), loss_of, dummy_input=example)
    pruner = LotteryJackpotsPruner(  # was: L1NormPruner(model, CONFIG, evaluator)
        model, CONFIG, evaluator, search_epochs=epochs, freeze_epochs=1, tune_epochs=epochs
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    ModelSpeedup(model, example, masks).speedup_model()
    print(f"searched, tuned, removed: {count(model):,} parameters, top-1 {accuracy(model, test):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        written = npe.export_onnx(model, example, Path(folder) / "model.onnx")
        assert written.parity is not None
        print(f"ONNX: top-1 {onnx_accuracy(written.path, test):.3f}, difference {written.parity.max_rel:.1e}")


def pruned_by_magnitude(scheduler: Any, model: nn.Module, loop: Any, example: Tensor, *, updates: int) -> list[int]:
    """Prunes by L1 while the model trains; returns how many masked channels every update brought back."""
    evaluator = TorchEvaluator(loop, optimizer_of(model, 0.2), loss_of, dummy_input=example)
    pruner = scheduler(L1NormPruner(model, CONFIG, evaluator), INTERVAL, updates, schedule="one_shot")
    history: list[dict[str, Tensor]] = []
    update = pruner.bound_pruner.update_masks

    def noted(masks: Any) -> None:
        update(masks)
        history.append({layer: own["weight"].flatten(1).amax(1) for layer, own in pruner.get_masks().items()})

    pruner.bound_pruner.update_masks = noted
    pruner.compress(max_steps=INTERVAL * (updates + 1), max_epochs=None)
    return [
        int(sum(((now[layer] > before[layer]).sum() for layer in now), torch.zeros(())))
        for before, now in pairwise(history)
    ]


def loss_of(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    """Returns the loss on a batch: NNI's training step."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def optimizer_of(model: nn.Module, rate: float = 0.05) -> Any:
    """Returns an optimizer as NNI needs it, traced."""
    return nni.trace(torch.optim.SGD)(model.parameters(), lr=rate, momentum=0.9)


def training_loop(batches: Iterable[Any]) -> Callable[..., None]:
    """Returns a training function with the arguments that NNI calls it by."""

    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Callable[..., Tensor],
        lr_scheduler: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.train()
        step, epoch = 0, 0
        while (max_steps is None or step < max_steps) and (max_epochs is None or epoch < max_epochs):
            for batch in batches:
                optimizer.zero_grad()
                training_step(batch, model).backward()
                optimizer.step()
                step += 1
                if max_steps is not None and step >= max_steps:
                    break
            epoch += 1
        model.eval()

    return train


def count(model: nn.Module) -> int:
    """Returns the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
