"""Registered schedulers of all three kinds as NNI pruners around any NNI pruner, ours or NNI's own.

* a *schedule* says how far the goals of the inner pruner are on their way at each update;
* a *ratio policy* says in addition how the goals differ between layers, the total being that of the config_list;
* a *mask update rule* limits how far the inner pruner's masks may change at each update.

Where NNI's LinearPruner and AGPPruner go wrong in silence, these do what was meant, or warn with names and numbers.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import ClassVar, cast

from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.pruning import MovementPruner
from nni.compression.pruning.scheduled_pruner import ScheduledPruner as NniScheduledPruner
from nni.compression.utils.evaluator import Evaluator
from torch import Tensor, nn

from nni_prune_ext.adapters.nni_context import (
    parameters_of,
    plain_copy,
    policy_goals,
    put_back,
    reached_ratios,
    share_parameters,
    wrapped_again,
)
from nni_prune_ext.adapters.nni_evaluator import adopt_parameters, first_weights, released, rewind, untrained
from nni_prune_ext.adapters.nni_mask_rules import ruled_masks
from nni_prune_ext.adapters.nni_named_pruners import class_name
from nni_prune_ext.adapters.nni_pruners import MethodPruner
from nni_prune_ext.adapters.nni_ratio_policies import check_look, looked, policy_weights, refuse_single_weights
from nni_prune_ext.adapters.nni_scheduler_checks import check_arguments, check_inner, without_schedule
from nni_prune_ext.adapters.nni_targets import ChannelTargets, active_places, inputs_of, short_of_goal
from nni_prune_ext.errors import ConfigError, PluginError
from nni_prune_ext.registry import load_plugin
from nni_prune_ext.schedules import (
    DataRatioPolicy,
    MaskUpdateRule,
    RatioPolicy,
    Schedule,
    SchedulerSpec,
    build_schedule,
)

_logger = logging.getLogger(__name__)
_CLASS_NAMES: Mapping[str, str] = {
    "agp": "AGPPruner",
    "asfp": "ASFPPruner",
    "firing_signature": "FiringSignaturePruner",
    "ftwt_ratio": "FTWTRatioPruner",
    "psap_ratio": "PSAPRatioPruner",
    "short_restriction_cosine": "CosineShortRestrictionPruner",
}
"""Names that are no plain words, or read better in another order."""


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
        chain, evaluator = without_schedule(own, pruner, evaluator)
        inner = chain[-1]
        if not isinstance(evaluator, Evaluator):
            raise ConfigError(
                f"{own} trains between its updates, but neither it nor its {type(inner).__name__} has an evaluator. "
                "Pass evaluator=, here or to the inner pruner."
            )
        self._check_goals(inner)
        check_inner(own, inner, interval_steps, total_times)
        holder = next((one for one in chain if one._is_wrapped), inner)
        with wrapped_again(holder):
            if holder._is_wrapped:
                holder.unwrap_model()
            adopt_parameters(evaluator, inner)
            self._prepare(inner, evaluator)
            self._originals = parameters_of(inner.bound_model)
            super().__init__(inner.bound_model, [], evaluator, inner._module_wrappers)
        share_parameters(self._originals, inner)
        self._warn_of_untrained(evaluator)
        self.fused_compressors.extend(inner.fused_compressors[1:])
        self._target_spaces = inner._target_spaces
        self.interval_steps, self.total_times, self.bound_pruner = interval_steps, total_times, inner
        self._clock = inner.interval_steps, inner.total_times
        for one in chain:
            if isinstance(one, NniScheduledPruner):  # training that raised has left its goals half way
                one._update_sparse_goals_by_ratio(1.0)
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

    def _check_goals(self, inner: Pruner) -> None:
        """Refuses goals that cannot be scheduled; nothing has been changed yet."""

    def _prepare(self, inner: Pruner, evaluator: Evaluator) -> None:
        """Looks at the model while nothing wraps it."""

    def update_sparse_goals(self, current_times: int) -> None:
        """Sets the inner pruner's goals for update ``current_times`` of ``total_times``."""
        raise NotImplementedError

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        try:
            with released(self.evaluator):
                super()._fusion_compress(max_steps, max_epochs)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        """Leaves the inner pruner with its own methods, its own clock and the goals of the config_list."""
        inner = self.bound_pruner
        for name in ("update_sparse_goals", "_generate_sparsity"):
            vars(inner).pop(name, None)
        inner.interval_steps, inner.total_times = self._clock
        self._update_sparse_goals_by_ratio(1.0)

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        self._give_back()
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
        self.bound_pruner._fuse_postprocess(evaluator)
        if self._done < self.total_times:
            _logger.warning(
                "%s made %d of %d updates: training stopped too early for the others (one every %d steps).",
                type(self).__name__,
                self._done,
                self.total_times,
                self.interval_steps,
            )
        self._tell_if_short()
        self._give_back()

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
                "The optimizers of the evaluator hold %d parameters less than %s trains, among them '%s': these do "
                "not move between the updates. If that is not meant, pass the evaluator to the inner pruner, when it "
                "is made.",
                len(missing),
                type(self.bound_model).__name__,
                missing[0],
            )


