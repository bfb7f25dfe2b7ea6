"""Exact rewrites that make hidden channel structure visible before channels are removed.

Shortcuts of type A (He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2,
https://arxiv.org/abs/1512.03385) subsample their input and pad it with zero channels by fixed amounts. A fixed amount
cannot follow a cut, so such a module is replaced by :class:`ChannelSelect`, which says for every output channel which
input channel it copies, or none. The replacement has no parameters, costs no MACs, and becomes slice-and-pad again at
export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_variadic

from nni_prune_ext.errors import PlanError
from nni_prune_ext.graph.model_copy import copy_model
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import ExampleInputs, call_model


def channel_select(x: Tensor, selection: Tensor, stride: int, average: bool) -> Tensor:
    """Copies input channels to output channels, subsampled; output channels that select nothing are zero.

    Args:
        x: ``(N, I, H, W)``.
        selection: ``(O, I)`` bool, at most one ``True`` per row.
        stride: keeps every ``stride``-th row and column, or their average over ``stride × stride`` windows.

    Returns:
        ``(N, O, ceil(H / stride), ceil(W / stride))``.
    """
    if has_torch_function_variadic(x, selection):
        return handle_torch_function(channel_select, (x, selection), x, selection, stride, average)  # type: ignore[no-any-return]
    return _copy_channels(_subsample(x, stride, average), sources(selection))


def sources(selection: Tensor) -> Tensor:
    """Returns ``(O,)`` int64: which input channel each output copies, ``I`` where it copies none."""
    return torch.where(selection.any(1), selection.int().argmax(1), selection.shape[1])


class ChannelSelect(nn.Module):
    """A parameter-free shortcut as an explicit selection of channels; see the module docstring."""

    selection: Tensor

    def __init__(self, selection: Tensor, *, stride: int, average: bool = False) -> None:
        super().__init__()
        self.register_buffer("selection", selection.bool(), persistent=False)
        self.stride = stride
        self.average = average

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, I, H, W)`` to ``(N, O, H', W')``."""
        return channel_select(x, self.selection, self.stride, self.average)

    def for_export(self) -> nn.Module:
        """Returns the same function as slice and pad (and a gather where channels in between are missing)."""
        return _SliceAndPad(sources(self.selection).tolist(), self.selection.shape[1], self.stride, self.average)

    def extra_repr(self) -> str:
        """Says the widths."""
        return f"{self.selection.shape[1]}, {self.selection.shape[0]}, stride={self.stride}, average={self.average}"


class _SliceAndPad(nn.Module):
    """What :class:`ChannelSelect` is at export: constants instead of a selection matrix."""

    def __init__(self, source: Sequence[int], width: int, stride: int, average: bool) -> None:
        super().__init__()
        self.stride, self.average, self.width = stride, average, width
        used = [i for i, s in enumerate(source) if s < width]
        front = used[0] if used else 0
        back = len(source) - 1 - used[-1] if used else 0
        middle = list(source[front : len(source) - back])
        self.pads = (front, back)
        self.middle = None if middle == list(range(width)) else middle

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, I, H, W)`` to ``(N, O, H', W')``."""
        x = _subsample(x, self.stride, self.average)
        if self.middle is not None:
            x = _copy_channels(x, torch.tensor(self.middle, device=x.device))
        return functional.pad(x, (0, 0, 0, 0, *self.pads)) if any(self.pads) else x


def find_rewrites(model: nn.Module, padding: Sequence[str], example_inputs: ExampleInputs) -> tuple[str, ...]:
    """Returns the names, among modules seen to pad channels, that :class:`ChannelSelect` replaces exactly."""
    if not padding:
        return ()
    found = _selections(model, padding, example_inputs)
    return tuple(name for name in padding if name in found)


def apply_rewrites(
    model: nn.Module, names: Iterable[str], example_inputs: ExampleInputs, *, share_tensors: bool = False
) -> nn.Module:
    """Returns a copy of the model with the named modules replaced; those that are replaced already stay.

    Args:
        share_tensors: the copy holds the model's own parameters and buffers: for copies that are only read.

    Raises:
        PlanError: a named module is not one that can be replaced exactly.
    """
    existing = dict(model.named_modules())
    wanted = [name for name in names if not isinstance(existing.get(name), ChannelSelect)]
    found = _selections(model, wanted, example_inputs) if wanted else {}
    result = copy_model(model, share_others=share_tensors)
    for name in wanted:
        if name not in found:
            raise PlanError(
                f"The plan rewrites '{name}', expected a parameter-free shortcut that pads channels, which this "
                f"{type(model).__name__} does not have there. Make a new plan for this model (`nni-prune-ext plan`)."
            )
        result.set_submodule(name, found[name].train(existing[name].training))
    return result


def _selections(model: nn.Module, names: Sequence[str], example_inputs: ExampleInputs) -> dict[str, ChannelSelect]:
    """Probes parameter-free modules with labelled inputs and keeps those that a selection reproduces exactly."""
    existing = dict(model.named_modules())
    candidates = {n: existing[n] for n in names if n in existing and not list(existing[n].parameters())}
    candidates = {n: m for n, m in candidates.items() if n and not list(m.buffers())}
    shapes: dict[str, set[torch.Size]] = {name: set() for name in candidates}

    def note(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor) and args[0].dim() == 4:
                shapes[name].add(args[0].shape)

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in candidates.items()]
    try:
        with untouched(model), torch.no_grad():
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    probed = {name: _probe(candidates[name], seen.pop(), device) for name, seen in shapes.items() if len(seen) == 1}
    return {name: selection for name, selection in probed.items() if selection is not None}


def _probe(module: nn.Module, shape: torch.Size, device: torch.device) -> ChannelSelect | None:
    """Returns the selection that equals the module bit for bit on random input, in both modes, or ``None``."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn((2, 2, *shape[1:]), generator=generator, dtype=torch.float64)
    x = (draw[0] * 10 ** draw[1].clamp(-2, 2)).to(device)  # of both signs, small and large: nothing clips or bends it
    training = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            in_evaluation, in_training = module.eval()(x), module.train()(x)
    finally:
        for part, mode in training:
            part.training = mode
    if not isinstance(in_evaluation, Tensor) or in_evaluation.dim() != 4 or not in_evaluation.numel():
        return None
    for average in (False, True):
        candidate = _candidate(x, in_evaluation, average)
        if candidate is not None and all(torch.equal(candidate(x), out) for out in (in_evaluation, in_training)):
            return candidate
    return None


def _candidate(x: Tensor, out: Tensor, average: bool) -> ChannelSelect | None:
    """Returns the selection that the first pixel suggests, ``None`` where sizes differ or a channel has two sources."""
    stride = -(-x.shape[2] // out.shape[2])
    small = _subsample(x, stride, average)
    if small.shape[2:] != out.shape[2:]:
        return None
    selection = out[0, :, None, 0, 0] == small[0, None, :, 0, 0]
    return (
        None
        if int(selection.sum(1).max()) > 1
        else ChannelSelect(selection, stride=stride, average=average).to(x.device)
    )


def _subsample(x: Tensor, stride: int, average: bool) -> Tensor:
    if average:
        return functional.avg_pool2d(x, stride)
    return x[:, :, ::stride, ::stride]


def _copy_channels(x: Tensor, source: Tensor) -> Tensor:
    return functional.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, source)
