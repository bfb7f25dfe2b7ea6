"""Removes what an earlier run wrote, and only that: files that a manifest of ours names with the content they have."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

from nni_prune_ext.errors import ArtefactError, OutputError
from nni_prune_ext.export.artefact_folder import MANIFEST, READ_PARTS, REPORT, REPORT_PAGE
from nni_prune_ext.export.manifest import Manifest, Part, read_manifest

_KEYS_OF_ROWS = frozenset({"name", "macs", "params", "onnx_bytes", "parity", "kind"})


def check_replaceable(folder: Path) -> None:
    """Makes sure that writing an artefact folder meets nothing but an earlier artefact folder.

    Raises:
        OutputError: there are files called like parts, but neither a manifest of ours nor a run's report beside the
            folder says that they are.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"'{folder}' is in the way: it is no folder, expected one, or nothing. Move it elsewhere.")
    found = [folder / name for name in (MANIFEST, *READ_PARTS) if os.path.lexists(folder / name)]
    if found and not _is_artefact_folder(folder):
        raise OutputError(
            f"'{found[0]}' is in the way: it would be lost, and nothing says that an earlier run wrote it. Expected an "
            "empty or new folder, or an artefact folder. Move it elsewhere, or choose another folder."
        )


def remove_earlier_run(folder: Path) -> None:
    """Removes the report of an earlier run and the unchanged artefacts of the networks in it; all other files stay.

    A ``report.html`` goes with it if a network of the run holds a copy of it.
    """
    names = _networks_in_report(folder / REPORT)
    if not names:
        return
    page = folder / REPORT_PAGE
    copies = [manifest.parts.get(REPORT_PAGE) for name in names if (manifest := _own_manifest(folder / name))]
    if page.is_file() and Part.of(page) in copies:
        page.unlink()
    for artefacts in (folder / name for name in names):
        found = _own_manifest(artefacts) is not None
        remove_artefacts(artefacts)
        if found and not artefacts.is_symlink() and not any(artefacts.iterdir()):
            artefacts.rmdir()
    (folder / REPORT).unlink()  # last: it says which networks there are


def remove_artefacts(folder: Path) -> None:
    """Removes the unchanged files of an artefact folder, the manifest last; all other files stay.

    Parts that were changed since, or damaged, are not lost: ``model.onnx`` becomes ``model.onnx.changed-1``.
    """
    if not _is_artefact_folder(folder):
        return
    ours = _own_files(folder)
    for path in (folder / name for name in (*READ_PARTS, MANIFEST)):
        if os.path.lexists(path) and path not in ours:
            path.rename(_free_name(path))
    for path in ours:
        path.unlink()


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.changed-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _is_artefact_folder(folder: Path) -> bool:
    """Says whether a folder holds a manifest of ours or, should that be damaged, a run's report beside it names it."""
    return _own_manifest(folder) is not None or folder.name in _networks_in_report(folder.parent / REPORT)


def _own_files(folder: Path) -> list[Path]:
    """Returns the files that a manifest of ours names with the content that they have, and then the manifest."""
    manifest = _own_manifest(folder)
    if manifest is None:
        return []
    parts = [name for name in (*READ_PARTS, REPORT, REPORT_PAGE) if name in manifest.parts]
    unchanged = (name for name in parts if (folder / name).is_file() and Part.of(folder / name) == manifest.parts[name])
    return [*sorted(folder / name for name in unchanged), folder / MANIFEST]


def _own_manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except ArtefactError:  # none, or one of something else
        return None


def _networks_in_report(path: Path) -> list[str]:
    """Returns the names of the networks in a report of ours; none if it is of another tool."""
    try:
        content = json.loads(path.read_bytes())
        ours = type(content["format"]) is int and all(row.keys() >= _KEYS_OF_ROWS for row in content["rows"])
        names = [str(row["name"]) for row in content["rows"]] if ours else []
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    return [name for name in names if Path(name).name == name and name != ".."]
