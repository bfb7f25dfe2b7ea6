"""Images with boxes, held in memory: the data of object detection, from PASCAL VOC and COCO folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nni_prune_ext.data.batches import EPOCH_STRIDE
from nni_prune_ext.data.detection_folders import BoxFile, read_coco, read_voc
from nni_prune_ext.data.image_folders import UNREADABLE, unreadable
from nni_prune_ext.errors import ConfigError, DataError

DETECTION_FORMS = "voc:FOLDER or coco:FOLDER"
DEFAULT_DETECTION_SIZE = (320, 320)


@dataclass(frozen=True, eq=False)
class ImageBoxes:
    """The objects of one image.

    Attributes:
        boxes: (M, 4) float32, x1, y1, x2, y2 in pixels of the image as it is held.
        labels: (M,) int64, 1 and up; 0 is the background.
        ignored: (M,) bool: neither to be found nor wrong to find (VOC: difficult, COCO: crowd).
    """

    boxes: Tensor
    labels: Tensor
    ignored: Tensor


@dataclass(frozen=True, eq=False)
class DetectionImages:
    """Images of one split, (N, 3, H, W) uint8, and the objects on each."""

    images: Tensor
    objects: tuple[ImageBoxes, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.objects)


@dataclass(frozen=True, eq=False)
class DetectionSource:
    """A detection data set: train to fit, val to choose by, test to report on and for nothing else.

    Attributes:
        name: what reports call it.
        class_names: of the labels 1, 2, and so on.
        input_shape: (3, H, W) of every image.
        dropped: boxes thinner than half a pixel, which were left out.
    """

    name: str
    train: DetectionImages
    val: DetectionImages
    test: DetectionImages
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    dropped: int = 0

    def splits(self) -> dict[str, DetectionImages]:
        """Return the three splits by their names, train first."""
        return {"train": self.train, "val": self.val, "test": self.test}


def open_detection(
    spec: str, *, image_size: tuple[int, int] | None = None, limit: int | None = None, seed: int = 0
) -> DetectionSource:
    """Open a detection data set and hold all its images in memory.

    * ``voc:FOLDER``: ``JPEGImages``, ``Annotations``, and ``ImageSets/Main/train|val|test.txt``.
    * ``coco:FOLDER``: ``annotations/instances_train*.json`` and the like, with images in folders of the same names, in
      ``images/`` or in ``FOLDER`` itself.

    Splits are those of the folder. Where there is no test list, ``val`` becomes the TEST set and a tenth of the
    training images validates; where there is only a train list, or none, all images are divided 70/10/20. Corners are
    taken as they are: those of the first PASCAL VOC sets count from 1.

    Args:
        image_size: (H, W); an image of another size is scaled to fit, and padded with black at the right or the bottom.
            None keeps the common size of all images; 320 × 320 if they differ.
        limit: at most so many images per split.
        seed: of the splits and the limit.

    Raises:
        DataError: the folder is not of this form, a file is damaged, or an object has an unknown class.
        ConfigError: an option is out of range.
    """
    kind, _, place = spec.partition(":")
    readers = {"voc": read_voc, "coco": read_coco}
    if kind not in readers or not place:
        raise DataError(f"There is no detection data '{spec}', expected {DETECTION_FORMS}. Add the folder.")
    if (limit is not None and limit < 1) or (image_size is not None and min(image_size) < 1):
        raise ConfigError(
            f"limit is {limit} and image_size is {image_size}, expected at least 1. Leave them out for the defaults."
        )
    root = Path(place).expanduser()
    lists, names = readers[kind](root)
    divided = _divided(lists, seed)
    everything = [file for files in divided.values() for file in files]
    sizes = {file.size for file in everything}
    size = image_size or (sizes.pop() if len(sizes) == 1 else DEFAULT_DETECTION_SIZE)
    kept = {split: _limited(files, limit, seed) for split, files in divided.items()}
    for split in ("train", "test"):
        if not any(not hard for file in kept[split] for hard in file.ignored):
            raise DataError(
                f"The {len(kept[split])} images of the {split} split of '{root}' show no object to be found, expected "
                "one at least. Check annotations and lists."
            )
    made = {split: _decoded(files, size) for split, files in kept.items()}
    dropped = sum(file.dropped for files in kept.values() for file in files)
    return DetectionSource(
        root.resolve().name, made["train"], made["val"], made["test"], names, (3, *size), dropped=dropped
    )


class DetectionBatches:
    """Iterates over a split: images (N, 3, H, W) float32 in 0–1, and per image a dict as torchvision's detectors read.

    The dict holds ``boxes`` (M, 4), ``labels`` (M,) and, where all objects are wanted, ``iscrowd`` (M,) int64.

    Args:
        train: shuffled, mirrored at random, without ignored objects and without an odd last batch; otherwise as it is.
        seed: of order and mirroring, together with the epoch.
    """

    def __init__(self, part: DetectionImages, batch_size: int, *, train: bool, seed: int = 0) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, expected at least 1. A usual choice is 8.")
        self.part, self.batch_size, self.train, self.seed, self.epoch = part, batch_size, train, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose order and mirroring of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of one pass."""
        full, left_over = divmod(len(self.part), self.batch_size)
        return full + (1 if left_over and not (self.train and full) else 0)

    def __iter__(self) -> Iterator[tuple[Tensor, list[dict[str, Tensor]]]]:
        """Yield batches, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed * EPOCH_STRIDE + self.epoch)
        total = len(self.part)
        order = torch.randperm(total, generator=generator) if self.train else torch.arange(total)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            indices = order[start : start + self.batch_size]
            images = self.part.images[indices].float().div_(255)
            targets = [self._target(self.part.objects[index]) for index in indices.tolist()]
            if self.train:
                mirrored = torch.rand(len(indices), generator=generator) < 0.5
                images[mirrored] = images[mirrored].flip(3)
                for target, turned in zip(targets, mirrored.tolist()):
                    if turned:
                        target["boxes"] = mirrored_boxes(target["boxes"], images.shape[3])
            yield images, targets

    def _target(self, own: ImageBoxes) -> dict[str, Tensor]:
        if self.train:
            return {"boxes": own.boxes[~own.ignored], "labels": own.labels[~own.ignored]}
        return {"boxes": own.boxes, "labels": own.labels, "iscrowd": own.ignored.long()}


def mirrored_boxes(boxes: Tensor, width: int) -> Tensor:
    """Return boxes (M, 4) as they are once the image is mirrored left to right."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], 1)


