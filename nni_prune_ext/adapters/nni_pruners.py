"""NNI pruners for every registered method: NNI 3.0's class contract around this package's methods.

A method that is a criterion gives NNI its metrics, so that NNI's config_list, schedules and fusion work as with NNI's
own pruners. A method that trains or searches runs its own phases with the user's evaluator, on a copy that may be cut;
masks and trained weights are then put into the user's model. The granularity says what such a method is asked for:
channels, or single weights. Departures from NNI's pruners:

* channel groups are traced first, and coupled layers share one mask;
* what NNI accepts in silence (ratios above 1, entries that select nothing, …) is a :class:`ConfigListError`;
* a pruner in a fusion without a schedule prunes once: at the start, or as soon as it has seen the batches it scores
  with;
* data-driven scores are taken at one set of weights, on the batches that the training has just seen;
* ``sparse_threshold`` is compared with the method's scores, whose mean over a layer is 1 for the weight criteria;
* an evaluator is let go again when training raises.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.pruning.tools import active_sparse_targets_filter
from nni.compression.utils.evaluator import Evaluator
from torch import Tensor, nn

from nni_prune_ext.adapters.nni_config import Entry, check_config_list
from nni_prune_ext.adapters.nni_context import (
    ScoringContext,
    parameters_of,
    plain_copy,
    put_back,
    share_parameters,
    wrapped_again,
)
from nni_prune_ext.adapters.nni_evaluator import (
    StepCall,
    StepRecorder,
    collected_calls,
    released,
    torch_evaluator,
)
from nni_prune_ext.adapters.nni_granularity import BLOCK_METRICS, asked_unit
from nni_prune_ext.adapters.nni_masks import layer_masks
from nni_prune_ext.adapters.nni_method_run import (
    channel_run,
    load_weights,
    refuse_unplannable,
    run_method,
    weight_run,
    with_weight_masks,
)
from nni_prune_ext.adapters.nni_pruner_options import checked_options, option_names
from nni_prune_ext.adapters.nni_sparsity import make_masks
from nni_prune_ext.adapters.nni_speedup import removal_of
from nni_prune_ext.adapters.nni_targets import (
    ChannelTargets,
    Masks,
    Place,
    active_places,
    inputs_of,
    short_of_goal,
    turn_transposed,
)
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import MethodSpec, Outcome
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.training.processes import averaged

_logger = logging.getLogger(__name__)


class MethodPruner(Pruner):  # type: ignore[misc]
    """Base of the NNI pruners of this package; ``pruner_for`` makes the class of a method.

    Args:
        model: the model to prune; wrapped in place, as NNI does.
        config_list: NNI's; every key of NNI 3.0 is honoured.
        evaluator: needed by methods that train or score with data, and by schedulers around them.
        method_options: the options of the method, by position in the order in which it declares them.
        existed_wrappers: for ``from_compressor``.
        dummy_input: example input; else the evaluator's, else common shapes are tried.
        seed: of everything random in the method.
        options: the options of the method, by name.

    Raises:
        ConfigListError: the config_list is wrong in a way that NNI would accept.
        ConfigError: an option is unknown or out of range, or the dummy input does not fit.
    """

    method: ClassVar[MethodSpec]

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Entry],
        evaluator: Evaluator | None = None,
        *method_options: object,
        existed_wrappers: Mapping[str, Any] | None = None,
        dummy_input: object = None,
        seed: int = 0,
        **options: object,
    ) -> None:
        if evaluator is not None and not isinstance(evaluator, Evaluator):
            raise ConfigError(
                f"The evaluator of {type(self).__name__} is a {type(evaluator).__name__}, expected an evaluator of "
                "nni.compression. An example input is passed by name: dummy_input=."
            )
        self.options: Any = checked_options(type(self).__name__, self.method, method_options, options)
        self.seed = seed
        self.unit = asked_unit(self.method, check_config_list(model, config_list))
        example = dummy_input if dummy_input is not None else getattr(evaluator, "dummy_input", None)
        self._skeleton = copy.deepcopy(model)
        if self.unit == "weight" and example is None:
            self.channels = ChannelTargets.untraced(model)
        else:
            self.channels = ChannelTargets.of(model, None if example is None else inputs_of(example))
        self._originals = parameters_of(model)
        self.gated_model: nn.Module | None = None
        self.outcome: Outcome | None = None
        self._shortcut_masks: Masks = {}
        super().__init__(
            model, list(config_list), evaluator, None if existed_wrappers is None else dict(existed_wrappers)
        )
        self.interval_steps = -1
        self.total_times: int | str = 1
        self._calls: list[StepCall] = []
        self._recorder: StepRecorder | None = None
        self._fired = False
        share_parameters(self._originals, self)

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: Sequence[Entry],
        *method_options: object,
        evaluator: Evaluator | None = None,
        **options: object,
    ) -> MethodPruner:
        """Makes a pruner that takes over another compressor's model, wrappers and evaluator (NNI's class contract)."""
        by_name = dict(zip(option_names(cls.method), method_options))
        return cls._taken_over(compressor, new_config_list, evaluator=evaluator, **by_name, **options)

    @classmethod
    def _taken_over(cls, compressor: Compressor, config_list: Sequence[Entry], **arguments: object) -> MethodPruner:
        """Lets NNI make the pruner; if that is refused, the compressor is as it was."""
        with wrapped_again(compressor):
            made = Compressor.from_compressor.__func__(cls, compressor, list(config_list), **arguments)
        return cast("MethodPruner", made)

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor | None]]]:
        """Prunes; returns the same model, wrapped and masked, and its masks (NNI's class contract).

        Args:
            max_steps: training steps, in a fusion or under a schedule only.
            max_epochs: the same in epochs.

        Raises:
            ConfigError: a length was given although the method decides its own, or an evaluator is missing.
        """
        return cast("tuple[nn.Module, dict[str, dict[str, Tensor | None]]]", super().compress(max_steps, max_epochs))

    def get_masks(self) -> dict[str, dict[str, Any]]:
        """Returns a copy of the masks: of all targets, and of the outputs of shortcuts that lost channels.

        A shortcut without weights has no target. Where a method has cut channels that one of them passes on, only a
        mask of its output (``_output_0``) tells a speedup so.
        """
        masks = cast("dict[str, dict[str, Any]]", super().get_masks())
        for module, own in self._shortcut_masks.items():
            masks[module] = {target: mask.clone() for target, mask in own.items()}
        return masks

    def update_masks(self, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Sets masks, as ``get_masks`` returned them."""
        shortcuts = set(self.channels.groups.rewrites) - set(self._module_wrappers)
        self._shortcut_masks |= {module: dict(own) for module, own in masks.items() if module in shortcuts}
        super().update_masks({module: own for module, own in masks.items() if module not in shortcuts})

    def unwrap_model(self) -> None:
        """Takes the wrappers off. Unlike NNI's, the parameters are the objects that they were before wrapping.

        An optimizer that was made before is still about them.
        """
        super().unwrap_model()
        put_back(self._originals, self)

    def plan(self) -> PruningPlan:
        """Returns the channels that a speedup removes for the current masks.

        Raises:
            ConfigError: there is no example input that the model runs on.
            SpeedupError: masks of single weights, or a layer without any channel left.
        """
        model = plain_copy(self._skeleton, self.bound_model, None)
        masks = layer_masks(self.get_masks(), model)
        if not self.channels.traced:
            raise ConfigError(
                f"The channels of {type(self.bound_model).__name__} could not be traced without an example input, so "
                "masks do not make a plan. Pass dummy_input=."
            )
        removal, _ = removal_of(model, masks, self.channels.example_inputs)
        return removal.plan

    def _places(self) -> list[Place]:
        return list(active_places(self._target_spaces))

    # NNI's three steps: data, metrics, masks

    def _register_scalers(self) -> None:
        super()._register_scalers()
        turn_transposed(self._target_spaces)

    def _collect_data(self) -> Masks:
        return cast("Masks", active_sparse_targets_filter(self._target_spaces))

    def _calculate_metrics(self, data: Masks) -> Masks:
        places = self._places()
        groups = self.channels.scored_groups(places)
        masks = self.get_masks() if self.method.needs_data else None
        model = plain_copy(self._skeleton, self.bound_model, masks)
        context = ScoringContext(model, groups, tuple(self._calls), self.seed)
        scores = averaged(dict(self._scores()(cast("Any", context), self.options)))
        metrics = self.channels.metrics(places, scores)
        blocks = {(p.module, p.target) for p in places if p.dim is None}
        if blocks:
            chosen = {m: {t: v for t, v in own.items() if (m, t) in blocks} for m, own in data.items()}
            for module, own in BLOCK_METRICS[self.method.name](chosen, self._target_spaces).items():
                metrics.setdefault(module, {}).update(own)
        return metrics

    def _generate_sparsity(self, metrics: Masks) -> Masks:
        return make_masks(self.channels, self._places(), metrics, self._target_spaces)

    def _scores(self) -> Callable[[Any, Any], Mapping[str, Tensor]]:
        if self.method.scores is None:
            raise ConfigError(
                f"The method '{self.method.name}' decides in phases of its own and gives no scores, so an outer "
                "schedule or fusion cannot drive it. Expected a criterion, such as l1 or taylor; use the method "
                f"alone: {type(self).__name__}(model, config_list, evaluator).compress()."
            )
        return self.method.scores

    # alone

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if max_steps is not None or max_epochs is not None:
            raise ConfigError(
                f"{type(self).__name__}.compress was called with max_steps={max_steps} and max_epochs={max_epochs}, "
                "expected neither: alone, the method decides how long it trains (its options say). For training in "
                "between put a scheduler around it, such as AGPPruner."
            )
        if self.method.scores is not None:
            if self.method.needs_data:
                self._calls = self._collected(self._batches_to_score())
            self.update_masks(self.generate_masks())
            self._calls = []
        else:
            self._run_method()
        self._tell_about_masks()

    def _batches_to_score(self) -> int:
        return int(getattr(self.options, "batches", 1))

    def _collected(self, count: int) -> list[StepCall]:
        """Returns batches of the user's training function, which trains a copy that is thrown away."""
        evaluator = torch_evaluator(self.evaluator, f"The method '{self.method.name}'")
        copied = plain_copy(self._skeleton, self.bound_model, None)
        calls = collected_calls(evaluator, copied, count)
        if len(calls) < count:
            _logger.warning(
                "%s scores with %d batches, but the training_func stopped after %d steps; it scores with these.",
                type(self).__name__,
                count,
                len(calls),
            )
        return calls

    def _run_method(self) -> None:
        """Runs the phases of a method on a copy, then puts its weights and masks into the user's model."""
        method, evaluator = self.method.build(self.options), None
        if self.unit == "channel" and not self.channels.traced:
            raise ConfigError(
                f"The method '{self.method.name}' prunes channel groups and must run the model, but there is no "
                "example input. Pass dummy_input=, here or to the evaluator."
            )
        if self.method.needs_data or any(phase.epochs for phase in method.phases()):
            evaluator = torch_evaluator(self.evaluator, f"The method '{self.method.name}'")
        model = plain_copy(self._skeleton, self.bound_model, None)
        if self.unit == "weight":
            run = weight_run(model, self.channels, self._target_spaces, self.seed)
        else:
            refuse_unplannable(type(self).__name__, self.channels, self._places())
            run = channel_run(model, self.channels, self._target_spaces, self.seed)
        self.outcome = run_method(method, run, evaluator)
        self.gated_model = self.outcome.gated_model
        load_weights(self.bound_model, run)
        masks = {module: own for module, own in self.get_masks().items() if module in self._module_wrappers}
        if run.applied is not None:
            masks |= self.channels.masks_of(run.applied, self._target_spaces)
        self._shortcut_masks = {} if run.applied is None else self.channels.shortcut_masks_of(run.applied)
        self.update_masks(with_weight_masks(masks, self.outcome, run))

    # in a fusion, or under a schedule

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        self._scores()
        self._fired, self._steps = False, 0
        self._due = self.interval_steps if self.interval_steps > 0 else self._batches_to_score()
        self._remaining = self.total_times if self.interval_steps > 0 else 1
        if self.method.needs_data:
            torch_evaluator(evaluator, f"The method '{self.method.name}'")
            self._recorder = StepRecorder(evaluator, self._batches_to_score())
        elif self.interval_steps <= 0:
            self._fire()
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[self._after_step])

    def _after_step(self) -> None:
        self._steps += 1
        if self._steps == self._due and self._remaining != 0:
            self._fire()
            if self._remaining != 0:
                self._steps = 0

    def _fire(self) -> None:
        if self._recorder is not None:
            self._calls, wanted = list(self._recorder.calls), self._batches_to_score()
            if len(self._calls) < wanted:
                _logger.warning(
                    "%s scores with %d batches, but only %d steps were made so far; it scores with these.",
                    type(self).__name__,
                    wanted,
                    len(self._calls),
                )
        self.update_masks(self.generate_masks())
        self._fired = True
        if isinstance(self._remaining, int):
            self._remaining -= 1

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        if not self._fired:
            _logger.warning(
                "%s was to prune after %d training steps, but training stopped after %d; it prunes now.",
                type(self).__name__,
                self._due,
                self._steps,
            )
            self._fire()
        self._recorder, self._calls = None, []
        self._tell_about_masks()

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if self.evaluator is None or (max_steps is None and max_epochs is None):
            raise ConfigError(
                f"{type(self).__name__} is fused with {len(self.fused_compressors) - 1} other compressors and must "
                f"train, but has max_steps={max_steps}, max_epochs={max_epochs} and "
                f"{'no evaluator' if self.evaluator is None else 'an evaluator'}. Expected an evaluator, and one of "
                "the two."
            )
        with released(self.evaluator):
            super()._fusion_compress(max_steps, max_epochs)

    def _tell_about_masks(self) -> None:
        """Warns, with names and numbers, about targets that miss their ratio and masks that a speedup cannot follow."""
        places, masks = self._places(), self.get_masks()
        short = short_of_goal(places, masks)
        if short:
            _logger.warning(
                "%s: %d targets are masked less than asked: %s.", type(self).__name__, len(short), "; ".join(short[:5])
            )
        torn = self.channels.torn(places, masks)
        if torn:
            _logger.warning(
                "%s: the masks of %d coupled groups cannot be followed by a speedup, which keeps those channels: %s.",
                type(self).__name__,
                len(torn),
                "; ".join(torn[:5]),
            )
