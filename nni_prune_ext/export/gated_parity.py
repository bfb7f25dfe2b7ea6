"""Compares an ONNX file of a gated network with the masked PyTorch network, or another file: masks first, then outputs.

A mask hangs on a threshold: a difference of 1e-6 in a logit can switch a filter, and then outputs differ with good
reason. So outputs are compared where all masks agree, and how often they agree is a figure of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from nni_prune_ext.errors import ConfigError, ExportError
from nni_prune_ext.export.gate_graphs import with_masks
from nni_prune_ext.export.gate_markers import open_name
from nni_prune_ext.export.parity import onnxruntime_errors
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import tensors_in

AGREEMENT = 0.999
"""Smallest share of mask bits that must agree."""

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class GatedParity:
    """How far an ONNX file is from the masked PyTorch network.

    Attributes:
        images: how many were compared.
        bits: mask bits over all images and layers.
        agreement: share of the bits that agree, 0–1.
        compared: images on which all bits agree.
        max_rel: largest ``max|difference| / max|output|`` on these.
        firing_rate: share of the bits that are open in the reference: 0–1 alone would prove little.
        fail: largest ``max_rel`` that passes.
        passed: whether enough bits agree, some image could be compared, and outputs are close.
    """

    images: int
    bits: int
    agreement: float
    compared: int
    max_rel: float
    firing_rate: float
    fail: float
    passed: bool

    def to_dict(self) -> dict[str, object]:
        """Returns the report as JSON-ready values."""
        return asdict(self)


def check_gated_parity(
    network: GatedNetwork, graph: onnx.ModelProto, images: Tensor, *, batch_size: int | None, fail: float
) -> GatedParity:
    """Runs network and graph on the same images; the network is left as it was.

    Args:
        graph: a mask form or compact form, with one input.
        images: ``(N, C, H, W)``, real ones.
        batch_size: images per call; ``None`` gives all at once.
        fail: largest relative difference that passes.

    Raises:
        ExportError: the graph does not run.
    """
    layers = [place.layer for place in network.gates.places]
    if not layers:
        raise ConfigError(
            "The network has no gate left, expected one at least: there are no masks to compare. Export it as a plain "
            "network: export_onnx(network.model, …)."
        )
    if not len(images):
        raise ConfigError("There are 0 images to compare on, expected 64 or more. Pass real images (N, C, H, W).")
    parts = images.split(len(images) if batch_size is None else batch_size)  # type: ignore[no-untyped-call]
    expected, masks = _reference(network, parts)
    made = run_graph(with_masks(graph), [part.cpu().numpy() for part in parts])
    opened = {open_name(layer): own for layer, own in masks.items()}
    return _parity(expected, opened, [own for name, own in made.items() if name not in opened], made, fail)


def compare_gated_graphs(
    reference: onnx.ModelProto, graph: onnx.ModelProto, parts: Sequence[Array], *, fail: float
) -> GatedParity:
    """Runs two graphs of one gated network, with gates of the same names, on the same images.

    Args:
        reference: a mask form or compact form, with one input.
        graph: the other one.
        parts: what goes in at a time, ``(N, C, H, W)``.
        fail: largest relative difference that passes.

    Raises:
        ExportError: a graph does not run, or has no gate.
    """
    expected, made = (run_graph(with_masks(own), parts) for own in (reference, graph))
    prefix, suffix = open_name("\n").split("\n")
    masks = {name: own for name, own in expected.items() if name.startswith(prefix) and name.endswith(suffix)}
    if not masks:
        raise ExportError(
            "The graph has no gate, expected one at least: there are no masks to compare. Give the file of a gated "
            "network."
        )
    outputs, others = ([own for name, own in all_of.items() if name not in masks] for all_of in (expected, made))
    return _parity(outputs, masks, others, made, fail)


def _parity(
    expected: Sequence[Array],
    masks: Mapping[str, Array],
    outputs: Sequence[Array],
    made: Mapping[str, Array],
    fail: float,
) -> GatedParity:
    """Compares outputs and, by the names of their values, masks; ``made`` holds the other masks."""
    agreeing = {name: made[name] == own for name, own in masks.items()}
    same = np.asarray(np.stack([own.all(axis=1) for own in agreeing.values()]).all(axis=0))
    bits = sum(own.size for own in masks.values())
    agreement = sum(int(own.sum()) for own in agreeing.values()) / bits
    worst = max((_relative(one[same], other[same]) for one, other in zip(expected, outputs)), default=0.0)
    return GatedParity(
        images=same.size,
        bits=bits,
        agreement=agreement,
        compared=int(same.sum()),
        max_rel=worst,
        firing_rate=sum(int(own.sum()) for own in masks.values()) / bits,
        fail=fail,
        passed=agreement >= AGREEMENT and bool(same.any()) and worst <= fail,
    )


def _reference(network: GatedNetwork, parts: Sequence[Tensor]) -> tuple[list[Array], dict[str, Array]]:
    """Returns outputs and masks of PyTorch, image by image where the graph runs so."""
    outputs: list[list[Tensor]] = []
    masks: dict[str, list[Tensor]] = {}
    with untouched(network), torch.no_grad():
        for part in parts:
            outputs.append(list(tensors_in(network(part.to(next(network.parameters()).device)))))
            for layer, own in network.gates.opened.items():
                masks.setdefault(layer, []).append(own)
    network.gates.forget()
    return (
        [torch.cat(own).cpu().numpy() for own in zip(*outputs)],
        {layer: torch.cat(own).cpu().numpy() for layer, own in masks.items()},
    )


def run_graph(graph: onnx.ModelProto, parts: Sequence[Array]) -> dict[str, Array]:
    """Returns name → output of a graph with one input, for all parts one behind the other, on ONNX Runtime's CPU.

    Raises:
        ExportError: the graph does not run.
    """
    onnxruntime = importlib.import_module("onnxruntime")  # not at the top: it is heavy
    try:
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        port = session.get_inputs()[0].name
        rows = [session.run(None, {port: part}) for part in parts]
    except onnxruntime_errors() as error:
        raise ExportError(
            f"ONNX Runtime does not run the gated graph: {str(error).splitlines()[0]}. Expected a graph for images of "
            f"shape {parts[0].shape}. Export with the example inputs that the network was built with."
        ) from error
    names = [output.name for output in session.get_outputs()]
    return {name: np.concatenate([row[k] for row in rows]) for k, name in enumerate(names)}


def _relative(expected: Array, found: Array) -> float:
    one, other = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if not one.size:
        return 0.0
    if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
        return float("inf")
    return float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-30))
