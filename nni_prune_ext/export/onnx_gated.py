"""Writes a gated network as ONNX, in flavours that differ in who can run them and whether they are faster.

* ``mask``: gates multiply. Any batch size and any runtime; nothing is saved, it is slower than without gates. The
  reference.
* ``compact``: a gated layer computes its open filters only, and what reads them reads these only. Standard ONNX for one
  image at a time, for ONNX Runtime on the CPU.

Both compute what the masked PyTorch network computes. Measured: single filters gain less than blocks of filters, small
layers lose, a layer that fires more often than its break-even rate loses (see docs/explanation/dynamic_onnx.md). Layers
that do not gain are masked, or, if asked for, no longer gated at all (``fold``): then the file computes another
function, that of ``network.without(layers)``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx
import torch
from torch import Tensor

from nni_prune_ext.errors import ConfigError, ExportError, ParityError
from nni_prune_ext.export.gate_graphs import GatedLayer, compact_form, gated_layers, mask_form
from nni_prune_ext.export.gated_graph import marked_graph
from nni_prune_ext.export.gated_parity import AGREEMENT, GatedParity, check_gated_parity
from nni_prune_ext.export.onnx_static import published
from nni_prune_ext.export.parity import FAIL
from nni_prune_ext.export.provenance import provenance
from nni_prune_ext.export.single_input import fix_batch
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import ExampleInputs, tensors_in
from nni_prune_ext.specs import did_you_mean

Flavour = Literal["mask", "compact"]

_NOTHING_GATHERED = "one image at a time, and no layer gains from computing its open filters only: all gates are masks"
_OWN_PROPERTIES = frozenset({"flavour", "speed", "limits", "gathered", "folded"})
SMALLEST_GAIN = 0.1
"""By how much the firing rate of a layer must stay below its break-even rate."""
SMALLEST_LAYER_MACS = 2_500_000
"""Layers below this lose whatever fires: their nodes cost more than their arithmetic."""

LIMITS: Mapping[Flavour, str] = {
    "mask": "computes every filter and multiplies: no faster than the network without gates, on no runtime",
    "compact": "one image at a time; on CUDA, NonZero stops at the host in every gated layer and convolutions are "
    "planned anew for every width; TensorRT and CUDA graphs cannot run it",
}
"""What a flavour cannot do; said at export and written into the file."""


@dataclass(frozen=True)
class GatedExport:
    """A written ONNX file of a gated network.

    Attributes:
        path: the file.
        flavour: how its gates work.
        gathered: gated layers that compute their open filters only.
        masked: gated layers that compute everything and multiply, each with the reason.
        folded: layers that are no longer gated; the file is then another function than the network given.
        network: what the file computes: the network given, or without the folded gates.
        parity: the comparison with that network; ``None`` without images.
        limits: what this flavour cannot do.
        size_bytes: of the file.
        break_even: gated layers whose open filters alone can be computed → the firing rate below which that is faster.
    """

    path: Path
    flavour: Flavour
    gathered: tuple[str, ...]
    masked: Mapping[str, str]
    folded: tuple[str, ...]
    network: GatedNetwork
    parity: GatedParity | None
    limits: str
    size_bytes: int
    break_even: Mapping[str, float] = field(default_factory=dict)


def export_gated(
    network: GatedNetwork,
    example_inputs: ExampleInputs,
    path: Path,
    *,
    flavour: Flavour = "compact",
    images: Tensor | None = None,
    gathered: Collection[str] | Literal["all"] | None = None,
    fold: bool = False,
    dynamic_batch: bool | None = None,
    opset: int = 18,
    properties: Mapping[str, str] | None = None,
    fail: float = FAIL,
) -> GatedExport:
    """Writes a gated network as ONNX and compares it with PyTorch; the network is left as it was.

    Args:
        network: with one image tensor as its input.
        path: where the file goes; an older one is replaced only by a complete and checked one.
        flavour: see the module's docstring.
        images: real images ``(N, C, H, W)``, 64 or more: masks and outputs are compared on them, and firing rates for
            the choice of layers come from them.
        gathered: layers that compute their open filters only; by default those whose firing rate on the images is below
            their break-even rate (all that can be, without images); ``all`` takes whatever can be.
        fold: layers that are not gathered are no longer gated; the file is another function then.
        dynamic_batch: leave the batch size open; by default wherever the flavour can. Without, it is 1.
        opset: ONNX operator set.
        properties: further metadata for the file, without prefix.
        fail: largest relative difference to PyTorch that passes where masks agree.

    Raises:
        ConfigError: an open batch size is asked for where the flavour has none, or options do not fit together.
        ExportError: the network cannot be written.
        ParityError: masks or outputs differ from PyTorch's; no file is left.
        OutputError: the file cannot be written.
    """
    _check(flavour, gathered, fold, images, properties or {})
    if flavour == "compact" and dynamic_batch:
        raise ConfigError(
            "An open batch size was asked for with the flavour compact, which runs one image at a time: the images of "
            "a batch need different filters. Leave dynamic_batch out, or export the flavour mask."
        )
    marked = marked_graph(network, example_inputs, opset=opset)
    layers = gated_layers(marked)
    if gathered is not None and gathered != "all":
        _check_names(gathered, [own.name for own in layers])
    left_out: dict[str, str] = {own.name: "the flavour is mask" for own in layers}
    if flavour == "compact":
        rates = None if images is None else firing_rates(network, images)
        left_out = dict(_left_out(layers, rates, gathered))
    folded = tuple(left_out) if fold else ()
    if folded and len(folded) == len(layers):
        raise ConfigError(
            f"No layer gains from its gate ({next(iter(left_out.values()))}): with fold there would be no gate left, "
            "expected one that stays. Export the static core with export_onnx(network.model, …), or leave fold out."
        )
    if folded:
        network = network.without(folded)
        marked = marked_graph(network, example_inputs, opset=opset)
    chosen = tuple(own.name for own in layers if own.name not in left_out)
    graph = mask_form(marked) if flavour == "mask" else compact_form(marked, chosen)
    if flavour == "mask" and dynamic_batch is False:
        fix_batch(graph)
    limits = LIMITS[flavour] if flavour == "mask" or chosen else _NOTHING_GATHERED
    written = {
        "flavour": flavour,
        "speed": "one image at a time on ONNX Runtime CPU" if flavour == "compact" and chosen else "none",
        "limits": limits,
        "gathered": ", ".join(chosen) if flavour == "compact" else "",
        "folded": ", ".join(folded),
        **(properties or {}),
    }
    inputs = {graph.graph.input[0].name: one_image_tensor(example_inputs)}
    onnx.helper.set_model_props(graph, provenance(network, inputs, opset=opset, exporter="dynamo", extra=written))
    parity = None
    if images is not None:
        batch = None if flavour == "mask" else 1
        parity = check_gated_parity(network, graph, images, batch_size=batch, fail=fail)
        _require(parity)
    masked = {} if fold else left_out
    size = published(graph, Path(path), network)
    bounds = {own.name: break_even(own) for own in layers if own.can_gather}
    return GatedExport(Path(path), flavour, chosen, masked, folded, network, parity, limits, size, bounds)


def _check(
    flavour: str,
    gathered: Collection[str] | Literal["all"] | None,
    fold: bool,
    images: Tensor | None,
    properties: Mapping[str, str],
) -> None:
    """Refuses options that do not fit together.

    Raises:
        ConfigError: with the one that does not.
    """
    if flavour not in LIMITS:
        raise ConfigError(f"The flavour is '{flavour}', expected {' or '.join(LIMITS)}. Choose one of these.")
    if flavour == "mask" and (fold or gathered is not None):
        raise ConfigError(
            "The flavour mask gathers and folds nothing, but layers to gather or fold were given, expected none. Leave "
            "gathered and fold out, or ask for compact."
        )
    if images is not None and not len(images):
        raise ConfigError("There are 0 images to compare on, expected 64 or more. Pass real images (N, C, H, W).")
    taken = sorted(_OWN_PROPERTIES & properties.keys())
    if taken:
        raise ConfigError(
            f"The property '{taken[0]}' was given, but the export writes it. Expected other names than "
            f"{', '.join(sorted(_OWN_PROPERTIES))}. Rename it."
        )


def _check_names(gathered: Collection[str], layers: Sequence[str]) -> None:
    """Refuses names to gather that are no gated layers.

    Raises:
        ConfigError: with the first of them.
    """
    if isinstance(gathered, str):
        raise ConfigError(
            f"The layers to gather are the text '{gathered}', expected a list of names, or 'all'. Pass ['{gathered}']."
        )
    unknown = [name for name in gathered if name not in layers]
    if unknown:
        raise ConfigError(
            f"There is no gated layer '{unknown[0]}' to gather.{did_you_mean(unknown[0], list(layers))} Expected some "
            f"of {', '.join(layers[:5])}{', …' if len(layers) > 5 else ''}. Correct the name."
        )


def firing_rates(network: GatedNetwork, images: Tensor) -> dict[str, float]:
    """Returns layer → share of its filters that are open, mean over the images."""
    with untouched(network), torch.no_grad():
        device, sums = next(network.parameters()).device, dict[str, float]()
        for part in images.split(64):  # type: ignore[no-untyped-call]
            network(part.to(device))
            for layer, own in network.gates.open_channels().items():
                sums[layer] = sums.get(layer, 0.0) + float(own.float().mean(1).sum())
    network.gates.forget()
    return {layer: total / len(images) for layer, total in sums.items()}


def break_even(layer: GatedLayer) -> float:
    """Returns the firing rate (0–1) below which computing the open filters only is faster, by measurement.

    Measured on ONNX Runtime 1.31 with AVX-512, one thread: chains of four equal layers against the network without
    gates, which runs in the runtime's blocked layout. Other machines differ; ``gated_deployment.fastest`` measures.
    """
    pixels = (layer.height or 0) * (layer.width or 0)
    if layer.kernel == (1, 1):
        return 0.77 if layer.block and layer.block > 1 else 0.52
    if layer.block and layer.block > 1:
        return 0.75 if pixels >= 16 else 0.56
    return 0.75 if pixels >= 196 else 0.64 if pixels >= 49 else 0.37


def _left_out(
    layers: Collection[GatedLayer], rates: Mapping[str, float] | None, gathered: Collection[str] | Literal["all"] | None
) -> list[tuple[str, str]]:
    """Returns the layers that are not gathered, and why."""
    result = []
    for own in layers:
        if not own.can_gather:
            result.append((own.name, own.reason or "its filters cannot be computed one by one"))
        elif gathered == "all":
            continue
        elif gathered is not None:
            if own.name not in gathered:
                result.append((own.name, "it was not asked for"))
        elif rates is not None:
            result += [(own.name, reason) for reason in _does_not_pay(own, rates[own.name])]
    return result


def _does_not_pay(layer: GatedLayer, rate: float) -> list[str]:
    macs = (layer.height or 0) * (layer.width or 0) * layer.channels * (layer.in_channels or 0)
    macs *= 1 if layer.kernel is None else layer.kernel[0] * layer.kernel[1]
    if macs < SMALLEST_LAYER_MACS:
        return [f"it has {macs / 1e6:.2f} M MACs only"]
    bound = break_even(layer) - SMALLEST_GAIN
    return [] if rate < bound else [f"it fires at {rate:.2f}, and gains below {bound:.2f} only"]


def one_image_tensor(example_inputs: ExampleInputs) -> Tensor:
    """Returns the only tensor among example inputs.

    Raises:
        ExportError: there is another number of them.
    """
    found = list(tensors_in(example_inputs))
    if len(found) != 1:
        raise ExportError(
            f"The gated network has {len(found)} input tensors, expected one image tensor. Wrap it in a module that "
            "takes one."
        )
    return found[0]


def _require(parity: GatedParity) -> None:
    if not parity.passed:
        raise ParityError(
            f"The ONNX file does not compute what the gated network computes: {parity.agreement:.5f} of the mask bits "
            f"agree (expected {AGREEMENT} or more), and where all do (on {parity.compared} of {parity.images} images) "
            f"outputs differ by {parity.max_rel:.3g} (expected {parity.fail:g} or less). The file was not kept. Export "
            "the flavour mask, and report this network."
        )
