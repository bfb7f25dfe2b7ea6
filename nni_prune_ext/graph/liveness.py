"""Which weights move the outputs: one backward pass, in which nothing is cut off from the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nni_prune_ext.errors import ModelError
from nni_prune_ext.graph.model_copy import copy_model, named_tensors
from nni_prune_ext.graph.randomised import Precision, continuous
from nni_prune_ext.graph.state import seed_generators
from nni_prune_ext.inputs import ExampleInputs, call_model, cast_floats, tensors_in


def first_order_effects(model: nn.Module, inputs: ExampleInputs, names: AbstractSet[str]) -> dict[str, Tensor]:
    """Returns name → gradient · weight, element by element, of a random sum of the continuous outputs, in float32.

    Outputs count relative to their largest values. Weights that no gradient reaches are absent; so are all where the
    model does not run in float32 with gradients.
    """
    floats = {name: t.detach().float() for name, t in named_tensors(model) if t.is_floating_point()}
    if not names & floats.keys():
        return {}
    torch.set_default_dtype(torch.float32)
    seed_generators(0)
    try:
        copy = copy_model(model, floats, share_others=True)
        weights = {
            name: tensor.requires_grad_(True) for name, tensor in named_tensors(copy) if name in names & floats.keys()
        }
        with torch.enable_grad():
            with Precision(torch.float32), _Attached():
                found = list(tensors_in(call_model(copy, cast_floats(inputs, torch.float32))))
            total = _random_sum([tensor for tensor in found if tensor.requires_grad and continuous(tensor.detach())])
            gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    except (ModelError, RuntimeError):
        return {}
    products = zip(weights.items(), gradients)
    return {name: gradient * weight.detach() for (name, weight), gradient in products if gradient is not None}


def _random_sum(outputs: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(())
    for tensor in outputs:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        total = total.to(real) + (real / real.detach().abs().max() * torch.randn_like(real)).sum()
    return total


class _Attached(TorchFunctionMode):
    """Makes the gradient that of the function computed, whatever the model detaches from it."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled":
            return None
        if name in ("detach", "detach_") or (name == "__get__" and getattr(func, "__self__", None) is _DATA):
            return args[0]
        return func(*args, **(kwargs or {}))


_DATA = Tensor.data
