"""Read the annotations of PASCAL VOC and COCO folders: files, sizes, boxes and classes, without decoding an image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from nni_prune_ext.data.image_folders import IMAGE_SUFFIXES, UNREADABLE, unreadable
from nni_prune_ext.errors import DataError

VOC_LAYOUT = "FOLDER/JPEGImages, FOLDER/Annotations and FOLDER/ImageSets/Main"
COCO_LAYOUT = "FOLDER/annotations/instances_train*.json"
SPLITS = ("train", "val", "test")


@dataclass
class BoxFile:
    """An image file and the objects on it, in pixels of the file.

    Attributes:
        size: (H, W).
        labels: 1 and up.
        ignored: per box: difficult, or a crowd.
        dropped: boxes without an area, which are not in ``boxes``.
    """

    path: Path
    size: tuple[int, int]
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: list[bool] = field(default_factory=list)
    dropped: int = 0

    def add(self, box: Sequence[float], label: int, *, ignored: bool) -> None:
        """Add a box x1, y1, x2, y2, cut to the image."""
        height, width = self.size
        x1, x2 = (min(max(x, 0.0), float(width)) for x in box[::2])
        y1, y2 = (min(max(y, 0.0), float(height)) for y in box[1::2])
        if x2 <= x1 or y2 <= y1:
            self.dropped += 1
            return
        self.boxes.append((x1, y1, x2, y2))
        self.labels.append(label)
        self.ignored.append(ignored)


def read_voc(root: Path) -> tuple[dict[str, list[BoxFile]], tuple[str, ...]]:
    """Return the files of each list (of the empty name where there is no list) and the classes, sorted.

    Raises:
        DataError: a folder or file is missing, or an annotation cannot be read.
    """
    annotations, pictures = root / "Annotations", root / "JPEGImages"
    if not annotations.is_dir() or not pictures.is_dir():
        raise DataError(f"'{root}' is no PASCAL VOC folder, expected {VOC_LAYOUT}. Check the path.")
    places = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    lists = {
        split: [line.split()[0] for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
        for split, place in places.items()
        if place.is_file()
    } or {"": sorted(path.stem for path in annotations.glob("*.xml"))}
    found = {path.stem: path for path in sorted(pictures.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    trees = {name: _parsed(annotations / f"{name}.xml") for names in lists.values() for name in names}
    classes = sorted({_text(own, "name", place) for place, tree in trees.values() for own in tree.iter("object")})
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    return {
        split: [_voc_file(name, found, trees[name], numbers) for name in names] for split, names in lists.items()
    }, (*classes,)


def read_coco(root: Path) -> tuple[dict[str, list[BoxFile]], tuple[str, ...]]:
    """Return the files of each ``instances_*.json`` and the classes, in the order of their ids.

    Raises:
        DataError: a folder or file is missing, or an annotation cannot be read.
    """
    places = sorted((root / "annotations").glob("instances_*.json"))
    lists: dict[str, list[BoxFile]] = {}
    names: tuple[str, ...] | None = None
    for place in places:
        stem = place.stem.removeprefix("instances_")
        split = next((own for own in SPLITS if stem.startswith(own)), None)
        if split is None:
            continue
        if split in lists:
            raise DataError(
                f"'{root / 'annotations'}' holds two files for {split}, '{place.name}' and another, expected one. "
                "Take one of them out."
            )
        content = _coco_content(place)
        categories = sorted(content["categories"], key=lambda own: int(own["id"]))
        own_names = tuple(str(own["name"]) for own in categories)
        if names is not None and own_names != names:
            raise DataError(f"'{place}' has the classes {own_names}, expected {names} as in the other files. Mend it.")
        names = own_names
        lists[split] = _coco_files(root, stem, content, place)
    if names is None:
        raise DataError(f"'{root}' is no COCO folder, expected {COCO_LAYOUT}. Check the path.")
    return lists, names


def _parsed(place: Path) -> tuple[Path, ElementTree.Element]:
    try:
        return place, ElementTree.parse(place).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(
            f"The annotation '{place}' cannot be read ({error}), expected the XML of PASCAL VOC. Mend it, or take its "
            "name off the lists."
        ) from error


def _voc_file(
    name: str, found: Mapping[str, Path], read: tuple[Path, ElementTree.Element], numbers: Mapping[str, int]
) -> BoxFile:
    place, tree = read
    if name not in found:
        raise DataError(f"There is no image '{name}' in JPEGImages, expected one for '{place}'. Add it.")
    file = BoxFile(found[name], _size_of(found[name]))
    for own in tree.iter("object"):
        box = own.find("bndbox")
        if box is None:
            raise DataError(f"An object in '{place}' has no bndbox, expected xmin, ymin, xmax, ymax. Mend it.")
        try:
            corners = [float(_text(box, key, place)) for key in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError as error:
            raise DataError(f"A bndbox in '{place}' is no four numbers ({error}). Mend it.") from error
        file.add(corners, numbers[_text(own, "name", place)], ignored=(own.findtext("difficult") or "0").strip() == "1")
    return file


def _text(element: ElementTree.Element, key: str, place: Path) -> str:
    text = (element.findtext(key) or "").strip()
    if not text:
        raise DataError(f"'{element.tag}' in '{place}' has no {key}, expected the XML of PASCAL VOC. Mend it.")
    return text


def _coco_content(place: Path) -> dict[str, Any]:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"'{place}' cannot be read ({error}), expected the JSON of COCO. Mend it.") from error
    if missing:
        raise DataError(f"'{place}' has no list of {missing[0]}, expected the JSON of COCO. Mend it.")
    return dict(content)


def _coco_files(root: Path, stem: str, content: Mapping[str, Any], place: Path) -> list[BoxFile]:
    folders = (root / stem, root / "images" / stem, root / "images", root)
    try:
        labels = {int(own["id"]): n for n, own in enumerate(sorted(content["categories"], key=_id), start=1)}
        files: dict[int, BoxFile] = {}
        for own in content["images"]:
            path = next((f / own["file_name"] for f in folders if (f / own["file_name"]).is_file()), None)
            if path is None:
                raise DataError(
                    f"There is no image '{own['file_name']}' of '{place}', expected it in '{folders[0]}'. Add it."
                )
            files[int(own["id"])] = BoxFile(path, _size_of(path))
        for own in content["annotations"]:
            x, y, width, height = (float(value) for value in own["bbox"])
            label = labels[int(own["category_id"])]
            files[int(own["image_id"])].add((x, y, x + width, y + height), label, ignored=bool(own.get("iscrowd", 0)))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"An entry of '{place}' is incomplete ({type(error).__name__}: {error}), expected the JSON of COCO. "
            "Mend it."
        ) from error
    return list(files.values())


def _id(own: Mapping[str, Any]) -> int:
    return int(own["id"])


def _size_of(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except UNREADABLE as error:
        raise unreadable(path, error) from error
