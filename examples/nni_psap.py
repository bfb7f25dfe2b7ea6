"""PSAP (re-derived from the abstract) in NNI scripts: the pruner, and its ratios around plain L1.

Both parts are NNI scripts with the class swapped. The first trains and prunes, speeds the network up, writes it as ONNX
and runs that. The second divides NNI's total among the layers by the sparsity of their weights, beside the same ratio
everywhere. ``--smoke`` trains for seconds instead of minutes.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from nni.compression import TorchEvaluator
from nni_jackpots import CONFIG, INTERVAL, count, loss_of, optimizer_of, training_loop
from torch import Tensor, nn

import nni_prune_ext as npe
from nni_prune_ext.deployment import onnx_accuracy
from nni_prune_ext.pruning import L1NormPruner, PSAPPruner, PSAPRatioPruner, UniformRatioPruner
from nni_prune_ext.speedup import ModelSpeedup
from nni_prune_ext.training import accuracy


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

    pruned_softly(copy.deepcopy(dense), loop, example, test, epochs=3 if smoke else 20)
    for scheduler in (UniformRatioPruner, PSAPRatioPruner):
        model = copy.deepcopy(dense)
        ratios = pruned_by_magnitude(scheduler, model, loop, example, updates=2 if smoke else 10)
        low, high = min(ratios.values()), max(ratios.values())
        name = scheduler.__name__
        print(
            f"L1 under {name}: layers lose {low:.2f} to {high:.2f} of their channels, top-1 {accuracy(model, test):.3f}"
        )


def pruned_softly(model: nn.Module, loop: Any, example: Tensor, test: Any, *, epochs: int) -> None:
    """Trains and prunes, removes, and runs the smaller network as ONNX."""
    evaluator = TorchEvaluator(loop, optimizer_of(model, 0.02), loss_of, dummy_input=example)
    pruner = PSAPPruner(model, CONFIG, evaluator, epochs=epochs)  # was: L1NormPruner(model, CONFIG, evaluator)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    facts = ", ".join(f"{name} {number:.0f}" for name, number in pruner.outcome.facts.items())
    ModelSpeedup(model, example, masks).speedup_model()
    print(
        f"trained, pruned, removed: {count(model):,} parameters, top-1 {accuracy(model, test):.3f}; channels: {facts}"
    )
    with tempfile.TemporaryDirectory() as folder:
        written = npe.export_onnx(model, example, Path(folder) / "model.onnx")
        assert written.parity is not None
        print(f"ONNX: top-1 {onnx_accuracy(written.path, test):.3f}, difference {written.parity.max_rel:.1e}")


def pruned_by_magnitude(
    scheduler: Any, model: nn.Module, loop: Any, example: Tensor, *, updates: int
) -> dict[str, float]:
    """Prunes by L1 while the model trains; returns the share of channels that every layer loses."""
    evaluator = TorchEvaluator(loop, optimizer_of(model, 0.02), loss_of, dummy_input=example)
    pruner = scheduler(L1NormPruner(model, CONFIG, evaluator), INTERVAL, updates)
    _, masks = pruner.compress(max_steps=INTERVAL * (updates + 1), max_epochs=None)
    return {
        layer: 1 - float(own["weight"].flatten(1).amax(1).mean()) for layer, own in masks.items() if "weight" in own
    }


if __name__ == "__main__":
    main()
