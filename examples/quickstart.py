"""Train a small network on scikit-learn's digits, prune half of its MACs, export it, check it: seconds on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

import nni_prune_ext as npe
from nni_prune_ext.deployment import onnx_accuracy
from nni_prune_ext.training import TrainingSettings, accuracy

torch.manual_seed(0)
data = npe.open_data("digits", image_size=8)
train = npe.split_batches(data, "train", 64)
test = npe.split_batches(data, "test", 500)
model = npe.build_model("resnet20", num_classes=data.num_classes, in_channels=1)
npe.fit(model, train, epochs=5, settings=TrainingSettings(learning_rate=0.1))

example = torch.randn(1, *data.input_shape)
result = npe.prune(model, example, method="taylor", target="macs=0.5", train_batches=train, recover_epochs=2)
npe.export_onnx(result.model, example, Path("pruned.onnx"))

print(f"MACs {result.dense.macs:,} -> {result.costs.macs:,}; certificate exact: {result.certificate.exact}")
print(
    f"top-1 dense {accuracy(model, test):.3f}, after the cut {accuracy(result.removed_only, test):.3f}, "
    f"recovered {accuracy(result.model, test):.3f}, ONNX {onnx_accuracy(Path('pruned.onnx'), test):.3f}"
)
