"""The NNI pruner class of every registered method, and those of NNI that are good as they are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from nni.compression.base.compressor import Compressor
from nni.compression.pruning import LevelPruner, MovementPruner, SlimPruner
from nni.compression.utils.evaluator import Evaluator
from torch import nn

from nni_prune_ext.adapters.nni_config import Entry
from nni_prune_ext.adapters.nni_pruners import MethodPruner
from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.pipeline import method_spec

__all__ = ["LevelPruner", "MovementPruner", "SlimPruner", "TaylorPruner", "pruner_for"]

_CLASS_NAMES: Mapping[str, str] = {"l1": "L1NormPruner", "l2": "L2NormPruner", "fpgm": "FPGMPruner"}
"""What NNI calls the pruners that are replaced."""
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
        made = Compressor.from_compressor.__func__(
            cls, compressor, list(new_config_list), evaluator=evaluator, training_steps=training_steps, **options
        )
        return cast("MethodPruner", made)


TaylorPruner.__signature__ = inspect.signature(TaylorPruner.__init__.__get__(object()))  # not that of its base
_CLASSES["taylor"] = TaylorPruner
