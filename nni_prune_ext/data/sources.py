"""Open a data source by its specification: digits, cifar10:ROOT, imagefolder:PATH or the user's own factory."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from nni_prune_ext.data.image_arrays import Augment, DataSource, ImageArrays
from nni_prune_ext.data.image_folders import (
    VAL_SHARE,
    class_folders,
    common_size,
    decode_images,
    find_splits,
)
from nni_prune_ext.data.loaders import Loaders
from nni_prune_ext.data.splitting import split_off, split_off_share
from nni_prune_ext.errors import ConfigError, DataError, NniPruneExtError
from nni_prune_ext.specs import did_you_mean, import_factory

__all__ = ["Augment", "DataSource", "ImageArrays", "Loaders", "open_data", "open_source"]

SPEC_NAMES = ("digits", "cifar10", "imagefolder")
SPEC_FORMS = "digits, cifar10:ROOT, imagefolder:PATH, or module.path:factory"
RGB_CHANNELS = 3

DIGITS_SIZE = 16
DIGITS_LEVELS = 16  # scikit-learn's pixels are whole numbers from 0 to 16
DIGITS_TEST_SHARE = 0.25
DIGITS_VAL_SHARE = 0.15
DIGITS_SEED = 0

CIFAR10_SIZE = 32
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

DEFAULT_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_data(
    spec: str,
    *,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    download: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> DataSource:
    """Open a data source and hold all its images in memory.

    * ``digits``: scikit-learn's 1797 grey 8×8 digits, scaled to 16×16; divided 60/15/25, the same for every seed.
    * ``cifar10:ROOT``: torchvision's ``ROOT/cifar-10-batches-py``, or images in ``ROOT/train/<class>`` and
      ``ROOT/test/<class>``; 10 % of the training images are split off for validation.
    * ``imagefolder:PATH``: ``PATH/train|val|test/<class>/image`` or ``PATH/<class>/image``. A missing ``val`` is split
      off the training images (10 %); a folder with ``train`` and ``val`` only has its ``val`` as TEST set and
      validation split off the training images; without either, all images are divided 70/10/20. All images become RGB.
    * ``module.path:factory``: a function without arguments that returns a `DataSource`.

    Args:
        spec: One of the forms above.
        image_size: Height and width of the images. None keeps their own common size; 224 if it differs.
        limit: Keep at most so many images of each split, with the classes in proportion.
        seed: For the splits and the limit.
        download: Let torchvision download CIFAR-10 into ROOT if it is not there.
        mean: Mean of each channel for pixels in [0, 1], instead of the source's own.
        std: Standard deviation of each channel for pixels in [0, 1], instead of the source's own.

    Raises:
        DataError: if there is no such source, or it holds nothing usable.
        ConfigError: if an option is out of range.

    Example:
        >>> source = open_data("digits", limit=100)
        >>> source.input_shape, source.num_classes, len(source.train)
        ((1, 16, 16), 10, 100)
    """
    source = open_source(
        spec, image_size=image_size, limit=limit, seed=seed, download=download, mean=mean, std=std
    )  # fmt: skip
    if isinstance(source, Loaders):
        raise DataError(
            f"The factory '{spec}' returned Loaders, expected a DataSource: images are wanted here. Use loaders with "
            "`run` and `prune`, or return a DataSource."
        )
    return source


def open_source(
    spec: str,
    *,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    download: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> DataSource | Loaders:
    """Open a data source like `open_data`; a factory may also return `Loaders`, which are taken as they are.

    Raises:
        DataError: see `open_data`; or options for images were given for loaders.
        ConfigError: if an option is out of range.
    """
    for option, value in (("image_size", image_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}, expected at least 1. Leave it out for the default.")
    name, colon, place = spec.partition(":")
    if name in ("cifar10", "imagefolder") and not place:
        raise DataError(f"'{spec}' names no folder, expected {name}:FOLDER. Add the folder after the colon.")
    if name == "digits" and not colon:
        source = _open_digits(image_size or DIGITS_SIZE)
    elif name == "cifar10":
        source = _open_cifar10(Path(place).expanduser(), image_size, limit, seed, download)
    elif name == "imagefolder":
        source = _open_image_folder(Path(place).expanduser(), image_size, limit, seed)
    else:
        made = _open_factory(spec)
        if isinstance(made, Loaders):
            _refuse_image_options(spec, image_size=image_size, limit_images=limit, mean=mean, std=std)
            return made
        source = made
    source = _limited(_resized(source, image_size), limit, seed)
    return dataclasses.replace(
        source,
        mean=source.mean if mean is None else tuple(mean),
        std=source.std if std is None else tuple(std),
    )


def _open_digits(size: int) -> DataSource:
    try:
        digits = importlib.import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        raise DataError(
            f"'digits' needs scikit-learn, which cannot be imported ({error}). Expected it to be installed. "
            f"Run: pip install scikit-learn"
        ) from error
    pixels = torch.from_numpy(digits.images).unsqueeze(1)
    images = (pixels * (255 / DIGITS_LEVELS)).round().to(torch.uint8)
    arrays = ImageArrays(_scaled(images, size), torch.from_numpy(digits.target).to(torch.int64))
    rest, test = split_off_share(arrays.labels, DIGITS_TEST_SHARE, seed=DIGITS_SEED)
    train, val = split_off_share(arrays.labels[rest], DIGITS_VAL_SHARE / (1 - DIGITS_TEST_SHARE), seed=DIGITS_SEED)
    return DataSource(
        name="digits",
        train=arrays.subset(rest[train]),
        val=arrays.subset(rest[val]),
        test=arrays.subset(test),
        class_names=tuple(str(digit) for digit in range(10)),
        input_shape=(1, size, size),
        mean=(0.3071,),
        std=(0.3199,),
        augment="shift",
    )


def _open_cifar10(root: Path, image_size: int | None, limit: int | None, seed: int, download: bool) -> DataSource:
    if download or (root / "cifar-10-batches-py").is_dir():
        return _open_cifar10_batches(root, seed, download)
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        raise DataError(
            f"'{root}' holds neither cifar-10-batches-py nor the folders train and test, expected one of them. Check "
            f"the path, or allow the download."
        )
    found = class_folders(root / "train")
    if found != CIFAR10_CLASSES:
        raise DataError(
            f"'{root / 'train'}' holds the classes {', '.join(found)}, expected CIFAR-10's "
            f"{', '.join(CIFAR10_CLASSES)}. Open other images with imagefolder:{root}."
        )
    source = _open_image_folder(root, image_size or CIFAR10_SIZE, limit, seed)
    return dataclasses.replace(source, name="cifar10", mean=CIFAR10_MEAN, std=CIFAR10_STD)


def _open_cifar10_batches(root: Path, seed: int, download: bool) -> DataSource:
    """Read the original batch files; torchvision checks their MD5 sums before it unpickles them."""
    cifar10 = importlib.import_module("torchvision.datasets").CIFAR10
    try:
        parts = [cifar10(str(root), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"CIFAR-10 cannot be read from '{root}' ({type(error).__name__}: {error}). Expected the complete folder "
            f"cifar-10-batches-py, or a network connection to download it. Copy or download it again."
        ) from error
    pool, test = (
        ImageArrays(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    train, val = split_off_share(pool.labels, VAL_SHARE, seed=seed)
    return DataSource(
        name="cifar10",
        train=pool.subset(train),
        val=pool.subset(val),
        test=test,
        class_names=CIFAR10_CLASSES,
        input_shape=(RGB_CHANNELS, CIFAR10_SIZE, CIFAR10_SIZE),
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        augment="crop_flip",
    )


def _open_image_folder(root: Path, image_size: int | None, limit: int | None, seed: int) -> DataSource:
    splits = find_splits(root, seed=seed)
    files = {"train": splits.train, "val": splits.val, "test": splits.test}
    if image_size is None:
        # All files decide, not only those within the limit, so that a trial run has the final shape.
        every_path = [path for part in files.values() for path in part.paths]
        height, width = common_size(every_path) or (DEFAULT_SIZE, DEFAULT_SIZE)
    else:
        height, width = image_size, image_size
    kept = {split: part.limited(limit, seed=seed) for split, part in files.items()}
    arrays = {
        split: ImageArrays(decode_images(part.paths, (height, width)), part.labels) for split, part in kept.items()
    }
    return DataSource(
        name=root.resolve().name,
        train=arrays["train"],
        val=arrays["val"],
        test=arrays["test"],
        class_names=splits.class_names,
        input_shape=(RGB_CHANNELS, height, width),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        augment="crop_flip",
    )


def _open_factory(spec: str) -> DataSource | Loaders:
    if ":" not in spec:
        raise DataError(f"There is no data source '{spec}'. Expected {SPEC_FORMS}.{did_you_mean(spec, SPEC_NAMES)}")
    factory = import_factory(spec, error=DataError, prefixes=SPEC_NAMES)
    try:
        source = factory()
    except NniPruneExtError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise DataError(
            f"The factory '{spec}' raised {type(error).__name__}: {error}. Expected it to return a DataSource or "
            "Loaders when it is called without arguments. Mend it."
        ) from error
    if not isinstance(source, (DataSource, Loaders)):
        raise DataError(
            f"The factory '{spec}' returned a {type(source).__name__}, expected a DataSource or Loaders. Return one of "
            f"them; both are in nni_prune_ext.data."
        )
    return source


def _refuse_image_options(spec: str, **options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise DataError(
            f"'{spec}' returns loaders, on which {given[0]} has no effect, expected it only with images that are held "
            "in memory. Leave it out, and do it in the loaders."
        )


def _limited(source: DataSource, limit: int | None, seed: int) -> DataSource:
    if limit is None:
        return source
    train, val, test = (_limited_arrays(arrays, limit, seed) for arrays in source.splits().values())
    return dataclasses.replace(source, train=train, val=val, test=test)


def _limited_arrays(arrays: ImageArrays, limit: int, seed: int) -> ImageArrays:
    if limit >= len(arrays):
        return arrays
    return arrays.subset(split_off(arrays.labels, limit, seed=seed)[1])


def _resized(source: DataSource, size: int | None) -> DataSource:
    """Scale all images to `size`; those of built-in sources have it already and are kept."""
    channels, height, width = source.input_shape
    if size is None or (height, width) == (size, size):
        return source
    train, val, test = (ImageArrays(_scaled(part.images, size), part.labels) for part in source.splits().values())
    return dataclasses.replace(source, train=train, val=val, test=test, input_shape=(channels, size, size))


def _scaled(images: Tensor, size: int) -> Tensor:
    """Scale (N, C, H, W) uint8 images to (N, C, size, size) without aliasing."""
    if images.shape[2:] == (size, size):
        return images
    scaled = functional.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)
