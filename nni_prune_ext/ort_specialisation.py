"""A local cache of compact gated networks in the blocked layout of ONNX Runtime's CPU provider: faster, on one machine.

The portable file stays what is shipped. A specialised one holds operators that are no public contract, in a layout that
depends on the processor; read elsewhere, its numbers could be wrong without an error. So an entry of the cache carries
what it was made for (portable file, versions, size of blocks, processor) and a hash of its graph, is compared with the
portable file when it is made and whenever it is opened, and whatever is in doubt leads back to the portable file, with
the reason.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import Tensor

from nni_prune_ext.deployment import runtime
from nni_prune_ext.errors import ConfigError, ExportError, ModelError, OutputError
from nni_prune_ext.evaluation import environment, measure_latency
from nni_prune_ext.export.blocked_layout import blocked_form
from nni_prune_ext.export.gated_parity import GatedParity, compare_gated_graphs
from nni_prune_ext.export.onnx_static import publish, temporary_folder_beside
from nni_prune_ext.export.parity import FAIL
from nni_prune_ext.export.provenance import PREFIX, package_version
from nni_prune_ext.runtimes.base import Array, RunnableModel
from nni_prune_ext.runtimes.onnxruntime_blocks import host_block_size

FEWEST_IMAGES = 8
_ENTRY = PREFIX + "specialised"
"""Property of a specialised file: what it was made for, as JSON."""
_FACTS = ("latency_ratio", "blocked", "left")
"""Attributes of `Specialised` that an entry remembers."""
_DecodeError: type[Exception] = importlib.import_module("google.protobuf.message").DecodeError  # it has no type hints


@dataclass(frozen=True)
class Specialised:
    """The file to run on this machine, and why it is that one.

    Attributes:
        path: the specialised file, or the portable one.
        portable: the portable file.
        reason: why it is the portable file, or None if it is the specialised one.
        block: channels per block of this machine, or None if it has no blocked layout.
        parity: the comparison of both files, or None if it did not come to that.
        latency_ratio: time of the specialised file by that of the portable one, or None if it was never measured.
        blocked: convolutions with computed weights that run in the blocked layout.
        left: those that do not → why.
    """

    path: Path
    portable: Path
    reason: str | None
    block: int | None
    parity: GatedParity | None = None
    latency_ratio: float | None = None
    blocked: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Returns the facts as JSON-ready values."""
        return {**asdict(self), "path": str(self.path), "portable": str(self.portable)}


def specialise_ort_cpu(
    portable: Path,
    images: Tensor,
    *,
    cache_folder: Path | None = None,
    rounds: int = 30,
    min_seconds: float = 2.0,
) -> Specialised:
    """Puts a specialised file into the cache, if the network has one that computes the same and is faster here.

    Args:
        portable: a file of the flavour ``compact`` whose gates open blocks of this machine's size, 16 with AVX-512.
        images: real images ``(N, C, H, W)``, eight at least: both files are compared and timed on them.
        cache_folder: where specialised files are kept; by default ``nni_prune_ext`` in the user's cache.
        rounds: fewest rounds of the measurement.
        min_seconds: shortest time for all rounds together.

    Raises:
        ConfigError: too few images, or images of another shape than the file takes.
        ModelError: the portable file cannot be read, or takes something else than images of one size.
        OutputError: the cache cannot be written.
    """
    if len(images) < FEWEST_IMAGES:
        raise ConfigError(
            f"There are {len(images)} images to compare and measure on, expected {FEWEST_IMAGES} or more: the work of "
            "a gated network depends on the image. Pass more images."
        )
    model, digest = _read(portable)
    singles, result = _singles(model, images), _started(portable, model)
    if result.reason is not None or result.block is None:
        return result
    try:
        form = blocked_form(model, result.block)
    except ExportError as error:
        return replace(result, reason=str(error))
    result = _compared(replace(result, blocked=form.blocked, left=form.left), model, form.model, singles)
    if result.reason is not None or result.block is None:
        return result
    key = _key(digest, result.block)
    entry = _entry(cache_folder, portable, key)
    _make_folder(entry.parent)
    with temporary_folder_beside(entry) as folder:
        draft = folder / entry.name
        _save(form.model, draft, entry)
        ratio, error_bar = _timed(portable, draft, singles, rounds, min_seconds)
        result = replace(result, latency_ratio=ratio)
        if ratio > 1 - error_bar:
            return replace(result, reason=f"it would take × {ratio:.2f} of the portable file's time: no gain here")
        _record(form.model, result, key)
        _save(form.model, draft, entry)
        publish(folder, entry)
    return replace(result, path=entry)


