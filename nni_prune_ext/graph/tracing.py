"""One forward pass in which every tensor carries the labels of its channels.

Torch calls are intercepted (``TorchFunctionMode``); each is executed as it is, and a rule says what it does to labels.
Operations that only move data are simply executed a second time on the labels, so views, transposes, slices, windows,
shuffles and concatenations need no index arithmetic of ours. A call without a rule protects the channels that enter it:
what is not understood is never cut.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from nni_prune_ext.errors import TraceError
from nni_prune_ext.graph.label_book import LabelBook, Labels, Role
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.inputs import ExampleInputs, call_model, opaque_in, tensors_in

Arguments = tuple[object, ...]
Keywords = Mapping[str, object]
Rule = Callable[["ChannelTracer", Callable[..., object], Arguments, Keywords, object], None]

RULES: dict[str, Rule] = {}
"""Name of a torch function → what it does to labels. Filled by the ``rules_*`` modules of this package."""

WRITES = frozenset({"__setitem__", "copy_", "index_put_", "masked_scatter_", "scatter_", "index_add_", "index_copy_"})
"""Functions that write into a part of a tensor: all channels that take part are protected."""


READERS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
    | {"linear", "embedding", "channel_select"}
)
"""Functions whose second argument is a weight: the one use in which zero columns are the same as missing ones."""

VALUES = frozenset(
    {"__bool__", "item", "__float__", "__int__", "__index__", "__complex__", "tolist", "numpy", "__array__"}
)
"""Functions that turn a tensor into Python values, on which the forward pass may branch."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers one rule for several torch function names."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


@dataclass
class Trace:
    """What one traced forward pass has found out."""

    book: LabelBook
    channel_pads: dict[str, None] = field(default_factory=dict)
    """Innermost modules that append constant channels to written ones."""
    visited: set[str] = field(default_factory=set)
    """Names of the tensors that took part in the forward pass."""
    other_uses: dict[str, str] = field(default_factory=dict)
    """Parameter or buffer → how it is used other than as the weight of a layer."""
    value_dependent: dict[str, None] = field(default_factory=dict)
    """Where values of activations, inputs or parameters become Python values."""


