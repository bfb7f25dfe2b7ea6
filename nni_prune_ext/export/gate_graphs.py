"""Graphs of gated networks: with masks, for any batch and runtime, or computing the open filters alone, for one input.

Passes over ``onnx.ModelProto`` that turn the markers of an exported gated network (see `gate_markers`) into standard
ONNX. They return new models and leave the given one as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from nni_prune_ext.errors import ExportError
from nni_prune_ext.export.compact_layouts import CompactRewriter
from nni_prune_ext.export.gate_markers import (
    DOMAIN,
    Marker,
    check_sizes,
    is_marker,
    open_name,
    read_markers,
    write_mask,
)
from nni_prune_ext.export.graph_cleaning import constants_to_initializers, remove_identities
from nni_prune_ext.export.graph_index import GraphIndex, Shape, inferred_shapes, opset_of, remove_unused
from nni_prune_ext.export.graph_writer import GraphWriter
from nni_prune_ext.export.single_input import fix_batch, simplify


@dataclass(frozen=True)
class GatedLayer:
    """A gate of an exported network and the layer it belongs to.

    Attributes:
        name: Name of the gate.
        conv: Name of the convolution's node, or None if something else writes the gated value.
        channels: Number of channels.
        units: Number of units that open and close.
        block: Channels per unit, or None if units have different sizes.
        height: Height of the gated value, or None if it is open.
        width: Width of the gated value, or None if it is open.
        kernel: Kernel size of the convolution, or None if there is none.
        in_channels: Number of input channels, per group, of the convolution, or None if there is none.
        can_gather: Whether the open filters alone can be computed.
        reason: Why not, if they cannot.
    """

    name: str
    conv: str | None
    channels: int
    units: int
    block: int | None
    height: int | None
    width: int | None
    kernel: tuple[int, ...] | None
    in_channels: int | None
    can_gather: bool
    reason: str | None


def gated_layers(model: onnx.ModelProto) -> tuple[GatedLayer, ...]:
    """Returns the gates of an exported network in the order of its graph.

    Raises:
        ExportError: If a marker contradicts itself or its inputs.
    """
    _, markers, shapes = _masked(model)
    index = GraphIndex(model.graph)
    return tuple(_describe(marker, index, shapes) for marker in markers)


def mask_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the network with every gate as a multiplication with zeros and ones, for any batch and any runtime.

    It costs more time than the network without gates, and is the reference for `compact_form`.

    Raises:
        ExportError: If a marker contradicts itself or its inputs.
    """
    result, _, _ = _masked(model)
    return _finished(result)


def compact_form(model: onnx.ModelProto, gathered: Collection[str] | None = None) -> onnx.ModelProto:
    """Returns the network for one input at a time, with gated convolutions that compute their open filters alone.

    The outputs equal those of `mask_form` up to the rounding of float32, for every input with finite values.
    Between layers, tensors hold only the channels that are open; whatever cannot work on those gets all of them.

    Args:
        model: The exported network with markers, its batch size open or 1.
        gathered: Names of the gates whose filters are picked when the network runs; the others become masks.
            By default all for which that is possible. See `gated_layers`.

    Raises:
        ExportError: If a marker contradicts itself or its inputs, if the batch size is fixed to another number,
            if a gate in `gathered` does not exist or cannot be gathered, or if the network's sizes are not fixed.
    """
    single = _copy(model)
    constants_to_initializers(single)
    remove_identities(single)
    fix_batch(single)
    _, markers, shapes = _masked(single)
    chosen = _choose(markers, gathered)
    simplify(single.graph, shapes)
    # Nodes were replaced: the markers must refer to those that the graph has now.
    current = [marker for marker in read_markers(single.graph) if marker.name in chosen]
    CompactRewriter(single.graph, inferred_shapes(_masked(single)[0]), opset_of(single)).rewrite(current)
    return _finished(single)


def with_masks(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a mask form or compact form with what is open as further outputs, ``gate/<name>/open``, (N, U) bool."""
    result = _copy(model)
    shapes = inferred_shapes(model)
    prefix, suffix = open_name("\n").split("\n")
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    for node in model.graph.node:
        name = node.output[0]
        if name.startswith(prefix) and name.endswith(suffix):
            sizes = [batch.dim_param or batch.dim_value, *shapes.get(name, (None, None))[1:]]
            result.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, sizes))
    return result


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def _masked(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[Marker, ...], dict[str, Shape]]:
    """Returns the mask form, the markers that were in the model, and the shapes of the mask form's values."""
    result = _copy(model)
    markers = read_markers(result.graph)
    by_output = {marker.output: marker for marker in markers}
    writer = GraphWriter(result.graph)
    for node in result.graph.node:
        if is_marker(node):
            write_mask(writer, by_output[node.output[0]])
        else:
            writer.copy(node)
    writer.finish(result.graph)
    shapes = inferred_shapes(result)
    check_sizes(markers, shapes)
    return result, markers, shapes


def _finished(model: onnx.ModelProto) -> onnx.ModelProto:
    """Removes what a rewritten model no longer needs and lets onnx check it."""
    remove_unused(model.graph)
    for index in reversed(range(len(model.opset_import))):
        if model.opset_import[index].domain == DOMAIN:
            del model.opset_import[index]
    onnx.checker.check_model(model)
    return model


def _choose(markers: tuple[Marker, ...], gathered: Collection[str] | None) -> set[str]:
    possible = {marker.name for marker in markers if marker.conv is not None}
    if gathered is None:
        return possible
    refusals = {marker.name: marker.refusal for marker in markers}
    for name in gathered:
        if name not in possible:
            reason = refusals.get(name) or "there is no such gate"
            raise ExportError(
                f"The filters of gate '{name}' cannot be gathered: {reason}. Expected some of {sorted(possible)}. "
                "Leave it out; gates that are not gathered become masks."
            )
    return set(gathered)


def _describe(marker: Marker, index: GraphIndex, shapes: Mapping[str, Shape]) -> GatedLayer:
    sizes = np.bincount(marker.units)
    writer = index.writers.get(marker.features)
    conv = writer if writer is not None and writer.op_type == "Conv" else None
    weight = shapes.get(conv.input[1], ()) if conv is not None else ()
    height, width = shapes[marker.features][2:]
    return GatedLayer(
        name=marker.name,
        conv=conv.name if conv is not None else None,
        channels=len(marker.units),
        units=marker.num_units,
        block=int(sizes[0]) if len(set(sizes.tolist())) == 1 else None,
        height=height,
        width=width,
        kernel=tuple(size for size in weight[2:] if size is not None) if weight else None,
        in_channels=weight[1] if weight else None,
        can_gather=marker.refusal is None,
        reason=marker.refusal,
    )
