"""What may stand inside a scheduled pruner, and whose clock counts."""

from __future__ import annotations

import logging

from nni.compression.base.compressor import Pruner
from nni.compression.pruning import MovementPruner
from nni.compression.pruning.scheduled_pruner import ScheduledPruner as NniScheduledPruner
from nni.compression.utils.evaluator import Evaluator

from nni_prune_ext.adapters.nni_pruners import MethodPruner
from nni_prune_ext.errors import ConfigError

_logger = logging.getLogger(__name__)


def check_arguments(own: str, pruner: object, interval_steps: int, total_times: int) -> None:
    """Refuses what is no pruner, and counts below 1."""
    if not isinstance(pruner, Pruner) or not hasattr(pruner, "interval_steps"):
        raise ConfigError(
            f"{own} was given a {type(pruner).__name__}, expected a pruner such as L1NormPruner(model, config_list). "
            "Make that first."
        )
    for name, value in (("interval_steps", interval_steps), ("total_times", total_times)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} of {own} is {value!r}, expected a whole number of at least 1.")


def without_schedule(own: str, pruner: Pruner, evaluator: Evaluator | None) -> tuple[list[Pruner], Evaluator | None]:
    """Returns the pruners from the outermost schedule to the plain one inside, and the innermost evaluator."""
    chain = [pruner]
    while isinstance(pruner, NniScheduledPruner) and hasattr(pruner, "bound_pruner"):
        _logger.warning(
            "%s replaces the schedule of the %s inside it (%d updates, one every %d steps).",
            own,
            type(pruner).__name__,
            pruner.total_times,
            pruner.interval_steps,
        )
        pruner = pruner.bound_pruner
        chain.append(pruner)
    known = [one for one in (*(inside.evaluator for inside in reversed(chain)), evaluator) if one is not None]
    if len({id(one) for one in known}) > 1:
        _logger.warning("%s uses the evaluator of its %s; the other one is ignored.", own, type(pruner).__name__)
    return chain, known[0] if known else None


def check_inner(own: str, pruner: Pruner, interval_steps: int, total_times: int) -> None:
    """Refuses an inner pruner whose own clock cannot be made to agree, and sets the one that can."""
    if isinstance(pruner, MovementPruner):
        last = pruner.warmup_step + interval_steps * total_times
        if last > pruner.cooldown_begin_step:
            raise ConfigError(
                f"{own} makes its last update at step {last} (warm-up {pruner.warmup_step} + {total_times} × "
                f"{interval_steps}), after the MovementPruner's cooldown_begin_step {pruner.cooldown_begin_step}. "
                "Expected it before. Raise cooldown_begin_step, or make fewer updates."
            )
        return
    steps = getattr(pruner, "training_steps", None)
    if steps is not None and steps != interval_steps and not isinstance(pruner, MethodPruner):
        if steps > interval_steps:
            raise ConfigError(
                f"{type(pruner).__name__} collects for {steps} training_steps, but {own} updates every "
                f"{interval_steps}. Expected training_steps no larger than interval_steps. Set them equal."
            )
        _logger.warning(
            "%s collects for %d training_steps of the %d between two updates of %s: its masks would be one update "
            "behind. It collects for %d steps now.",
            type(pruner).__name__,
            steps,
            interval_steps,
            own,
            interval_steps,
        )
        pruner.training_steps = interval_steps
