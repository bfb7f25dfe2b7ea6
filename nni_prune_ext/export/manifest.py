"""The manifest of an artefact folder: which parts it has, the hash of each, and how the network came to be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from nni_prune_ext.errors import ArtefactError
from nni_prune_ext.export.artefact_folder import MANIFEST, READ_PARTS, FormatOne
from nni_prune_ext.export.provenance import package_version
from nni_prune_ext.export.weight_masks import MaskFacts
from nni_prune_ext.text_files import write_text

FORMAT: Final = 1


class Part(BaseModel):
    """One file of an artefact folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)

    @classmethod
    def of(cls, path: Path) -> Part:
        """Measures a file."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return cls(sha256=digest.hexdigest(), size_bytes=path.stat().st_size)


class MethodUse(BaseModel):
    """The method that a network was pruned with, and its full configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    options: dict[str, JsonValue] = Field(default_factory=dict)


class Manifest(BaseModel):
    """What an artefact folder holds; immutable.

    Attributes:
        package_version: of the package that wrote the folder.
        parts: file name → hash and size, of every file but the manifest.
        method: how the network was pruned; ``None`` for a dense one.
        masks: weight name → facts about its mask; empty without masks.
        format: version of this format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    package_version: str
    parts: dict[str, Part]
    method: MethodUse | None = None
    masks: dict[str, MaskFacts] = Field(default_factory=dict)
    format: FormatOne = FORMAT

    def save(self, folder: Path) -> None:
        """Writes the manifest and its own hash into an artefact folder, atomically."""
        body = json.loads(self.model_dump_json())
        write_text(folder / MANIFEST, json.dumps({**body, "sha256": body_sha256(body)}, indent=1) + "\n")


def body_sha256(content: Mapping[str, object]) -> str:
    """Returns the SHA-256 of all keys of a manifest but ``sha256``: as ASCII JSON, keys sorted, without blanks."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(
    folder: Path, *, method: MethodUse | None = None, masks: Mapping[str, MaskFacts] | None = None
) -> Manifest:
    """Writes the manifest of all files that lie in a folder."""
    parts = {path.name: Part.of(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST}
    manifest = Manifest(package_version=package_version(), parts=parts, method=method, masks=dict(masks or {}))
    manifest.save(folder)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of an artefact folder, without looking at the parts.

    Raises:
        ArtefactError: there is none, it cannot be read, is damaged, or is of a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(
            f"'{folder}' holds no {MANIFEST}, expected an artefact folder as `nni-prune-ext prune` and "
            "write_artefacts make it. Choose the folder of one network (OUT/METHOD); one that an earlier version "
            "wrote, or that was cut short, has to be made anew."
        )
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        _check_body(path, content)
        if type(content.get("format")) is int and content["format"] > FORMAT:
            raise ArtefactError(
                f"'{path}' is of format {content['format']}, expected at most {FORMAT}: a newer version "
                f"({content.get('package_version', 'unknown')}) wrote it. Read it with that version."
            )
        return Manifest.model_validate({key: value for key, value in content.items() if key != "sha256"})
    except (OSError, ValueError) as error:  # a ValidationError is a ValueError
        raise ArtefactError(
            f"'{path}' cannot be read ({_reason(error)}), expected the manifest of an artefact folder. Copy the whole "
            "folder again from where it was made."
        ) from error


def checked_manifest(folder: Path, *, needed: Sequence[str] = ()) -> Manifest:
    """Reads the manifest of an artefact folder and compares every part with its hash.

    Args:
        needed: parts that must be there.

    Raises:
        ArtefactError: the manifest is unusable; a part is missing, damaged or not of this folder.
    """
    manifest = read_manifest(folder)
    foreign = [name for name in READ_PARTS if name not in manifest.parts and (folder / name).exists()]
    if foreign:
        raise ArtefactError(
            f"'{folder}' holds '{foreign[0]}', which its manifest does not name: the file is not of this network. "
            "Remove it, or copy the whole folder again from where it was made."
        )
    for name, part in manifest.parts.items():
        _check_part(folder, name, part)
    absent = [name for name in needed if name not in manifest.parts]
    if absent:
        raise ArtefactError(
            f"'{folder}' has no {absent[0]}; it holds {', '.join(manifest.parts) or 'nothing'}. Expected the artefact "
            "folder of a network that has one. Choose another folder."
        )
    return manifest


def add_parts(folder: Path, parts: Mapping[str, str]) -> None:
    """Adds texts such as reports to an artefact folder, or replaces them; the manifest follows.

    A text that is replaced leaves the manifest first, so that the folder is usable whenever this is interrupted.

    Args:
        parts: file name → content.

    Raises:
        ArtefactError: the folder has no usable manifest, or a name is that of another part.
        OutputError: a file cannot be written.
    """
    manifest = read_manifest(folder)
    taken = [name for name in parts if name in (*READ_PARTS, MANIFEST) or Path(name).name != name]
    if taken:
        raise ArtefactError(
            f"'{taken[0]}' cannot be added to '{folder}': that name is taken or no plain file name, expected for "
            "example report.html. Choose another name."
        )
    kept = {name: part for name, part in manifest.parts.items() if name not in parts}
    if len(kept) < len(manifest.parts):
        manifest.model_copy(update={"parts": kept}).save(folder)
    for name, text in parts.items():
        write_text(folder / name, text)
    added = {name: Part.of(folder / name) for name in parts}
    manifest.model_copy(update={"parts": {**kept, **added}}).save(folder)


@contextmanager
def replacing_part(folder: Path, name: str) -> Iterator[Path]:
    """Yields the path of a part to write, or to replace, in an artefact folder; the manifest follows.

    On an error inside the block the folder is as it was. A kill between part and manifest leaves a folder that is
    refused, because the part is not the one that the manifest names.

    Raises:
        ArtefactError: the folder has no usable manifest.
    """
    manifest = read_manifest(folder)
    yield folder / name
    parts = {**manifest.parts, name: Part.of(folder / name)}
    manifest.model_copy(update={"parts": parts}).save(folder)


def _check_body(path: Path, content: Mapping[str, object]) -> None:
    """Refuses a manifest that was changed after it was written, before any part is blamed for it."""
    expected, found = content.get("sha256"), body_sha256(content)
    if expected != found:
        raise ArtefactError(
            f"'{path}' itself is damaged or was edited: its content has SHA-256 {found}, but its key sha256 says "
            f"{json.dumps(expected)}. Expected the same. Copy the whole folder again from where it was made; after an "
            "intended change, write it with nni_prune_ext.export.manifest.write_manifest."
        )


def _check_part(folder: Path, name: str, part: Part) -> None:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise ArtefactError(
            f"'{folder}' lacks '{name}', which its manifest names. Copy the whole folder again from where it was made."
        )
    seen = Part.of(path)
    if seen != part:
        raise ArtefactError(
            f"'{path}' is damaged or of another run: {_difference(seen, part)} as its manifest says. Copy the whole "
            "folder again from where it was made."
        )


def _difference(seen: Part, expected: Part) -> str:
    """Says in what two parts differ, in full: shortened hashes may look the same."""
    if seen.size_bytes != expected.size_bytes:
        return f"it has {seen.size_bytes:,} bytes, expected {expected.size_bytes:,}"
    return f"it has SHA-256 {seen.sha256}, expected {expected.sha256}"


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