class _SchedulePruner(SchedulerPruner):
    """Scheduled pruner of a ``schedule``."""

    def update_sparse_goals(self, current_times: int) -> None:
        schedule = cast("Schedule", self.scheduler.build())
        self._update_sparse_goals_by_ratio(float(schedule(current_times / self.total_times)))

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        super()._fuse_preprocess(evaluator)
        if not self.scheduler.rewinds:
            return
        generate, first, rounds = self.bound_pruner._generate_sparsity, first_weights(self.bound_model), [0]

        def then_rewound(metrics: object) -> object:
            masks = generate(metrics)
            if self._done > rounds[-1]:  # NNI's MovementPruner makes masks between its updates, too
                rounds.append(self._done)
                rewind(first, evaluator)
            return masks

        self.bound_pruner._generate_sparsity = then_rewound


class _AlongSchedulePruner(SchedulerPruner):
    """Scheduled pruner of what is no schedule itself: ``schedule`` names the one that it follows."""

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


class _RatioPolicyPruner(_AlongSchedulePruner):
    """Scheduled pruner of a ``ratio_policy``; ``schedule`` says how the total grows.

    A policy that looks at data does so when ``compress`` begins, at the model without masks: on the first batches of
    the training function, which trains a copy that is thrown away.
    """

    def _check_goals(self, inner: Pruner) -> None:
        for place in active_places(inner._target_spaces):
            if place.goal is None or place.space.global_group_id is not None:
                key = "sparse_threshold" if place.goal is None else "global_group_id"
                raise ConfigError(
                    f"{type(self).__name__} gives every layer a ratio of its own, but '{place.module}' has a {key}. "
                    "Expected a sparse_ratio only. Use a schedule such as AGPPruner for it."
                )
        if self.scheduler.needs_data:
            refuse_single_weights(type(self).__name__, list(active_places(inner._target_spaces)))

    def _prepare(self, inner: Pruner, evaluator: Evaluator) -> None:
        if isinstance(inner, MethodPruner):
            self._channels = inner.channels
        else:
            example = getattr(evaluator, "dummy_input", None)
            self._channels = ChannelTargets.of(inner.bound_model, None if example is None else inputs_of(example))
        if self.scheduler.needs_data:
            check_look(type(self).__name__, evaluator, self._channels)
            self._skeleton = copy.deepcopy(inner.bound_model)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if self.scheduler.needs_data:
            policy = cast("DataRatioPolicy", self.scheduler.build())
            plain, places = plain_copy(self._skeleton, self.bound_model, None), list(active_places(self._target_spaces))
            self._seen = looked(policy, plain, self._channels, places, self.evaluator)
        super()._fusion_compress(max_steps, max_epochs)

    def update_sparse_goals(self, current_times: int) -> None:
        """Sets the ratios that the policy gives, scaled to the config_list's total."""
        places = list(active_places(self._target_spaces))
        units = {place.tensor: self._channels.unit_of(place) for place in places}
        progress = current_times / self.total_times
        policy = cast("RatioPolicy", self.scheduler.build())
        if self.scheduler.needs_data:
            cast("DataRatioPolicy", policy).seen = self._seen
        weights = policy_weights(self.bound_model, self._channels, places, units)
        relative = policy(weights, reached_ratios(places, units), progress)
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


class _MaskUpdatePruner(_AlongSchedulePruner):
    """Scheduled pruner of a ``mask_update_rule``; ``schedule`` says how the goals grow."""

    def update_sparse_goals(self, current_times: int) -> None:
        """Sets the goals along the schedule; the rule acts when the inner pruner makes its masks."""
        self._update_sparse_goals_by_ratio(float(self._schedule(current_times / self.total_times)))

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        super()._fuse_preprocess(evaluator)
        generate = self.bound_pruner._generate_sparsity
        rule = cast("MaskUpdateRule", self.scheduler.build())
        self.bound_pruner._generate_sparsity = lambda metrics: ruled_masks(
            generate, rule, metrics, list(active_places(self._target_spaces)), self._done / self.total_times
        )


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
