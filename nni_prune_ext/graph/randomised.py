"""Randomised copies of a model, in which no symmetry hides a wrong index, and how far two models are apart.

Every floating-point parameter and statistic is random, also those initialised to zero or one. Weights are scaled so
that signals neither die nor explode, and running statistics follow the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nni_prune_ext.graph.model_copy import copy_model
from nni_prune_ext.graph.state import seed_generators
from nni_prune_ext.inputs import ExampleInputs, call_model, tensors_in

_POOL = 1_000_003
"""Prime, so that no row length divides it and no two rows of a large matrix are equal."""


def randomised(model: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """Returns a copy in evaluation mode with every floating-point parameter and buffer random, in ``dtype``."""
    draw = _Normal(generator)
    values: dict[str, Tensor] = {}
    known = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for module in model.modules():
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            name = known[id(tensor)]
            if tensor.is_floating_point() and name not in values:
                values[name] = _random_values(module, key, tuple(tensor.shape), draw).to(tensor.device, dtype)
    return copy_model(model, values).eval()


@contextmanager
def statistics_followed(model: nn.Module, generator: torch.Generator) -> Iterator[list[str]]:
    """While open, a forward pass sets running statistics to those of the activations, moved at random.

    Yields:
        a list to which modules are added that run a second time: earlier results with their old statistics are stale.
    """
    repeated: list[str] = []
    seen: set[str] = set()

    def follow(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            x, mean, var = args[0] if args else None, module.running_mean, module.running_var
            if not isinstance(x, Tensor) or not isinstance(mean, Tensor) or not isinstance(var, Tensor):
                return
            if x.dim() < 2 or not x.shape[1:2] == mean.shape == var.shape:
                return
            if name in seen:
                repeated.append(name)
            seen.add(name)
            dims = [0, *range(2, x.dim())]
            found = x.var(dims, unbiased=False) + 1e-2 * x.pow(2).mean() + 1e-6
            noise = torch.randn(2, *mean.shape, generator=generator, dtype=torch.float64).to(found).clamp(-2, 2)
            mean.copy_(x.mean(dims) + 0.3 * noise[0] * found.sqrt())
            var.copy_(found * (1 + noise[1] / 4))

        return hook

    handles = [
        module.register_forward_pre_hook(follow(name))
        for name, module in model.named_modules()
        if hasattr(module, "running_mean") and hasattr(module, "running_var")
        if not isinstance(module, torch.jit.ScriptModule)  # takes no hooks
    ]
    try:
        yield repeated
    finally:
        for handle in handles:
            handle.remove()


def outputs(model: nn.Module, inputs: ExampleInputs, dtype: torch.dtype) -> list[Tensor]:
    """Runs the model with all floating-point work in ``dtype`` and the same random numbers each time.

    Raises:
        ModelError: the forward pass raised.
    """
    torch.set_default_dtype(dtype)
    seed_generators(0)
    with torch.no_grad(), Precision(dtype):
        return list(tensors_in(call_model(model, inputs)))


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Returns the largest difference over all outputs, relative to the largest value of the second.

    Infinite where numbers or shapes of outputs differ, or values are not finite.
    """
    if len(first) != len(second):
        return math.inf
    return max((_relative(a, b) for a, b in zip(first, second)), default=0.0)


def movement(first: list[Tensor], second: list[Tensor]) -> float:
    """Returns the same over those outputs only that are continuous in ``first``; 0 where none is."""
    chosen = [index for index, tensor in enumerate(first) if continuous(tensor)]
    if len(first) != len(second):
        return math.inf if chosen else 0.0
    return difference([first[index] for index in chosen], [second[index] for index in chosen])


def continuous(tensor: Tensor) -> bool:
    """Says whether a tensor holds more than whole numbers: classes, counts and flags hide what leads to them."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.is_floating_point() and bool((tensor != tensor.round()).any())


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        return math.inf
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else math.inf
    if not a.numel():
        return 0.0
    scale, gap = float(b.abs().max()), float((a - b).abs().max())
    return gap / scale if scale else (math.inf if gap else 0.0)


class _Normal:
    """Draws normal numbers; large tensors share one pool, each from its own place."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.pool: Tensor | None = None

    def __call__(self, count: int) -> Tensor:
        """Returns ``(count,)`` float64 on CPU."""
        if count < _POOL // 16:
            return torch.randn(count, generator=self.generator, dtype=torch.float64)
        if self.pool is None:
            self.pool = torch.randn(_POOL, generator=self.generator, dtype=torch.float64)
        start = int(torch.randint(_POOL, (1,), generator=self.generator))
        result = torch.empty(count, dtype=torch.float64)
        filled = 0
        while filled < count:
            piece = self.pool[start : start + count - filled]
            result[filled : filled + len(piece)] = piece
            filled, start = filled + len(piece), 0
        return result


def _random_values(module: nn.Module, key: str, shape: tuple[int, ...], draw: _Normal) -> Tensor:
    normal = draw(math.prod(shape)).reshape(shape)
    if len(shape) > 1 and max(shape) < math.prod(shape):
        fan_in = math.prod(shape[1:])
        if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            fan_in = shape[0] * math.prod(shape[2:])
        return normal.mul_(math.sqrt(2.0 / fan_in))
    if "bias" in key or "mean" in key:
        return normal.mul_(0.3)
    return normal.abs_().clamp_(max=2.0).div_(2).add_(0.5)


class Precision(TorchFunctionMode):
    """Turns every cast to a floating-point type into one to ``dtype``, so that no step rounds more than the others."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if getattr(func, "__name__", "") in ("float", "half", "bfloat16", "double"):
            return cast("Tensor", args[0]).to(self.dtype)
        return func(*map(self._same, args), **{key: self._same(value) for key, value in (kwargs or {}).items()})

    def _same(self, value: object) -> object:
        return self.dtype if isinstance(value, torch.dtype) and value.is_floating_point else value
