"""Registered schedulers of all three kinds as NNI pruners around any NNI pruner, ours or NNI's own.

* a *schedule* says how far the goals of the inner pruner are on their way at each update;
* a *ratio policy* says in addition how the goals differ between layers, the total being that of the config_list;
* a *mask update rule* limits how far the inner pruner's masks may change at each update.

Where NNI's LinearPruner and AGPPruner go wrong in silence, these do what was meant, or warn with names and numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.pruning import MovementPruner
from nni.compression.pruning.scheduled_pruner import ScheduledPruner as NniScheduledPruner
from nni.compression.utils.evaluator import Evaluator
from torch import Tensor, nn

from nni_prune_ext.adapters.nni_context import parameters_of, plain_names, policy_goals, put_back, reached_ratios
from nni_prune_ext.adapters.nni_evaluator import adopt_parameters, released, untrained
from nni_prune_ext.adapters.nni_named_pruners import class_name
from nni_prune_ext.adapters.nni_pruners import MethodPruner
from nni_prune_ext.adapters.nni_scheduler_checks import check_arguments, check_inner, without_schedule
from nni_prune_ext.adapters.nni_targets import ChannelTargets, Masks, Place, active_places, inputs_of, short_of_goal
from nni_prune_ext.errors import ConfigError, PluginError
from nni_prune_ext.registry import load_plugin
from nni_prune_ext.schedules import MaskUpdateRule, RatioPolicy, Schedule, SchedulerSpec, build_schedule
from nni_prune_ext.scoring.group_reduction import writer_rows
from nni_prune_ext.scoring.weight_norms import slice_rows

_logger = logging.getLogger(__name__)
_CLASS_NAMES: Mapping[str, str] = {"agp": "AGPPruner", "asfp": "ASFPPruner"}
"""Names that are no plain words."""


class SchedulerPruner(NniScheduledPruner):  # type: ignore[misc]
    """Base of the scheduled pruners; :func:`scheduled_pruner_for` makes the class of a registered scheduler.

    Args:
        pruner: the pruner that makes the masks. A schedule of its own (NNI's LinearPruner or AGPPruner, or another one
        of
            these) is taken off, with a warning; NNI's MovementPruner keeps its warm-up and is updated within it.
        interval_steps: optimizer steps from one update to the next.
        total_times: number of updates; the last one reaches the config_list's goals.
        evaluator: needed here or in the inner pruner.

    Raises:
        ConfigError: an argument is out of range, or there is no evaluator.
    """

    scheduler: ClassVar[SchedulerSpec]

    def __init__(
        self,
        pruner: Pruner,
        interval_steps: int,
        total_times: int,
        evaluator: Evaluator | None = None,
    ) -> None:
        own = type(self).__name__
        check_arguments(own, pruner, interval_steps, total_times)
        pruner, evaluator = without_schedule(own, pruner, evaluator)
        check_inner(own, pruner, interval_steps, total_times)
        if pruner._is_wrapped:
            pruner.unwrap_model()
        if not isinstance(evaluator, Evaluator):
            raise ConfigError(
                f"{own} trains between its updates, but neither it nor its {type(pruner).__name__} has an evaluator. "
                "Pass evaluator=, here or to the inner pruner."
            )
        adopt_parameters(evaluator, pruner.bound_model)
        self._originals = parameters_of(pruner.bound_model)
        super().__init__(pruner.bound_model, [], evaluator, pruner._module_wrappers)
        self._warn_of_untrained(evaluator)
        self.fused_compressors.extend(pruner.fused_compressors[1:])
        self._target_spaces = pruner._target_spaces
        self.interval_steps, self.total_times, self.bound_pruner = interval_steps, total_times, pruner
        self._done = self._step = 0
        self._init_sparse_goals()
        self._asked = {place.tensor: place.goal for place in active_places(self._target_spaces)}

    @classmethod
    def from_compressor(cls, compressor: Compressor, *args: object, **kwargs: object) -> SchedulerPruner:
        """Is not offered: a schedule is made around a pruner."""
        raise NotImplementedError(
            f"{cls.__name__} is made around a pruner: {cls.__name__}(pruner, interval_steps, total_times)."
        )

    def compress(
        self, max_steps: int | None, max_epochs: int | None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor | None]]]:
        """Trains and prunes; returns the same model, wrapped and masked, and its masks (NNI's class contract).

        Raises:
            ConfigError: ``max_steps`` is too short for all updates, or no length is given.
        """
        needed = self.interval_steps * self.total_times + getattr(self.bound_pruner, "warmup_step", 0)
        if (max_steps is None and max_epochs is None) or (max_steps is not None and max_steps < needed):
            raise ConfigError(
                f"{type(self).__name__} makes {self.total_times} updates, one every {self.interval_steps} steps, so "
                f"max_steps must be at least {needed}; it is {max_steps}, max_epochs is {max_epochs}. Train longer, or "
                "make fewer updates."
            )
        return cast("tuple[nn.Module, dict[str, dict[str, Tensor | None]]]", super().compress(max_steps, max_epochs))

    def unwrap_model(self) -> None:
        """Takes the wrappers off; the parameters are the objects that they were before wrapping."""
        super().unwrap_model()
        put_back(self._originals, self)

    def update_sparse_goals(self, current_times: int) -> None:
        """Sets the inner pruner's goals for update ``current_times`` of ``total_times``."""
        raise NotImplementedError

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        with released(self.evaluator):
            super()._fusion_compress(max_steps, max_epochs)

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        inner = self.bound_pruner
        self._done = self._step = 0
        inner.interval_steps, inner.total_times = self.interval_steps, self.total_times
        if isinstance(inner, MovementPruner):  # it counts by itself, and asks for its goals
            inner._fuse_preprocess(evaluator)
            inner.update_sparse_goals = self._counted_update
            return
        self._update_sparse_goals_by_ratio(0.0)
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[self._after_step])
        inner._fuse_preprocess(evaluator)  # patched later, so its own task at a step comes after ours

    def _after_step(self) -> None:
        self._step += 1
        if self._step == self.interval_steps and self._done < self.total_times:
            self._step = 0
            self._counted_update(self._done + 1)

    def _counted_update(self, current_times: int) -> None:
        self._done = current_times
        self.update_sparse_goals(current_times)

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        inner = self.bound_pruner
        inner._fuse_postprocess(evaluator)
        vars(inner).pop("update_sparse_goals", None)
        if self._done < self.total_times:
            _logger.warning(
                "%s made %d of %d updates: training stopped too early for the others (one every %d steps).",
                type(self).__name__,
                self._done,
                self.total_times,
                self.interval_steps,
            )
        self._tell_if_short()

    def _tell_if_short(self) -> None:
        """Warns about targets that miss what the config_list asks for."""
        self._update_sparse_goals_by_ratio(1.0)
        short = short_of_goal(list(active_places(self._target_spaces)), self.get_masks())
        told = isinstance(self.bound_pruner, MethodPruner) and self._done == self.total_times
        if short and not told:
            _logger.warning(
                "%s: %d targets are masked less than asked: %s.", type(self).__name__, len(short), "; ".join(short[:5])
            )

    def _warn_of_untrained(self, evaluator: Evaluator) -> None:
        missing = untrained(evaluator, self.bound_model)
        if missing:
            _logger.warning(
                "The optimizers of the evaluator hold %d parameters less than %s trains, among them '%s': these do not "
                "move between the updates. If that is not meant, pass the evaluator to the inner pruner, when it is "
                "made.",
                len(missing),
                type(self.bound_model).__name__,
                missing[0],
            )


