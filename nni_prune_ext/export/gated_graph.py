"""A gated network as one ONNX graph with markers where its gates are; see ``gate_markers`` for what becomes of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeAlias

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.errors import ExportError
from nni_prune_ext.export.exporters import export_graph
from nni_prune_ext.export.frozen_model import evaluation_mode, exportable_form
from nni_prune_ext.export.gate_markers import DOMAIN, OPERATOR, read_markers
from nni_prune_ext.export.model_call import as_call, named_leaves
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.heads import GateHead
from nni_prune_ext.graph.gate_places import GatePlace
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.inputs import ExampleInputs

_Attribute: TypeAlias = int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]


def marked_graph(network: GatedNetwork, example_inputs: ExampleInputs, *, opset: int = 18) -> onnx.ModelProto:
    """Returns the graph of a gated network, any batch size, with a marker per gate; the network is left as it was.

    Norms are folded into the convolutions in front of them, gated or not, so that filters can be picked from one
    weight; the numbers change by rounding only. Gates are called like their layers.

    Raises:
        ExportError: the network cannot be exported.
    """
    flow = trace_gate_flow(network.model, example_inputs)
    model = copy.deepcopy(network.model).eval()
    folded = {place.layer for place in flow.places if _fold(model, place)}
    for place, head in zip(network.gates.places, network.gates.all_heads()):
        _mark(model, place, head, folded=place.layer in folded)
    call = as_call(model, example_inputs)
    with evaluation_mode(model), exportable_form(model) as exportable:
        outputs = [name for name, _ in named_leaves(call.run(exportable), "output")]
        outputs = [f"{name}_" if name in call.named_tensors() else name for name in outputs]
        proto, _, _ = export_graph(
            exportable, call, outputs=outputs, exporter="dynamo", opset=opset, dynamic_batch=True
        )
    written = {marker.name for marker in read_markers(proto.graph)}
    lost = [place.layer for place in network.gates.places if place.layer not in written]
    if lost:
        raise ExportError(
            f"The gate of '{lost[0]}' is not in the exported graph, expected all {len(network.gates.places)} gates: "
            "its layer was not called as a module. Gate other layers, or call it as one."
        )
    return proto


def _fold(model: nn.Module, place: GatePlace) -> bool:
    """Folds the batch norm behind a convolution into it; says whether nothing but the convolution is left."""
    norm = model.get_submodule(place.point)
    if place.point == place.layer:
        return True
    layer = model.get_submodule(place.layer)
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or not isinstance(layer, nn.Conv2d):
        return False
    if not place.alone:
        return False
    _replace(model, layer, torch.nn.utils.fuse_conv_bn_eval(layer, norm))
    _replace(model, norm, nn.Identity())
    return True


def _mark(model: nn.Module, place: GatePlace, head: GateHead, *, folded: bool) -> None:
    """Puts the head in front of a layer and the marker behind its point."""
    layer, seen = model.get_submodule(place.layer), _Seen()
    if folded:
        _replace(model, layer, _MarkedLayer(layer, head, place.layer))
    else:
        point = model.get_submodule(place.point)
        _replace(model, layer, _Watched(layer, head, seen))
        _replace(model, point, _MarkedPoint(point, head, place.layer, seen))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another, under all of its names."""
    holders = [(parent, name) for parent in model.modules() for name, own in parent._modules.items() if own is old]
    for parent, name in holders:
        parent._modules[name] = new.eval()


class _ExportedHead(nn.Module):
    """A head in the operations that runtimes are quick at; the virtual input is there only if it stands for any."""

    def __init__(self, head: GateHead) -> None:
        super().__init__()
        count = float(head.removed) if head.softmax else 0.0
        self.pool, self.softmax = head.pool, head.softmax
        weight = head.weight.detach() if head.softmax else head.weight.detach() * head.scale
        self.weight = nn.Parameter(weight.clone() if count else weight[:, :-1].clone())
        self.bias = nn.Parameter(head.bias.detach().clone())
        self.virtual: Tensor | None
        self.register_buffer("virtual", head.removed.log().reshape(1, 1) if count else None)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits ``(N, U)``."""
        operator = "GlobalMaxPool" if self.pool == "max" else "GlobalAveragePool"  # ORT has both in its own layout
        pooled = _standard(operator, x, (*x.shape[:2], 1, 1)).flatten(1)
        if self.virtual is not None:
            pooled = torch.cat([pooled, self.virtual.expand(pooled.shape[0], 1)], 1)
        return functional.linear(pooled.softmax(1) if self.softmax else pooled, self.weight, self.bias)


class _MarkedLayer(nn.Module):
    """A convolution whose output is marked as gated by a head that reads its input."""

    def __init__(self, layer: nn.Module, head: GateHead, name: str) -> None:
        super().__init__()
        self.layer, self.head, self.name, self.units = layer, _ExportedHead(head), name, head.units.tolist()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the marked output."""
        return _marker(self.layer(x), self.head(x), self.name, self.units)


class _Seen:
    """What a head has said in this forward pass; no module, so that exporters do not look for it."""

    logits: Tensor | None = None


class _Watched(nn.Module):
    """A convolution in front of which a head looks, where a norm that cannot be folded follows."""

    def __init__(self, layer: nn.Module, head: GateHead, seen: _Seen) -> None:
        super().__init__()
        self.layer, self.head, self.seen = layer, _ExportedHead(head), seen

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the convolution."""
        self.seen.logits = self.head(x)
        result: Tensor = self.layer(x)
        return result


class _MarkedPoint(nn.Module):
    """The norm behind such a convolution, whose output is marked."""

    def __init__(self, norm: nn.Module, head: GateHead, name: str, seen: _Seen) -> None:
        super().__init__()
        self.norm, self.name, self.units, self.seen = norm, name, head.units.tolist(), seen

    def forward(self, x: Tensor) -> Tensor:
        """Returns the marked output."""
        logits = self.seen.logits
        assert logits is not None, "the convolution runs before its norm"
        return _marker(self.norm(x), logits, self.name, self.units)


def _standard(operator: str, x: Tensor, shape: Sequence[int | torch.SymInt]) -> Tensor:
    """Returns the result of a standard operator that PyTorch would write as several."""
    made: Tensor = torch.onnx.ops.symbolic(operator, (x,), {}, dtype=x.dtype, shape=shape)
    return made


def _marker(x: Tensor, logits: Tensor, name: str, units: list[int]) -> Tensor:
    attributes: dict[str, _Attribute] = {"name": name, "units": units}
    try:
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATOR}", (x, logits), attributes, dtype=x.dtype, shape=x.shape, version=1
        )
    except AttributeError as error:
        raise ExportError(
            f"This PyTorch ({torch.__version__}) has no torch.onnx.ops.symbolic, with which gates are written. "
            "Expected version 2.8 or later. Update torch."
        ) from error
    return marked
