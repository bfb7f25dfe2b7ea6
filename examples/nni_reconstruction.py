"""Reconstruction in an NNI script: only the class is swapped, up to a smaller network in ONNX Runtime.

The network is pruned in rounds, on its task and on the rebuilding of its input together, and rewound after each. What
is left is a ticket: the first weights in a smaller network, which are then trained again. Beside it stands the control,
the same rounds without the reconstruction. ``--smoke`` trains for seconds instead of minutes.
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
from torch import Tensor, nn

import nni_prune_ext as npe
from nni_prune_ext.deployment import onnx_accuracy
from nni_prune_ext.pruning import ReconstructionPruner
from nni_prune_ext.speedup import ModelSpeedup
from nni_prune_ext.training import accuracy


def main() -> None:
    """Trains a network, prunes copies of it with and without reconstruction, and trains the tickets."""
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

    lengths = {"decoder_epochs": 1, "rounds": 2, "round_epochs": 1} if smoke else {
        "decoder_epochs": 10, "rounds": 3, "round_epochs": 3
    }  # fmt: skip
    for weight in (0.0, 10.0):
        model = copy.deepcopy(dense)
        facts = pruned(model, loop, example, reconstruction_weight=weight, **lengths)
        loop(model, optimizer_of(model, 0.02), loss_of, max_epochs=1 if smoke else 5)
        error = f", reconstruction error {facts['rounds_error_last']:.3f}" if weight else ""
        print(f"weight {weight:g}: {count(model):,} parameters, top-1 {accuracy(model, test):.3f}{error}")
    with tempfile.TemporaryDirectory() as folder:
        written = npe.export_onnx(model, example, Path(folder) / "model.onnx")
        assert written.parity is not None
        print(f"ONNX: top-1 {onnx_accuracy(written.path, test):.3f}, difference {written.parity.max_rel:.1e}")


def pruned(model: nn.Module, loop: Any, example: Tensor, **options: Any) -> dict[str, float]:
    """Prunes a model in rounds and makes it smaller; returns what the method has noted."""
    evaluator = TorchEvaluator(loop, optimizer_of(model, 0.02), loss_of, dummy_input=example)
    pruner = ReconstructionPruner(model, CONFIG, evaluator, **options)  # was: L1NormPruner(model, CONFIG, evaluator)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    ModelSpeedup(model, example, masks).speedup_model()
    return dict(pruner.outcome.facts)


if __name__ == "__main__":
    main()