class _SchedulePruner(SchedulerPruner):
    """Scheduled pruner of a ``schedule``."""

    def update_sparse_goals(self, current_times: int) -> None:
        schedule = cast("Schedule", self.scheduler.build())
        self._update_sparse_goals_by_ratio(float(schedule(current_times / self.total_times)))


class _RatioPolicyPruner(SchedulerPruner):
    """Scheduled pruner of a ``ratio_policy``; ``schedule`` says how the total grows."""

    def __init__(
        self,
        pruner: Pruner,
        interval_steps: int,
        total_times: int,
        evaluator: Evaluator | None = None,
        *,
        schedule: str = "linear",
    ) -> None:
        self._schedule = build_schedule(schedule)
        super().__init__(pruner, interval_steps, total_times, evaluator)
        for place in active_places(self._target_spaces):
            if place.goal is None or place.space.global_group_id is not None:
                key = "sparse_threshold" if place.goal is None else "global_group_id"
                raise ConfigError(
                    f"{type(self).__name__} gives every layer a ratio of its own, but '{place.module}' has a {key}. "
                    "Expected a sparse_ratio only. Use a schedule such as AGPPruner for it."
                )
        self._channels = _channels_of(self)

    def update_sparse_goals(self, current_times: int) -> None:
        """Sets the ratios that the policy gives, scaled to the config_list's total."""
        places = list(active_places(self._target_spaces))
        units = {place.tensor: self._channels.unit_of(place) for place in places}
        progress = current_times / self.total_times
        policy = cast("RatioPolicy", self.scheduler.build())
        relative = policy(self._weights(places, units), reached_ratios(places, units), progress)
        asked = {name: goal or 0.0 for name, goal in self._asked.items()}
        goals = policy_goals(places, units, relative, asked, self._schedule(progress))
        for place in places:
            place.space.sparse_ratio = float(goals[place.tensor])

    def _tell_if_short(self) -> None:
        short = short_of_goal(list(active_places(self._target_spaces)), self.get_masks())
        if short:
            _logger.warning(
                "%s: %d targets are masked less than planned: %s.",
                type(self).__name__,
                len(short),
                "; ".join(short[:5]),
            )

    def _weights(self, places: Sequence[Place], units: Mapping[str, str]) -> dict[str, list[Tensor]]:
        live, names = dict(self.bound_model.named_parameters()), plain_names(self.bound_model)
        tensors = {plain: live[name] for plain, name in names.items()}
        groups = {group.name: group for group in self._channels.groups}
        weights: dict[str, list[Tensor]] = {}
        for place in places:
            unit = units[place.tensor]
            if unit in groups:
                weights.setdefault(unit, writer_rows(groups[unit], tensors))
            else:
                weights.setdefault(unit, []).append(slice_rows(place.space.target, place.dim or 0))
        return weights


