"""One traced forward pass that finds the places for gates and follows their signals; see ``gate_places``."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from nni_prune_ext.graph import rules_elementwise, rules_layers, rules_movement  # noqa: F401 (they register rules)
from nni_prune_ext.graph.gate_places import ACTIVATIONS, Activation, GateFlow, GatePlace, LayerFlow, Signals
from nni_prune_ext.graph.label_book import LabelBook, Labels
from nni_prune_ext.graph.model_copy import copy_model
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.graph.tracing import (
    WRITES,
    Arguments,
    ChannelTracer,
    Keywords,
    Rule,
    argument,
    numpy_labels,
    refuse_untraceable,
    tensor_argument,
)
from nni_prune_ext.inputs import ExampleInputs, call_model, tensors_in


def trace_gate_flow(model: nn.Module, example_inputs: ExampleInputs) -> GateFlow:
    """Finds the places for gates and the flow of signals, from one forward pass in evaluation mode.

    Usual places are convolutions with an activation that keeps zeros, or whose output goes into an addition or directly
    into a layer. Shortcuts (the shallower of two convolutions that meet in an addition), layers that work on one pixel,
    grouped convolutions, and layers behind whose gate a norm or another function makes something of zeros are unusual.

    Args:
        model: left as it was.
        example_inputs: as for ``trace_channel_groups``.

    Raises:
        ModelError: the model does not run on the example inputs.
        TraceError: it cannot be followed.
    """
    refuse_untraceable(model)
    with untouched(model):
        model = copy_model(model, share_others=True)
        tracer = _FlowTracer(model, example_inputs)
        with torch.no_grad(), tracer.module_outputs(model), tracer.module_stack(), tracer:
            output = call_model(model, example_inputs)
        return tracer.flow(list(tensors_in(output)))


class _NoMerging(LabelBook):
    """A book in which every label stays what it is: signals are followed, not tied."""

    def merge(self, first: Labels, second: Labels, reason: str) -> None:
        """Does nothing."""

    def freeze(self, labels: Labels, reason: str) -> None:
        """Does nothing."""


@dataclass
class _Convolution:
    """What is learnt about one call of a convolution."""

    layer: str
    flow: LayerFlow
    depth: int
    raw: weakref.ref[Tensor]
    point: weakref.ref[Tensor]
    module: str = ""
    normed: bool = False
    overwritten: bool = False
    added_deeper: bool = False
    read_raw: bool = False
    activation: Activation | None = None
    uses: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)


_NORMS = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"})
_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__"})
_PRODUCTS = frozenset({"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "div", "__truediv__"})
_CLAMPS = frozenset({"clamp", "clamp_", "clip"})
_KEEP_ZEROS = frozenset(
    {"permute", "transpose", "squeeze", "unsqueeze", "view", "reshape", "flatten", "unflatten", "chunk", "split"}
    | {"__getitem__", "narrow", "select", "unbind", "cat", "concat", "concatenate", "expand", "contiguous", "clone"}
    | {"detach", "dropout", "dropout_", "feature_dropout", "dropout2d", "to", "float", "half", "double", "bfloat16"}
    | {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d_with_indices"}
    | {"interpolate", "upsample", "mean", "sum", "amax", "max", "abs", "neg", "alias", "positive", "stochastic_depth"}
)


class _FlowTracer(ChannelTracer):
    """Gives channels the signals of the convolutions that write them."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__(model, example_inputs)
        self.trace.book = _NoMerging()
        self.layers: list[LayerFlow] = []
        self.unions: list[tuple[Signals, Signals, Signals]] = []
        self.convolutions: list[_Convolution] = []
        self._batch = next((t.shape[0] for t in tensors_in(example_inputs) if t.dim()), 1)
        self._module_calls: Counter[str] = Counter()
        self._depths: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    @contextmanager
    def module_outputs(self, model: nn.Module) -> Iterator[None]:
        """Notes, while the context is open, which module puts out what a convolution or its norm has written."""

        def note(name: str, output: object) -> None:
            self._module_calls[name] += 1
            own = self._writing(output)
            if own is not None and not own.module:  # the innermost module is the first
                own.module = name

        handles = [
            module.register_forward_hook(lambda _, args, output, name=name: note(name, output))
            for name, module in model.named_modules()
            if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def flow(self, outputs: Sequence[Tensor]) -> GateFlow:
        """Returns what was found, once the model has run."""
        calls = Counter(own.layer for own in self.layers)
        shown = self._parts([self.labels_of(output) for output in outputs])
        for own in self.convolutions:
            if np.isin(own.flow.writes, shown).any():
                own.reasons.append("its channels reach the output of the model")
        places = tuple(
            GatePlace(
                own.layer,
                own.module,
                len(own.flow.reads),
                len(own.flow.writes),
                own.flow.groups,
                own.activation,
                "; ".join(_reasons(own)),
                not own.read_raw,
            )
            for own in self.convolutions
            if own.module and calls[own.layer] == 1 and self._module_calls[own.module] == 1
        )
        return GateFlow(tuple(self.layers), places, tuple(self.unions), len(self.book._parent))

    def _parts(self, labels: Sequence[Tensor | None]) -> Signals:
        """Returns all signals that labels are made of."""
        found = {int(x) for own in labels if own is not None for x in np.unique(numpy_labels(own))}
        for made, one, other in reversed(self.unions):
            among = np.isin(made, list(found))
            found |= {int(x) for part in (one, other) for x in part[among]}
        return np.array(sorted(found), dtype=np.int64)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> object:
        """Executes the call and follows it; whatever is written into in a way that is not followed is open."""
        result = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        target = args[0] if args else None
        in_place = name in WRITES or name.startswith("__i") or (name.endswith("_") and not name.startswith("__"))
        if in_place and isinstance(target, Tensor) and not _keeps_zeros(name, args, kwargs or {}):
            if name not in _ADDITIONS | _PRODUCTS:
                self.set_labels(target, None)
            if target._base is not None:
                self.set_labels(target._base, None)
        return result

    def _apply(self, handler: Rule, name: str, call: tuple[Callable[..., object], Arguments, Keywords, object]) -> None:
        _, args, kwargs, result = call
        made = list(tensors_in(result))
        given = [tensor for tensor in tensors_in((args, dict(kwargs))) if self.name_of(tensor) is None]
        if name in _ADDITIONS:
            self._note_shortcut(given)
        if made and not name.startswith("get "):
            self._note_uses(name, args, kwargs, given, made)
        self._note_depth(given, made, name)
        if name in ("conv2d", "linear"):
            self._weighted(name, args, kwargs, result)
        elif name in _NORMS:
            self._norm(given, result)
        elif name in _ADDITIONS:
            self._sum(args, kwargs, result)
        elif name in _PRODUCTS:
            self._product(given, result)
        elif _keeps_zeros(name, args, kwargs):
            super()._apply(handler, name, call)
        else:
            for tensor in made:
                self.set_labels(tensor, None)

    def _weighted(self, name: str, args: Arguments, kwargs: Keywords, out: object) -> None:
        x, weight = tensor_argument(args, kwargs, 0, "input"), tensor_argument(args, kwargs, 1, "weight")
        assert isinstance(x, Tensor)
        assert isinstance(weight, Tensor)
        assert isinstance(out, Tensor)
        dim = x.dim() - 3 if name == "conv2d" else x.dim() - 1
        own = self.name_of(weight)
        layer = (own or "").removesuffix(".weight")
        groups = cast("int", argument(args, kwargs, 6, "groups", 1)) if name == "conv2d" else 1
        read = self.vector(x, dim, name)
        reads = np.zeros(x.shape[dim], dtype=np.int64) if read is None else read
        written = self.book.new(weight.shape[0])
        positions = out.numel() // weight.shape[0] // self._batch
        flow = LayerFlow(layer, reads, written, positions, prod(weight.shape[2:]), groups)
        self.layers.append(flow)
        if name == "linear" or own is None or out.dim() != 4 or not own.endswith(".weight"):
            return
        self.set_vector(out, written, dim)
        reference = weakref.ref(out)
        found = _Convolution(layer, flow, self._depth(out), reference, reference)
        if 1 < groups < x.shape[dim]:
            found.reasons.append("it is a grouped convolution")
        if positions == 1 and x.shape[-2:] == (1, 1):
            found.reasons.append("it works on one pixel")
        self.convolutions.append(found)

    def _norm(self, given: Sequence[Tensor], out: object) -> None:
        """Lets the norm behind a convolution pass; any other norm makes something of zeros.

        The gate then sits behind the norm: whoever reads what is in front of it reads all channels.
        """
        own = self._writing(given[0])
        alone = own is not None and own.raw() is given[0] and not own.normed and sum(own.uses.values()) == 1
        if own is not None and alone and isinstance(out, Tensor):
            own.normed, own.point, own.module = True, weakref.ref(out), ""
            own.uses.clear()
            self.set_labels(out, self.labels_of(given[0]))
            self.set_labels(given[0], None)
        else:
            for tensor in tensors_in(out):
                self.set_labels(tensor, None)

    def _sum(self, args: Arguments, kwargs: Keywords, out: object) -> None:
        operands = [argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "other")]
        vectors = [self._channels(x) if isinstance(x, Tensor) and x.dim() == 4 else None for x in operands]
        assert isinstance(out, Tensor)
        one, other = vectors
        if one is None or other is None or len(one) != len(other):
            self.set_labels(out, None)
            return
        made = self.book.new(len(one))
        self.unions.append((made, one, other))
        self.set_vector(out, made, 1)

    def _note_shortcut(self, given: Sequence[Tensor]) -> None:
        """Notes the shallower of two convolutions that meet in an addition."""
        met = [own for own in map(self._writing, given) if own is not None and own.activation is None]
        if len(met) == 2 and met[0].depth != met[1].depth:
            min(met, key=lambda own: own.depth).added_deeper = True

    def _product(self, given: Sequence[Tensor], out: object) -> None:
        """A product is zero where one factor is; that of full shape counts."""
        assert isinstance(out, Tensor)
        labels = (self.labels_of(x) for x in given if x.shape == out.shape)
        self.set_labels(out, next((own for own in labels if own is not None), None))

    def _channels(self, x: Tensor) -> Signals | None:
        labels = self.labels_of(x)
        return None if labels is None else numpy_labels(labels[0, :, 0, 0])

    def _writing(self, x: object) -> _Convolution | None:
        """Returns the convolution of which a tensor is the raw or the normed output."""
        if not isinstance(x, Tensor):
            return None
        return next((own for own in self.convolutions if own.point() is x and not own.overwritten), None)

    def _note_uses(
        self, name: str, args: Arguments, kwargs: Keywords, given: Sequence[Tensor], made: Sequence[Tensor]
    ) -> None:
        for tensor in given:
            for past in self.convolutions:
                past.read_raw |= past.normed and past.raw() is tensor
            own = self._writing(tensor)
            if own is None:
                continue
            if own.activation is not None:
                own.reasons.append("it is read before its activation, too")
                continue
            own.uses[name] += 1
            activation = _activation(name, args, kwargs)
            if activation is not None and sum(own.uses.values()) == 1:
                own.activation = activation
            elif activation is not None:
                own.reasons.append("it is read before its activation, too")
            own.overwritten = any(tensor is result for result in made)

    def _note_depth(self, given: Sequence[Tensor], made: Sequence[Tensor], name: str) -> None:
        depth = max((self._depth(tensor) for tensor in given), default=0) + (name in ("conv2d", "linear"))
        for tensor in made:
            self._depths[id(tensor)] = (weakref.ref(tensor), depth)

    def _depth(self, tensor: Tensor) -> int:
        owner, depth = self._depths.get(id(tensor), (None, 0))
        return depth if owner is not None and owner() is tensor else 0


