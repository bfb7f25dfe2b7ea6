"""A network with a residual sum, made data and an evaluator in NNI's documented form, for the tests of NNI's faces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import torch
from nni.compression import TorchEvaluator
from torch import Tensor, nn

IMAGE = torch.zeros(2, 1, 12, 12)
LAYERS = ("conv1", "conv2", "conv3", "fc1")


class Residual(nn.Module):
    """conv2 and conv3 are summed, so their channels are one; fc2 is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)) + x)
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


def network() -> Residual:
    torch.manual_seed(0)
    return Residual()


def config(ratio: float = 0.75, **settings: Any) -> list[dict[str, Any]]:
    return [{"op_names": list(LAYERS), "sparse_ratio": ratio, **settings}]


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 1, 12, 12, generator=generator), torch.randint(0, 10, (8,), generator=generator))
        for _ in range(count)
    ]


def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def training(data: list[tuple[Tensor, Tensor]], most: int | None = None) -> Callable[..., None]:
    """Returns a training function of NNI's form; ``most`` makes it stop early, as some users' do."""

    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Callable[..., Tensor],
        lr_scheduler: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        limit = min(max_steps or 10**9, most or 10**9)
        done = 0
        for _ in range(max_epochs or 100):
            for batch in data:
                if done == limit:
                    return
                optimizer.zero_grad()
                training_step(batch, model).backward()
                optimizer.step()
                done += 1

    return train


def evaluator(model: nn.Module, most: int | None = None, **arguments: Any) -> TorchEvaluator:
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05)
    return TorchEvaluator(training(batches(), most), optimizer, step, **arguments)


def shares(masks: Any) -> dict[str, float]:
    return {module: float((own["weight"] == 0).double().mean()) for module, own in masks.items() if "weight" in own}


def channels(mask: Tensor) -> list[int]:
    return [int(c) for c in (mask.flatten(1) != 0).any(1).nonzero().flatten()]
