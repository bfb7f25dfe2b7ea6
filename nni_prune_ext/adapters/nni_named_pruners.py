"""The NNI pruner of every registered method, and NNI's own LevelPruner, SlimPruner and MovementPruner, guarded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import nni.compression.pruning as nni_pruning
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.utils.evaluator import Evaluator
from torch import nn

from nni_prune_ext.adapters.nni_config import Entry, check_config_list
from nni_prune_ext.adapters.nni_context import parameters_of, put_back, share_parameters, wrapped_again
from nni_prune_ext.adapters.nni_evaluator import released
from nni_prune_ext.adapters.nni_pruner_options import option_names
from nni_prune_ext.adapters.nni_pruners import MethodPruner
from nni_prune_ext.adapters.nni_targets import turn_transposed
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.pipeline import method_spec

__all__ = ["LevelPruner", "MovementPruner", "SlimPruner", "TaylorPruner", "pruner_for"]

_CLASS_NAMES: Mapping[str, str] = {
    "l1": "L1NormPruner",
    "l2": "L2NormPruner",
    "fpgm": "FPGMPruner",
    "ftwt": "FTWTPruner",
    "psap": "PSAPPruner",
}
"""What NNI calls the pruners that are replaced, and acronyms."""
_CLASSES: dict[str, type[MethodPruner]] = {}


def pruner_for(name: str) -> type[MethodPruner]:
    """Returns the NNI pruner class of a registered method, or of ``module.path:SPEC``.

    Raises:
        UnknownPluginError: nobody registered the name.
    """
    spec = method_spec(name)
    known = _CLASSES.get(spec.name)
    return known if known is not None and known.method is spec else _class_of(spec)


def class_name(name: str, known: Mapping[str, str]) -> str:
    """Returns the class name of a registered name: ``my-method`` becomes ``MyMethodPruner``."""
    return known.get(name) or "".join(part.capitalize() for part in name.replace("-", "_").split("_")) + "Pruner"


def _class_of(spec: MethodSpec) -> type[MethodPruner]:
    made = type(class_name(spec.name, _CLASS_NAMES), (MethodPruner,), {"method": spec, "__doc__": _documentation(spec)})
    made.__signature__ = _signature(spec)  # type: ignore[attr-defined]
    _CLASSES[spec.name] = made
    return made


def _documentation(spec: MethodSpec) -> str:
    return f"NNI pruner of the method '{spec.name}': {spec.summary} ({spec.reference})."


def _signature(spec: MethodSpec) -> inspect.Signature:
    """Returns the constructor's signature with the method's options where NNI has algorithm arguments."""
    base = inspect.signature(MethodPruner)
    own = [
        inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=field.get_default(call_default_factory=True)
        )
        for name, field in spec.options.model_fields.items()
        if name in option_names(spec)
    ]
    fixed = [p for p in base.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    front = [p for p in fixed if p.kind is p.POSITIONAL_OR_KEYWORD]
    back = [p for p in fixed if p.kind is p.KEYWORD_ONLY]
    return inspect.Signature([*front, *own, *back])


class TaylorPruner(pruner_for("taylor")):  # type: ignore[misc]
    """NNI's TaylorPruner with this package's Taylor criterion.

    Args:
        training_steps: training batches that are averaged for one score.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Entry],
        evaluator: Evaluator,
        training_steps: int,
        existed_wrappers: Mapping[str, Any] | None = None,
        *,
        dummy_input: object = None,
        seed: int = 0,
    ) -> None:
        if evaluator is None or not isinstance(training_steps, int) or training_steps < 1:
            raise ConfigError(
                f"TaylorPruner was given training_steps={training_steps!r} and "
                f"{'no evaluator' if evaluator is None else 'an evaluator'}, expected an evaluator and at least 1 "
                "step: its scores come from training batches. Pass both."
            )
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers=existed_wrappers,
            dummy_input=dummy_input,
            seed=seed,
            batches=training_steps,
        )
        self.training_steps = training_steps

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: Sequence[Entry],
        training_steps: int,
        evaluator: Evaluator | None = None,
        **options: Any,
    ) -> MethodPruner:
        """Makes a pruner that takes over another compressor's model, wrappers and evaluator (NNI's class contract)."""
        made: MethodPruner = cls._taken_over(
            compressor, new_config_list, evaluator=evaluator, training_steps=training_steps, **options
        )
        return made


TaylorPruner.__signature__ = inspect.signature(TaylorPruner.__init__.__get__(object()))  # not that of its base
_CLASSES["taylor"] = TaylorPruner


class _GuardedPruner(Pruner):  # type: ignore[misc]
    """What this package adds to a pruner of NNI: its config_list is checked, and nothing is left behind."""

    _finest: ClassVar[str | None] = "out_channel"
    """What the pruner takes for the default granularity."""

    def __init__(self, model: nn.Module, config_list: Sequence[Entry], *arguments: Any) -> None:
        check_config_list(model, config_list, self._finest)
        self._originals = parameters_of(model)
        try:
            super().__init__(model, list(config_list), *arguments)
        except BaseException:
            if getattr(self, "_is_wrapped", False):
                self.unwrap_model()
            raise
        share_parameters(self._originals, self)

    @classmethod
    def from_compressor(cls, compressor: Compressor, *arguments: Any, **options: Any) -> Pruner:
        """Makes a pruner that takes over another compressor's model, wrappers and evaluator (NNI's class contract)."""
        with wrapped_again(compressor):
            return cast("Pruner", super().from_compressor(compressor, *arguments, **options))

    def unwrap_model(self) -> None:
        """Takes the wrappers off; the parameters are the objects that they were before wrapping."""
        super().unwrap_model()
        put_back(self._originals, self)

    def _register_scalers(self) -> None:
        super()._register_scalers()
        turn_transposed(self._target_spaces)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        with released(self.evaluator):
            super()._fusion_compress(max_steps, max_epochs)


class LevelPruner(_GuardedPruner, nni_pruning.LevelPruner):  # type: ignore[misc]
    """NNI's LevelPruner: masks the smallest single weights."""

    _finest = None

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Entry],
        evaluator: Evaluator | None = None,
        existed_wrappers: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, config_list, evaluator, existed_wrappers)


class SlimPruner(_GuardedPruner, nni_pruning.SlimPruner):  # type: ignore[misc]
    """NNI's SlimPruner: trains a factor per channel, of batch norms as a rule, and masks the smallest.

    Args:
        training_steps: training steps before the masks are made.
        regular_scale: how strongly the factors are drawn to 0.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Entry],
        evaluator: Evaluator,
        training_steps: int,
        regular_scale: float = 1.0,
        existed_wrappers: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, config_list, evaluator, training_steps, regular_scale, existed_wrappers)


class MovementPruner(_GuardedPruner, nni_pruning.MovementPruner):  # type: ignore[misc]
    """NNI's MovementPruner: masks the weights that training moves towards 0.

    Args:
        warmup_step: training steps before the first masks.
        cooldown_begin_step: the step at which the masks reach their goals.
        regular_scale: how strongly scores are drawn to 0 where a threshold decides.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Entry],
        evaluator: Evaluator,
        warmup_step: int,
        cooldown_begin_step: int,
        regular_scale: float = 1.0,
        existed_wrappers: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model, config_list, evaluator, warmup_step, cooldown_begin_step, regular_scale, existed_wrappers
        )

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        try:
            super()._fusion_compress(max_steps, max_epochs)
        finally:
            self._update_sparse_goals_by_ratio(1.0)