def open_specialised(portable: Path, *, cache_folder: Path | None = None, images: Tensor | None = None) -> Specialised:
    """Returns the specialised file from the cache if it is there and still computes the same, or says why not.

    Whatever is wrong with the cache leads to the portable file; nothing is raised for it, and nothing is written.

    Args:
        portable: the portable file.
        cache_folder: as in `specialise_ort_cpu`.
        images: images ``(N, C, H, W)`` to compare both files on; by default eight of noise.

    Raises:
        ConfigError: images of another shape than the file takes.
        ModelError: the portable file cannot be read, or takes something else than images of one size.
    """
    model, digest = _read(portable)
    singles, result = _singles(model, images), _started(portable, model)
    if result.reason is not None or result.block is None:
        return result
    key = _key(digest, result.block)
    entry = _entry(cache_folder, portable, key)
    try:
        found, facts = _checked(entry, key)
    except _UnusableEntryError as error:
        return replace(result, reason=str(error))
    ratio, blocked, left = (facts[name] for name in _FACTS)
    result = replace(result, latency_ratio=ratio, blocked=tuple(blocked), left=left)
    result = _compared(result, model, found, singles)
    return result if result.reason is not None else replace(result, path=entry)


def taken_shape(portable: Path) -> tuple[int, int, int]:
    """Returns the shape ``(C, H, W)`` of the images that a file takes.

    Raises:
        ModelError: the file cannot be read, or takes something else.
    """
    return _taken_shape(_read(portable)[0])[1:]


