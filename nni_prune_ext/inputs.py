"""Example inputs: how a model is called when all we hold is what the user would pass to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from numbers import Number
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ModelError

ExampleInputs: TypeAlias = Tensor | tuple[object, ...] | list[object] | dict[str, object]
"""A tensor or list is one positional argument, a tuple all positional arguments, a dict the keyword arguments."""


def call_model(model: nn.Module, example_inputs: ExampleInputs) -> object:
    """Calls ``model`` with the example inputs and returns whatever it returns.

    Raises:
        ModelError: the forward pass raised; the original error is chained.
    """
    try:
        if isinstance(example_inputs, dict):
            return model(**example_inputs)
        if isinstance(example_inputs, tuple):
            return model(*example_inputs)
        return model(example_inputs)
    except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AssertionError, AttributeError) as error:
        where = _failing_module(model, error)
        raise ModelError(
            f"{type(model).__name__} does not run on the example inputs ({describe(example_inputs)}): "
            f"{type(error).__name__}{where}: {(str(error).splitlines() or [''])[0]}. Expected inputs that "
            "model(...) takes: pass a tensor, a tuple of positional arguments or a dict of keyword arguments."
        ) from error


def _failing_module(model: nn.Module, error: BaseException) -> str:
    """Returns " in 'name'" for the innermost submodule on the error's traceback, nothing where there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    traceback = error.__traceback__
    while traceback is not None:
        found = names.get(id(traceback.tb_frame.f_locals.get("self")), "") or found
        traceback = traceback.tb_next
    return f" in '{found}'" if found else ""


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yields every tensor inside nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for item in _items(value) or ():
            yield from tensors_in(item)


def opaque_in(value: object) -> Iterator[object]:
    """Yields everything inside ``value`` that ``tensors_in`` cannot look into although it may hold tensors."""
    if value is None or isinstance(value, _PLAIN):
        return
    items = _items(value)
    if items is None:
        yield value
    else:
        for item in items:
            yield from opaque_in(item)


_PLAIN = (Tensor, Number, str, bytes, Enum, torch.dtype, torch.device)


def _items(value: object) -> Iterable[object] | None:
    """Returns what a container holds, ``None`` where ``value`` is no container that is walked."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (tuple, list)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, part.name) for part in fields(value)]
    return None


def map_tensors(value: ExampleInputs, change: Callable[[Tensor], Tensor]) -> ExampleInputs:
    """Returns the same nesting with ``change(tensor)`` in the place of every tensor."""
    return cast("ExampleInputs", _map(value, change))


def describe(value: object) -> str:
    """Says the shapes of all tensors inside ``value``, for error messages."""
    shapes = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_in(value)]
    return ", ".join(shapes) or f"no tensor in {type(value).__name__}"


def random_like(example_inputs: ExampleInputs, generator: torch.Generator) -> ExampleInputs:
    """Returns inputs of the same shapes: floats from a standard normal, integers from the range seen, flags shuffled.

    Flags are tensors with at most two different values, such as masks: how many are set stays as it is.

    Args:
        generator: a CPU generator; tensors are moved to the device of the example.
    """

    def draw(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return (
                torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype).to(tensor.device)
            )
        if tensor.is_complex():
            return (
                torch.randn(tensor.shape, generator=generator, dtype=torch.complex128)
                .to(tensor.dtype)
                .to(tensor.device)
            )
        if tensor.dtype is not torch.bool and len(torch.unique(tensor)) > 2:
            low, high = int(tensor.min()), int(tensor.max())
            return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor.dtype).to(tensor.device)
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.reshape(-1)[order].reshape(tensor.shape)

    return map_tensors(example_inputs, draw)


def cast_floats(example_inputs: ExampleInputs, dtype: torch.dtype) -> ExampleInputs:
    """Returns the inputs with every floating tensor in ``dtype``."""
    return map_tensors(example_inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _map(value: object, change: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_map(item, change) for item in value)
    if isinstance(value, list):
        return [_map(item, change) for item in value]
    return value
