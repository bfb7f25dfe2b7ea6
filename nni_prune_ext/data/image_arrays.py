"""The form of all data here: decoded images and labels in memory, and a data source with its three splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nni_prune_ext.errors import DataError

Augment = Literal["none", "shift", "crop_flip"]
AUGMENTS: tuple[Augment, ...] = ("none", "shift", "crop_flip")


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """Images and labels of one split.

    Attributes:
        images: (N, C, H, W) uint8 on the CPU.
        labels: (N,) int64 on the CPU, class indices.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        """Check types and shapes, so that a mistake shows where it is made."""
        images, labels = self.images, self.labels
        fits = images.ndim == 4 and labels.ndim == 1 and len(images) == len(labels)
        if not fits or images.dtype != torch.uint8 or labels.dtype != torch.int64:
            raise DataError(
                f"Images are {images.dtype} {tuple(images.shape)} and labels {labels.dtype} {tuple(labels.shape)}, "
                f"expected uint8 (N, C, H, W) and int64 (N,). Convert them before making ImageArrays."
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageArrays:
        """Return the images at the indices, (M,) int64, as a copy."""
        return ImageArrays(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class DataSource:
    """A classification data set: train to fit, val to select, test to report and for nothing else.

    Attributes:
        name: What reports call it.
        train: Images to train on.
        val: Images to choose settings and epochs by; disjoint from `train` and `test`.
        test: Images to report on.
        class_names: One name per class index.
        input_shape: (C, H, W) of every image.
        mean: Mean of each channel for pixels in [0, 1].
        std: Standard deviation of each channel for pixels in [0, 1].
        augment: How training images may be varied without changing their class.
    """

    name: str
    train: ImageArrays
    val: ImageArrays
    test: ImageArrays
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = "none"

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        for split, arrays in self.splits().items():
            self._check_split(split, arrays)
        channels = self.input_shape[0]
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise DataError(
                f"Data source '{self.name}' has mean {self.mean} and std {self.std}, expected {channels} numbers each, "
                f"std above 0. Give one number per channel."
            )
        if self.augment not in AUGMENTS:
            raise DataError(
                f"Data source '{self.name}' has augment '{self.augment}', expected one of {', '.join(AUGMENTS)}. "
                f"Choose 'none' if in doubt."
            )

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def splits(self) -> dict[str, ImageArrays]:
        """Return the three splits by their names, train first."""
        return {"train": self.train, "val": self.val, "test": self.test}

    def _check_split(self, split: str, arrays: ImageArrays) -> None:
        if len(arrays) == 0:
            raise DataError(
                f"The {split} split of data source '{self.name}' is empty, expected at least one image. Add images, or "
                f"raise the limit."
            )
        if tuple(arrays.images.shape[1:]) != self.input_shape:
            raise DataError(
                f"The {split} images of data source '{self.name}' are {tuple(arrays.images.shape[1:])}, expected the "
                f"input shape {self.input_shape}. Resize them to one size."
            )
        if int(arrays.labels.min()) < 0 or int(arrays.labels.max()) >= self.num_classes:
            raise DataError(
                f"The {split} labels of data source '{self.name}' range from {int(arrays.labels.min())} to "
                f"{int(arrays.labels.max())}, expected 0 to {self.num_classes - 1}. Number the classes from 0."
            )
