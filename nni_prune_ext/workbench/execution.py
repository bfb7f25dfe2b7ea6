"""Carries out a recipe: base training, method, recovery, control, artefacts, report; resumable wherever it trains."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate.utils import send_to_device
from torch import nn

from nni_prune_ext.checkpoints import Checkpoints, Json
from nni_prune_ext.deployment import Measurement, Variant, compare_variants, gated_variants
from nni_prune_ext.errors import CheckpointError, NniPruneExtError
from nni_prune_ext.evaluation import latency_caption
from nni_prune_ext.graph.channel_groups import ChannelGroups
from nni_prune_ext.pipeline import PruneResult, prune
from nni_prune_ext.recipes import Origins, Recipe, checked_recipe
from nni_prune_ext.report import Row, RunReport
from nni_prune_ext.training import EpochLog, TrainingSettings, Watcher, fit
from nni_prune_ext.training.processes import (
    from_main,
    is_main,
    stay_on_cpu,
    wait_for_everyone,
    wait_for_main,
)
from nni_prune_ext.workbench.folder_state import checked_folder, is_finished, remove_checkpoints, remove_empty_claim
from nni_prune_ext.workbench.identity import base_identity, control_identity, run_identity
from nni_prune_ext.workbench.preparation import Prepared, lower_precision, planned_epochs, prepare, wants_control
from nni_prune_ext.workbench.run_folder import CHECKPOINTS, RECIPE, REPORT, run_facts, target_sentences, write_run
from nni_prune_ext.workbench.run_lock import locked

CONTROL = "dense-trained-longer"


@dataclass(frozen=True)
class RunResult:
    """What came of a recipe.

    Attributes:
        rows: one per network, the dense one first; empty in processes other than the main one.
        title: of the report.
        caption: how latency was measured.
        met: whether every target was reached.
        targets: asked and achieved, one sentence each.
        groups: what was open to pruning, and what was not.
        result: the compact network and how it came to be; ``None`` without a method, or if the run was done before.
        already_done: nothing was to be done, because the folder holds this very run.
    """

    folder: Path
    rows: tuple[Row, ...] = ()
    title: str = ""
    caption: str = ""
    met: bool = True
    targets: tuple[str, ...] = ()
    groups: ChannelGroups | None = None
    result: PruneResult | None = None
    already_done: bool = False

    @property
    def report(self) -> Path:
        """The report as JSON."""
        return self.folder / REPORT

    @property
    def networks(self) -> tuple[Row, ...]:
        """The rows of networks, without those of their files of lower precision."""
        return tuple(row for row in self.rows if row.precision == "fp32")

    @property
    def artefacts(self) -> list[Path]:
        """One artefact folder per network."""
        return [self.folder / row.name for row in self.networks]

    def summary(self) -> dict[str, object]:
        """Returns the result for machines, as JSON values."""
        return {
            "folder": str(self.folder),
            "report": str(self.report),
            "report_page": str(self.report.with_suffix(".html")),
            "artefacts": [str(path) for path in self.artefacts],
            "already_done": self.already_done,
            "met": self.met,
            "targets": list(self.targets),
            "rows": [vars(row) for row in self.rows],
        }


@dataclass
class _Networks:
    """The networks of a run in the order of their rows, and the epochs of each stage."""

    variants: list[Variant] = field(default_factory=list)
    curves: dict[str, list[EpochLog]] = field(default_factory=dict)
    result: PruneResult | None = None


def execute(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    origins: Origins | None = None,
) -> RunResult:
    """Carries out a recipe; everything goes into its folder ``out``.

    The validation split selects epochs; the test split is only reported on. In several processes all of them call
    this alike, and the main one writes.

    Args:
        resume: go on with the interrupted run in ``out``; a finished one is left as it is.
        overwrite: replace an earlier run in ``out``; otherwise the folder must be empty or new.
        watcher: is told how it goes.
        origins: where the keys of the recipe were written, for messages.

    Raises:
        RecipeError: the recipe does not fit together, or says no ``out``.
        OutputError: the folder cannot be written, holds something else, or another run is writing to it.
        CheckpointError: the folder holds a run of another recipe or model.
        ArtefactError: the folder holds this run, but no longer whole.
        TargetError, CertificateError, TrainingError, ExportError: see ``prune`` and ``write_artefacts``.
    """
    if recipe.device == "cpu":
        stay_on_cpu()
    recipe, watcher = checked_recipe(recipe), (watcher if is_main() else None) or Watcher()
    out = checked_folder(recipe, resume=resume, overwrite=overwrite)
    prepared = prepare(recipe, origins=origins)
    with locked(out) if is_main() else nullcontext():
        return _executed(prepared, out, watcher, resume=resume, overwrite=overwrite)


def _executed(prepared: Prepared, out: Path, watcher: Watcher, *, resume: bool, overwrite: bool) -> RunResult:
    recipe, base, whole = prepared.recipe, base_identity(prepared), run_identity(prepared)
    if resume and from_main(is_finished(out, whole, watcher.note) if is_main() else False):
        if is_main() and not recipe.keep_checkpoints:
            remove_checkpoints(out / CHECKPOINTS)  # a kill may have come between the last file and this
        return _finished_before(out)
    if overwrite and is_main():
        (out / RECIPE).unlink(missing_ok=True)  # from here on the folder holds no whole run
        remove_checkpoints(out / CHECKPOINTS)
    wait_for_everyone()
    checkpoints = Checkpoints(out / CHECKPOINTS, base, tell=watcher.note)
    if is_main() and (recipe.train or planned_epochs(recipe)):
        checkpoints.claim()
    try:
        networks = _train_and_prune(prepared, checkpoints, watcher)
    except NniPruneExtError:
        if is_main():
            remove_empty_claim(checkpoints.folder)
        raise
    done = _delivered(prepared, networks, whole, out, watcher) if is_main() else RunResult(out)
    if is_main() and not recipe.keep_checkpoints:
        remove_checkpoints(out / CHECKPOINTS)
    wait_for_main()
    return done


def _train_and_prune(prepared: Prepared, checkpoints: Checkpoints, watcher: Watcher) -> _Networks:
    recipe, made = prepared.recipe, _Networks()
    model, seconds = prepared.job.model.to(prepared.device), None
    if recipe.train is not None:
        settings, saved = recipe.train.settings(), checkpoints.stage("train")
        made.curves["train"], seconds = _trained(
            model, prepared, saved, watcher, name="train", epochs=recipe.train.epochs, settings=settings
        )
    made.variants.append(Variant("dense", model, seconds=seconds))
    if recipe.method is None:
        return made
    began = time.perf_counter()
    with _stage_of_its_own(checkpoints, "prune"):
        made.result = result = _pruned(model, prepared, checkpoints, watcher)
    name = result.method  # that of the specification, also where the recipe says module.path:SPEC
    made.curves[name] = list(result.logs)
    pruned = Variant(name, result.model, result, _seconds(began, result.logs), recipe.options)
    if wants_control(recipe):
        made.variants.append(_control(model, prepared, checkpoints, watcher, made))
    made.variants += [*gated_variants(result, pruned.seconds, recipe.options), pruned]
    return made


def _control(
    model: nn.Module, prepared: Prepared, checkpoints: Checkpoints, watcher: Watcher, made: _Networks
) -> Variant:
    """Trains a copy of the dense network for all epochs that the recipe plans, without an early stop or a teacher."""
    recipe, longer = prepared.recipe, copy.deepcopy(model)
    settings = recipe.training.model_copy(update={"patience": None})
    with _stage_of_its_own(checkpoints, "control"):
        saved = checkpoints.stage("control", control_identity(prepared))
    made.curves[CONTROL], seconds = _trained(
        longer, prepared, saved, watcher, name="control", epochs=planned_epochs(recipe), settings=settings
    )
    return Variant(CONTROL, longer, seconds=seconds)


@contextmanager
def _stage_of_its_own(checkpoints: Checkpoints, name: str) -> Iterator[None]:
    """Says what can be kept, if a stage's checkpoints are not those of the recipe."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} To keep the stages before it, delete '{checkpoints.folder / name}' and resume; to start the "
            "whole run anew, use --overwrite, or another folder with --out."
        ) from error


