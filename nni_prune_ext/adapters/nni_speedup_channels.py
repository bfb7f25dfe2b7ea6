"""Which channels NNI's masks remove: those that no reader of the masked model can tell from a constant.

Masks of weights say so by themselves where every layer that writes a channel is masked there, or every layer that reads
it is. Masks of depthwise convolutions, norms, inputs and outputs, and layers that do not agree, are tried out: on
randomised copies of the masked model, what the readers see is compared over random inputs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nni_prune_ext.adapters.nni_masks import INPUT, LayerMasks
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, GroupMember
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.graph.randomised import outputs, randomised, statistics_followed
from nni_prune_ext.graph.rewrites import apply_rewrites
from nni_prune_ext.graph.state import unchanged_globals
from nni_prune_ext.graph.tracing import READERS, argument
from nni_prune_ext.inputs import ExampleInputs, cast_floats, random_like
from nni_prune_ext.plan import Channels

_INPUTS = 4
"""Random inputs that each randomised copy is run on."""
_COPIES = (4, 10)
"""At least and at most so many copies: one that happens to switch a channel off (a ReLU) must not decide."""
_ENOUGH = 64
"""Values that must be equal before a channel counts as constant; a reader of large images has them at once."""
_CONSTANT = 1e-9
"""Largest relative difference between inputs that counts as none, in float64."""
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
Reading = tuple[str, int]
"""A weight and the dimension of it that reads: a tied one may read in both directions."""


def removable_channels(
    model: nn.Module,
    masks: LayerMasks,
    example_inputs: ExampleInputs,
    groups: ChannelGroups,
    *,
    heed_shifts: bool = False,
) -> dict[str, Channels]:
    """Returns group name → ``(num_channels,)`` bool, ``True`` for the channels that the masks remove.

    Args:
        heed_shifts: a shift that is left to a masked channel counts as its value: multiplied by a gate that is not
            masked, the channel is no constant. NNI takes it for zero.

    Raises:
        ModelError: masks have to be tried out, and the model does not run on random inputs.
    """
    gone = {group.name: _gone_by_weights(group, masks) for group in groups}
    open_ones = {}
    for group in groups:
        candidates = _touched(group, masks, model) & ~gone[group.name]
        if candidates.any():
            open_ones[group.name] = candidates
    if open_ones:
        for name, constant in _constant_channels(
            model, masks, example_inputs, groups, open_ones, heed_shifts=heed_shifts
        ).items():
            gone[name] = gone[name] | constant
    return gone


def silent_channels(member: GroupMember, masks: LayerMasks, num_channels: int) -> Channels:
    """Returns the channels of a group all of whose positions in one tensor are masked whole."""
    result = np.zeros(num_channels, dtype=np.bool_)
    silent = masks.silent(member.tensor, member.dim)
    if silent is not None:
        result[member.channel] = True
        result[member.channel[~silent[member.index]]] = False
    return result


def holds(member: GroupMember, num_channels: int) -> Channels:
    """Returns the channels of a group that have a position in one tensor."""
    result = np.zeros(num_channels, dtype=np.bool_)
    result[member.channel] = True
    return result


def _gone_by_weights(group: ChannelGroup, masks: LayerMasks) -> Channels:
    size = group.num_channels
    writers, readers = group.by_role(Role.WRITER), [member for member in group.members if member.reads]
    return _agreed(writers, masks, size) | _agreed(readers, masks, size)


def _agreed(members: Sequence[GroupMember], masks: LayerMasks, size: int) -> Channels:
    """Returns the channels that some of the members hold and all of those mask."""
    held, open_ones = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
    for member in members:
        own = holds(member, size)
        held |= own
        open_ones |= own & ~silent_channels(member, masks, size)
    return held & ~open_ones


def _touched(group: ChannelGroup, masks: LayerMasks, model: nn.Module) -> Channels:
    """Returns the channels that some mask concerns: only these are asked about."""
    result = np.zeros(group.num_channels, dtype=np.bool_)
    for member in group.members:
        result |= silent_channels(member, masks, group.num_channels)
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    modules = dict(model.named_modules(remove_duplicate=False))
    for (module, _), mask in masks.activations.items():
        if bool(mask.all()):
            continue
        own = {names[id(tensor)] for tensor in modules[module].parameters(recurse=False)}
        for member in group.members:
            if not own or member.tensor in own:
                result |= holds(member, group.num_channels)
    return result


def _constant_channels(
    model: nn.Module,
    masks: LayerMasks,
    example_inputs: ExampleInputs,
    groups: ChannelGroups,
    candidates: Mapping[str, Channels],
    *,
    heed_shifts: bool,
) -> dict[str, Channels]:
    """Returns those candidates that every reader sees constant in every probe."""
    constant = {name: channels.copy() for name, channels in candidates.items()}
    shiftless = {} if heed_shifts else candidates
    with unchanged_globals(), torch.no_grad():
        for number in range(1, _COPIES[1] + 1):
            generator = torch.Generator().manual_seed(7_919 + number)
            twin, inputs = _twin(model, masks, groups, shiftless, cast_floats(example_inputs, torch.float64), generator)
            seen = _Comparison(twin, masks, groups, constant)
            for _ in range(_INPUTS):
                with seen.one_run(), masked_activations(twin, masks):
                    outputs(twin, random_like(inputs, generator), torch.float64)
            fewest = seen.settle()
            if not any(channels.any() for channels in constant.values()):
                break
            if number >= _COPIES[0] and number * fewest >= _ENOUGH:
                break
    return constant


def _twin(
    model: nn.Module,
    masks: LayerMasks,
    groups: ChannelGroups,
    shiftless: Mapping[str, Channels],
    inputs: ExampleInputs,
    generator: torch.Generator,
) -> tuple[nn.Module, ExampleInputs]:
    """Returns a randomised masked copy in which some channels have no shift, and inputs.

    What multiplies a masked channel then cannot carry its own signal into it.
    """
    twin = randomised(model, torch.float64, generator)
    inputs = random_like(inputs, generator)
    with statistics_followed(twin, generator):
        outputs(twin, inputs, torch.float64)
    if groups.rewrites:
        twin = apply_rewrites(twin, groups.rewrites, inputs, share_tensors=True)
    tensors = dict(named_tensors(twin))
    for name, mask in masks.tensors.items():
        tensors[name].mul_(mask.to(tensors[name]))
    for name, channels in shiftless.items():
        for member in groups[name].by_role(Role.BIAS, Role.NORM):
            shift = member.role is Role.BIAS or member.tensor.rpartition(".")[2] in ("bias", "running_mean")
            if shift:
                positions = torch.from_numpy(member.index[channels[member.channel]])
                tensors[member.tensor].index_fill_(member.dim, positions.to(tensors[member.tensor].device), 0)
    return twin, inputs


@contextmanager
def masked_activations(model: nn.Module, masks: LayerMasks) -> Iterator[None]:
    """While open, inputs and outputs of modules are multiplied by their masks, as NNI's wrappers do."""
    modules = dict(model.named_modules(remove_duplicate=False))
    handles = []
    for (name, target), mask in masks.activations.items():
        if target.startswith(INPUT):
            place = _Place(target.removeprefix(INPUT), mask)
            handles.append(modules[name].register_forward_pre_hook(place.on_inputs, with_kwargs=True))
        else:
            handles.append(
                modules[name].register_forward_hook(_Place(target.removeprefix("_output_"), mask).on_outputs)
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Place:
    """One input or output of a module, by number or by name, and its mask."""

    key: str
    mask: Tensor

    def on_inputs(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Masks one argument; NNI numbers those that may be positional, however they are passed."""
        key = self.key
        if key.isdecimal():
            number, names = int(key), list(inspect.signature(module.forward).parameters)
            args = tuple(self._masked(a) if i == number else a for i, a in enumerate(args))
            key = names[number] if number < len(names) else key
        return args, {name: self._masked(value) if name == key else value for name, value in kwargs.items()}

    def on_outputs(self, module: nn.Module, args: object, output: object) -> object:
        """Masks one of the results; their container keeps its type."""
        if isinstance(output, dict):
            result = copy.copy(output)
            result.update({name: self._masked(value) for name, value in output.items() if str(name) == self.key})
            return result
        if isinstance(output, (tuple, list)):
            values = [self._masked(value) if str(i) == self.key else value for i, value in enumerate(output)]
            make: Callable[..., object] = getattr(type(output), "_make", type(output))  # that of named tuples
            return make(values)
        return self._masked(output) if self.key == "0" else output

    def _masked(self, value: object) -> object:
        return value * self.mask.to(value) if isinstance(value, Tensor) else value


class ReaderInputs(TorchFunctionMode):
    """Hands what every convolution and linear layer reads to a function.

    Args:
        note: takes the name of the weight and which of its dimensions reads, the input, channels first, and the call.
    """

    def __init__(self, model: nn.Module, note: Callable[[Reading, Tensor, Mapping[str, object]], None]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in named_tensors(model)}
        self._note = note

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in READERS and name != "embedding":
            x, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
            own = self._names.get(id(weight))
            if own is not None and isinstance(x, Tensor) and isinstance(weight, Tensor):
                convolution = x.dim() - weight.dim() + 1  # a batch dimension may be missing
                dim = {"linear": x.dim() - 1, "channel_select": 1}.get(name, convolution)
                padding = argument(args, kwargs, 4, "padding", 0) if name.startswith("conv") else 0
                reading = (own, 0 if name in TRANSPOSED else 1)
                self._note(reading, x.movedim(dim, 0), {"call": name, "padding": padding})
        return func(*args, **kwargs)


@dataclass
class _Comparison:
    """Compares what the readers see in several runs of one masked copy."""

    twin: nn.Module
    masks: LayerMasks
    groups: ChannelGroups
    constant: dict[str, Channels]
    first: list[tuple[Reading, Tensor]] = field(default_factory=list)
    runs: int = 0
    calls: int = 0
    fewest: int = _ENOUGH

    def __post_init__(self) -> None:
        self.readers: dict[Reading, list[tuple[str, GroupMember]]] = {}
        self.unread = {name: channels.copy() for name, channels in self.constant.items()}
        for name in self.constant:
            for member in self.groups[name].members:
                if member.reads:
                    self.readers.setdefault((member.tensor, member.dim), []).append((name, member))

    @contextmanager
    def one_run(self) -> Iterator[None]:
        """Follows one forward pass."""
        self.calls = 0
        with ReaderInputs(self.twin, self._note):
            yield
        if self.runs and self.calls != len(self.first):
            self.constant.update({name: np.zeros_like(channels) for name, channels in self.constant.items()})
        self.runs += 1

    def settle(self) -> int:
        """Returns how few values a channel was judged by; channels that no call has read are not constant."""
        for name, unread in self.unread.items():
            self.constant[name] = self.constant[name] & ~unread
        return self.fewest * self.runs

    def _note(self, reading: Reading, x: Tensor, _: Mapping[str, object]) -> None:
        members = self.readers.get(reading)
        if not members:
            return
        if self.runs == 0:
            self.first.append((reading, x.clone()))
            return
        number, self.calls = self.calls, self.calls + 1
        earlier, before = self.first[number] if number < len(self.first) else (("", 0), x)
        same_call = earlier == reading and before.shape == x.shape
        moved = _moved(x, before) if same_call else None
        for group, member in members:
            self._judge(group, member, moved, x)

    def _judge(self, group: str, member: GroupMember, moved: Tensor | None, x: Tensor) -> None:
        size = self.groups[group].num_channels
        read = holds(member, size) & ~silent_channels(member, self.masks, size)
        self.unread[group] &= ~holds(member, size)
        if moved is None:
            self.constant[group] &= ~read
            return
        width = self.groups.shapes[member.tensor][member.dim]
        by_position = moved.view(-1, width).any(0).cpu().numpy()  # partners in the groups of a grouped convolution
        live = np.zeros(size, dtype=np.bool_)
        live[member.channel[by_position[member.index]]] = True
        self.constant[group] &= ~(live & read)
        if (self.constant[group] & read).any():
            self.fewest = min(self.fewest, max(1, x[0].numel()))


def _moved(x: Tensor, before: Tensor) -> Tensor:
    """Returns, per channel (dimension 0), whether two inputs of one reader differ."""
    gap = (x - before).abs().flatten(1).amax(1) if x.dim() > 1 else (x - before).abs()
    return gap > _CONSTANT * max(float(before.abs().max()), 1e-30)
