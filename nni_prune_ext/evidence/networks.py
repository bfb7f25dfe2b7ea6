"""The networks of a measurement: ONNX files, and artefact folders that hold the same network for PyTorch, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import onnx
import torch
from torch import nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ArtefactError, ConfigError, ModelError, NniPruneExtError
from nni_prune_ext.evaluation import file_size_bytes
from nni_prune_ext.export.artefact_folder import GATED, ONNX, PLAN, WEIGHTS, ModelSpec
from nni_prune_ext.export.artefact_loading import load_gated, load_pruned
from nni_prune_ext.export.manifest import checked_manifest
from nni_prune_ext.export.provenance import PREFIX
from nni_prune_ext.models.loading import build_model, builtin_names
from nni_prune_ext.models.weights import load_weights
from nni_prune_ext.runtimes.base import RunnableModel

NO_FOLDER = "It is an ONNX file alone: no artefact folder holds its PyTorch module"
_LIBRARIES = ("torchvision", "timm")


@dataclass(frozen=True)
class EvidenceNetwork:
    """One network that is measured.

    Attributes:
        name: as short as it can be.
        onnx_path: its ONNX file.
        size_bytes: of that file, with weights beside it.
        input_shape: of its input; the first size is ``None`` where the batch is open.
        folder: its artefact folder, if it has one.
        module: the same network for PyTorch, in eval mode, where the folder can be read back.
        no_module: why there is no module, without a full stop; empty if there is one.
        macs: multiply–accumulates of one input; ``None`` without a module, or where they depend on the input.
        params: number of parameters; ``None`` without a module.
    """

    name: str
    onnx_path: Path
    size_bytes: int
    input_shape: tuple[int | None, ...]
    folder: Path | None = None
    module: nn.Module | None = None
    no_module: str = NO_FOLDER
    macs: int | None = None
    params: int | None = None

    @property
    def runnable(self) -> RunnableModel:
        """The network in the forms that runtimes take."""
        return RunnableModel(self.onnx_path, self.module)


def read_networks(paths: Sequence[Path], *, model: str | None = None, device: str = "cpu") -> list[EvidenceNetwork]:
    """Reads networks from artefact folders and ONNX files.

    Args:
        model: how the original model of every folder is built, as for ``build_model``; by default what the folder says,
            if that is no code of somebody's own.
        device: where the modules run.

    Raises:
        ConfigError: nothing is there, a network is given twice, or it has other inputs than one of float32.
        ArtefactError: a folder is damaged.
        ModelError: a file is no ONNX.
    """
    names = _names(paths)
    return [_network(name, path, model, device) for name, path in names.items()]


def rebuilt(folder: Path, model: str | None = None) -> nn.Module:
    """Rebuilds the network that the ONNX file of an artefact folder computes, in eval mode on the CPU.

    Raises:
        ArtefactError: the folder does not say how, names code that was not asked for, or is damaged.
        ModelError, PlanError, WeightsError: the model cannot be built, or what lies in the folder does not fit it.
    """
    manifest = checked_manifest(folder, needed=(WEIGHTS,))
    spec = ModelSpec.load(folder)
    named = model or (spec.model if spec else None)
    if spec is None or named is None:
        raise ArtefactError(f"'{folder}' does not say how its model is built. Name it with --model.")
    if model is None and not _is_known(named):
        raise ArtefactError(
            f"'{folder}' names '{named}', and no folder decides what code is imported. If you trust that code, pass "
            f"--model {named}."
        )

    def build() -> nn.Module:
        assert spec is not None
        return build_model(named, num_classes=spec.num_classes, in_channels=spec.input_shape[1])

    with torch.random.fork_rng(devices=[]):  # weights are drawn, and then replaced
        if _metadata(folder / ONNX).get("flavour") and GATED in manifest.parts:
            return load_gated(build, folder).eval()
        if PLAN in manifest.parts:
            return load_pruned(build, folder).eval()
        dense = build()
    load_weights(dense, folder / WEIGHTS)
    return dense.eval()


def common_shape(networks: Sequence[EvidenceNetwork], batches: Sequence[int]) -> tuple[int | None, ...]:
    """Returns the input shape that all networks share, the first size being ``None`` where the batch is open.

    Raises:
        ConfigError: they differ, or one cannot be run at a batch size that was asked for.
    """
    first, *others = networks
    for other in others:
        if other.input_shape[1:] != first.input_shape[1:]:
            raise ConfigError(
                f"'{other.name}' takes inputs of {written(other.input_shape)}, but '{first.name}' of "
                f"{written(first.input_shape)}. Expected one input shape for all. Compare them in separate runs."
            )
    fixed = {network.input_shape[0]: network.name for network in networks if network.input_shape[0] is not None}
    for size, name in fixed.items():
        if set(batches) != {size}:
            raise ConfigError(
                f"'{name}' takes a batch of {size} only, but --batch is {', '.join(map(str, batches))}. Expected "
                f"--batch {size} alone. Ask for that, or export the network with an open batch."
            )
    return (next(iter(fixed), None), *first.input_shape[1:])


def written(shape: Sequence[int | None]) -> str:
    """Returns a shape as text, with ``N`` for an open size."""
    return "(" + ", ".join("N" if size is None else str(size) for size in shape) + ")"


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    """Returns the networks by names that are as short as they can be."""
    names: dict[str, Path] = {}
    last = [path.name for path in paths]
    for path in paths:
        if not path.is_dir() and not path.is_file():
            raise ConfigError(f"There is nothing at '{path}'. Expected an artefact folder or an ONNX file.")
        name = path.name if path.name and last.count(path.name) == 1 else str(path)
        if name in names:
            raise ConfigError(f"'{path}' was given twice, expected different networks. Name each of them once.")
        names[name] = path
    return names


def _network(name: str, path: Path, model: str | None, device: str) -> EvidenceNetwork:
    if not path.is_dir():
        return EvidenceNetwork(name, path, file_size_bytes(path), _input_shape(path))
    checked_manifest(path, needed=(ONNX,))
    file = path / ONNX
    shape = _input_shape(file)
    size = file_size_bytes(file)
    try:
        module = rebuilt(path, model)
    except NniPruneExtError as error:
        if model is not None:
            raise
        return EvidenceNetwork(name, file, size, shape, path, no_module=str(error).rstrip("."))
    sizes = [length or 1 for length in shape[1:]]
    gated = bool(_metadata(file).get("flavour"))
    costs = count_costs(module, torch.zeros(1, *sizes))
    macs = None if gated else costs.macs
    return EvidenceNetwork(name, file, size, shape, path, module.to(device), "", macs, costs.params)


def _is_known(model: str) -> bool:
    """Says whether a specification names a model of this package, torchvision or timm, and no other code or place."""
    library, colon, name = model.partition(":")
    if colon and library in _LIBRARIES:
        return not {":", "/"} & set(name)
    return model.removeprefix("cifar:") in builtin_names()


def _metadata(path: Path) -> dict[str, str]:
    """Returns what this package wrote about the origin of an ONNX file."""
    properties = _loaded(path).metadata_props
    return {entry.key.removeprefix(PREFIX): entry.value for entry in properties if entry.key.startswith(PREFIX)}


def _input_shape(path: Path) -> tuple[int | None, ...]:
    graph = _loaded(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [port.type.tensor_type for port in graph.input if port.name not in weights]
    if len(inputs) != 1 or inputs[0].elem_type != onnx.TensorProto.FLOAT:
        raise ConfigError(
            f"'{path}' has {len(inputs)} inputs, expected one of float32: that is what this command can make up. "
            "Measure other networks with nni_prune_ext.evaluation.measure_latency."
        )
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in inputs[0].shape.dim]
    if not sizes or None in sizes[1:]:
        raise ConfigError(
            f"The input of '{path}' is {written(sizes)}, expected only the first size to be open. Export the network "
            "with fixed image sizes."
        )
    return tuple(sizes)


def _loaded(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path), load_external_data=False)
    except (OSError, ValueError, _decode_error()) as error:
        raise ModelError(
            f"'{path}' cannot be read as ONNX ({error}). Expected what `nni-prune-ext export` makes."
        ) from error


def _decode_error() -> type[Exception]:
    """Returns what protobuf, which has no type hints, raises on a file of another kind."""
    error: type[Exception] = import_module("google.protobuf.message").DecodeError
    return error