def _trained(
    model: nn.Module,
    prepared: Prepared,
    checkpoints: Checkpoints,
    watcher: Watcher,
    *,
    name: str,
    epochs: int,
    settings: TrainingSettings,
) -> tuple[list[EpochLog], float]:
    """Trains a dense network in place, validation-selected; returns the logs and the seconds it took."""
    batches, began = prepared.training_batches(), time.perf_counter()
    assert batches is not None  # a recipe that trains without data is refused
    logs = fit(
        model,
        batches,
        epochs=epochs,
        settings=settings,
        loss=prepared.loss,
        evaluate=prepared.validation(),
        watcher=watcher,
        checkpoints=checkpoints,
        name=name,
        seed=prepared.recipe.seed,
    )
    return logs, _seconds(began, logs)


def _pruned(model: nn.Module, prepared: Prepared, checkpoints: Checkpoints, watcher: Watcher) -> PruneResult:
    recipe = prepared.recipe
    assert recipe.method is not None
    result = prune(
        model,
        send_to_device(prepared.job.example, prepared.device),
        method=recipe.method,
        target=recipe.target,
        options=recipe.options,
        limits=recipe.limits,
        scope=recipe.scope,
        train_batches=prepared.training_batches(),
        loss=prepared.loss,
        recover_epochs=recipe.recovery_epochs,
        settings=recipe.training,
        evaluate=prepared.validation(),
        distillation=recipe.distillation,
        groups=prepared.groups,
        watcher=watcher,
        checkpoints=checkpoints,
        latency=recipe.latency,
        seed=recipe.seed,
    )
    return _on_cpu(result) if prepared.device.type != "cpu" else result


