"""Seeded batches of images from memory, normalised and, for training, varied at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nni_prune_ext.data.image_arrays import AUGMENTS, Augment, DataSource, ImageArrays
from nni_prune_ext.errors import ConfigError

SHIFT_DIVISOR = 8  # images move by up to an eighth of their height: 4 pixels of 32, 2 of 16
EPOCH_STRIDE = 1_000_003  # a prime, so that neighbouring seeds and epochs share no stream


def split_batches(
    source: DataSource, split: str, batch_size: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> BatchLoader:
    """Return batches of one split: ``train`` shuffled, varied and without an odd last batch, the others as they are."""
    train = split == "train"
    arrays = source.splits()[split]
    return BatchLoader(
        arrays,
        batch_size,
        shuffle=train,
        seed=seed,
        augment=source.augment if train else "none",
        mean=source.mean,
        std=source.std,
        device=device,
        drop_last=train and len(arrays) > batch_size,
    )


class BatchLoader:
    """Iterates over a split in batches; the same seed and epoch give the same batches on every device.

    Iterating does not advance the epoch: call `set_epoch` before each pass for a new order and new variations.

    Args:
        arrays: The images.
        batch_size: Images per batch; the last batch may be smaller.
        shuffle: Draw a new order for every epoch; otherwise the order of `arrays`.
        seed: Fixes order and variations, together with the epoch.
        augment: ``none``; ``shift``: move by up to an eighth of the height (4 pixels of 32), black outside;
            ``crop_flip``: shift, and mirror half of the images left to right.
        mean: Mean of each channel for pixels in [0, 1]; None for 0.
        std: Standard deviation of each channel for pixels in [0, 1]; None for 1.
        device: Where the batches should be.
        drop_last: Leave out a last batch that is smaller than the others.

    Example:
        >>> arrays = ImageArrays(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
        >>> [tuple(images.shape) for images, labels in BatchLoader(arrays, 3)]
        [(3, 1, 8, 8), (2, 1, 8, 8)]
    """

    def __init__(
        self,
        arrays: ImageArrays,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        augment: Augment = "none",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, expected at least 1. A usual choice is 128.")
        if augment not in AUGMENTS:
            raise ConfigError(f"augment is '{augment}', expected one of {', '.join(AUGMENTS)}. Choose one of them.")
        self.arrays = arrays
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment
        self.mean = mean
        self.std = std
        self.device = torch.device(device)
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the variations of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of one pass."""
        full, left_over = divmod(len(self.arrays), self.batch_size)
        return full + (1 if left_over and not self.drop_last else 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, (N, C, H, W) float32 and normalised, and labels, (N,) int64, on the device."""
        generator = torch.Generator().manual_seed(self.seed * EPOCH_STRIDE + self.epoch)
        total = len(self.arrays)
        order = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            indices = order[start : start + self.batch_size]
            images = self.arrays.images[indices].to(self.device)
            if self.augment != "none":
                images = _shifted(images, generator, flip=self.augment == "crop_flip")
            yield self._normalised(images), self.arrays.labels[indices].to(self.device)

    def _normalised(self, images: Tensor) -> Tensor:
        pixels = images.float().div_(255)
        if self.mean is not None:
            pixels.sub_(torch.tensor(self.mean, device=self.device).view(-1, 1, 1))
        if self.std is not None:
            pixels.div_(torch.tensor(self.std, device=self.device).view(-1, 1, 1))
        return pixels


def _shifted(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Move each image of (N, C, H, W) by its own random offset and, if `flip`, mirror it with probability 1/2.

    All random numbers are drawn on the CPU, so that they do not depend on the device.
    """
    total, _, height, width = images.shape
    reach = height // SHIFT_DIVISOR
    offsets = torch.randint(2 * reach + 1, (2, total, 1), generator=generator)
    rows = offsets[0] + torch.arange(height)
    columns = offsets[1] + torch.arange(width)
    if flip:
        mirrored = torch.rand(total, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (reach, reach, reach, reach))
    rows, columns = rows.to(images.device), columns.to(images.device)
    which = torch.arange(total, device=images.device).view(-1, 1, 1)
    # Indexing around the channel dimension moves it last: (N, H, W, C).
    return padded[which, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()
