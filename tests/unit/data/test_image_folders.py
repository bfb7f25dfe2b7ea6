"""Image folders: layouts, decoding and what the user reads when something is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nni_prune_ext.data.image_folders import decode_images, find_splits
from nni_prune_ext.data.sources import CIFAR10_CLASSES, open_data
from nni_prune_ext.errors import DataError


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (4, 4), value: int = 0) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", size, (value, index, 0)).save(folder / f"{index:03d}.png")


def write_classes(root: Path, count: int, names: tuple[str, ...] = ("cat", "dog")) -> None:
    for label, name in enumerate(names):
        write_images(root / name, count, value=label)


def test_train_val_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        write_classes(tmp_path / split, count)

    source = open_data(f"imagefolder:{tmp_path}")

    assert [6, 4, 2] == [len(arrays) for arrays in source.splits().values()]
    assert ("cat", "dog") == source.class_names


def test_without_val_a_tenth_of_the_training_images_is_split_off(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 20)
    write_classes(tmp_path / "test", 3)

    source = open_data(f"imagefolder:{tmp_path}")

    assert [36, 4, 6] == [len(arrays) for arrays in source.splits().values()]
    assert [2, 2] == source.val.labels.bincount().tolist()


def test_without_test_the_val_folder_is_the_test_set(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 10)
    write_classes(tmp_path / "val", 3)

    splits = find_splits(tmp_path, seed=0)

    assert {tmp_path / "val"} == {path.parent.parent for path in splits.test.paths}
    assert {tmp_path / "train"} == {path.parent.parent for path in splits.val.paths}
    assert [18, 2, 6] == [len(part.paths) for part in (splits.train, splits.val, splits.test)]


@pytest.mark.parametrize("inner", ["", "train"])
def test_images_of_one_folder_are_divided_seventy_ten_twenty(inner: str, tmp_path: Path) -> None:
    write_classes(tmp_path / inner, 10)

    splits = find_splits(tmp_path, seed=0)

    parts = (splits.train, splits.val, splits.test)
    assert [14, 2, 4] == [len(part.paths) for part in parts]
    assert 20 == len({path for part in parts for path in part.paths})


def test_every_image_keeps_the_label_of_its_folder(tmp_path: Path) -> None:
    write_classes(tmp_path, 10)

    source = open_data(f"imagefolder:{tmp_path}")

    for arrays in source.splits().values():
        assert arrays.labels.tolist() == arrays.images[:, 0, 0, 0].tolist()


def test_decoded_images_equal_pillow_pixel_by_pixel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (130, 5, 6, 3), dtype=np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)

    decoded = decode_images(paths, (5, 6))

    assert torch.equal(torch.from_numpy(pixels).permute(0, 3, 1, 2), decoded)


def test_images_of_one_size_keep_it(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 5, size=(6, 4))

    assert (3, 4, 6) == open_data(f"imagefolder:{tmp_path}").input_shape


def test_images_of_different_sizes_become_224(tmp_path: Path) -> None:
    write_images(tmp_path / "cat", 5, size=(6, 4))
    write_images(tmp_path / "dog", 5, size=(4, 6))

    assert (3, 224, 224) == open_data(f"imagefolder:{tmp_path}").input_shape


def test_another_size_is_the_centre_of_the_scaled_image(tmp_path: Path) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 120, 3), dtype=np.uint8))
    image.save(tmp_path / "wide.png")
    expected = np.array(transforms.CenterCrop(10)(transforms.Resize(10)(image)))

    decoded = decode_images([tmp_path / "wide.png"], (10, 10))

    assert torch.equal(torch.from_numpy(expected.transpose(2, 0, 1)), decoded[0])


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")

    assert torch.equal(torch.full((1, 3, 4, 4), 77, dtype=torch.uint8), decode_images([tmp_path / "grey.png"], (4, 4)))


def test_a_limit_keeps_every_class_and_the_shape(tmp_path: Path) -> None:
    write_classes(tmp_path, 50)

    source = open_data(f"imagefolder:{tmp_path}", limit=4)

    assert [4, 4, 4] == [len(arrays) for arrays in source.splits().values()]
    assert [2, 2] == source.train.labels.bincount().tolist()


def test_cifar10_images_are_read_from_folders(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 10, CIFAR10_CLASSES)
    write_classes(tmp_path / "test", 1, CIFAR10_CLASSES)

    source = open_data(f"cifar10:{tmp_path}")

    assert (3, 32, 32) == source.input_shape
    assert [90, 10, 10] == [len(arrays) for arrays in source.splits().values()]


def test_cifar10_with_other_classes_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 2)
    write_classes(tmp_path / "test", 2)

    with pytest.raises(DataError, match="cat, dog, expected CIFAR-10's airplane"):
        open_data(f"cifar10:{tmp_path}")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder"):
        open_data(f"imagefolder:{tmp_path / 'nowhere'}")


def test_a_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no class folders"):
        open_data(f"imagefolder:{tmp_path}")


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, 3)
    (tmp_path / "emu").mkdir()

    with pytest.raises(DataError, match=r"emu' holds no images, expected files ending in .*\.jpg"):
        open_data(f"imagefolder:{tmp_path}")


def test_a_test_class_that_was_never_trained_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 3)
    write_classes(tmp_path / "test", 3, ("cat", "emu"))

    with pytest.raises(DataError, match="holds the class 'emu'"):
        open_data(f"imagefolder:{tmp_path}")


def test_a_missing_test_class_does_not_shift_the_labels(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 3)
    write_images(tmp_path / "test" / "dog", 2)

    source = open_data(f"imagefolder:{tmp_path}")

    assert [1, 1] == source.test.labels.tolist()


def test_a_lone_val_folder_is_not_taken_for_a_class(tmp_path: Path) -> None:
    write_classes(tmp_path / "val", 3)

    with pytest.raises(DataError, match="holds val but no train folder"):
        open_data(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("image_size", [None, 4])
def test_an_unreadable_image_is_named(image_size: int | None, tmp_path: Path) -> None:
    write_classes(tmp_path, 5)
    (tmp_path / "dog" / "bad.jpg").write_bytes(b"this is no image")

    with pytest.raises(DataError, match=r"bad\.jpg' cannot be read"):
        open_data(f"imagefolder:{tmp_path}", image_size=image_size)


def test_an_image_that_was_cut_off_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])

    with pytest.raises(DataError, match=r"cut\.jpg' cannot be read"):
        decode_images([tmp_path / "cut.jpg"], (64, 64))
