"""FTWT in NNI scripts: gates are trained, what fires least is removed; and FTWT's rule for ratios around plain L1.

Both parts are NNI scripts with the class swapped. The first trains gates and network, removes the channels that fire
least, speeds the network up, trains it without gates and runs it as ONNX; the gated network beside it switches filters
per image. The second divides NNI's total among the layers by the mass of their weights, beside the same ratio
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
from nni_jackpots import CONFIG, count, loss_of, optimizer_of, training_loop
from nni_psap import pruned_by_magnitude
from torch import Tensor, nn

import nni_prune_ext as npe
from nni_prune_ext.deployment import onnx_accuracy
from nni_prune_ext.gates import GatedNetwork, measure_gating
from nni_prune_ext.pruning import FTWTPruner, FTWTRatioPruner, UniformRatioPruner
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

    lengths = {"epochs": 2, "core_epochs": 1, "calibration_batches": 4} if smoke else {
        "epochs": 12, "core_epochs": 4, "calibration_batches": 8
    }  # fmt: skip
    gated(copy.deepcopy(dense), loop, example, test, after=1 if smoke else 4, softmax=False, **lengths)
    for scheduler in (UniformRatioPruner, FTWTRatioPruner):
        model = copy.deepcopy(dense)
        ratios = pruned_by_magnitude(scheduler, model, loop, example, updates=2 if smoke else 10)
        low, high = min(ratios.values()), max(ratios.values())
        name = scheduler.__name__
        print(
            f"L1 under {name}: layers lose {low:.2f} to {high:.2f} of their channels, top-1 {accuracy(model, test):.3f}"
        )


def gated(model: nn.Module, loop: Any, example: Tensor, test: Any, *, after: int, **options: Any) -> None:
    """Trains gates, removes what fires least, and runs the smaller network as ONNX."""
    evaluator = TorchEvaluator(loop, optimizer_of(model, 0.02), loss_of, dummy_input=example)
    pruner = FTWTPruner(model, CONFIG, evaluator, **options)  # was: L1NormPruner(model, CONFIG, evaluator)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    network = pruner.gated_model
    assert isinstance(network, GatedNetwork)
    expected, firing = measure_gating(network, example, test)
    varying = sum(own.varying for own in firing.values())
    print(
        f"gated: top-1 {accuracy(network, test):.3f}, {expected.share:.0%} of the MACs of its static core, "
        f"{varying} of {sum(len(own.rate) for own in firing.values())} filters vary with the image"
    )
    ModelSpeedup(model, example, masks).speedup_model()
    loop(model, optimizer_of(model, 0.02), loss_of, max_epochs=after)
    print(f"static core, without gates: {count(model):,} parameters, top-1 {accuracy(model, test):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        written = npe.export_onnx(model, example, Path(folder) / "model.onnx")
        assert written.parity is not None
        print(f"ONNX: top-1 {onnx_accuracy(written.path, test):.3f}, difference {written.parity.max_rel:.1e}")


if __name__ == "__main__":
    main()
