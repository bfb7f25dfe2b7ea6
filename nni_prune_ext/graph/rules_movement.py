"""What operations that only move data do to channel labels: they are executed on the labels.

Where one dimension of channels is split (views into groups or heads, chunks, halves), the parts must keep equal
numbers of channels in equal places, so the channels of the parts are tied to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import cast

import torch
from torch import Tensor

from nni_prune_ext.graph.tracing import (
    WRITES,
    Arguments,
    ChannelTracer,
    Keywords,
    argument,
    numpy_labels,
    rule,
)
from nni_prune_ext.inputs import tensors_in

Function = Callable[..., object]


@rule(
    "permute",
    "transpose",
    "swapaxes",
    "swapdims",
    "movedim",
    "moveaxis",
    "t",
    "get T",
    "get mT",
    "adjoint",
    "squeeze",
    "squeeze_",
    "unsqueeze",
    "unsqueeze_",
    "expand",
    "expand_as",
    "broadcast_to",
    "repeat",
    "tile",
    "repeat_interleave",
    "flip",
    "numpy_T",
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "diagonal",
    "view_as_real",
    "pixel_unshuffle",
)
def _move(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    source, rest, named = _source(args, kwargs)
    labels = t.labels_of(source)
    if labels is None:
        _clear(t, out)
    elif getattr(func, "__name__", "").endswith("_"):
        t.set_labels(out, labels.reshape(cast("Tensor", out).shape))  # squeezed or transposed in place
    else:
        _assign(t, out, t.replay(func, labels, *rest, **named))


@rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_alias")
def _reshape(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    source, _, _ = _source(args, kwargs)
    labels = t.labels_of(source)
    if labels is None or not isinstance(out, Tensor) or out.numel() != source.numel() or not out.numel():
        t.freeze(labels, f"an empty tensor or another type is viewed in {t.place}")
        _clear(t, out)
        return
    moved = labels.reshape(out.shape)
    for inner, outer in _segments(source.shape, out.shape):
        if len(outer) < 2 or not any(t.varies(labels, dim) for dim in inner):
            continue
        if len(inner) > 1:
            t.freeze(labels, f"a reshape in {t.place} mixes channels with another dimension")
            _clear(t, out)
            return
        shrinking = max(outer, key=lambda dim: (out.shape[dim], dim))
        for dim in outer:
            if dim != shrinking:
                _tie_along(t, moved, dim)
    t.set_labels(out, moved)


@rule("chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "hsplit", "vsplit")
def _split(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    source, rest, named = _source(args, kwargs)
    labels = t.labels_of(source)
    if labels is None:
        _clear(t, out)
        return
    parts = cast("Sequence[Tensor]", t.replay(func, labels, *rest, **named))
    dims = [d for d in range(source.dim()) if parts[0].shape[d] != source.shape[d]]
    if dims and t.varies(labels, dims[0]):
        if len({part.shape[dims[0]] for part in parts}) > 1:
            t.freeze(labels, f"channels are cut into unequal parts in {t.place}")
        else:
            for part in parts[1:]:
                _merge(t, parts[0], part, "an even split")
    _assign(t, out, parts)


@rule("unbind", "select", "narrow", "__getitem__", "index_select", "take_along_dim", "gather", "roll", "unfold")
def _pick(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    source, rest, named = _source(args, kwargs)
    labels = t.labels_of(source)
    if labels is None:
        _clear(t, out)
        return
    name = getattr(func, "__name__", "")
    if func is torch.nn.functional.unfold:  # (N, C, H, W) to (N, C * window, places)
        channel_dim = source.dim() - 3
        vector = t.vector(source, channel_dim, "an unfolding")
        window = cast("Tensor", out).shape[channel_dim] // source.shape[channel_dim]
        t.set_vector(out, None if vector is None else vector.repeat(window), channel_dim)
        return
    if name == "__getitem__":
        _tie_slices(t, labels, args[1])
    elif name == "narrow":
        dim, start, length = (
            cast("int", argument(args, kwargs, i, n)) for i, n in enumerate(("dim", "start", "length"), 1)
        )
        _tie_slice(t, labels, dim, start, length)
    else:
        _freeze_along(t, labels, args, kwargs, name)
    _assign(t, out, t.replay(func, labels, *rest, **named))


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack")
def _concatenate(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    tensors = cast("Sequence[Tensor]", argument(args, kwargs, 0, "tensors"))
    found = [t.labels_of(tensor) for tensor in tensors]
    if all(labels is None for labels in found) or not isinstance(out, Tensor):
        _clear(t, out)
        return
    labels = [torch.zeros((), dtype=torch.int64).expand(x.shape) if f is None else f for x, f in zip(tensors, found)]
    if getattr(func, "__name__", "") not in ("cat", "concat", "concatenate"):
        for other in labels[1:]:
            _merge(t, labels[0], other, "a stack")
        named = {key: value for key, value in kwargs.items() if key not in ("tensors", "out")}
        _assign(t, out, t.replay(func, labels, *args[1:], **named))
        return
    dim = cast("int", argument(args, kwargs, 1, "dim", kwargs.get("axis", 0))) % out.dim()
    labels = [x for x in labels if x.dim() == out.dim()]  # torch.cat skips empty tensors of shape (0,)
    _align(t, labels, dim)
    spread = [d != dim and all(x.stride(d) == 0 or x.shape[d] == 1 for x in labels) for d in range(out.dim())]
    index = tuple(slice(0, 1) if constant else slice(None) for constant in spread)
    t.set_labels(out, torch.cat([x[index] for x in labels], dim).expand(out.shape))


@rule("pad", "_pad", "constant_pad_nd")
def _pad(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    source, _, _ = _source(args, kwargs)
    labels = t.labels_of(source)
    if labels is None or not isinstance(out, Tensor):
        _clear(t, out)
        return
    for dim in range(source.dim()):
        if source.shape[dim] == out.shape[dim]:
            continue
        if t.varies(labels, dim):
            t.trace.channel_pads[t.module] = None
            t.freeze(labels, f"channels are padded inside {t.place}")
            _clear(t, out)
            return
        labels = labels.narrow(dim, 0, 1).expand([out.shape[d] if d == dim else s for d, s in enumerate(labels.shape)])
    t.set_labels(out, labels)


@rule("pixel_shuffle")
def _pixel_shuffle(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    labels = t.labels_of(_source(args, kwargs)[0])
    if labels is None:
        _clear(t, out)
        return
    factor = cast("int", argument(args, kwargs, 1, "upscale_factor"))
    blocks = torch.unflatten(labels, labels.dim() - 3, (-1, factor * factor))
    _tie_along(t, blocks, blocks.dim() - 3)
    _assign(t, out, func(labels, factor))


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    labels = t.labels_of(_source(args, kwargs)[0])
    if labels is None:
        _clear(t, out)
        return
    groups = cast("int", argument(args, kwargs, 1, "groups"))
    split = torch.unflatten(labels, 1, (groups, -1))
    _tie_along(t, split, 1)
    _assign(t, out, split.transpose(1, 2).reshape(labels.shape))


@rule("glu")
def _glu(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    labels = t.labels_of(_source(args, kwargs)[0])
    if labels is None:
        _clear(t, out)
        return
    first, second = labels.chunk(2, cast("int", argument(args, kwargs, 1, "dim", -1)))
    _merge(t, first, second, "a gated linear unit")
    t.set_labels(out, first)


@rule(*WRITES)
def _write(t: ChannelTracer, func: Function, args: Arguments, kwargs: Keywords, out: object) -> None:
    """Does nothing: the tracer froze the channels before the call."""


def _source(args: Arguments, kwargs: Keywords) -> tuple[Tensor, Arguments, dict[str, object]]:
    if args:
        return cast("Tensor", args[0]), args[1:], dict(kwargs)
    named = dict(kwargs)
    return cast("Tensor", named.pop("input")), (), named


def _assign(t: ChannelTracer, out: object, labels: object) -> None:
    for tensor, found in zip(tensors_in(out), tensors_in(labels)):
        t.set_labels(tensor, found)


def _clear(t: ChannelTracer, out: object) -> None:
    for tensor in tensors_in(out):
        t.set_labels(tensor, None)


def _merge(t: ChannelTracer, first: Tensor, second: Tensor, what: str) -> None:
    a, b = torch.broadcast_tensors(first, second)  # type: ignore[no-untyped-call]
    keep = [slice(0, 1) if x == 0 and y == 0 else slice(None) for x, y in zip(a.stride(), b.stride())]
    t.book.merge(
        numpy_labels(a[tuple(keep)]), numpy_labels(b[tuple(keep)]), f"a channel has no partner in {what} in {t.place}"
    )


def _tie_along(t: ChannelTracer, labels: Tensor, dim: int) -> None:
    _merge(t, labels.narrow(dim, 0, 1), labels, "a split into groups")


def _segments(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs the dimensions of two shapes with equal products, ignoring dimensions of size 1."""
    left = [(d, s) for d, s in enumerate(source) if s != 1]
    right = [(d, s) for d, s in enumerate(target) if s != 1]
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        inner, outer = [left[i]], [right[j]]
        i, j = i + 1, j + 1
        while prod(s for _, s in inner) != prod(s for _, s in outer):
            if prod(s for _, s in inner) < prod(s for _, s in outer):
                inner.append(left[i])
                i += 1
            else:
                outer.append(right[j])
                j += 1
        result.append(([d for d, _ in inner], [d for d, _ in outer]))
    return result


