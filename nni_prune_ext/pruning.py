"""NNI pruners and schedulers, where NNI has them: change ``nni.compression.pruning`` to ``nni_prune_ext.pruning``.

Every registered method is a pruner and every registered scheduler a scheduled pruner; those of other packages are made
by ``pruner_for`` and ``scheduled_pruner_for``. LevelPruner, SlimPruner and MovementPruner are NNI's algorithms in
subclasses of NNI's classes, which check their config_list and leave nothing behind.
See docs/how-to/migrate_from_nni.md.
"""

from __future__ import annotations

from nni_prune_ext.adapters.nni_named_pruners import (
    LevelPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
    pruner_for,
)
from nni_prune_ext.adapters.nni_pruners import MethodPruner
from nni_prune_ext.adapters.nni_schedulers import SchedulerPruner, scheduled_pruner_for

L1NormPruner = pruner_for("l1")
L2NormPruner = pruner_for("l2")
FPGMPruner = pruner_for("fpgm")
RandomPruner = pruner_for("random")
LotteryJackpotsPruner = pruner_for("lottery_jackpots")
FTWTPruner = pruner_for("ftwt")
PSAPPruner = pruner_for("psap")
ReconstructionPruner = pruner_for("reconstruction")

LinearPruner = scheduled_pruner_for("linear")
AGPPruner = scheduled_pruner_for("agp")
CosinePruner = scheduled_pruner_for("cosine")
ASFPPruner = scheduled_pruner_for("asfp")
OneShotPruner = scheduled_pruner_for("one_shot")
UniformRatioPruner = scheduled_pruner_for("uniform_ratio")
ReplacePruner = scheduled_pruner_for("replace")
RewindingPruner = scheduled_pruner_for("rewinding")
FiringSignaturePruner = scheduled_pruner_for("firing_signature")
FTWTRatioPruner = scheduled_pruner_for("ftwt_ratio")
PSAPRatioPruner = scheduled_pruner_for("psap_ratio")
ShortRestrictionPruner = scheduled_pruner_for("short_restriction")
CosineShortRestrictionPruner = scheduled_pruner_for("short_restriction_cosine")

__all__ = [
    "AGPPruner",
    "ASFPPruner",
    "CosinePruner",
    "CosineShortRestrictionPruner",
    "FPGMPruner",
    "FTWTPruner",
    "FTWTRatioPruner",
    "FiringSignaturePruner",
    "L1NormPruner",
    "L2NormPruner",
    "LevelPruner",
    "LinearPruner",
    "LotteryJackpotsPruner",
    "MethodPruner",
    "MovementPruner",
    "OneShotPruner",
    "PSAPPruner",
    "PSAPRatioPruner",
    "RandomPruner",
    "ReconstructionPruner",
    "ReplacePruner",
    "RewindingPruner",
    "SchedulerPruner",
    "ShortRestrictionPruner",
    "SlimPruner",
    "TaylorPruner",
    "UniformRatioPruner",
    "pruner_for",
    "scheduled_pruner_for",
]
