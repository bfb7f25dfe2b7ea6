"""The folder of a network that was exported in routes: what its index says, and when an older one may be replaced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nni_prune_ext.errors import ArtefactError, OutputError
from nni_prune_ext.export.artefact_folder import FormatOne, check_writable, first_foreign
from nni_prune_ext.export.manifest import Part
from nni_prune_ext.text_files import write_text

INDEX = "routes.json"
ROUTER = "router.onnx"
FORMAT: Final = 1


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IndexedRoute(_Content):
    """One route, as the index describes it.

    Attributes:
        file: the ONNX file beside the index.
        share: of the calibration images, 0–1.
        macs: multiply–accumulates per image.
        macs_share: of those of the network without gates.
        images: how many of the images that judge take this route by their full masks.
        accuracy: on these; ``None`` without labels, or without an image.
        firing_rate: layer → mean firing rate of its filters for images of this route.
        centre: layer → firing rate of every filter.
    """

    file: str
    share: float
    macs: int
    macs_share: float
    images: int
    accuracy: float | None
    firing_rate: dict[str, float]
    centre: dict[str, tuple[float, ...]]


class IndexedRouter(_Content):
    """The router, as the index describes it.

    Attributes:
        file: the ONNX file beside the index: images to route numbers.
        layers: the first gated layers, whose heads it reads.
        macs: multiply–accumulates per image.
        macs_share: of those of the network without gates.
        agreement: share of the images that judge on which it names the route of the full masks.
        most_frequent: what always naming the most frequent route would reach.
    """

    file: str
    layers: tuple[str, ...]
    macs: int
    macs_share: float
    agreement: float
    most_frequent: float


class Routing(_Content):
    """One way to run images, measured on the images that judge.

    Attributes:
        macs_share: mean multiply–accumulates per image, as a share of those of the network without gates.
        accuracy: ``None`` without labels.
    """

    macs_share: float
    accuracy: float | None


class RoutesIndex(_Content):
    """What ``routes.json`` says; immutable.

    Attributes:
        package_version: of the package that wrote the folder.
        routes: most frequent first; the router's numbers are places in this list.
        router: ``None`` if there is one route only, or none was asked for.
        keep: firing rate from which a filter stays open in a route.
        weights: layer → what one filter counts in the distance to a centre.
        routings: name → ways to run images, side by side.
        images: how many images judged; others found the routes.
        remarks: what to know before using it.
        limits: what this flavour cannot do.
        parts: file name → hash and size.
        kind: says what this file is.
        format: version of this format.
    """

    package_version: str
    routes: tuple[IndexedRoute, ...] = Field(min_length=1)
    router: IndexedRouter | None
    keep: float
    weights: dict[str, float]
    routings: dict[str, Routing]
    images: int
    remarks: tuple[str, ...]
    limits: str
    parts: dict[str, Part]
    kind: Literal["routes of a gated network"] = "routes of a gated network"
    format: FormatOne = FORMAT

    def save(self, folder: Path) -> None:
        """Writes the index, atomically."""
        write_text(folder / INDEX, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RoutesIndex:
        """Reads the index of a folder.

        Raises:
            ArtefactError: there is none, or it is not of this format.
        """
        try:
            return cls.model_validate_json((folder / INDEX).read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise ArtefactError(
                f"'{folder / INDEX}' is no index of routes ({reason}), expected what export_routes writes. Export "
                "again."
            ) from error


def check_routes_folder(folder: Path) -> None:
    """Makes sure that a folder is absent, empty, or holds an unchanged earlier export in routes and nothing else.

    Raises:
        OutputError: it cannot be written, or something would be lost.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"'{folder}' is in the way: it is no folder, expected one, or nothing. Move it elsewhere.")
    check_writable(folder)
    parts = _earlier_parts(folder)
    found = first_foreign(folder, {*parts, INDEX} if parts else ())
    changed = (folder / name for name, part in parts.items() if (folder / name).exists())
    found = found or next((path for path in changed if Part.of(path) != parts[path.name]), None)
    if found is not None:
        raise OutputError(
            f"'{found}' is in the way: it would be lost, and no index of routes says that an earlier export wrote it. "
            "Expected an empty or new folder, or an unchanged earlier export. Move it elsewhere, or choose another "
            "folder."
        )


def remove_earlier_routes(folder: Path) -> None:
    """Removes the files of an earlier export, its index last; ``check_routes_folder`` has been asked before."""
    for name in _earlier_parts(folder):
        (folder / name).unlink(missing_ok=True)
    (folder / INDEX).unlink(missing_ok=True)


def _earlier_parts(folder: Path) -> dict[str, Part]:
    try:
        parts = RoutesIndex.load(folder).parts
    except ArtefactError:
        return {}
    return {name: part for name, part in parts.items() if Path(name).name == name and name != INDEX}
