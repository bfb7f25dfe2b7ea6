"""The networks of a measurement: ONNX files, and artefact folders that hold the same network for PyTorch, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ArtefactError, NniPruneExtError
from nni_prune_ext.evaluation import file_size_bytes
from nni_prune_ext.export import onnx_inputs
from nni_prune_ext.export.artefact_folder import GATED, ONNX, PLAN, WEIGHTS, ModelSpec
from nni_prune_ext.export.artefact_loading import load_gated, load_pruned
from nni_prune_ext.export.manifest import checked_manifest
from nni_prune_ext.export.onnx_inputs import Shape
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
    input_shape: Shape
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
    return [_network(name, path, model, device) for name, path in onnx_inputs.named_networks(paths).items()]


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


def common_shape(networks: Sequence[EvidenceNetwork], batches: Sequence[int]) -> Shape:
    """Returns the input shape that all networks share; errors are those of ``onnx_inputs.common_shape``."""
    return onnx_inputs.common_shape({network.name: network.input_shape for network in networks}, batches)


def _network(name: str, path: Path, model: str | None, device: str) -> EvidenceNetwork:
    if not path.is_dir():
        return EvidenceNetwork(name, path, file_size_bytes(path), onnx_inputs.input_shape(path))
    file = onnx_inputs.onnx_file(path)
    shape = onnx_inputs.input_shape(file)
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
    properties = onnx_inputs.loaded_graph(path).metadata_props
    return {entry.key.removeprefix(PREFIX): entry.value for entry in properties if entry.key.startswith(PREFIX)}
