"""Our schedules as torch-pruning's: a list of cumulative pruning ratios, one per step."""

from __future__ import annotations

from collections.abc import Callable

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.schedules import build_schedule

HostSchedule = Callable[[float, int], list[float]]
"""``(pruning_ratio, steps) → steps + 1`` cumulative ratios, from 0 to ``pruning_ratio``."""


def schedule_for(name: str) -> HostSchedule:
    """Returns any registered schedule in the form that ``iterative_pruning_ratio_scheduler=`` takes.

    Raises:
        UnknownPluginError: no such scheduler.
        PluginError: the scheduler is of another kind (a ratio policy, a mask update rule).
    """
    schedule = build_schedule(name)

    def cumulative(pruning_ratio: float, steps: int) -> list[float]:
        if steps < 1:
            raise ConfigError(f"A schedule over {steps} steps was asked for, expected 1 or more. Set iterative_steps.")
        return [pruning_ratio * schedule(step / steps) for step in range(steps + 1)]

    cumulative.__name__ = cumulative.__qualname__ = name
    cumulative.__doc__ = f"Returns the cumulative pruning ratios of the schedule '{name}'."
    return cumulative


def agp(pruning_ratio: float, steps: int) -> list[float]:
    """Returns cumulative ratios on a cubic curve: fast first, slow at the end."""
    return schedule_for("agp")(pruning_ratio, steps)


def linear(pruning_ratio: float, steps: int) -> list[float]:
    """Returns cumulative ratios in equal shares."""
    return schedule_for("linear")(pruning_ratio, steps)


def cosine(pruning_ratio: float, steps: int) -> list[float]:
    """Returns cumulative ratios on half a cosine wave: slow at both ends."""
    return schedule_for("cosine")(pruning_ratio, steps)


def asfp(pruning_ratio: float, steps: int) -> list[float]:
    """Returns cumulative ratios on ASFP's exponential: three quarters in the first eighth."""
    return schedule_for("asfp")(pruning_ratio, steps)


def one_shot(pruning_ratio: float, steps: int) -> list[float]:
    """Returns the whole ratio from the first step on."""
    return schedule_for("one_shot")(pruning_ratio, steps)
