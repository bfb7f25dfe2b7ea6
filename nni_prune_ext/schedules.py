"""WHEN and HOW MUCH: three kinds of schedulers, one definition for every host.

* a *schedule* maps progress (0–1) to the fraction of the target that is reached by then;
* a *ratio policy* says how the pruning ratio differs from group to group, some after a look at data;
* a *mask update rule* limits how a mask may change from one step to the next.

All three are registered under ``nni_prune_ext.schedulers`` as a :class:`SchedulerSpec`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from nni_prune_ext.errors import PluginError
from nni_prune_ext.mask_updates import ShareOfSwaps, fourth_power, half_cosine, limited
from nni_prune_ext.registry import load_plugin

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nni_prune_ext.graph.channel_groups import ChannelGroups
    from nni_prune_ext.inputs import ExampleInputs

SchedulerKind = Literal["schedule", "ratio_policy", "mask_update_rule"]


class Schedule(Protocol):
    """Progress → fraction of the target; 0 at 0, exactly 1 at 1, never falling."""

    def __call__(self, progress: float) -> float:
        """Returns the fraction reached at ``progress``, both in 0–1."""


class RatioPolicy(Protocol):
    """Says how strongly each group is pruned relative to the others."""

    def __call__(
        self, weights: Mapping[str, Sequence[Tensor]], previous: Mapping[str, float], progress: float
    ) -> Mapping[str, float]:
        """Returns one relative ratio per group; only their proportions count, the target sets the scale.

        Args:
            weights: group → one ``(num_channels, weights per channel)`` tensor per layer that writes the group.
            previous: group → pruning ratio (0–1) after the last step, 0 at the start.
            progress: 0–1.
        """


class PolicyContext(Protocol):
    """What a ratio policy with ``needs_data`` may look at; the context of a method is one."""

    model: nn.Module
    groups: ChannelGroups
    example_inputs: ExampleInputs

    def batches(self, count: int) -> list[Any]:
        """Returns up to ``count`` training batches; only ``task_loss`` looks inside."""

    def task_loss(self, batch: Any) -> Tensor:
        """Returns the user's loss of the model on a batch, a scalar."""

    def agreed(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the means over all processes."""


class DataRatioPolicy(RatioPolicy, Protocol):
    """A ratio policy that looks at data before it is asked.

    Attributes:
        seen: what it saw; set by the host. Asked while it is empty, the policy raises a ``ConfigError``.
    """

    seen: Mapping[str, float]

    def look(self, context: PolicyContext) -> Mapping[str, float]:
        """Returns group → one number, from the model and a few batches; the model is left as it was.

        A host calls it once per run, before anything is removed, and saves what it returns: a run that is continued
        has the same ratios. A group may be asked for that was not there (what is left of one that a cut has split).
        """


class MaskUpdateRule(Protocol):
    """Limits how much of a mask may change in one step."""

    def __call__(self, old: Tensor, proposed: Tensor, scores: Tensor, progress: float) -> Tensor:
        """Returns the mask to use, with as many channels kept as in ``proposed``.

        Args:
            old: ``(C,)`` bool, the mask in use, ``True`` = kept.
            proposed: ``(C,)`` bool, the mask that the scores ask for.
            scores: ``(C,)`` float, higher = keep.
            progress: 0–1.
        """


@dataclass(frozen=True)
class SchedulerSpec:
    """What is registered: the kind of a scheduler, one sentence about it, and how to make a fresh one.

    Attributes:
        rewinds: a schedule after whose every step the first weights are loaded again, as far as they are left.
        needs_data: a ratio policy that looks at data first, a :class:`DataRatioPolicy`.
    """

    kind: SchedulerKind
    summary: str
    build: Callable[[], Schedule | RatioPolicy | MaskUpdateRule]
    rewinds: bool = False
    needs_data: bool = False


def build_schedule(name: str) -> Schedule:
    """Makes the registered schedule of this name; see :func:`_build` for what it raises."""
    return cast("Schedule", _build(name, "schedule"))


def rewinds(name: str) -> bool:
    """Says whether the registered schedule of this name rewinds; see :func:`_build` for what it raises."""
    _build(name, "schedule")
    spec = load_plugin("schedulers", name)
    return isinstance(spec, SchedulerSpec) and spec.rewinds


def build_ratio_policy(name: str) -> RatioPolicy:
    """Makes the registered ratio policy of this name; see :func:`_build` for what it raises."""
    return cast("RatioPolicy", _build(name, "ratio_policy"))


def needs_data(name: str) -> bool:
    """Says whether the registered ratio policy of this name looks at data; see :func:`_build` for what it raises."""
    _build(name, "ratio_policy")
    spec = load_plugin("schedulers", name)
    return isinstance(spec, SchedulerSpec) and spec.needs_data


def informed_ratio_policy(name: str, context: PolicyContext, seen: dict[str, float]) -> RatioPolicy:
    """Makes the registered ratio policy of this name, ready to be asked; see :func:`_build` for what it raises.

    Args:
        context: what a policy looks at that needs data; it does so only while ``seen`` is empty.
        seen: what it saw, filled here. The caller keeps it for as long as a run lasts, and saves it.
    """
    policy = build_ratio_policy(name)
    if needs_data(name):
        own = cast("DataRatioPolicy", policy)
        if not seen:
            seen.update(own.look(context))
        own.seen = seen
    return policy


def build_mask_update_rule(name: str) -> MaskUpdateRule:
    """Makes the registered mask update rule of this name; see :func:`_build` for what it raises."""
    return cast("MaskUpdateRule", _build(name, "mask_update_rule"))


def one_shot(progress: float) -> float:
    """Returns 1 as soon as anything is to be pruned."""
    return 1.0 if progress > 0 else 0.0


def linear(progress: float) -> float:
    """Returns the progress itself."""
    return progress


def agp(progress: float) -> float:
    """Returns the cubic schedule of AGP (Zhu & Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878)."""
    return 1.0 - (1.0 - progress) ** 3


def cosine(progress: float) -> float:
    """Returns half a cosine wave: slow at both ends."""
    return 0.5 * (1.0 - math.cos(math.pi * progress))


def rounds_of_a_fifth(progress: float) -> float:
    """Returns the share of eight rounds that each take a fifth of what is left: ``1 − 0.8^(8 · progress)``, to 1.

    The rounds of lottery tickets, as in Li et al., "Reconstruction Task Finds Universal Winning Tickets", 2022,
    https://arxiv.org/abs/2202.11484, section 4.1.
    """
    return float((1.0 - 0.8 ** (8 * progress)) / (1.0 - 0.8**8))


def asfp(progress: float) -> float:
    """Returns the exponential schedule of ASFP, through (0, 0), (1/8, 3/4) and (1, 1).

    He et al., "Asymptotic Soft Filter Pruning", 2019, https://arxiv.org/abs/1808.07471.
    """
    rate = _asfp_rate()
    return math.expm1(-rate * progress) / math.expm1(-rate)


def uniform_ratio(
    weights: Mapping[str, Sequence[Tensor]], previous: Mapping[str, float], progress: float
) -> Mapping[str, float]:
    """Returns the same ratio for every group."""
    return dict.fromkeys(weights, 1.0)


def replace_mask(old: Tensor, proposed: Tensor, scores: Tensor, progress: float) -> Tensor:
    """Returns the proposed mask: no restriction."""
    return proposed


def short_restriction(share: ShareOfSwaps) -> MaskUpdateRule:
    """Returns the rule that makes a share of the swaps of a step, best pairs first: all at first, none at the end.

    From "Lottery Jackpots Exist in Pre-trained Models", https://arxiv.org/abs/2104.08700; its published schedule is not
    confirmed. What a change of the number of kept channels needs is made in any case.

    Args:
        share: progress (0–1) → share (0–1).
    """

    def rule(old: Tensor, proposed: Tensor, scores: Tensor, progress: float) -> Tensor:
        return limited(old, proposed, scores, share(progress))

    return rule


def _build(name: str, kind: SchedulerKind) -> object:
    """Makes a registered scheduler.

    Raises:
        UnknownPluginError: the name is not registered.
        PluginError: it is a scheduler of another kind, or none at all.
    """
    spec = load_plugin("schedulers", name)
    if not isinstance(spec, SchedulerSpec) or spec.kind != kind:
        found = spec.kind if isinstance(spec, SchedulerSpec) else type(spec).__name__
        raise PluginError(
            f"The scheduler '{name}' is a {found.replace('_', ' ')}, expected a {kind.replace('_', ' ')}. "
            "`nni-prune-ext list` shows the kind of each scheduler."
        )
    return spec.build()


@cache
def _asfp_rate() -> float:
    """Returns the k with (1 − e^(−k/8)) / (1 − e^(−k)) = 3/4, by bisection."""
    low, high = 1.0, 20.0
    for _ in range(100):
        middle = (low + high) / 2
        if math.expm1(-middle / 8) / math.expm1(-middle) < 0.75:
            low = middle
        else:
            high = middle
    return low


ONE_SHOT = SchedulerSpec("schedule", "the whole target in the first step", lambda: one_shot)
LINEAR = SchedulerSpec("schedule", "equal shares per step", lambda: linear)
AGP = SchedulerSpec("schedule", "cubic: fast first, slow at the end (Zhu & Gupta 2017)", lambda: agp)
COSINE = SchedulerSpec("schedule", "slow at both ends", lambda: cosine)
ASFP = SchedulerSpec("schedule", "exponential: three quarters in the first eighth (ASFP 2019)", lambda: asfp)
REWINDING = SchedulerSpec(
    "schedule",
    "eight rounds of a fifth of what is left; the first weights are loaded again after each (Reconstruction 2022)",
    lambda: rounds_of_a_fifth,
    rewinds=True,
)
UNIFORM_RATIO = SchedulerSpec("ratio_policy", "the same pruning ratio in every group", lambda: uniform_ratio)
REPLACE = SchedulerSpec("mask_update_rule", "every step takes the mask that the scores ask for", lambda: replace_mask)
SHORT_RESTRICTION = SchedulerSpec(
    "mask_update_rule",
    "a falling share of the swaps, fourth power: all at first, none at the end (Lottery Jackpots)",
    lambda: short_restriction(fourth_power),
)
SHORT_RESTRICTION_COSINE = SchedulerSpec(
    "mask_update_rule",
    "a falling share of the swaps, half a cosine wave",
    lambda: short_restriction(half_cosine),
)