_READS = _ADDITIONS | {"conv2d"}


def _reasons(own: _Convolution) -> list[str]:
    """Says why a convolution is no usual place for a gate."""
    if own.activation is not None or own.reasons:
        return own.reasons
    if own.added_deeper and not set(own.uses) - _ADDITIONS:
        return ["it is a shortcut"]
    others = sorted(set(own.uses) - _READS)
    if others:
        return [f"'{others[0]}' reads it, behind which a closed filter may not stay zero"]
    return [] if own.uses else ["nothing reads it"]


def _activation(name: str, args: Arguments, kwargs: Keywords) -> Activation | None:
    """Returns the activation that a call is, if it keeps zeros with these settings."""
    known = name.rstrip("_")
    if known not in ACTIVATIONS:
        return None
    made = Activation(known, _settings(ACTIVATIONS[known], args, kwargs))
    return made if float(made(torch.zeros(1))) == 0 else None


def _keeps_zeros(name: str, args: Arguments, kwargs: Keywords) -> bool:
    """Says whether a channel of zeros is one of zeros behind a call that only moves, reduces or maps values."""
    if name in ("max", "min") and isinstance(argument(args, kwargs, 1, "other"), Tensor):
        return False
    if name in _CLAMPS:
        return _spans(args, kwargs)
    return name in _KEEP_ZEROS or _activation(name, args, kwargs) is not None


def _spans(args: Arguments, kwargs: Keywords) -> bool:
    """Says whether a clamp keeps zeros."""
    low, high = argument(args, kwargs, 1, "min"), argument(args, kwargs, 2, "max")
    return all(not isinstance(bound, Tensor) for bound in (low, high)) and (
        (low is None or cast("float", low) <= 0) and (high is None or cast("float", high) >= 0)
    )


def _settings(function: Callable[..., Tensor], args: Arguments, kwargs: Keywords) -> tuple[tuple[str, object], ...]:
    """Returns the arguments behind the tensor by name, without ``inplace``."""
    code = getattr(function, "__code__", None)
    names = code.co_varnames[1 : code.co_argcount] if code is not None else ()
    found = {**dict(zip(names, args[1:])), **kwargs}
    return tuple(sorted((k, v) for k, v in found.items() if k not in ("inplace", "input") and v is not None))
