"""Read the annotations of PASCAL VOC and COCO folders: files, sizes, boxes and classes, without decoding an image."""

from __future__ import annotations

import json
import math
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
_THINNEST = 0.5
"""Pixels."""


@dataclass
class BoxFile:
    """An image file and the objects on it, in pixels of the file.

    Attributes:
        size: (H, W), as the annotation says or, where it does not, the file.
        labels: 1 and up.
        ignored: per box: difficult, or a crowd.
        dropped: boxes thinner than half a pixel, which are not in ``boxes``.
    """

    path: Path
    size: tuple[int, int]
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: list[bool] = field(default_factory=list)
    dropped: int = 0

    def add(self, box: Sequence[float], label: int, *, ignored: bool) -> None:
        """Add a box x1, y1, x2, y2, cut to the image.

        Raises:
            DataError: it holds NaN or infinity.
        """
        if not all(math.isfinite(value) for value in box):
            raise DataError(f"A box of '{self.path}' is {tuple(box)}, expected finite numbers. Mend the annotation.")
        height, width = self.size
        x1, x2 = (min(max(x, 0.0), float(width)) for x in box[::2])
        y1, y2 = (min(max(y, 0.0), float(height)) for y in box[1::2])
        if x2 - x1 < _THINNEST or y2 - y1 < _THINNEST:
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
    lists = {split: _names_in(place) for split, place in places.items() if place.is_file()} or {
        "": sorted(path.stem for path in annotations.glob("*.xml"))
    }
    _refuse_twice([name for names in lists.values() for name in names], root)
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
        own_names = _category_names(content, place)
        if names is not None and own_names != names:
            raise DataError(f"'{place}' has the classes {own_names}, expected {names} as in the other files. Mend it.")
        names = own_names
        lists[split] = _coco_files(root, stem, content, place)
    _refuse_twice([str(file.path) for files in lists.values() for file in files], root)
    if names is None:
        raise DataError(f"'{root}' is no COCO folder, expected {COCO_LAYOUT}. Check the path.")
    return lists, names


def _names_in(place: Path) -> list[str]:
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The list '{place}' cannot be read ({error}), expected UTF-8 text. Mend it.") from error
    names = [line.split()[0] for line in lines if line.strip()]
    for name in names:
        if Path(name).name != name:
            raise DataError(f"'{place}' names '{name}', expected names without folders. Mend it.")
    return names


def _refuse_twice(names: Sequence[str], root: Path) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(
                f"'{root}' lists the image '{name}' twice, expected every image in one split: what is tested would be "
                "trained on. Take it off one list."
            )
        seen.add(name)


def _parsed(place: Path) -> tuple[Path, ElementTree.Element]:
    try:
        return place, ElementTree.parse(place).getroot()
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
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
    file = BoxFile(found[name], _stated(tree.findtext("size/height"), tree.findtext("size/width"), found[name]))
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
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"'{place}' cannot be read ({error}), expected the JSON of COCO. Mend it.") from error
    if missing:
        raise DataError(f"'{place}' has no list of {missing[0]}, expected the JSON of COCO. Mend it.")
    return dict(content)


def _category_names(content: Mapping[str, Any], place: Path) -> tuple[str, ...]:
    try:
        names = tuple(str(own["name"]) for own in sorted(content["categories"], key=_id))
    except (KeyError, TypeError, ValueError) as error:
        raise _incomplete(place, error) from error
    if len(set(names)) < len(names):
        raise DataError(f"'{place}' has two categories of one name, expected every name once: {names}. Rename one.")
    return names


def _incomplete(place: Path, error: Exception) -> DataError:
    return DataError(
        f"An entry of '{place}' is incomplete ({type(error).__name__}: {error}), expected the JSON of COCO. Mend it."
    )


def _coco_files(root: Path, stem: str, content: Mapping[str, Any], place: Path) -> list[BoxFile]:
    folders = (root / stem, root / "images" / stem, root / "images", root)
    try:
        labels = {int(own["id"]): n for n, own in enumerate(sorted(content["categories"], key=_id), start=1)}
        files: dict[int, BoxFile] = {}
        for own in content["images"]:
            path = next((f / own["file_name"] for f in folders if (f / own["file_name"]).is_file()), None)
            if path is not None and not path.resolve().is_relative_to(root.resolve()):
                raise DataError(f"'{place}' names '{own['file_name']}', expected a file in '{root}'. Mend it.")
            if int(own["id"]) in files:
                raise DataError(f"'{place}' has two images with the id {own['id']}, expected every id once. Mend it.")
            if path is None:
                raise DataError(
                    f"There is no image '{own['file_name']}' of '{place}', expected it in '{folders[0]}'. Add it."
                )
            files[int(own["id"])] = BoxFile(path, _stated(own.get("height"), own.get("width"), path))
        for own in content["annotations"]:
            x, y, width, height = (float(value) for value in own["bbox"])
            label = labels[int(own["category_id"])]
            files[int(own["image_id"])].add((x, y, x + width, y + height), label, ignored=bool(own.get("iscrowd", 0)))
    except (KeyError, TypeError, ValueError) as error:
        raise _incomplete(place, error) from error
    return list(files.values())


def _id(own: Mapping[str, Any]) -> int:
    return int(own["id"])


def _stated(height: object, width: object, path: Path) -> tuple[int, int]:
    """Returns the size that an annotation states, the file's own where it states none."""
    try:
        stated = (int(float(str(height))), int(float(str(width))))
    except (ValueError, OverflowError):
        stated = (0, 0)
    return stated if min(stated) > 0 else _size_of(path)


def _size_of(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except UNREADABLE as error:
        raise unreadable(path, error) from error
