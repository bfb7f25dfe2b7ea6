"""What element-wise, spatial and reducing operations do to channel labels.

Tensors that are combined element by element must keep the same channels, so their labels are merged. Pooling and
resizing keep channels; reducing over channels protects them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.tracing import (
    Arguments,
    ChannelTracer,
    Keywords,
    argument,
    numpy_labels,
    rule,
)
from nni_prune_ext.inputs import tensors_in

Function = Callable[..., object]

_BINARY = (
    "add",
    "sub",
    "mul",
    "div",
    "true_divide",
    "divide",
    "multiply",
    "subtract",
    "pow",
    "floor_divide",
    "remainder",
    "fmod",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
)
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "and", "or", "xor")


@rule(
    *_BINARY,
    *(f"{name}_" for name in _BINARY),
    *(f"__{name}__" for name in _OPERATORS),
    *(f"__r{name}__" for name in _OPERATORS),
    *(f"__i{name}__" for name in _OPERATORS),
    "rsub",
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "lerp",
    "lerp_",
    "where",
    "addcmul",
    "addcdiv",
    "addcmul_",
    "addcdiv_",
    "masked_fill",
    "masked_fill_",
    "atan2",
    "hypot",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "greater",
    "less",
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "clamp",
    "clamp_",
    "clamp_min",
    "clamp_max",
    "clamp_min_",
    "clamp_max_",
    "clip",
    "isclose",
)
def _combine(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    if not isinstance(out, Tensor):
        t.freeze_arguments((args, dict(kwargs)), f"values of channels become indices in {t.place}")
        return
    operands = [x for x in tensors_in((args, dict(kwargs))) if x.dim() <= out.dim()]
    t.set_labels(out, combined(t, operands, out.shape))


@rule(
    "relu",
    "relu_",
    "relu6",
    "gelu",
    "silu",
    "silu_",
    "mish",
    "sigmoid",
    "sigmoid_",
    "tanh",
    "tanh_",
    "hardswish",
    "hardswish_",
    "hardsigmoid",
    "hardsigmoid_",
    "hardtanh",
    "hardtanh_",
    "leaky_relu",
    "leaky_relu_",
    "elu",
    "elu_",
    "selu",
    "celu",
    "softplus",
    "softsign",
    "tanhshrink",
    "hardshrink",
    "softshrink",
    "logsigmoid",
    "rrelu",
    "threshold",
    "threshold_",
    "exp",
    "exp_",
    "log",
    "log1p",
    "sqrt",
    "rsqrt",
    "square",
    "abs",
    "neg",
    "__neg__",
    "sin",
    "cos",
    "erf",
    "reciprocal",
    "sign",
    "floor",
    "ceil",
    "round",
    "nan_to_num",
    "isnan",
    "isfinite",
    "logical_not",
    "__invert__",
    "__abs__",
    "__pos__",
    "dropout",
    "dropout_",
    "feature_dropout",
    "alpha_dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "to",
    "type",
    "type_as",
    "float",
    "half",
    "double",
    "bfloat16",
    "int",
    "long",
    "bool",
    "cpu",
    "cuda",
    "contiguous",
    "clone",
    "detach",
    "detach_",
    "requires_grad_",
    "zero_",
    "fill_",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "get data",
    "get real",
    "positive",
    "alias",
    "logit",
    "expm1",
    "bernoulli",
    "bernoulli_",
    "div_scalar",
)
def _keep(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    source = cast("Tensor", args[0] if args else kwargs["input"])
    labels = t.labels_of(source)
    for tensor in tensors_in(out):
        t.set_labels(tensor, labels if labels is not None and labels.shape == tensor.shape else None)


@rule(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "lp_pool1d",
    "lp_pool2d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "interpolate",
    "upsample",
    "upsample_nearest",
    "upsample_bilinear",
    "grid_sample",
    "max_pool1d_with_indices",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "fractional_max_pool2d",
    "local_response_norm",
)
def _spatial(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    source = cast("Tensor", args[0] if args else kwargs["input"])
    name = getattr(func, "__name__", "")
    digits = next((int(c) for c in reversed(name) if c in "123"), source.dim() - 2)
    channel_dim = source.dim() - digits - 1
    if name == "local_response_norm":
        t.freeze_arguments(source, f"a norm over neighbouring channels in {t.place}")
        return
    vector = t.vector(source, channel_dim, "a pooling or resize")
    for tensor in tensors_in(out):
        t.set_vector(tensor, vector, channel_dim)


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "norm",
    "logsumexp",
    "prod",
    "any",
    "all",
    "argmax",
    "argmin",
    "median",
    "var_mean",
    "std_mean",
    "count_nonzero",
    "nansum",
    "nanmean",
    "vector_norm",
    "linalg_vector_norm",
)
def _reduce(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    source = cast("Tensor", args[0] if args else kwargs["input"])
    second = argument(args, kwargs, 1, "other")
    if isinstance(second, Tensor):
        _combine(t, func, args, kwargs, out)
        return
    position = 2 if getattr(func, "__name__", "") in ("norm", "vector_norm", "linalg_vector_norm") else 1
    given = argument(args, kwargs, position, "dim", kwargs.get("axis"))
    labels = t.labels_of(source)
    if labels is None:
        for tensor in tensors_in(out):
            t.set_labels(tensor, None)
        return
    dims = sorted({d % source.dim() for d in _dims(given, source.dim())}, reverse=True)
    if any(t.varies(labels, dim) for dim in dims):
        t.freeze(labels, f"'{getattr(func, '__name__', '')}' in {t.place} reduces over channels")
        labels = None
    for tensor in tensors_in(out):
        reduced = labels
        if reduced is not None:
            keep = tensor.dim() == source.dim()
            for dim in dims:
                reduced = reduced.narrow(dim, 0, 1) if keep else reduced.select(dim, 0)
        t.set_labels(tensor, reduced if reduced is not None and reduced.shape == tensor.shape else None)


@rule(
    "softmax", "log_softmax", "softmin", "cumsum", "cumprod", "sort", "argsort", "topk", "normalize", "gumbel_softmax"
)
def _along(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    source = cast("Tensor", args[0] if args else kwargs["input"])
    name = getattr(func, "__name__", "")
    position, default = {"normalize": (2, 1), "topk": (2, -1), "gumbel_softmax": (4, -1)}.get(name, (1, -1))
    dim = argument(args, kwargs, position, "dim", default)
    labels = t.labels_of(source)
    if labels is not None and (not isinstance(dim, int) or t.varies(labels, dim % source.dim())):
        t.freeze(labels, f"'{name}' in {t.place} runs over channels")
        labels = None
    for tensor in tensors_in(out):
        t.set_labels(tensor, labels if labels is not None and labels.shape == tensor.shape else None)


@rule("new_zeros", "new_ones", "new_empty", "new_full", "get grad")
def _neutral(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    return None


def combined(t: ChannelTracer, operands: Sequence[Tensor], shape: torch.Size) -> Tensor | None:
    """Merges the labels of tensors that are combined element by element and returns those of the result."""
    found = [None if _several_dims(x) and t.name_of(x) else t.labels_of(x) for x in operands]
    wide = [None if labels is None else labels.expand(shape) for labels in found]
    varying = {d for labels in wide if labels is not None for d in range(len(shape)) if t.varies(labels, d)}
    if len(varying) > 1:
        for labels in wide:
            t.freeze(labels, f"channels of one tensor meet another dimension of a second one in {t.place}")
        return None
    result: Tensor | None = None
    for operand, labels in zip(operands, wide):
        if labels is None:
            continue
        if any(_size(operand, dim, shape) == 1 for dim in varying):
            t.freeze(labels, f"one channel is spread over all channels of another tensor in {t.place}")
        elif result is None:
            result = labels
        else:
            result = _merge_operands(t, result, labels)
    if result is not None:
        for operand, labels in zip(operands, wide):
            if labels is None:
                _bind_plain(t, operand, result)
    return result


def _several_dims(tensor: Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) > 1


def _size(operand: Tensor, dim: int, shape: torch.Size) -> int:
    """Returns the size of the operand along a dimension of the result, 1 where it is missing."""
    own = dim - (len(shape) - operand.dim())
    return operand.shape[own] if own >= 0 else 1


def _merge_operands(t: ChannelTracer, first: Tensor, second: Tensor) -> Tensor:
    keep = tuple(slice(0, 1) if x == 0 and y == 0 else slice(None) for x, y in zip(first.stride(), second.stride()))
    a, b = first[keep], second[keep]
    t.book.merge(numpy_labels(a), numpy_labels(b), f"meets a tensor without channels in {t.place}")
    return torch.maximum(a, b).expand(first.shape)


def _bind_plain(t: ChannelTracer, operand: Tensor, labels: Tensor) -> None:
    """Treats an operand without labels: broadcast, a parameter along the channels, or something not followed."""
    offset = labels.dim() - operand.dim()
    dims = [d for d in range(operand.dim()) if operand.shape[d] > 1 and t.varies(labels, d + offset)]
    if not dims:
        return
    name = t.name_of(operand)
    if name is None or len(dims) > 1:
        t.freeze(labels, f"is combined in {t.place} with a tensor whose channels are not followed")
        return
    index = tuple(slice(None) if d == dims[0] + offset else 0 for d in range(labels.dim()))
    t.book.bind(name, dims[0], Role.PARAMETER, numpy_labels(labels[index]), t.place)


def _dims(given: object, count: int) -> list[int]:
    if given is None or given == () or isinstance(given, bool):  # var(x, False) gives no dimension
        return list(range(count))
    if isinstance(given, int):
        return [given]
    return [int(d) for d in cast("Sequence[int]", given)]