def _read(portable: Path) -> tuple[onnx.ModelProto, str]:
    """Returns a portable file's graph and the hash of its bytes."""
    try:
        content = portable.read_bytes()
        return onnx.load_model_from_string(content), hashlib.sha256(content).hexdigest()
    except (OSError, _DecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelError(
            f"'{portable}' cannot be read: {why}. Expected the ONNX file of a gated network, of the flavour compact. "
            "Write one with export_gated."
        ) from error


def _taken_shape(model: onnx.ModelProto) -> tuple[int, int, int, int]:
    """Returns the shape of the images that a graph takes; an open number of images is 0."""
    ports = [[size.dim_value for size in port.type.tensor_type.shape.dim] for port in model.graph.input]
    if len(ports) != 1 or len(ports[0]) != 4 or 0 in ports[0][1:]:
        raise ModelError(
            f"The file takes inputs of the shapes {ports}, 0 for open sizes, expected images of one size, "
            "(N, C, H, W). Give the file of a gated network, of the flavour compact."
        )
    number, channels, height, width = ports[0]
    return number, channels, height, width


def _started(portable: Path, model: onnx.ModelProto) -> Specialised:
    """Returns the portable file, with a reason if it cannot be specialised in any case."""
    result = Specialised(portable, portable, None, host_block_size())
    if result.block is None:
        return replace(result, reason="ONNX Runtime has no blocked layout on this machine")
    if _taken_shape(model)[0] != 1:
        reason = "it takes several images, and only a file of the flavour compact is specialised"
        return replace(result, reason=f"{reason} (`nni-prune-ext gates export --flavour compact`)")
    return result


def _singles(model: onnx.ModelProto, images: Tensor | None) -> list[Array]:
    """Returns images one by one, as the file takes them; noise of different strengths if there are none.

    Raises:
        ConfigError: the images have another shape.
        ModelError: the file takes something else than images.
    """
    shape = _taken_shape(model)[1:]
    if images is None:
        noise = np.random.default_rng(0).normal(0, 1, (FEWEST_IMAGES, 1, *shape)).astype(np.float32)
        return [own * scale for own, scale in zip(noise, np.geomspace(0.25, 4, FEWEST_IMAGES, dtype=np.float32))]
    if tuple(images.shape[1:]) != shape:
        raise ConfigError(
            f"The images have the shape {tuple(images.shape[1:])}, expected {shape}, which the file takes. Pass images "
            "of that size."
        )
    return [np.ascontiguousarray(image[None].float().cpu().numpy()) for image in images]


def _compared(
    result: Specialised, portable: onnx.ModelProto, other: onnx.ModelProto, singles: Sequence[Array]
) -> Specialised:
    """Adds the comparison of both graphs, and a reason against the other one if they differ."""
    try:
        parity = compare_gated_graphs(portable, other, singles, fail=FAIL)
    except ExportError as error:
        return replace(result, reason=str(error))
    if parity.passed:
        return replace(result, parity=parity)
    reason = (
        f"it does not compute what the portable file computes: {parity.agreement:.5f} of the mask bits agree, and "
        f"where all do (on {parity.compared} of {parity.images} images) outputs differ by {parity.max_rel:.3g}"
    )
    return replace(result, parity=parity, reason=reason)


def _key(digest: str, block: int) -> dict[str, str]:
    """Returns all that a specialised file depends on."""
    machine = environment()
    return {
        "portable_sha256": digest,
        "onnxruntime": str(importlib.import_module("onnxruntime").__version__),
        "block": str(block),
        "cpu": f"{platform.machine()}, {machine['cpu']}, {machine['cpu_capability']}",
        "nni_prune_ext": package_version(),
    }


def _entry(cache_folder: Path | None, portable: Path, key: Mapping[str, str]) -> Path:
    """Returns where the cache keeps the file for a key."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return (cache_folder or home / "nni_prune_ext") / f"{portable.stem}.{name}.onnx"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The cache cannot be written to '{folder}': {error.strerror}. Expected a folder, or the name of a new "
            "one. Choose another place."
        ) from error


def _save(model: onnx.ModelProto, draft: Path, entry: Path) -> None:
    try:
        draft.write_bytes(model.SerializeToString())
    except OSError as error:
        raise OutputError(
            f"The cache cannot take '{entry}': {error.strerror}. Expected room for {model.ByteSize():,} bytes. Make "
            "space, or choose another place."
        ) from error


def _timed(
    portable: Path, other: Path, singles: Sequence[Array], rounds: int, min_seconds: float
) -> tuple[float, float]:
    """Returns the other file's time by that of the portable one, and the error of that."""
    files = {"portable": portable, "specialised": other}
    entries = {name: (runtime("onnxruntime-cpu"), RunnableModel(onnx_path=path)) for name, path in files.items()}
    latency = measure_latency(entries, [[own] for own in singles], rounds=rounds, min_seconds=min_seconds, threads=1)
    return latency.rows[1].ratio, latency.error_bar


def _record(model: onnx.ModelProto, result: Specialised, key: Mapping[str, str]) -> None:
    """Writes into a specialised graph what it was made for, and a hash of everything."""
    facts = {"key": dict(key), **{name: getattr(result, name) for name in _FACTS}}
    facts = json.loads(json.dumps(facts))  # as it will be read
    onnx.helper.set_model_props(model, {_ENTRY: json.dumps({**facts, "sha256": _sha256(model, facts)})})


def _checked(entry: Path, key: Mapping[str, str]) -> tuple[onnx.ModelProto, Mapping[str, Any]]:
    """Returns an entry's graph and facts.

    Raises:
        _UnusableEntryError: it is missing, damaged, or made for something else.
    """
    try:
        model = onnx.load_model_from_string(entry.read_bytes())
        facts = dict(json.loads({own.key: own.value for own in model.metadata_props}[_ENTRY]))
        whole = facts.pop("sha256") == _sha256(model, facts)
    except FileNotFoundError as error:
        raise _UnusableEntryError(
            f"the cache has no file for ONNX Runtime {key['onnxruntime']}, blocks of {key['block']}, {key['cpu']} and "
            "these very bytes of the portable file; specialise it here"
        ) from error
    except (OSError, _DecodeError, ValueError, LookupError, TypeError) as error:
        raise _UnusableEntryError(f"the file in the cache is damaged: '{entry}'; specialise again") from error
    if not whole:
        raise _UnusableEntryError(f"the file in the cache is damaged: '{entry}'; specialise again")
    for name, expected in key.items():
        made_for = facts["key"].get(name)
        if made_for != expected:
            raise _UnusableEntryError(
                f"the file in the cache was made for {name} {made_for}, not {expected}: '{entry}'; specialise again"
            )
    return model, facts


def _sha256(model: onnx.ModelProto, facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(model.graph.SerializeToString(deterministic=True))
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


class _UnusableEntryError(Exception):
    """An entry of the cache is not to be used; the message says why."""
