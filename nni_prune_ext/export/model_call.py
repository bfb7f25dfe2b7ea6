"""The call of a model that example inputs stand for, whose tensors have the names of the parameters of ``forward``."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from nni_prune_ext.errors import ModelError
from nni_prune_ext.inputs import ExampleInputs


@dataclass(frozen=True)
class ModelCall:
    """The arguments of one call of a model, bound to the parameters of its ``forward``."""

    bound: inspect.BoundArguments

    def named_tensors(self) -> dict[str, Tensor]:
        """Returns every tensor of the call, nested ones as ``parameter_0`` or ``parameter_key``."""
        arguments = self.bound.arguments
        return {name: tensor for key, value in arguments.items() for name, tensor in named_leaves(value, key)}

    def map(self, function: Callable[[object], object]) -> ModelCall:
        """Returns the call with the function applied to every leaf of its arguments."""
        arguments = {key: map_leaves(value, function) for key, value in self.bound.arguments.items()}
        return ModelCall(inspect.BoundArguments(self.bound.signature, OrderedDict(arguments)))

    def run(self, model: nn.Module) -> object:
        """Returns what the model returns for these arguments."""
        output: object = model(*self.bound.args, **self.bound.kwargs)
        return output


def as_call(model: nn.Module, inputs: ExampleInputs) -> ModelCall:
    """Matches the inputs to the signature of the model's ``forward``.

    Raises:
        ModelError: If they do not fit the signature.
    """
    signature = inspect.signature(model.forward)
    try:
        if isinstance(inputs, Mapping):
            bound = signature.bind(**inputs)
        else:
            bound = signature.bind(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    except TypeError as error:
        raise ModelError(
            f"The example inputs do not fit {type(model).__name__}.forward{signature}: {error}. Expected a tensor, a "
            "tuple of positional arguments or a dict of keyword arguments. Pass what the model itself is called with."
        ) from error
    return ModelCall(bound)


def map_leaves(value: object, function: Callable[[object], object]) -> object:
    """Applies a function to every leaf of nested tuples, lists and mappings."""
    if isinstance(value, Mapping):
        return {key: map_leaves(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [map_leaves(item, function) for item in value]
    if isinstance(value, tuple):
        return tuple(map_leaves(item, function) for item in value)
    return function(value)


def named_leaves(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in nested tuples, lists and mappings, named by their place."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_leaves(item, f"{name}_{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from named_leaves(item, f"{name}_{index}")
