"""Which layers a network runs, and on what sizes: all that the cost of a layer depends on beside its widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import ExampleInputs, call_model

Sizes = tuple[int, ...]


class Layer(BaseModel):
    """One call of a convolution or linear layer, without its widths.

    Attributes:
        weight: tensor name of its weight.
        size: spatial size of the input, ``(H, W)``; of a linear layer the dimensions between batch and channels.
        kernel: spatial size of the weight; empty for a linear layer, like ``stride``, ``dilation`` and ``padding``.
        padding: zeros before and after each dimension, ``(top, left, bottom, right)`` as in ONNX.
        groups: of a grouped convolution; 1 where ``depthwise``.
        depthwise: every channel is read by its own filters, ``multiplier`` of them: groups follow the width.
        transposed: a transposed convolution, with the output padding ``extra``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: str
    size: Sizes
    kernel: Sizes = ()
    stride: Sizes = ()
    dilation: Sizes = ()
    padding: Sizes = ()
    groups: int = 1
    depthwise: bool = False
    multiplier: int = 1
    transposed: bool = False
    extra: Sizes = ()

    def widths(self, shape: Sequence[int]) -> tuple[int, int]:
        """Returns the channels that a weight of this shape reads and writes."""
        first, second = shape[0], shape[1]
        if self.depthwise:
            read = first if self.transposed else first // self.multiplier
            return read, read * self.multiplier
        if self.transposed:
            return first, second * self.groups
        return second * self.groups, first

    def groups_at(self, read: int) -> int:
        """Returns the number of groups where so many channels are read."""
        return read if self.depthwise else self.groups

    def key(self, read: int, written: int) -> str:
        """Returns the operator with all its sizes as text, the same for the same work."""
        parts = {"k": self.kernel, "s": self.stride, "d": self.dilation, "p": self.padding, "e": self.extra}
        name = "linear" if not self.kernel else "transposed" if self.transposed else "conv"
        sizes = " ".join(f"{letter}{'x'.join(map(str, values))}" for letter, values in parts.items() if values)
        groups = "depthwise" if self.depthwise else f"g{self.groups}"
        return f"{name} {'x'.join(map(str, self.size)) or '-'} {sizes} {groups} {read}>{written}"


def find_layers(model: nn.Module, example_inputs: ExampleInputs) -> tuple[Layer, ...]:
    """Finds every call of a convolution or linear layer with a named weight, from one run in evaluation mode.

    Raises:
        ModelError: the model does not run on the example inputs.
    """
    finder = _Finder(model)
    with untouched(model), torch.no_grad(), finder:
        call_model(model, example_inputs)
    return tuple(finder.layers)


class _Finder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        keys = _ARGUMENTS.get(getattr(func, "__name__", ""))
        if keys is not None:
            given = {**dict(zip(keys, args)), **(kwargs or {})}
            x, weight = cast("Tensor", given["input"]), cast("Tensor", given["weight"])
            name = self._names.get(id(weight))
            if name is not None:
                self.layers.append(_linear(name, x) if keys is _LINEAR else _convolution(name, x, weight, given))
        return func(*args, **(kwargs or {}))


_LINEAR = ("input", "weight", "bias")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ARGUMENTS = {
    "linear": _LINEAR,
    **{f"conv{dims}d": _CONV for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": _TRANSPOSED for dims in (1, 2, 3)},
}


def _linear(name: str, x: Tensor) -> Layer:
    return Layer(weight=name, size=tuple(x.shape[1:-1]))


def _convolution(name: str, x: Tensor, weight: Tensor, given: Mapping[str, object]) -> Layer:
    kernel, transposed = tuple(weight.shape[2:]), "output_padding" in given
    dims, groups = len(kernel), cast("int", given.get("groups", 1))
    dilation = _each(given.get("dilation", 1), dims)
    read, written = x.shape[x.dim() - dims - 1], weight.shape[1] * groups if transposed else weight.shape[0]
    depthwise = groups == read > 1
    return Layer(
        weight=name,
        size=tuple(x.shape[x.dim() - dims :]),
        kernel=kernel,
        stride=_each(given.get("stride", 1), dims),
        dilation=dilation,
        padding=_padding(given.get("padding", 0), kernel, dilation),
        groups=1 if depthwise else groups,
        depthwise=depthwise,
        multiplier=written // read if depthwise else 1,
        transposed=transposed,
        extra=_each(given.get("output_padding", 0), dims) if transposed else (),
    )


def _each(value: object, dims: int) -> Sizes:
    """Returns one number per dimension."""
    if isinstance(value, int):
        return (value,) * dims
    numbers = tuple(int(number) for number in cast("Sequence[int]", value))
    return numbers * dims if len(numbers) == 1 else numbers


def _padding(value: object, kernel: Sizes, dilation: Sizes) -> Sizes:
    """Returns the zeros before, then those after each dimension."""
    if value == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        return (*(n // 2 for n in total), *(n - n // 2 for n in total))
    return _each(0 if value == "valid" else value, len(kernel)) * 2
