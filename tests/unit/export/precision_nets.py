"""A small network that can read digits, as float32 files for tests of lower precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nni_prune_ext.data.batches import BatchLoader, split_batches
from nni_prune_ext.data.sources import open_data
from nni_prune_ext.export.onnx_static import export_onnx


class DigitNet(nn.Module):
    """Convolutions with and without BatchNorm, a depthwise layer, a shortcut, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16))
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.depthwise(self.stem(images)).clamp(0, 6)
        features = torch.relu(self.left(features)) + self.right(features)
        logits: Tensor = self.head(torch.relu(features).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """A trained network as a file, and images of two disjoint sets."""

    model: nn.Module
    path: Path
    train: Tensor
    test: list[tuple[Tensor, Tensor]]


def trained_digits(folder: Path) -> Digits:
    """Trains for a second and exports with TorchScript, which is quick."""
    source = open_data("digits", image_size=8)
    loader = BatchLoader(source.train, 64, shuffle=True, mean=source.mean, std=source.std)
    torch.manual_seed(0)
    model = DigitNet().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(10):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    test = list(split_batches(source, "test", 200))
    train = next(iter(BatchLoader(source.train, 128, mean=source.mean, std=source.std)))[0]
    path = export_onnx(model, test[0][0][:1], folder / "model.onnx", exporter="torchscript").path
    return Digits(model, path, train, test)
