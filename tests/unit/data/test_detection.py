"""Images with boxes: VOC and COCO folders, splits, scaling, mirroring, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nni_prune_ext.data.detection import DetectionBatches, DetectionImages, ImageBoxes, mirrored_boxes, open_detection
from nni_prune_ext.errors import ConfigError, DataError

Boxes = Sequence[tuple[str, tuple[float, float, float, float], int]]
"""Class, x1 y1 x2 y2, difficult or crowd."""
ONE: Boxes = [("cat", (2, 1, 12, 9), 0)]


def picture(path: Path, size: tuple[int, int] = (20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), 255, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def voc(root: Path, images: dict[str, Boxes], lists: dict[str, list[str]], size: tuple[int, int] = (20, 30)) -> Path:
    (root / "Annotations").mkdir(parents=True)
    for name, boxes in images.items():
        picture(root / "JPEGImages" / f"{name}.jpg", size)
        keys = ("xmin", "ymin", "xmax", "ymax")
        objects = "".join(
            f"<object><name>{kind}</name><difficult>{hard}</difficult><bndbox>"
            + "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, box))
            + "</bndbox></object>"
            for kind, box, hard in boxes
        )
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    for split, names in lists.items():
        place = root / "ImageSets" / "Main" / f"{split}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("\n".join(names) + "\n")
    return root


def coco(root: Path, splits: dict[str, dict[str, Boxes]], folder: str = "{split}2017") -> Path:
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    for split, images in splits.items():
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for number, (name, boxes) in enumerate(images.items(), start=1):
            picture(root / folder.format(split=split) / f"{name}.png")
            content["images"].append({"id": number, "file_name": f"{name}.png"})
            content["annotations"] += [
                {
                    "image_id": number,
                    "category_id": {"dog": 7, "cat": 3}[kind],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": crowd,
                }
                for kind, (x1, y1, x2, y2), crowd in boxes
            ]
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def test_a_voc_folder_keeps_its_lists_its_boxes_and_what_is_difficult(tmp_path: Path) -> None:
    boxes: Boxes = [("dog", (2, 1, 12, 9), 0), ("cat", (0, 0, 30, 20), 1)]
    root = voc(tmp_path / "v", {"a": boxes, "b": ONE, "c": ONE}, {"train": ["a"], "val": ["b"], "test": ["c"]})

    source = open_detection(f"voc:{root}")

    assert ("cat", "dog") == source.class_names
    assert (3, 20, 30) == source.input_shape
    assert [1, 1, 1] == [len(part) for part in source.splits().values()]
    (found,) = source.train.objects
    assert [[2.0, 1.0, 12.0, 9.0], [0.0, 0.0, 30.0, 20.0]] == found.boxes.tolist()
    assert ([2, 1], [False, True]) == (found.labels.tolist(), found.ignored.tolist())


def test_a_coco_folder_counts_its_classes_by_id_and_turns_widths_into_corners(tmp_path: Path) -> None:
    boxes: Boxes = [("dog", (2, 1, 12, 9), 0), ("cat", (0, 0, 30, 20), 1)]
    root = coco(tmp_path / "c", {"train": {"a": boxes, "x": ONE}, "val": {"b": ONE}})

    source = open_detection(f"coco:{root}")

    assert ("cat", "dog") == source.class_names
    assert (1, 1, 1) == tuple(len(part) for part in source.splits().values())
    assert [[2.0, 1.0, 12.0, 9.0]] == source.test.objects[0].boxes.tolist()
    by_count = {len(part.objects[0].labels): part.objects[0] for part in (source.train, source.val)}
    assert ([2, 1], [False, True]) == (by_count[2].labels.tolist(), by_count[2].ignored.tolist())


@pytest.mark.parametrize("folder", ["{split}2017", "images/{split}2017", "images", "."])
def test_images_of_a_coco_folder_are_found_where_people_put_them(tmp_path: Path, folder: str) -> None:
    root = coco(tmp_path, {"train": {"a": ONE, "b": ONE}, "val": {"c": ONE}}, folder)

    assert 1 == len(open_detection(f"coco:{root}").test)


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (("train", "val"), {"train": 9, "val": 1, "test": 10}),
        (("train",), {"train": 7, "val": 1, "test": 2}),
        ((), {"train": 14, "val": 2, "test": 4}),
    ],
)
def test_missing_lists_are_made_without_an_image_in_two(
    tmp_path: Path, lists: tuple[str, ...], expected: dict[str, int]
) -> None:
    names = [f"{number:02d}" for number in range(20)]
    images: dict[str, Boxes] = {name: [("cat", (0, 0, k + 1, 5), 0)] for k, name in enumerate(names)}
    given = {"train": names[:10], "val": names[10:]}
    root = voc(tmp_path / "v", images, {split: given[split] for split in lists})

    source = open_detection(f"voc:{root}")

    widths = {s: {float(o.boxes[0, 2]) for o in part.objects} for s, part in source.splits().items()}
    assert expected == {split: len(found) for split, found in widths.items()}
    assert not widths["train"] & widths["test"]
    assert not widths["val"] & (widths["train"] | widths["test"])
    again = open_detection(f"voc:{root}")
    assert widths["test"] == {float(o.boxes[0, 2]) for o in again.test.objects}


def test_an_image_of_another_size_is_scaled_to_fit_and_its_boxes_with_it(tmp_path: Path) -> None:
    root = voc(tmp_path / "v", {"a": ONE, "b": ONE, "c": ONE}, {"train": ["a"], "val": ["b"], "test": ["c"]})

    source = open_detection(f"voc:{root}", image_size=(40, 40))  # 20 × 30 at 4/3

    (image,) = source.train.images
    assert [pytest.approx([8 / 3, 4 / 3, 16, 12])] == source.train.objects[0].boxes.tolist()
    assert bool((image[:, :27] == 255).all())
    assert bool((image[:, 27:] == 0).all())


def test_images_of_several_sizes_become_320_pixels_unless_told(tmp_path: Path) -> None:
    root = voc(tmp_path / "v", {"a": ONE, "b": ONE, "c": ONE}, {"train": ["a"], "val": ["b"], "test": ["c"]})
    picture(root / "JPEGImages" / "b.jpg", (10, 10))

    assert (3, 320, 320) == open_detection(f"voc:{root}").input_shape


def test_boxes_are_cut_to_the_image_and_those_without_an_area_are_counted(tmp_path: Path) -> None:
    boxes: Boxes = [("cat", (-5, 1, 99, 9), 0), ("cat", (4, 4, 4, 8), 0), ("cat", (40, 1, 50, 5), 0)]
    root = voc(tmp_path / "v", {"a": boxes, "b": ONE, "c": ONE}, {"train": ["a"], "val": ["b"], "test": ["c"]})

    source = open_detection(f"voc:{root}")

    assert [[0.0, 1.0, 30.0, 9.0]] == source.train.objects[0].boxes.tolist()
    assert 2 == source.dropped


def test_a_box_that_training_would_choke_on_is_left_out(tmp_path: Path) -> None:
    boxes: Boxes = [("cat", (2, 1, 12, 9), 0), ("cat", (5, 5, 5 + 1e-7, 9), 0), ("cat", (0, 0, 0.2, 5), 0)]
    root = coco(tmp_path, {"train": {"a": boxes, "b": boxes}, "val": {"c": boxes}})

    source = open_detection(f"coco:{root}", image_size=(320, 320))

    assert 6 == source.dropped
    for own in source.train.objects:
        for boxes_ in (own.boxes, mirrored_boxes(own.boxes, 320)):
            assert bool((boxes_[:, 2:] > boxes_[:, :2]).all())


def test_a_long_thin_image_keeps_a_pixel(tmp_path: Path) -> None:
    root = three(tmp_path / "v")
    picture(root / "JPEGImages" / "b.jpg", (1, 2000))

    assert (3, 32, 32) == open_detection(f"voc:{root}", image_size=(32, 32)).input_shape


def images_of(count: int) -> DetectionImages:
    pixels = torch.arange(30, dtype=torch.uint8).expand(count, 3, 20, 30).contiguous()
    boxes = torch.tensor([[2.0, 1.0, 12.0, 9.0], [0.0, 0.0, 5.0, 5.0]])
    own = ImageBoxes(boxes, torch.tensor([1, 2]), torch.tensor([False, True]))
    return DetectionImages(pixels, (own,) * count)


def test_training_batches_mirror_boxes_with_their_images_and_leave_out_what_is_ignored() -> None:
    batches = DetectionBatches(images_of(16), 4, train=True, seed=3)

    found = [(image, target) for images, targets in batches for image, target in zip(images, targets)]

    turned = [bool(image[0, 0, 0] > image[0, 0, -1]) for image, _ in found]
    assert {True, False} == set(turned)
    for (_, target), mirrored in zip(found, turned):
        assert [[18.0, 1.0, 28.0, 9.0] if mirrored else [2.0, 1.0, 12.0, 9.0]] == target["boxes"].tolist()
        assert [1] == target["labels"].tolist()


def test_an_epoch_and_a_seed_give_the_same_batches_and_others_give_others() -> None:
    part = DetectionImages(torch.randint(0, 255, (8, 3, 4, 4), dtype=torch.uint8), images_of(8).objects)

    def first(seed: int, epoch: int) -> torch.Tensor:
        batches = DetectionBatches(part, 8, train=True, seed=seed)
        batches.set_epoch(epoch)
        return next(iter(batches))[0]

    assert torch.equal(first(1, 2), first(1, 2))
    assert not torch.equal(first(1, 2), first(1, 3))
    assert not torch.equal(first(1, 2), first(2, 2))


def test_batches_to_measure_are_as_they_are_with_an_odd_last_one() -> None:
    batches = DetectionBatches(images_of(5), 2, train=False)

    found = list(batches)

    assert ([2, 2, 1], 3) == ([len(images) for images, _ in found], len(batches))
    assert 2 == len(DetectionBatches(images_of(5), 2, train=True))
    assert 1 == len(DetectionBatches(images_of(1), 2, train=True)), "a single small batch stays"
    assert ([1, 2], [0, 1]) == (found[0][1][0]["labels"].tolist(), found[0][1][0]["iscrowd"].tolist())
    assert float(found[0][0].max()) == pytest.approx(29 / 255)


def test_mirroring_twice_changes_nothing() -> None:
    boxes = torch.rand(5, 4) * 10

    assert torch.allclose(mirrored_boxes(mirrored_boxes(boxes, 30), 30), boxes, atol=1e-5)


def stated(place: Path, width: int, height: int) -> None:
    text = place.read_text().replace(
        "<annotation>", f"<annotation><size><width>{width}</width><height>{height}</height></size>"
    )
    place.write_text(text)


def three(root: Path) -> Path:
    return voc(root, {"a": ONE, "b": ONE, "c": ONE}, {"train": ["a"], "val": ["b"], "test": ["c"]})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda root: (root / "Annotations").rename(root / "other"), "no PASCAL VOC folder"),
    "no image": (lambda root: (root / "JPEGImages" / "a.jpg").unlink(), "no image 'a'"),
    "no annotation": (lambda root: (root / "Annotations" / "a.xml").unlink(), "a.xml' cannot be read"),
    "no XML": (lambda root: (root / "Annotations" / "a.xml").write_text("<annotation>"), "a.xml' cannot be read"),
    "no image file": (lambda root: (root / "JPEGImages" / "a.jpg").write_text("x"), "a.jpg' cannot be read"),
    "no box": (
        lambda root: (root / "Annotations" / "a.xml").write_text("<a><object><name>cat</name></object></a>"),
        "has no bndbox",
    ),
    "no name": (lambda root: (root / "Annotations" / "a.xml").write_text("<a><object/></a>"), "has no name"),
    "an encoding that is none": (
        lambda root: (root / "Annotations" / "a.xml").write_text("<?xml version='1.0' encoding='x-klingon'?><a/>"),
        "a.xml' cannot be read",
    ),
    "another size than the file's": (
        lambda root: stated(root / "Annotations" / "a.xml", 300, 200),
        "has 20 × 30 pixels, expected 200 × 300 as its annotation says",
    ),
    "a corner that is no number": (
        lambda root: (root / "Annotations" / "a.xml").write_text(
            "<a><object><name>cat</name><bndbox><xmin>nan</xmin><ymin>1</ymin><xmax>2</xmax><ymax>3</ymax></bndbox>"
            "</object></a>"
        ),
        "expected finite numbers",
    ),
    "no object to learn": (
        lambda root: (root / "Annotations" / "a.xml").write_text("<a/>"),
        "train split of .* show no object",
    ),
    "no object to find": (
        lambda root: (root / "Annotations" / "c.xml").write_text("<a/>"),
        "test split of .* show no object",
    ),
    "an image in two lists": (
        lambda root: (root / "ImageSets" / "Main" / "test.txt").write_text("a\n"),
        "lists the image 'a' twice",
    ),
    "a name with a folder": (
        lambda root: (root / "ImageSets" / "Main" / "test.txt").write_text("../../c\n"),
        "names without folders",
    ),
    "a list that is no text": (
        lambda root: (root / "ImageSets" / "Main" / "test.txt").write_bytes(b"\xff\xfe"),
        "expected UTF-8 text",
    ),
    "no list to train on": (lambda root: (root / "ImageSets" / "Main" / "train.txt").unlink(), "none to train on"),
    "no number": (
        lambda root: (root / "Annotations" / "a.xml").write_text(
            "<a><object><name>cat</name><bndbox><xmin>x</xmin><ymin>1</ymin><xmax>2</xmax><ymax>3</ymax></bndbox></object></a>"
        ),
        "no four numbers",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_voc_folder_is_named(case: str, tmp_path: Path) -> None:
    root = three(tmp_path / "v")
    BROKEN[case][0](root)

    with pytest.raises(DataError, match=BROKEN[case][1]):
        open_detection(f"voc:{root}")


def changed(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    place = root / "annotations" / "instances_train2017.json"
    content = json.loads(place.read_text())
    change(content)
    place.write_text(json.dumps(content))


BROKEN_COCO: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda root: (root / "annotations").rename(root / "x"), "no COCO folder"),
    "no JSON": (lambda root: (root / "annotations" / "instances_train2017.json").write_text("{"), "cannot be read"),
    "no list": (lambda root: changed(root, lambda content: content.pop("images")), "no list of images"),
    "no image": (lambda root: (root / "train2017" / "a.png").unlink(), "no image 'a.png'"),
    "no such class": (
        lambda root: changed(root, lambda content: content["annotations"][0].update(category_id=99)),
        "incomplete",
    ),
    "a class without a name": (
        lambda root: changed(root, lambda content: content["categories"][0].pop("name")),
        "incompl",
    ),
    "classes that are words": (
        lambda root: changed(root, lambda content: content.update(categories=["cat"])),
        "incompl",
    ),
    "two classes of one name": (
        lambda root: changed(root, lambda content: content["categories"][0].update(name="cat")),
        "two categories of one name",
    ),
    "two images of one id": (
        lambda root: changed(root, lambda content: content["images"][1].update(id=1)),
        "two images with the id 1",
    ),
    "a file outside": (
        lambda root: (
            picture(root.parent / "secret.png"),
            changed(root, lambda content: content["images"][0].update(file_name="../../secret.png")),
        ),
        "expected a file in",
    ),
    "another size than the file's": (
        lambda root: changed(root, lambda content: content["images"][0].update(width=300, height=200)),
        "has 20 × 30 pixels, expected 200 × 300",
    ),
    "other classes": (
        lambda root: changed(root, lambda content: content["categories"].append({"id": 9, "name": "cow"})),
        "has the classes",
    ),
    "two lists": (
        lambda root: (root / "annotations" / "instances_train2014.json").write_text(
            (root / "annotations" / "instances_train2017.json").read_text()
        ),
        "two files for train",
    ),
}


@pytest.mark.parametrize("case", BROKEN_COCO)
def test_a_damaged_coco_folder_is_named(case: str, tmp_path: Path) -> None:
    root = coco(tmp_path / "c", {"train": {"a": ONE, "b": ONE}, "val": {"c": ONE}})
    if case == "two lists":
        for name in ("a", "b"):
            picture(root / "train2014" / f"{name}.png")
    BROKEN_COCO[case][0](root)

    with pytest.raises(DataError, match=BROKEN_COCO[case][1]):
        open_detection(f"coco:{root}")


@pytest.mark.parametrize("spec", ["voc", "voc:", "pascal:/tmp", "imagefolder:x"])
def test_other_forms_are_refused(spec: str) -> None:
    with pytest.raises(DataError, match="expected voc:FOLDER or coco:FOLDER"):
        open_detection(spec)


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    root = three(tmp_path / "v")
    with pytest.raises(ConfigError, match="limit is 0"):
        open_detection(f"voc:{root}", limit=0)
    with pytest.raises(ConfigError, match=r"image_size is \(0, 5\)"):
        open_detection(f"voc:{root}", image_size=(0, 5))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        DetectionBatches(images_of(2), 0, train=True)


def test_a_limit_keeps_so_many_images_of_each_split(tmp_path: Path) -> None:
    names = [f"{number:02d}" for number in range(20)]
    root = voc(tmp_path / "v", dict.fromkeys(names, ONE), {})

    assert [3, 2, 3] == [len(part) for part in open_detection(f"voc:{root}", limit=3).splits().values()]