def _tie_slice(t: ChannelTracer, labels: Tensor, dim: int, start: int, length: int) -> None:
    """Ties the equal parts of a dimension of which one part is taken; a part without counterparts is frozen."""
    size = labels.shape[dim]
    if length in (0, size) or not t.varies(labels, dim):
        return
    if size % length or start % length:
        t.freeze(labels, f"an uneven part of the channels is taken in {t.place}")
        return
    parts = torch.split(labels, length, dim)
    for part in parts[1:]:
        _merge(t, parts[0], part, "an even split")


def _tie_slices(t: ChannelTracer, labels: Tensor, index: object) -> None:
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(1 for item in items if item is not None and item is not Ellipsis)
    dim = 0
    for item in items:
        if item is None:
            continue
        if item is Ellipsis:
            dim += labels.dim() - taken
            continue
        if isinstance(item, slice):
            start, stop, step = item.indices(labels.shape[dim])
            if step == 1:
                _tie_slice(t, labels, dim, start, max(stop - start, 0))
            elif t.varies(labels, dim):
                t.freeze(labels, f"channels are taken with a stride in {t.place}")
        elif dim < labels.dim() and t.varies(labels, dim):
            t.freeze(labels, f"single channels are picked by index in {t.place}")
        dim += item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _freeze_along(t: ChannelTracer, labels: Tensor, args: Arguments, kwargs: Keywords, name: str) -> None:
    position = {"roll": 2, "take_along_dim": 2}.get(name, 1)
    dims = argument(args, kwargs, position, "dims" if name == "roll" else "dim", None if name == "roll" else 0)
    if dims is None or dims == ():
        dims = list(range(labels.dim()))
    for dim in dims if isinstance(dims, (tuple, list)) else [dims]:
        if isinstance(dim, int) and t.varies(labels, dim % labels.dim()):
            t.freeze(labels, f"'{name}' in {t.place} picks or shifts channels")


def _align(t: ChannelTracer, labels: Sequence[Tensor], dim: int) -> None:
    """Merges the channels of tensors that are joined along a dimension that does not hold their channels."""
    across = [any(t.varies(x, d) for d in range(x.dim()) if d != dim) for x in labels]
    if not any(across):
        return
    for x, crossing in zip(labels, across):
        if crossing and t.varies(x, dim):
            t.freeze(x, f"tensors joined in {t.place} have channels in more than one dimension")
    heads = [x.narrow(dim, 0, 1) for x in labels if x.shape[dim]]
    for other in heads[1:]:
        _merge(t, heads[0], other, "a concatenation")