def _on_cpu(result: PruneResult) -> PruneResult:
    """Moves all networks and masks of a result to the CPU, where they are exported and measured."""
    outcome = result.outcome
    masks, gated = outcome.weight_masks, outcome.gated_model
    return replace(
        result,
        model=result.model.cpu(),
        removed_only=result.removed_only.cpu(),
        outcome=replace(
            outcome,
            weight_masks=masks and {name: mask.cpu() for name, mask in masks.items()},
            gated_model=gated and gated.cpu(),
        ),
    )


def _delivered(
    prepared: Prepared, made: _Networks, identity: Mapping[str, Json], out: Path, watcher: Watcher
) -> RunResult:
    """Writes the artefacts and the report of a run, and measures all networks side by side on the test split."""
    recipe, evaluate = prepared.recipe, prepared.validation()
    for variant in made.variants:
        variant.model.cpu()
    (out / RECIPE).unlink(missing_ok=True)  # it is written last and says that the run is whole
    rows, latency, gating = compare_variants(
        made.variants,
        out,
        prepared.job.example,
        test_batches=prepared.test_batches(),
        metric=prepared.metric if recipe.metric else None,
        given_inputs=prepared.job.example if prepared.job.loaders or recipe.metric else None,
        progress=watcher.note,
        spec=prepared.job.spec,
        measurement=Measurement(**recipe.measure.model_dump()) if recipe.measure else None,
        lower=lower_precision(prepared),
    )
    if evaluate is not None:
        models = {variant.name: variant.model for variant in made.variants}
        rows = [replace(row, validation=evaluate(models[row.name])) if row.name in models else row for row in rows]
    facts = run_facts(prepared, made.result, latency, curves=made.curves, networks=made.variants, gating=gating)
    report = write_run(out, recipe, rows, {**facts, "identity": dict(identity)})
    return RunResult(
        folder=out,
        rows=tuple(rows),
        title=report.heading,
        caption=latency_caption(latency, recipe.data is None) + _what_top1_holds(recipe),
        met=all(achieved.met for achieved in made.result.achieved) if made.result else True,
        targets=target_sentences(report),
        groups=prepared.groups,
        result=made.result,
    )


def _what_top1_holds(recipe: Recipe) -> str:
    return f"; in the columns top-1: {recipe.metric}" if recipe.metric else ""


def _finished_before(out: Path) -> RunResult:
    report = RunReport.load(out)
    return RunResult(
        out, report.rows, report.heading, targets=target_sentences(report), already_done=True,
        met=all(target.met is not False for target in report.targets),
    )  # fmt: skip


def _seconds(began: float, logs: Sequence[EpochLog]) -> float:
    """Returns the time since ``began``, or that of all epochs where a part of them lies before an interruption."""
    return max(time.perf_counter() - began, sum(log.seconds for log in logs))
