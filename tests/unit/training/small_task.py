"""A small network with batch norm and dropout, its data, and the comparisons that the training tests share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from nni_prune_ext.data.batches import BatchLoader
from nni_prune_ext.data.image_arrays import ImageArrays

IMAGES = 20
BATCH_SIZE = 4


def small_net(*, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Maps ``(N, 3, 8, 8)`` to ``(N, 3)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip


def small_batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Returns batches of images and labels, the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH_SIZE, 3, 8, 8, generator=generator), torch.randint(3, (BATCH_SIZE,), generator=generator))
        for _ in range(count)
    ]


def small_arrays(count: int = IMAGES) -> ImageArrays:
    """Returns the same number of images as bytes."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageArrays(images, torch.randint(3, (count,), generator=generator))


def dataset(count: int = IMAGES) -> TensorDataset:
    """Returns the images as a torch dataset."""
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(count, 3, 8, 8, generator=generator), torch.randint(3, (count,), generator=generator)
    )


class Shaken:
    """Batches in an order from Python's global generator, with noise from numpy's."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = list(small_batches())
        random.shuffle(order)
        for images, labels in order:
            yield images + torch.from_numpy(np.random.normal(size=images.shape)).float(), labels


LOADERS: dict[str, Callable[[], object]] = {
    "list": small_batches,
    "package": lambda: BatchLoader(small_arrays(), BATCH_SIZE, shuffle=True, augment="crop_flip", seed=5),
    "torch": lambda: DataLoader(dataset(), batch_size=BATCH_SIZE, shuffle=True),
    "torch with a generator": lambda: DataLoader(
        dataset(), batch_size=BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(6)
    ),
    "torch with a generator in the sampler": lambda: DataLoader(
        dataset(), batch_size=BATCH_SIZE, sampler=RandomSampler(dataset(), generator=torch.Generator().manual_seed(6))
    ),
    "numpy and python": Shaken,
}
"""Every kind of data whose order or values are random in another way; each call makes a fresh one."""


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of all parameters and buffers."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Says whether all tensors agree bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def another_process(seed: int) -> None:
    """Leaves the global generators as a new process would have them: anywhere."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def metrics(values: Sequence[float]) -> Callable[[nn.Module], float]:
    """Returns an ``evaluate`` that says these numbers one after the other."""
    remaining = iter(values)
    return lambda model: next(remaining)
