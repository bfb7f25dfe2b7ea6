"""Copies of a model in which some tensors are replaced, without copying the replaced ones first."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from nni_prune_ext.errors import ModelError


def copy_model(
    model: nn.Module, tensors: Mapping[str, Tensor] | None = None, *, share_others: bool = False
) -> nn.Module:
    """Copies a model, with the given tensors in the place of its own; tied tensors stay tied.

    Args:
        tensors: name of a parameter or buffer → data of the copy's one, used as it is; a parameter keeps
            ``requires_grad``.
        share_others: the copy uses the model's own tensors where none is given: for copies that are only read.

    Raises:
        ModelError: an attribute of the model cannot be copied.
    """
    memo: dict[int, object] = {}
    for name, own in named_tensors(model):
        given = (tensors or {}).get(name)
        if given is None and not share_others:
            continue
        if given is None or not isinstance(own, nn.Parameter):
            memo[id(own)] = own if given is None else given
        else:
            memo[id(own)] = nn.Parameter(given, requires_grad=own.requires_grad)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()  # cached activations: deepcopy refuses tensors with a history
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {error}. Every attribute of the model must allow copy.deepcopy; "
            "remove locks, open files and generators, or define __deepcopy__ for them."
        ) from error


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every parameter and buffer once, under the first of its names."""
    yield from model.named_parameters()
    yield from model.named_buffers()