def _divided(lists: dict[str, list[BoxFile]], seed: int) -> dict[str, list[BoxFile]]:
    train, val, test = (lists.get(split, []) for split in ("train", "val", "test"))
    if train and val and test:
        return {"train": train, "val": val, "test": test}
    if (val or test) and not train:
        raise DataError("There is a list of validation or test images but none to train on, expected train. Add it.")
    if train and (val or test):
        order = _order(len(train), seed)
        count = max(len(train) // 10, 1)
        return {"train": [train[k] for k in order[count:]], "val": [train[k] for k in order[:count]],
                "test": test or val}  # fmt: skip
    pool = [*train, *val, *test, *lists.get("", [])]
    order = _order(len(pool), seed)
    first, second = max(len(pool) // 5, 1), max(len(pool) * 3 // 10, 2)
    if len(pool) < 3:
        raise DataError(f"There are {len(pool)} images with annotations, expected at least 3, to divide. Add images.")
    return {"train": [pool[k] for k in order[second:]], "val": [pool[k] for k in order[first:second]],
            "test": [pool[k] for k in order[:first]]}  # fmt: skip


def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _limited(files: list[BoxFile], limit: int | None, seed: int) -> list[BoxFile]:
    if limit is None or limit >= len(files):
        return files
    return [files[k] for k in sorted(_order(len(files), seed)[:limit])]


def _decoded(files: Sequence[BoxFile], size: tuple[int, int]) -> DetectionImages:
    height, width = size
    images = np.zeros((len(files), 3, height, width), dtype=np.uint8)
    scales = [min(height / file.size[0], width / file.size[1]) for file in files]

    def decode(number: int) -> None:
        file, scale = files[number], scales[number]
        inner = (min(max(round(file.size[1] * scale), 1), width), min(max(round(file.size[0] * scale), 1), height))
        try:
            with Image.open(file.path) as opened:
                image = opened.convert("RGB")
        except UNREADABLE as error:
            raise unreadable(file.path, error) from error
        if (image.height, image.width) != file.size:
            raise DataError(
                f"'{file.path}' has {image.height} × {image.width} pixels, expected {file.size[0]} × {file.size[1]} as "
                "its annotation says. Mend the annotation."
            )
        image = image if image.size == inner else image.resize(inner, Image.Resampling.BILINEAR)
        images[number, :, : inner[1], : inner[0]] = np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode, range(len(files))):
            pass
    objects = tuple(
        ImageBoxes(
            torch.tensor(file.boxes, dtype=torch.float32).reshape(-1, 4) * scale,
            torch.tensor(file.labels, dtype=torch.int64),
            torch.tensor(file.ignored, dtype=torch.bool),
        )
        for file, scale in zip(files, scales)
    )
    return DetectionImages(torch.from_numpy(images), objects)
