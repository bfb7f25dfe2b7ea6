"""The certificate: on this architecture, removing these channels equals silencing them.

Both are carried out on copies in which every parameter and statistic is random (also those initialised to zero, so that
no symmetry hides a wrong index), in float64, and their outputs are compared. The check is shown to be non-vacuous: the
output moves with the input, and silencing moves the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import CertificateError, ModelError
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, GroupMember, trace_channel_groups
from nni_prune_ext.graph.liveness import first_order_effects
from nni_prune_ext.graph.randomised import difference, movement, outputs, randomised, statistics_followed
from nni_prune_ext.graph.rewrites import apply_rewrites
from nni_prune_ext.graph.state import unchanged_globals
from nni_prune_ext.inputs import ExampleInputs, cast_floats, random_like
from nni_prune_ext.plan import Channels, PruningPlan, plan_from_channels, spared
from nni_prune_ext.surgery import Removal, cut_channels, silence_channels

BOUND_FLOAT64 = 1e-9
BOUND_FLOAT32 = 1e-4
FLOAT64_PARAMS = 150_000_000
"""Above this many parameters the copies are made in float32."""
_REFUSAL = (
    "The plan cannot be carried out exactly: {}. Expected the outputs of the silenced model: protect the groups that "
    "are not exact (verify_groups finds them), then plan again."
)
_NO_INPUT_EFFECT = "the output does not move with the input (whole numbers do not count), so nothing was shown"
_NO_REMOVAL_EFFECT = (
    "silencing the channels does not move the output (whole numbers do not count), so nothing was shown"
)
_UNREAD = "no layer was seen to read these channels"
_MORE_PROBES = 6
"""Probes added where the first ones show nothing."""


@dataclass(frozen=True)
class Certificate:
    """What was compared and how far apart the two were.

    Attributes:
        max_relative_error: largest |removed − silenced| over the probes, relative to the largest |silenced|; infinite
            where shapes differ or values are not finite.
        bound: the largest error allowed.
        probes: number of random inputs, each with its own random weights.
        seed: seed of weights and inputs.
        dtype: ``float64``; ``float32`` above 150 M parameters and for models that do not run in float64.
        input_effect: largest relative move of the continuous outputs when the input changes.
        removal_effect: largest relative move of the continuous outputs when the channels are silenced.
    """

    max_relative_error: float
    bound: float
    probes: int
    seed: int
    dtype: str
    input_effect: float
    removal_effect: float

    @property
    def exact(self) -> bool:
        """Says whether removal is proven equal to silencing."""
        return self.flaw() is None

    def flaw(self) -> str | None:
        """Returns what is wrong, or ``None``."""
        if not self.max_relative_error <= self.bound:
            return _unequal(self.max_relative_error, self.bound)
        if not self.input_effect > self.bound:
            return _NO_INPUT_EFFECT
        if not self.removal_effect > self.bound:
            return _NO_REMOVAL_EFFECT
        return None

    def as_dict(self) -> dict[str, object]:
        """Returns all fields and the verdict, for reports."""
        return {**asdict(self), "exact": self.exact}


def remove_channels(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
    *,
    groups: ChannelGroups | None = None,
    certify: bool = True,
    probes: int = 2,
    seed: int = 0,
) -> Removal:
    """Removes the planned channels from a copy of the model and certifies that this is exact.

    Args:
        groups: the verified groups, to save trace and trial; ``None`` traces, and tries every group first.
        certify: ``False`` skips trial and proof; ``Removal.certificate`` is then ``None``.

    Returns:
        the removal with its certificate; the given model is not changed.

    Raises:
        PlanError: the plan was made for another model.
        CertificateError: removal is not exact; nothing is returned.
    """
    if groups is None:
        groups = trace_channel_groups(model, example_inputs)
        if certify and plan.num_removed:
            _refuse_protected(plan, groups, verify_groups(model, example_inputs, groups, seed=seed))
    removal = cut_channels(model, plan, example_inputs, groups=groups)
    if not certify or not plan.num_removed:
        return removal
    certificate = certify_plan(model, plan, example_inputs, groups=groups, probes=probes, seed=seed)
    flaw = certificate.flaw()
    if flaw is not None:
        raise CertificateError(_REFUSAL.format(flaw))
    return removal.certified(certificate)


def _refuse_protected(plan: PruningPlan, traced: ChannelGroups, verified: ChannelGroups) -> None:
    """Refuses a plan that cuts a group which did not stand its trial."""
    open_names = {group.name for group in verified}
    reasons = {protected.root: protected.reason for protected in verified.protected}
    for group in traced:
        if group.name not in open_names and any(plan.removed.get(root) for root in group.roots):
            raise CertificateError(_REFUSAL.format(f"'{group.name}': {reasons.get(group.name, 'not exact')}"))


def certify_plan(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
    *,
    groups: ChannelGroups,
    probes: int = 2,
    seed: int = 0,
) -> Certificate:
    """Compares removal with silencing on randomised copies; see the module docstring.

    Where the probes happen to switch the removed channels off (a ReLU over a single pixel), more are made.

    Raises:
        CertificateError: the compact copy does not run.
    """
    errors, input_effects, removal_effects = [0.0], [0.0], [0.0]
    bound, dtype = BOUND_FLOAT64, torch.float64
    for number in range(probes + _MORE_PROBES):
        if number >= probes and max(removal_effects) > bound and max(input_effects) > bound:
            break
        with randomised_probe(model, plan.rewrites, example_inputs, seed * 1_000_003 + number) as probe:
            try:
                error, effect = probe.compare(plan, groups)
            except ModelError as failure:
                raise CertificateError(_REFUSAL.format(_failure(failure))) from failure
        bound, dtype = probe.bound, probe.dtype
        errors.append(error)
        removal_effects.append(effect)
        input_effects.append(probe.input_effect)
    return Certificate(
        max_relative_error=max(errors),
        bound=bound,
        probes=len(errors) - 1,
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        input_effect=max(input_effects),
        removal_effect=max(removal_effects),
    )


def verify_groups(
    model: nn.Module, example_inputs: ExampleInputs, groups: ChannelGroups, *, seed: int = 0
) -> ChannelGroups:
    """Tries every group on a copy and protects, with the reason, those whose removal fails or is not exact.

    About half of the channels of all groups are removed at once; only if that does not run, or is not exact, are the
    groups halved until the culprits are found. Groups that nothing reads, or that move no output when each is silenced
    alone, are protected as well: nothing is shown about them.

    Returns:
        the groups, with the culprits moved to ``protected``.
    """
    reasons = {group.name: "has a single channel" for group in groups if group.num_channels == 1}
    for group in groups:
        if not spared(group, np.ones(group.num_channels, dtype=np.bool_)).any():
            reasons.setdefault(group.name, "every channel is the last one of some layer")
    names = [group.name for group in groups if group.name not in reasons]
    generator = torch.Generator().manual_seed(seed)
    gone = {name: _half(groups[name], generator) for name in names}

    def plan_for(tried: list[str]) -> PruningPlan:
        return plan_from_channels(groups, {name: gone[name] for name in tried})

    unread = {name: _UNREAD for name in names if not any(member.reads for member in groups[name].members)}
    compared, doubtful = False, [name for name in names if name not in unread]
    for number in range(1 + _MORE_PROBES):  # one whose output moves is enough, with each group in at least one
        with randomised_probe(model, groups.rewrites, example_inputs, seed * 1_000_003 + number) as probe:
            if not probe.input_effect > probe.bound:
                continue
            if names and not compared and probe.flaw(plan_for(names), groups) is not None:
                reasons |= _culprits(names, lambda tried: probe.failure(plan_for(tried), groups))
                running = [name for name in names if name not in reasons]
                reasons |= _culprits(running, lambda tried: probe.flaw(plan_for(tried), groups))
            compared, tried = True, {name: plan_for([name]) for name in doubtful if name not in reasons}
            doubtful = probe.unmoved(tried, groups)
        if not doubtful:
            break
    return groups.protecting(
        unread | reasons | dict.fromkeys(doubtful, _NO_REMOVAL_EFFECT if compared else _NO_INPUT_EFFECT)
    )


def _half(group: ChannelGroup, generator: torch.Generator) -> Channels:
    """Draws about half of the channels that each layer of the group writes first."""
    gone = np.zeros(group.num_channels, dtype=np.bool_)
    for _, channels in group.roots.values():
        own = np.unique(channels)
        order = torch.randperm(len(own), generator=generator).numpy()
        gone[own[order[: max(1, len(own) // 2)]]] = True
    return spared(group, gone)


def _culprits(names: list[str], flaw_of: Callable[[list[str]], str | None]) -> dict[str, str]:
    """Returns name → flaw for every group that cannot be removed along with the good ones before it."""
    good: list[str] = []
    reasons: dict[str, str] = {}

    def admit(tried: list[str], known_flaw: str | None) -> bool:
        flaw = known_flaw or flaw_of(good + tried)
        if flaw is None:
            good.extend(tried)
        elif len(tried) == 1:
            reasons[tried[0]] = flaw
        else:
            middle = len(tried) // 2
            first_is_good = admit(tried[:middle], None)
            admit(tried[middle:], flaw if first_is_good else None)
        return flaw is None

    if names:
        admit(names, None)
    return reasons


@dataclass(frozen=True)
class Probe:
    """A randomised copy of the model with one input, and what it computes before any cut.

    Attributes:
        twin: the copy, rewritten as the plan says.
        inputs: random inputs.
        dense: the outputs of the copy.
        input_effect: how far the outputs move, relatively, when the inputs are drawn anew.
        rewrite_error: relative difference of the copy to itself before it was rewritten.
        dtype: floating-point type of all computations.
    """

    twin: nn.Module
    inputs: ExampleInputs
    dense: list[Tensor]
    input_effect: float
    rewrite_error: float
    dtype: torch.dtype

    @property
    def bound(self) -> float:
        """The largest relative error that counts as exact."""
        return BOUND_FLOAT64 if self.dtype is torch.float64 else BOUND_FLOAT32

    def compare(self, plan: PruningPlan, groups: ChannelGroups) -> tuple[float, float]:
        """Returns the relative difference of removed to silenced, and of silenced to dense.

        Raises:
            ModelError: the compact copy does not run.
        """
        removed, silent = self.removed(plan, groups), self.silent(plan, groups)
        return max(difference(removed, silent), self.rewrite_error), movement(self.dense, silent)

    def unmoved(self, plans: Mapping[str, PruningPlan], groups: ChannelGroups) -> list[str]:
        """Returns the groups of ``plans`` (name → plan for this group alone) that move no continuous output.

        One backward pass clears most of them; the others are silenced one by one.
        """
        readers = {name: [member for member in groups[name].members if member.reads] for name in plans}
        read = {member.tensor for members in readers.values() for member in members}
        effects = first_order_effects(self.twin, self.inputs, read)
        return [
            name
            for name, plan in plans.items()
            if not any(_effect(effects, member) > BOUND_FLOAT32 for member in readers[name])
            if not movement(self.dense, self.silent(plan, groups)) > self.bound
        ]

    def silent(self, plan: PruningPlan, groups: ChannelGroups) -> list[Tensor]:
        """Returns the outputs of the silenced copy."""
        silent_twin = silence_channels(self.twin, plan, self.inputs, groups=groups, share_others=True)
        return outputs(silent_twin, self.inputs, self.dtype)

    def removed(self, plan: PruningPlan, groups: ChannelGroups) -> list[Tensor]:
        """Returns the outputs of the compact copy.

        Raises:
            ModelError: it does not run.
        """
        compact = cut_channels(self.twin, plan, self.inputs, groups=groups, share_others=True).model
        return outputs(compact, self.inputs, self.dtype)

    def failure(self, plan: PruningPlan, groups: ChannelGroups) -> str | None:
        """Returns why the compact copy does not run, or ``None``."""
        try:
            self.removed(plan, groups)
        except ModelError as error:
            return _failure(error)
        return None

    def flaw(self, plan: PruningPlan, groups: ChannelGroups) -> str | None:
        """Returns why the plan does not run or is not exact, or ``None``."""
        try:
            error, _ = self.compare(plan, groups)
        except ModelError as failure:
            return _failure(failure)
        return None if error <= self.bound else _unequal(error, self.bound)


@contextmanager
def randomised_probe(
    model: nn.Module, rewrites: tuple[str, ...], example_inputs: ExampleInputs, seed: int
) -> Iterator[Probe]:
    """Yields a randomised copy in evaluation mode, in float64 where the model allows it; leaves no trace.

    Raises:
        ModelError: the copy does not run on random inputs.
    """
    large = sum(p.numel() for p in model.parameters()) > FLOAT64_PARAMS
    with unchanged_globals(), torch.no_grad():
        try:
            probe = _make_probe(model, rewrites, example_inputs, seed, torch.float32 if large else torch.float64)
        except ModelError:
            if large:
                raise
            probe = _make_probe(model, rewrites, example_inputs, seed, torch.float32)
        yield probe


def _make_probe(
    model: nn.Module, rewrites: tuple[str, ...], example_inputs: ExampleInputs, seed: int, dtype: torch.dtype
) -> Probe:
    generator = torch.Generator().manual_seed(seed)
    inputs = cast_floats(random_like(example_inputs, generator), dtype)
    others = cast_floats(random_like(example_inputs, generator), dtype)
    twin = randomised(model, dtype, generator)
    with statistics_followed(twin, generator) as repeated:
        dense = outputs(twin, inputs, dtype)
    if repeated:
        dense = outputs(twin, inputs, dtype)
    rewrite_error = 0.0
    if rewrites:
        twin = apply_rewrites(twin, rewrites, inputs, share_tensors=True)
        rewrite_error = difference(outputs(twin, inputs, dtype), dense)
    effect = movement(dense, outputs(twin, others, dtype))
    return Probe(twin, inputs, dense, effect, rewrite_error, dtype)


def _effect(effects: Mapping[str, Tensor], member: GroupMember) -> float:
    found = effects.get(member.tensor)
    if found is None:
        return 0.0
    others = [dim for dim in range(found.dim()) if dim != member.dim]
    per_channel = found.sum(others) if others else found
    return float(per_channel[torch.from_numpy(member.index).to(found.device)].abs().max())


def _failure(error: ModelError) -> str:
    return "after the cut the forward pass fails: " + (str(error.__cause__).splitlines() or ["no message"])[0]


def _unequal(error: float, bound: float) -> str:
    if math.isfinite(error):
        return f"removed and silenced differ by {error:.1e}, allowed {bound:.0e}"
    return "removed and silenced have outputs of different shapes, or outputs that are not finite"
