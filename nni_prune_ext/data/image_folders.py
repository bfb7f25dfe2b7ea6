"""Folders of images, one folder per class: find the files, divide them into splits, decode them with threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nni_prune_ext.data.splitting import split_off, split_off_share
from nni_prune_ext.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
VAL_SHARE = 0.1
TEST_SHARE = 0.2
FILES_PER_TASK = 64
LAYOUTS = "PATH/train|val|test/<class>/image or PATH/<class>/image"
# What Pillow raises on files that are no image, damaged, or far too large.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files that are not decoded yet; `labels` is (N,) int64 on the CPU."""

    paths: tuple[Path, ...]
    labels: Tensor

    def subset(self, indices: Tensor) -> ImageFiles:
        """Return the files at the indices, (M,) int64."""
        return ImageFiles(tuple(self.paths[index] for index in indices.tolist()), self.labels[indices])

    def limited(self, limit: int | None, *, seed: int) -> ImageFiles:
        """Return at most `limit` files, drawn so that every class keeps its share."""
        if limit is None or limit >= len(self.paths):
            return self
        return self.subset(split_off(self.labels, limit, seed=seed)[1])


@dataclass(frozen=True, eq=False)
class FolderSplits:
    """The files of the three splits and the names of the classes."""

    train: ImageFiles
    val: ImageFiles
    test: ImageFiles
    class_names: tuple[str, ...]


def find_splits(root: Path, *, seed: int) -> FolderSplits:
    """Find the images under a folder and divide them into train, val and test.

    With ``train``, ``val`` and ``test`` folders these are the splits. A missing ``val`` is split off the training
    images (10 %, stratified, seeded). Where there is ``train`` and ``val`` but no ``test``, the ``val`` folder becomes
    the TEST set and validation is split off the training images. Otherwise, all images are divided 70/10/20.

    Raises:
        DataError: if the folder is missing, or has no class folders, or one of them holds no image.
    """
    train_root, val_root, test_root = root / "train", root / "val", root / "test"
    names = class_folders(train_root if train_root.is_dir() else root)
    if not train_root.is_dir() and set(names) <= {"val", "test"}:
        raise DataError(
            f"'{root}' holds {' and '.join(names)} but no train folder, expected {LAYOUTS}. Add the training images, "
            f"or give '{root / names[0]}' to divide these images into splits."
        )
    if not train_root.is_dir() or not (val_root.is_dir() or test_root.is_dir()):
        files = class_images(train_root if train_root.is_dir() else root, names)
        rest, test = split_off_share(files.labels, TEST_SHARE, seed=seed)
        train, val = _train_and_val(files.subset(rest), VAL_SHARE / (1 - TEST_SHARE), seed)
        return FolderSplits(train, val, files.subset(test), names)
    pool = class_images(train_root, names)
    test_files = class_images(test_root if test_root.is_dir() else val_root, names)
    if val_root.is_dir() and test_root.is_dir():
        return FolderSplits(pool, class_images(val_root, names), test_files, names)
    return FolderSplits(*_train_and_val(pool, VAL_SHARE, seed), test_files, names)


def class_folders(root: Path) -> tuple[str, ...]:
    """Return the names of the folders under `root`, sorted; their positions are the labels.

    Raises:
        DataError: if `root` is no folder or holds no folders.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder '{root}', expected {LAYOUTS}. Check the path.")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(
            f"'{root}' holds no class folders, expected {LAYOUTS}. Put the images of each class into "
            "a folder of its own."
        )
    return tuple(names)


def class_images(root: Path, class_names: Sequence[str]) -> ImageFiles:
    """List the images of every class folder under `root`, at any depth, sorted.

    Raises:
        DataError: if there is a class folder without images, or one that is not in `class_names`.
    """
    foreign = sorted(set(class_folders(root)) - set(class_names))
    if foreign:
        raise DataError(
            f"'{root}' holds the class '{foreign[0]}', which the training images do not have: expected some of "
            f"{', '.join(class_names)}. Rename or remove that folder."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        folder = root / name
        found = sorted(path for path in folder.rglob("*") if _is_image(path))
        if folder.is_dir() and not found:
            raise DataError(
                f"The class folder '{folder}' holds no images, expected files ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}. Add images, or remove the folder."
            )
        paths += found
        labels += [label] * len(found)
    return ImageFiles(tuple(paths), torch.tensor(labels, dtype=torch.int64))


def common_size(paths: Sequence[Path]) -> tuple[int, int] | None:
    """Return (H, W) if all images have the same size, else None; reads the headers only.

    Raises:
        DataError: if a file is no image.
    """
    sizes: set[tuple[int, int]] = set()
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.add((image.height, image.width))
        except UNREADABLE as error:
            raise unreadable(path, error) from error
        if len(sizes) > 1:
            return None
    return sizes.pop() if sizes else None


def decode_images(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Decode images to RGB; one of another size is scaled to cover `size` (H, W) and cropped at its centre.

    Returns:
        (N, 3, H, W) uint8 on the CPU, in the order of the paths.

    Raises:
        DataError: if a file cannot be decoded; the message names it.
    """
    height, width = size
    images = np.empty((len(paths), 3, height, width), dtype=np.uint8)

    def decode_range(start: int) -> None:
        for index in range(start, min(start + FILES_PER_TASK, len(paths))):
            images[index] = _decode(paths[index], size).transpose(2, 0, 1)

    # Pillow releases the interpreter lock while it decodes, so threads are enough.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for _ in pool.map(decode_range, range(0, len(paths), FILES_PER_TASK)):
            pass
    return torch.from_numpy(images)


def _train_and_val(files: ImageFiles, val_share: float, seed: int) -> tuple[ImageFiles, ImageFiles]:
    train, val = split_off_share(files.labels, val_share, seed=seed)
    return files.subset(train), files.subset(val)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _decode(path: Path, size: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    height, width = size
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)


def unreadable(path: Path, error: BaseException) -> DataError:
    """Return the error that tells of an image file that cannot be read."""
    return DataError(
        f"The image '{path}' cannot be read ({type(error).__name__}: {error}). Expected a complete image file. Replace "
        f"or remove it."
    )
