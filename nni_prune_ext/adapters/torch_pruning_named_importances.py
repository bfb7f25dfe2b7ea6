"""The torch-pruning importance of every registered method."""

from __future__ import annotations

from typing import Any

from nni_prune_ext.adapters.torch_pruning_decisions import DecisionImportance, deciding_method
from nni_prune_ext.adapters.torch_pruning_importance import (
    FPGMImportance,
    L1Importance,
    L2Importance,
    MethodImportance,
    RandomImportance,
    TaylorImportance,
)
from nni_prune_ext.pipeline import method_spec


class LotteryJackpotsImportance(DecisionImportance):
    """Scores channels by a mask that is searched in the frozen weights of a copy."""

    method = "lottery_jackpots"


class FTWTImportance(DecisionImportance):
    """Scores channels by what is left after gates were trained on a copy: those that fire least go first."""

    method = "ftwt"


class PSAPImportance(DecisionImportance):
    """Scores channels by what PSAP (re-derived from the abstract) removes from a copy that it trains."""

    method = "psap"


class ReconstructionImportance(DecisionImportance):
    """Scores channels by what rounds on the joint loss of task and reconstruction remove from a copy."""

    method = "reconstruction"


_NAMED: dict[str, type[MethodImportance]] = {
    own.method: own
    for own in (
        L1Importance,
        L2Importance,
        FPGMImportance,
        RandomImportance,
        TaylorImportance,
        LotteryJackpotsImportance,
        FTWTImportance,
        PSAPImportance,
        ReconstructionImportance,
    )
}


def importance_for(name: str) -> type[Any]:
    """Returns the importance class of any registered method that removes channels.

    That of a method without scores is a :class:`DecisionImportance`, which takes a ``pruning_ratio``.

    Raises:
        UnknownPluginError: no such method.
        PluginError: the method removes no channels.
    """
    base: type[MethodImportance] = MethodImportance
    if method_spec(name).scores is None:
        deciding_method(name)
        base = DecisionImportance
    if name not in _NAMED:
        title = "".join(part.capitalize() for part in name.rpartition(":")[2].replace("-", "_").split("_"))
        attributes: dict[str, Any] = {"method": name, "__doc__": f"Scores channels with the method '{name}'."}
        _NAMED[name] = type(f"{title}Importance", (base,), attributes)
    return _NAMED[name]
