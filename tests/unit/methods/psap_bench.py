"""PSAP on the bench, watched while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from nni_prune_ext.methods.base import MethodContext, Phase
from nni_prune_ext.methods.psap import PSAP, Psap
from nni_prune_ext.methods.psap_options import PsapOptions
from nni_prune_ext.surgery import Removal
from nni_prune_ext.testing.method_bench import Bench, CountedRun
from nni_prune_ext.training import drive

Seen = Callable[["Spy", MethodContext], object]


class Spy(Psap):
    """The method, watched at the end of every epoch and at the removal."""

    def __init__(self, options: PsapOptions, seen: Seen, removed: Seen) -> None:
        super().__init__(options)
        self.seen, self.removed = seen, removed

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        super().after_epoch(context, phase, epoch)
        self.seen(self, context)

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        self.removed(self, context)
        super().on_removed(context, removal)


def nothing(*_: object) -> None:
    """Sees nothing."""


def driven(
    options: Mapping[str, object], *, seen: Seen = nothing, removed: Seen = nothing, **changes: object
) -> tuple[Spy, CountedRun]:
    run = replace(Bench.of(PSAP, {}).run(), **changes)
    given = {"epochs": 5, "probe_batches": 1, "step_bound": 0.5, **options}
    spy = Spy(PsapOptions.model_validate(given), seen, removed)
    drive(spy, run)
    return spy, run