class _MaskUpdatePruner(SchedulerPruner):
    """Scheduled pruner of a ``mask_update_rule``; ``schedule`` says how the goals grow."""

    def __init__(
        self,
        pruner: Pruner,
        interval_steps: int,
        total_times: int,
        evaluator: Evaluator | None = None,
        *,
        schedule: str = "linear",
    ) -> None:
        self._schedule = build_schedule(schedule)
        super().__init__(pruner, interval_steps, total_times, evaluator)

    def update_sparse_goals(self, current_times: int) -> None:
        """Sets the goals along the schedule; the rule acts when the inner pruner makes its masks."""
        self._update_sparse_goals_by_ratio(float(self._schedule(current_times / self.total_times)))

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        generate = self.bound_pruner._generate_sparsity
        rule = cast("MaskUpdateRule", self.scheduler.build())
        self.bound_pruner._generate_sparsity = lambda metrics: self._restricted(generate, rule, metrics)
        super()._fuse_preprocess(evaluator)

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        super()._fuse_postprocess(evaluator)
        vars(self.bound_pruner).pop("_generate_sparsity", None)

    def _restricted(self, generate: Callable[[Masks], Masks], rule: MaskUpdateRule, metrics: Masks) -> Masks:
        """Returns the masks that the rule allows.

        NNI's own rules make them, from metrics in which every channel that the rule keeps is above all others: so
        everything that follows from a mask (aligned biases) follows here as well.
        """
        proposed = generate({module: {t: v.clone() for t, v in own.items()} for module, own in metrics.items()})
        progress = self._done / self.total_times
        forced: Masks = {module: dict(own) for module, own in metrics.items()}
        for place in active_places(self._target_spaces):
            metric = metrics.get(place.module, {}).get(place.target)
            if metric is None:
                continue
            old, new = (_units(place, mask).cpu() for mask in (place.space.mask, proposed[place.module][place.target]))
            allowed = rule(old, new, metric.detach().flatten().float().cpu(), progress)
            values = torch.where(allowed.to(metric.device), torch.inf, -torch.inf).reshape(metric.shape)
            forced[place.module][place.target] = values.to(metric.dtype)
        return generate(forced)


_KINDS: Mapping[str, type[SchedulerPruner]] = {
    "schedule": _SchedulePruner,
    "ratio_policy": _RatioPolicyPruner,
    "mask_update_rule": _MaskUpdatePruner,
}
_CLASSES: dict[str, type[SchedulerPruner]] = {}


def scheduled_pruner_for(name: str) -> type[SchedulerPruner]:
    """Returns the NNI pruner class of a registered scheduler of any kind.

    Raises:
        UnknownPluginError: nobody registered the name.
        PluginError: what is registered is no SchedulerSpec.
    """
    if name not in _CLASSES:
        spec = load_plugin("schedulers", name)
        if not isinstance(spec, SchedulerSpec) or spec.kind not in _KINDS:
            raise PluginError(
                f"The scheduler '{name}' is a {type(spec).__name__}, expected a SchedulerSpec. See "
                "docs/how-to/write_a_schedule_or_runtime.md."
            )
        members = {
            "scheduler": spec,
            "__doc__": f"NNI pruner of the {spec.kind.replace('_', ' ')} '{name}': {spec.summary}.",
        }
        _CLASSES[name] = type(class_name(name, _CLASS_NAMES), (_KINDS[spec.kind],), members)
    return _CLASSES[name]


def _channels_of(scheduled: SchedulerPruner) -> ChannelTargets:
    """Returns the channel groups of the inner pruner; those of NNI's own pruners are traced here."""
    if isinstance(scheduled.bound_pruner, MethodPruner):
        return scheduled.bound_pruner.channels
    example = getattr(scheduled.evaluator, "dummy_input", None)
    scheduled.unwrap_model()
    try:
        return ChannelTargets.of(scheduled.bound_model, None if example is None else inputs_of(example))
    finally:
        scheduled.wrap_model()


def _units(place: Place, mask: Any) -> Tensor:
    """Returns a mask as one bool per unit that NNI masks as a whole: a channel, a block, or an element."""
    scaler = place.space._scaler
    if mask is None:
        mask = torch.ones(place.space.shape)
    full = mask.expand(place.space.shape)
    reduced: Tensor = full if scaler is None else scaler.shrink(full, keepdim=True)
    return reduced.flatten() > 0