class ChannelTracer(TorchFunctionMode):
    """Follows channel labels; use :func:`trace_channels`."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self.trace = Trace(LabelBook())
        self._tensors = dict(named_tensors(model))  # held, so that no id is used again
        self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        self._labels: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self._derived: dict[int, weakref.ref[Tensor]] = {}
        for tensor in [*model.parameters(), *tensors_in(example_inputs)]:
            self._derived[id(tensor)] = weakref.ref(tensor)

    # -- where we are ------------------------------------------------------------------------------------------

    @property
    def book(self) -> LabelBook:
        """The labels found so far."""
        return self.trace.book

    @property
    def module(self) -> str:
        """Name of the innermost module whose forward is running."""
        return self._stack[-1] if self._stack else ""

    @property
    def place(self) -> str:
        """The innermost module, for messages."""
        return f"'{self.module}'" if self.module else "the model's own forward"

    def name_of(self, tensor: object) -> str | None:
        """Returns the name of a parameter or buffer of the model, ``None`` for any other tensor."""
        return self._names.get(id(tensor))

    # -- labels of tensors -------------------------------------------------------------------------------------

    def labels_of(self, tensor: Tensor) -> Tensor | None:
        """Returns the labels of a tensor, shape and strides like it, or ``None`` where it has no channel.

        A parameter or buffer with exactly one dimension larger than 1 gets labels of its own along that one.
        """
        owner, found = self._labels.get(id(tensor), (None, None))
        if found is not None and owner is not None and owner() is tensor:
            return found
        name = self.name_of(tensor)
        wide = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        if name is None or len(wide) != 1:
            return None
        vector = self.book.written(name, wide[0], tensor.shape[wide[0]], Role.PARAMETER)
        return spread(vector, wide[0], tensor.shape)

    def set_labels(self, tensor: object, labels: Tensor | None) -> None:
        """Attaches labels to a result; ``None`` clears them."""
        if not isinstance(tensor, Tensor) or id(tensor) in self._names:
            return
        if labels is None:
            self._labels.pop(id(tensor), None)
            return
        assert labels.shape == tensor.shape, (labels.shape, tensor.shape)
        self._labels[id(tensor)] = (weakref.ref(tensor), labels)

    def set_vector(self, tensor: object, vector: Labels | None, dim: int) -> None:
        """Attaches one label per index of ``dim``, the same at all other positions."""
        if isinstance(tensor, Tensor):
            labels = None if vector is None or not vector.any() else spread(vector, dim, tensor.shape)
            self.set_labels(tensor, labels)

    def vector(self, tensor: Tensor, dim: int, what: str) -> Labels | None:
        """Returns the labels along ``dim``, or ``None`` if there are none.

        Labels that also change along another dimension do not form channels here: they are frozen.
        """
        labels = self.labels_of(tensor)
        if labels is None:
            return None
        dim %= tensor.dim()
        for other in range(tensor.dim()):
            if other != dim and self.varies(labels, other):
                self.freeze(labels, f"{what} in {self.place} sees channels in more than one dimension")
                return None
        return numpy_labels(labels[tuple(slice(None) if d == dim else 0 for d in range(labels.dim()))])

    def varies(self, labels: Tensor, dim: int) -> bool:
        """Says whether the labels differ along ``dim``."""
        if labels.shape[dim] <= 1 or labels.stride(dim) == 0:
            return False
        small = thin(labels)
        if small.shape[dim] <= 1:
            return False
        found = self.book.find(numpy_labels(small))
        return bool((found != np.take(found, [0], axis=dim)).any())

    def freeze(self, labels: Tensor | None, reason: str) -> None:
        """Protects every channel in ``labels``."""
        if labels is not None:
            self.book.freeze(np.unique(numpy_labels(thin(labels))), reason)

    def freeze_arguments(self, args: object, reason: str) -> None:
        """Protects every channel of every tensor in nested arguments."""
        for tensor in tensors_in(args):
            self.freeze(self.labels_of(tensor), reason)

    # -- the mode ----------------------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> object:
        """Executes the call, then applies its rule to the labels."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", repr(func))
        if name == "__get__":
            name = f"get {getattr(getattr(func, '__self__', None), '__name__', '?')}"
        given = list(tensors_in((args, dict(kwargs))))
        self.trace.visited.update(self._names[id(tensor)] for tensor in given if id(tensor) in self._names)
        handler = RULES.get(name)
        if name in WRITES:
            self.freeze_arguments(given, f"{self.place} writes into a part of a tensor")
        result = func(*args, **kwargs)
        made = list(tensors_in(result))
        self._note_values(name, given, made)
        self._note_other_uses(name, given, made, argument(args, kwargs, 1, "weight") if name in READERS else None)
        if handler is not None:
            self._apply(handler, name, (func, args, kwargs, result))
        elif made:
            self.freeze_arguments(given, f"'{name}' in {self.place} is not followed")
            for tensor in made:
                if not any(tensor is argument for argument in given):
                    self.set_labels(tensor, None)
        return result

    def _apply(self, handler: Rule, name: str, call: tuple[Callable[..., object], Arguments, Keywords, object]) -> None:
        place = self.place
        try:
            handler(self, *call)
        except Exception as error:
            raise TraceError(
                f"The call of '{name}' in {place} cannot be followed: {type(error).__name__}: "
                f"{(str(error).splitlines() or [''])[0]}. Expected a call that the rule for '{name}' understands. "
                "Report this call, and write it in another way meanwhile."
            ) from error

    def _note_values(self, name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Follows what derives from inputs and parameters, and notes where it becomes a Python value."""
        owners = (self._derived.get(id(tensor)) for tensor in given)
        if not any(owner is not None and owner() is tensor for owner, tensor in zip(owners, given)):
            return
        for tensor in made:
            self._derived[id(tensor)] = weakref.ref(tensor)
        if name in VALUES:
            place = self.place
            self.trace.value_dependent[f"'{name}' in {place}"] = None

    def _note_other_uses(self, name: str, given: Sequence[Tensor], made: Sequence[Tensor], weight: object) -> None:
        for tensor in given:
            own = self.name_of(tensor)
            if own is not None and tensor is not weight and made and not any(tensor is result for result in made):
                self.trace.other_uses.setdefault(own, f"'{own}' is also used by '{name}' in {self.place}")

    def freeze_readers_used_elsewhere(self) -> None:
        """Protects what a weight reads if it is used otherwise too: zeros in it are then not the same as a cut."""
        for (name, _), entry in self.book.entries.items():
            if name in self.trace.other_uses and (entry.role is Role.CONSUMER or entry.also_reads):
                self.book.freeze(entry.labels, self.trace.other_uses[name])

    def replay(self, func: Callable[..., object], labels: object, *args: object, **kwargs: object) -> object:
        """Executes a call that only moves data on labels; ``None``, and frozen, where it does not run on integers."""
        try:
            return func(labels, *map(_on_cpu, args), **{key: _on_cpu(value) for key, value in kwargs.items()})
        except (RuntimeError, NotImplementedError) as error:
            name = getattr(func, "__name__", "?")
            for tensor in tensors_in(labels):
                self.freeze(tensor, f"'{name}' in {self.place} is not followed ({str(error).splitlines()[0]})")
            return None

    @contextmanager
    def module_stack(self) -> Iterator[None]:
        """Keeps track of the running module while the context is open."""

        def enter(module: nn.Module, _: object) -> None:
            name = self._modules.get(id(module))
            if name is not None:
                self._stack.append(name)

        def leave(module: nn.Module, _: object, __: object) -> None:
            if self._stack and id(module) in self._modules:
                self._stack.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()


def trace_channels(model: nn.Module, example_inputs: ExampleInputs) -> Trace:
    """Runs the model once on the example inputs and returns what was learnt about its channels.

    The model is expected in evaluation mode; the caller restores modes and random state (see ``state.untouched``).

    Raises:
        ModelError: the forward pass raised.
        TraceError: the model returned no tensor, or something that may hide one.
    """
    tracer = ChannelTracer(model, example_inputs)
    with torch.no_grad(), tracer.module_stack(), tracer:
        output = call_model(model, example_inputs)
    tensors = list(tensors_in(output))
    if not tensors:
        raise TraceError(
            f"{type(model).__name__} returned {type(output).__name__} without a tensor, so its channels cannot be "
            "followed. Wrap it in a module that returns a tensor, or a tuple, list or dict of tensors."
        )
    for hidden in opaque_in(output):
        raise TraceError(
            f"{type(model).__name__} returned a {type(hidden).__name__}, which may hide tensors, expected tensors, "
            "plain values, and tuples, lists, mappings and dataclasses of these. Wrap the model in a module that "
            "returns these."
        )
    for tensor in tensors:
        tracer.freeze(tracer.labels_of(tensor), "reaches the model's output")
    tracer.freeze_readers_used_elsewhere()
    return tracer.trace


def refuse_untraceable(model: nn.Module) -> None:
    """Refuses models whose calls or values cannot be seen.

    Raises:
        TraceError: a module is compiled, or a tensor has no data.
    """
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise TraceError(
                f"{repr(name) if name else 'The model'} is compiled (torch.compile), expected modules whose calls can "
                "be intercepted. Pass the original module (its _orig_mod), and compile the compact one."
            )
    for name, tensor in named_tensors(model):
        if tensor.is_meta:
            raise TraceError(
                f"'{name}' is on the meta device and has no values, expected tensors with data. Call "
                "model.to_empty(device='cpu') and load weights first."
            )


def spread(vector: Labels, dim: int, shape: Sequence[int]) -> Tensor:
    """Returns ``vector`` laid along ``dim`` of a tensor of ``shape``, without copying."""
    view = [1] * len(shape)
    view[dim] = -1
    return torch.from_numpy(vector).view(view).expand(tuple(shape))


def thin(labels: Tensor) -> Tensor:
    """Returns the labels with every dimension that is merely expanded (stride 0) cut to length 1."""
    index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in labels.stride())
    return labels[index]


def numpy_labels(labels: Tensor) -> Labels:
    """Returns labels as an integer array."""
    array: Labels = labels.detach().cpu().numpy()
    return array


def _on_cpu(value: object) -> object:
    """Returns arguments with their index tensors where the labels are."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
        return tuple(_on_cpu(item) for item in value)
    return value


def argument(args: Arguments, kwargs: Keywords, position: int, name: str, default: object = None) -> object:
    """Returns an argument given by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def tensor_argument(args: Arguments, kwargs: Keywords, position: int, name: str) -> Tensor | None:
    """Returns a tensor argument, ``None`` if it is absent."""
    value = argument(args, kwargs, position, name)
    return value if isinstance(value, Tensor) else None
