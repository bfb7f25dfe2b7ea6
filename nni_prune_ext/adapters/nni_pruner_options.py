"""The options of a method as arguments of its NNI pruner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.pipeline import method_options


def option_names(spec: MethodSpec) -> list[str]:
    """Returns the options that are arguments of a method's NNI pruner, in order.

    Of a criterion these are what its scores depend on: when and how far to cut is left to NNI.
    """
    return [name for name in spec.options.model_fields if spec.scores is None or name in spec.score_options]


def checked_options(
    own: str, spec: MethodSpec, by_position: Sequence[object], by_name: Mapping[str, object]
) -> BaseModel:
    """Returns the options of a method from the arguments of its pruner.

    Args:
        own: name of the pruner's class.

    Raises:
        ConfigError: one is unknown, given twice or out of range, or belongs to cuts that NNI's schedules make.
    """
    names = option_names(spec)
    if len(by_position) > len(names):
        raise ConfigError(
            f"{own} was given {len(by_position)} arguments after evaluator, expected at most {len(names)}: "
            f"{', '.join(names) or 'none'}. Pass existed_wrappers and dummy_input by name."
        )
    twice = [name for name in names[: len(by_position)] if name in by_name]
    if twice:
        raise ConfigError(f"{own} was given '{twice[0]}' twice, by position and by name. Expected it once.")
    own_cuts = [name for name in by_name if name in spec.options.model_fields and name not in names]
    if own_cuts:
        raise ConfigError(
            f"{own} was given '{own_cuts[0]}', which says how the method '{spec.name}' makes cuts of its own; in NNI, "
            f"schedules do that. Expected {', '.join(names) or 'no options'}. Put a scheduler around it: "
            f"AGPPruner({own}(…), interval_steps, total_times)."
        )
    return method_options(spec, {**dict(zip(names, by_position)), **by_name})
