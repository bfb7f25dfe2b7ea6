"""What a run leaves in its folder: the report as JSON and as a page, and the whole recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from nni_prune_ext import __version__
from nni_prune_ext.deployment import Variant, add_parts, result_facts
from nni_prune_ext.evaluation import LatencyReport, measurement_facts
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.pipeline import PruneResult
from nni_prune_ext.recipes import Recipe
from nni_prune_ext.report import Row, RunReport, write_html, write_report
from nni_prune_ext.report.gate_facts import GatingFacts
from nni_prune_ext.text_files import write_text
from nni_prune_ext.training import EpochLog
from nni_prune_ext.workbench.preparation import Prepared

REPORT, PAGE, RECIPE, CHECKPOINTS = "report.json", "report.html", "recipe.yaml", "checkpoints"


def run_facts(
    prepared: Prepared,
    result: PruneResult | None,
    latency: LatencyReport | None,
    *,
    curves: Mapping[str, Sequence[EpochLog]],
    networks: Sequence[Variant],
    gating: Sequence[GatingFacts] = (),
) -> dict[str, object]:
    """Returns everything a report says beside its rows."""
    recipe = prepared.recipe
    facts: dict[str, object] = {
        "title": recipe.title or f"{recipe.model.name}, {recipe.method or 'training'}",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "package_version": __version__,
        "model": recipe.model.name,
        "data": recipe.data.source if recipe.data else None,
        "metric": recipe.metric,
        "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json"),
        "method": recipe.method,
        "options": recipe.options,
        "training": recipe.training.model_dump(mode="json"),
        "distillation": recipe.distillation.model_dump(mode="json") if recipe.distillation else None,
        "recovery_epochs": recipe.recovery_epochs,
        "curves": {name: [asdict(log) for log in logs] for name, logs in curves.items()},
        **measurement_facts(latency),
    }
    if result is not None:
        own = {key: value for key, value in result_facts(result).items() if key != "epochs"}  # they are in the curves
        facts.update(own, widths=_widths(networks[0], result), notes=[dict(note) for note in result.notes])
        facts.update(masked=_masked(result), gating=[own.model_dump(mode="json") for own in gating])
    return facts


def write_run(out: Path, recipe: Recipe, rows: Sequence[Row], facts: Mapping[str, object]) -> RunReport:
    """Writes the reports of a run, also into the artefact folder of its last network; the recipe comes last.

    Raises:
        OutputError: a file cannot be written.
    """
    write_report(out / REPORT, rows, facts)
    report = RunReport.load(out)
    write_html(out / PAGE, [report])
    add_parts(
        out / report.networks[-1].name, {name: (out / name).read_text(encoding="utf-8") for name in (REPORT, PAGE)}
    )
    write_text(out / RECIPE, recipe.to_yaml())
    return report


def target_sentences(report: RunReport) -> tuple[str, ...]:
    """Returns one sentence per target, and by how much it was missed."""
    sentences = []
    for target in report.targets:
        asked, achieved = target.asked or 0.0, target.achieved or 0.0
        distance = "" if target.met is not False else f": missed by {abs(achieved - asked):,.6g}"
        unit = " ms" if target.metric == "latency" else ""
        sentences.append(f"target {target.target}: asked {asked:,.6g}{unit}, achieved {achieved:,.6g}{unit}{distance}")
    return tuple(sentences)


def _masked(result: PruneResult) -> list[dict[str, object]]:
    """Returns how many single weights of every masked layer there are, and how many are kept."""
    masks = result.outcome.weight_masks or {}
    return [
        {"layer": name.removesuffix(".weight"), "before": mask.numel(), "after": int(mask.sum())}
        for name, mask in masks.items()
    ]


def _widths(dense: Variant, result: PruneResult) -> list[dict[str, object]]:
    """Returns the output channels of every prunable layer before and after, in the order of the model."""
    before, after = dense.model.state_dict(), result.model.state_dict()
    places = {
        member.tensor: member.dim
        for group in result.groups
        for member in group.by_role(Role.WRITER, Role.DEPTHWISE)
        if member.tensor.endswith("weight")
    }
    return [
        {
            "layer": name.removesuffix(".weight"),
            "before": before[name].shape[places[name]],
            "after": after[name].shape[places[name]],
        }
        for name in before
        if name in places and name in after
    ]
