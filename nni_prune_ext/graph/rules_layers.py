"""What layers do to channel labels: convolutions, linear layers, embeddings, normalisations, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
from torch import Tensor

from nni_prune_ext.graph.label_book import Labels, Role
from nni_prune_ext.graph.tracing import (
    Arguments,
    ChannelTracer,
    Keywords,
    argument,
    numpy_labels,
    rule,
    tensor_argument,
)

Function = Callable[..., object]


@rule("conv1d", "conv2d", "conv3d")
def _convolution(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    x, weight, bias = (tensor_argument(args, kwargs, i, n) for i, n in enumerate(("input", "weight", "bias")))
    assert x is not None
    assert weight is not None
    assert isinstance(out, Tensor)
    groups = cast("int", argument(args, kwargs, 6, "groups", 1))
    channel_dim = x.dim() - weight.dim() + 1
    name = t.name_of(weight)
    if name is None:
        t.freeze_arguments((args, dict(kwargs)), f"the weight of {t.place} is computed in its forward")
        return
    read = t.vector(x, channel_dim, "a convolution")
    width = x.shape[channel_dim]
    if groups == 1:
        _read(t, name, 1, read)
        written = t.book.written(name, 0, weight.shape[0])
    elif groups == width:
        if read is None:
            return
        written = np.repeat(read, weight.shape[0] // width)
        t.book.bind(name, 0, Role.DEPTHWISE, written, t.place)
    else:
        if read is not None:
            _tie_rows(t, read.reshape(groups, -1))
            _read(t, name, 1, read[: width // groups])
        written = t.book.written(name, 0, weight.shape[0])
        _tie_rows(t, written.reshape(groups, -1))
    _bias(t, bias, written)
    t.set_vector(out, written, channel_dim)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed_convolution(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    x, weight, bias = (tensor_argument(args, kwargs, i, n) for i, n in enumerate(("input", "weight", "bias")))
    assert x is not None
    assert weight is not None
    assert isinstance(out, Tensor)
    groups = cast("int", argument(args, kwargs, 6, "groups", 1))
    channel_dim = x.dim() - weight.dim() + 1
    name = t.name_of(weight)
    depthwise = groups == x.shape[channel_dim] and weight.shape[1] == 1
    if name is None:
        t.freeze_arguments((args, dict(kwargs)), f"the weight of {t.place} is computed in its forward")
        return
    if groups > 1 and not depthwise:
        reason = f"transposed convolution {t.place} has groups"
        t.freeze_arguments((args, dict(kwargs)), reason)
        t.book.freeze(t.book.written(name, 1, weight.shape[1]), reason)
        return
    read = t.vector(x, channel_dim, "a transposed convolution")
    if depthwise:
        if read is None:
            return
        written = read
        t.book.bind(name, 0, Role.DEPTHWISE, written, t.place)
    else:
        _read(t, name, 0, read)
        written = t.book.written(name, 1, weight.shape[1])
    _bias(t, bias, written)
    t.set_vector(out, written, channel_dim)


@rule("linear")
def _linear(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    x, weight, bias = (tensor_argument(args, kwargs, i, n) for i, n in enumerate(("input", "weight", "bias")))
    assert x is not None
    assert weight is not None
    assert isinstance(out, Tensor)
    name = t.name_of(weight)
    if name is None:
        t.freeze_arguments((args, dict(kwargs)), f"the weight of {t.place} is computed in its forward")
        return
    _read(t, name, 1, t.vector(x, -1, "a linear layer"))
    written = t.book.written(name, 0, weight.shape[0])
    _bias(t, bias, written)
    t.set_vector(out, written, out.dim() - 1)


@rule("embedding")
def _embedding(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    weight = tensor_argument(args, kwargs, 1, "weight")
    name = t.name_of(weight)
    if weight is None or name is None or not isinstance(out, Tensor):
        t.freeze_arguments((args, dict(kwargs)), f"the embedding table of {t.place} is computed in its forward")
        return
    t.set_vector(out, t.book.written(name, 1, weight.shape[1]), out.dim() - 1)


@rule("batch_norm", "instance_norm")
def _norm_per_channel(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    x = tensor_argument(args, kwargs, 0, "input")
    assert x is not None
    _bind_norm(t, x, args, kwargs, ("running_mean", "running_var", "weight", "bias"), out)


@rule("group_norm")
def _group_norm(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    x = tensor_argument(args, kwargs, 0, "input")
    groups = cast("int", argument(args, kwargs, 1, "num_groups"))
    assert x is not None
    read = t.vector(x, 1, "a group norm")
    if read is not None and groups < x.shape[1]:
        _tie_rows(t, read.reshape(groups, -1))
        _need_scale(t, tensor_argument(args, kwargs, 2, "weight"), t.labels_of(x))
    _bind_norm(t, x, args, kwargs, ("", "weight", "bias"), out)


@rule("layer_norm", "rms_norm")
def _layer_norm(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    x, weight = tensor_argument(args, kwargs, 0, "input"), tensor_argument(args, kwargs, 2, "weight")
    bias = tensor_argument(args, kwargs, 3, "bias") if getattr(func, "__name__", "") == "layer_norm" else None
    shape = cast("tuple[int, ...]", argument(args, kwargs, 1, "normalized_shape"))
    assert x is not None
    assert isinstance(out, Tensor)
    labels = t.labels_of(x)
    if labels is None:
        return
    over = [dim for dim in range(x.dim() - len(shape), x.dim()) if t.varies(labels, dim)]
    if len(over) > 1:
        t.freeze(labels, f"the norm {t.place} sees channels in more than one dimension")
        return
    if over:
        _need_scale(t, weight, labels)
        read = t.vector(x, over[0], "a layer norm")
        for parameter in (weight, bias):
            name = t.name_of(parameter)
            if name is not None and read is not None:
                t.book.bind(name, over[0] - x.dim() + len(shape), Role.NORM, read, t.place)
    t.set_labels(out, labels)


@rule("prelu")
def _prelu(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    x, weight = tensor_argument(args, kwargs, 0, "input"), tensor_argument(args, kwargs, 1, "weight")
    assert x is not None
    assert weight is not None
    if weight.numel() > 1:
        read = t.vector(x, 1, "a PReLU")
        name = t.name_of(weight)
        if read is not None and name is not None:
            t.book.bind(name, 0, Role.PARAMETER, read, t.place)
    t.set_labels(out, t.labels_of(x))


@rule("channel_select")
def _channel_select(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    x, selection = args[0], args[1]
    assert isinstance(x, Tensor)
    assert isinstance(selection, Tensor)
    name = t.name_of(selection)
    assert name is not None
    _read(t, name, 1, t.vector(x, 1, "a shortcut"))
    t.set_vector(out, t.book.written(name, 0, selection.shape[0]), 1)


@rule(
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "mm",
    "bmm",
    "einsum",
    "scaled_dot_product_attention",
    "baddbmm",
    "addmm",
    "multi_head_attention_forward",
)
def _product_of_activations(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    t.freeze_arguments((args, dict(kwargs)), f"a matrix product in {t.place} mixes channels (attention)")


def _read(t: ChannelTracer, name: str, dim: int, labels: Labels | None) -> None:
    if labels is not None:
        t.book.bind(name, dim, Role.CONSUMER, labels, t.place)


def _bias(t: ChannelTracer, bias: Tensor | None, written: Labels) -> None:
    if bias is None:
        return
    name = t.name_of(bias)
    if name is not None:
        t.book.bind(name, 0, Role.BIAS, written, t.place)
        return
    labels = t.labels_of(bias)
    if labels is None:
        t.book.freeze(written, f"the bias of {t.place} is computed in its forward")
    else:
        t.book.merge(written, numpy_labels(labels), f"the bias of {t.place} is computed in its forward")


def _bind_norm(
    t: ChannelTracer, x: Tensor, args: Arguments, kwargs: Keywords, names: tuple[str, ...], out: object
) -> None:
    read = t.vector(x, 1, "a norm")
    if read is None:
        return
    for position, key in enumerate(names, start=1):
        parameter = tensor_argument(args, kwargs, position, key) if key else None
        name = t.name_of(parameter)
        if parameter is not None and name is None:
            t.book.freeze(read, f"the {key} of {t.place} is computed in its forward")
        elif name is not None:
            t.book.bind(name, 0, Role.NORM, read, t.place)
    t.set_vector(out, read, 1)


def _need_scale(t: ChannelTracer, weight: Tensor | None, labels: Tensor | None) -> None:
    """Protects channels under a norm whose survivors cannot be told by the channels of its scale."""
    if weight is None or t.name_of(weight) is None:
        t.freeze(labels, f"a norm over channels without its own scale in {t.place} cannot be checked")


def _tie_rows(t: ChannelTracer, rows: Labels) -> None:
    for row in rows[1:]:
        t.book.merge(rows[0], row, f"a channel of {t.place} has no partner in its group")
