"""The counter: multiply–accumulates (MACs), parameters and bytes of a model, layer by layer.

A MAC is one multiplication with one addition; convolutions, linear layers and matrix products (attention included)
are counted, element-wise operations, norms, biases and pooling are not. MACs of a layer are the number of positions at
which its weight is applied times the number of weights, so the cost after a cut follows from the cut weight's shape
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nni_prune_ext.inputs import ExampleInputs, call_model, tensors_in


@dataclass(frozen=True)
class LayerCost:
    """What one call in the forward pass costs.

    Attributes:
        name: the weight's tensor name, or the function's name where no named weight takes part.
        positions: how often the weight is applied; ``macs`` itself where ``name`` is not a tensor.
        macs: multiply–accumulates for the example inputs.
        weighted: whether ``macs == positions * weight.numel()``.
    """

    name: str
    positions: int
    macs: int
    weighted: bool


@dataclass(frozen=True)
class Costs:
    """The cost of one forward pass on the example inputs, and the size of the model."""

    macs: int
    params: int
    weight_bytes: int
    layers: tuple[LayerCost, ...]
    uncounted: tuple[str, ...] = ()
    """Functions that multiply and were called, but that the counter does not know: ``macs`` lacks them."""

    def as_dict(self) -> dict[str, int]:
        """Returns the three totals by target name."""
        return {"macs": self.macs, "params": self.params, "memory": self.weight_bytes}


def count_costs(model: nn.Module, example_inputs: ExampleInputs) -> Costs:
    """Counts MACs of one forward pass (in evaluation mode, without gradients), parameters and bytes of the weights.

    Bytes include parameters and floating-point buffers in their own dtypes.

    Raises:
        ModelError: the model does not run on the example inputs.
    """
    counter = _Counter(model)
    training = [(module, module.training) for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad(), counter:
            call_model(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, mode in training:
            module.training = mode
    tensors: list[Tensor] = list(model.parameters()) + [b for b in model.buffers() if b.is_floating_point()]
    return Costs(
        macs=sum(layer.macs for layer in counter.layers),
        params=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(t.numel() * t.element_size() for t in tensors),
        layers=tuple(counter.layers),
        uncounted=tuple(counter.uncounted),
    )


class _Counter(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers: list[LayerCost] = []
        self.uncounted: dict[str, None] = {}
        self._names = {id(p): name for name, p in model.named_parameters()}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        count = _COUNTERS.get(name)
        if count is not None:
            count(self, args, kwargs, result)
        elif name in _UNCOUNTED:
            self.uncounted[name] = None
        return result

    def add(self, weight: Tensor, positions: int) -> None:
        """Notes that a weight is applied ``positions`` times."""
        name = self._names.get(id(weight))
        macs = positions * weight.numel()
        self.layers.append(LayerCost(name or "computed weight", positions, macs, name is not None))

    def add_product(self, what: str, macs: int) -> None:
        """Notes a product of activations."""
        self.layers.append(LayerCost(what, macs, macs, False))


def _tensor(args: tuple[object, ...], kwargs: Mapping[str, object], position: int, name: str) -> Tensor:
    return cast("Tensor", args[position] if len(args) > position else kwargs[name])


def _second(args: tuple[object, ...], kwargs: Mapping[str, object], position: int, names: tuple[str, ...]) -> Tensor:
    return _tensor(args, kwargs, position, next((name for name in names if name in kwargs), names[0]))


def _convolution(c: _Counter, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
    weight = _tensor(args, kwargs, 1, "weight")
    assert isinstance(out, Tensor)
    c.add(weight, out.numel() // weight.shape[0])


def _transposed(c: _Counter, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
    x, weight = _tensor(args, kwargs, 0, "input"), _tensor(args, kwargs, 1, "weight")
    c.add(weight, x.numel() // weight.shape[0])


def _linear(c: _Counter, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
    x, weight = _tensor(args, kwargs, 0, "input"), _tensor(args, kwargs, 1, "weight")
    c.add(weight, x.numel() // x.shape[-1])


def _matmul(c: _Counter, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
    _product(c, _tensor(args, kwargs, 0, "input"), _second(args, kwargs, 1, ("other", "mat2", "vec", "tensor")), out)


def _product(c: _Counter, first: Tensor, second: Tensor, out: object) -> None:
    assert isinstance(out, Tensor)
    if id(second) in c._names and second.dim() == 2:
        c.add(second, first.numel() // second.shape[0])
    else:
        c.add_product("matrix product", out.numel() * first.shape[-1])


def _added_matmul(c: _Counter, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
    first = _second(args, kwargs, 1, ("mat1", "batch1", "mat"))
    _product(c, first, _second(args, kwargs, 2, ("mat2", "batch2", "vec")), out)


def _recurrent(c: _Counter, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
    x = _tensor(args, kwargs, 0, "input")
    for weight in tensors_in(args[1:]):
        if weight.dim() == 2:  # states have three dimensions, biases one
            c.add(weight, x.numel() // x.shape[-1])


def _recurrent_cell(c: _Counter, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
    for position, name in ((2, "w_ih"), (3, "w_hh")):
        c.add(_tensor(args, kwargs, position, name), _tensor(args, kwargs, 0, "input").shape[0])


def _bilinear(c: _Counter, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
    x, weight = _tensor(args, kwargs, 0, "input1"), _tensor(args, kwargs, 2, "weight")
    c.add(weight, x.numel() // x.shape[-1])


def _attention(c: _Counter, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
    query, key, value = (_tensor(args, kwargs, i, n) for i, n in enumerate(("query", "key", "value")))
    pairs = query.numel() // query.shape[-1] * key.shape[-2]
    c.add_product("attention", pairs * (query.shape[-1] + value.shape[-1]))


def _multi_head(c: _Counter, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
    query, key, value = (_tensor(args, kwargs, i, n) for i, n in enumerate(("query", "key", "value")))
    width = query.shape[-1]
    tokens, batch = query.shape[0], query.numel() // query.shape[0] // width
    in_proj = args[5] if len(args) > 5 else kwargs.get("in_proj_weight")
    if isinstance(in_proj, Tensor) and key.shape[0] == tokens:
        c.add(in_proj, tokens * batch)
    else:
        rows = query.numel() // width + key.numel() // key.shape[-1] + value.numel() // value.shape[-1]
        c.add_product("attention projections", rows * width * width)
    c.add_product("attention", 2 * batch * tokens * key.shape[0] * width)
    c.add(cast("Tensor", args[11] if len(args) > 11 else kwargs["out_proj_weight"]), tokens * batch)


def _einsum(c: _Counter, args: tuple[object, ...], kwargs: Mapping[str, object], out: object) -> None:
    equation, operands = args[0], args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) > 2:
        c.uncounted["einsum"] = None
    elif len(operands) == 2:
        sizes: dict[str, int] = {}
        for letters, operand in zip(equation.replace(" ", "").split("->")[0].split(","), operands):
            shape = cast("Tensor", operand).shape
            for letter, size in zip(_spelt_out(letters, len(shape)), shape):
                sizes[letter] = max(size, sizes.get(letter, 1))
        c.add_product("einsum", prod(sizes.values()))


def _spelt_out(letters: str, dims: int) -> list[str]:
    """Returns one name per dimension; those under an ellipsis are numbered from the right, as they broadcast."""
    before, dots, after = letters.partition("...")
    hidden = dims - len(before) - len(after) if dots else 0
    return [*before, *(f"...{number}" for number in range(hidden, 0, -1)), *after]


_COUNTERS: dict[str, Callable[[_Counter, tuple[object, ...], Mapping[str, object], object], None]] = {
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose1d": _transposed,
    "conv_transpose2d": _transposed,
    "conv_transpose3d": _transposed,
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _added_matmul,
    "baddbmm": _added_matmul,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head,
    "einsum": _einsum,
    "mv": _matmul,
    "dot": _matmul,
    "addmv": _added_matmul,
    "bilinear": _bilinear,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn_tanh": _recurrent,
    "rnn_relu": _recurrent,
    "lstm_cell": _recurrent_cell,
    "gru_cell": _recurrent_cell,
    "rnn_tanh_cell": _recurrent_cell,
    "rnn_relu_cell": _recurrent_cell,
}

_UNCOUNTED = frozenset(
    {"tensordot", "inner", "outer", "ger", "addr", "addbmm", "chain_matmul", "linalg_multi_dot", "linalg_matmul"}
    | {"linalg_vecdot", "vdot", "kron", "cdist", "__rmatmul__"}
)
