"""The sections about one run, from its facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from nni_prune_ext.report import charts, number_text
from nni_prune_ext.report.accuracy_charts import accuracy_section
from nni_prune_ext.report.facts import EpochFacts, LatencyFacts, RunReport, WidthFacts
from nni_prune_ext.report.gates import gates_sections
from nni_prune_ext.report.network_tables import before_after, has_gated, latency_table
from nni_prune_ext.report.page_parts import Cell, Chart, Column, Group, Section, Table, cell, pairs, words
from nni_prune_ext.report.pictures import pictures_section
from nni_prune_ext.report.precision_section import precision_section
from nni_prune_ext.report.verdicts import nothing_cut

_SHOWN_CLOCKS = {
    "cpu": "CPU time of the measuring thread",
    "wall": "elapsed time, which only an idle machine gives reliably",
}
_CERTIFICATE = (
    "The certificate compares two copies of the network with random weights: one with the channels removed, one with "
    "the same channels silenced; if both answer alike, the cut itself changes nothing but what these channels did."
)
_PARITY = (
    "Parity compares the ONNX file on ONNX Runtime with the network in PyTorch on the same inputs; its error is the "
    "largest difference, relative to the largest output."
)


def run_sections(report: RunReport, *, run: int, alone: bool) -> Iterator[Section]:
    """Yields everything about one run.

    Args:
        run: number of the run on the page, from 0.
        alone: the page has no other run, so that table and scatter stand here.
    """
    name = f"run{run + 1}"
    if alone:
        yield Section("Before and after", tables=before_after([report]), marks=True, gated=has_gated([report]))
        yield accuracy_section([report])
    if any(row.of for row in report.rows):
        yield precision_section(report)
    yield _latency(report)
    if report.masked:
        yield _masks(report, name)
    yield from gates_sections(report, name=name)
    yield _widths(report, name)
    yield _curves(report, name)
    if report.notes:
        yield _notes(report, name)
    if report.pictures:
        yield pictures_section(report)
    yield _exactness(report)
    yield _protected(report)
    yield _method(report)
    if report.environment:
        yield Section("Environment", tables=[pairs("Environment", report.environment)])
    else:
        yield Section("Environment", ["The environment was not recorded."])
    yield _recipe(report)


def _latency(report: RunReport) -> Section:
    table, aimed = latency_table(report), report.latency_target
    target = [f"Target: {sentence}." for sentence in aimed.sentences] if aimed else []
    if table is None or report.latency is None:
        return Section("Latency", ["Latency was not measured.", *target])
    return Section("Latency", [*_conditions(report.latency), *target], tables=[table])


def _conditions(latency: LatencyFacts) -> Iterator[str]:
    clock = _SHOWN_CLOCKS.get(latency.clock or "", latency.clock or "unknown")
    threads = "as many threads as the runtime chose" if latency.threads is None else _some(latency.threads, "thread")
    batch = "unknown" if latency.batch_size is None else str(latency.batch_size)
    rounds = "an unknown number of rounds" if latency.rounds is None else _some(latency.rounds, "round")
    yield f"Clock: {clock}. {threads.capitalize()}, batch {batch}, {rounds}, all networks interleaved in random order."
    if latency.error_bar is None or latency.aa_ratio is None:
        yield "The A/A error was not measured, so it is unknown how large a difference means nothing."
        return
    yield (
        f"A/A error {100 * latency.error_bar:.1f} %: the first network, measured twice, came out at "
        f"× {latency.aa_ratio:.3f} of itself. Smaller differences mean nothing."
    )
    within = [row.name for row in latency.rows[1:] if row.ratio and abs(row.ratio - 1) <= latency.error_bar]
    if within:
        yield f"Not distinguishable from {latency.rows[0].name}: {', '.join(within)}."


def _widths(report: RunReport, name: str) -> Section:
    if not report.widths:
        return Section("Layer widths", ["The widths of the layers were not recorded."])
    before, after = sum(width.before for width in report.widths), sum(width.after for width in report.widths)
    changed = sum(width.after < width.before for width in report.widths)
    lead = f"{changed} of {len(report.widths)} prunable layers are narrower; {after:,} of {before:,} channels are left."
    shown = []
    if changed:
        lead += " Bars show the share of channels that a layer keeps, numbers its channels before → after."
        shown = [Chart(svg) for svg in charts.width_charts(report.widths, name=f"{name}-widths")]
    table = _before_after("Widths of all prunable layers", report.widths)
    return Section("Layer widths", [lead], shown, [table], beside=True)


def _masks(report: RunReport, name: str) -> Section:
    before, after = sum(layer.before for layer in report.masked), sum(layer.after for layer in report.masked)
    lead = (
        f"{after:,} of {before:,} weights in {_some(len(report.masked), 'masked layer')} are left, the others are 0. "
        "Shapes stay, so this saves neither MACs nor time on ONNX Runtime; a file of zeros compresses well."
    )
    shown = [Chart(svg) for svg in charts.width_charts(report.masked, name=f"{name}-masks", of="weights")]
    table = _before_after("Weights of all masked layers", report.masked)
    return Section("Weights kept", [lead], shown, [table], beside=True)


def _before_after(caption: str, layers: Sequence[WidthFacts]) -> Table:
    columns = [Column("layer", numeric=False), Column("before"), Column("after"), Column("kept")]
    rows = [
        [Cell(w.layer), Cell(f"{w.before:,}"), Cell(f"{w.after:,}"), Cell(number_text.share(w.after, w.before))]
        for w in layers
    ]
    return Table(caption, columns, [Group(rows)], folded=True)


def _curves(report: RunReport, name: str) -> Section:
    if not any(report.curves.values()):
        return Section("Training", ["No training was recorded."])
    shown, missing = [], []
    for number, (stage, epochs) in enumerate(report.curves.items()):
        if len(epochs) < 2:  # a single point is no curve
            missing.append(_short_stage(stage, epochs))
            continue
        svg = charts.training_curve(epochs, stage=stage, name=f"{name}-curve-{number}")
        if svg is None:
            missing.append(f"{stage}: no loss was recorded.")
        else:
            shown.append(Chart(svg, _stage(stage, epochs)))
    columns = [Column("stage", numeric=False), Column("phase", numeric=False)]
    columns += [Column(heading) for heading in ("epoch", "loss", "validation metric", "learning rate", "time")]
    rows = [_epoch_cells(stage, epoch) for stage, epochs in report.curves.items() for epoch in epochs]
    every = Table("All epochs", columns, [Group(rows)], folded=True)
    return Section("Training", missing, shown, [*_phases(report.curves), every], beside=True)


def _phases(curves: Mapping[str, Sequence[EpochFacts]]) -> list[Table]:
    """Returns how every phase ended, for the stages that have several."""
    parts = {
        stage: [list(group) for _, group in groupby(epochs, key=lambda epoch: epoch.phase)]
        for stage, epochs in curves.items()
    }
    columns = [Column("stage", numeric=False), Column("phase", numeric=False), Column("epochs")]
    columns += [Column(heading) for heading in ("loss at its end", "validation metric at its end")]
    rows = [
        [
            Cell(stage),
            words(phase[-1].phase),
            Cell(str(len(phase))),
            cell(phase[-1].loss, "{:.4f}".format),
            cell(phase[-1].metric, "{:.4f}".format),
        ]
        for stage, phases in parts.items()
        if len(phases) > 1
        for phase in phases
    ]
    return [Table("Phases", columns, [Group(rows)])] if rows else []


def _stage(stage: str, epochs: Sequence[EpochFacts]) -> str:
    seconds = [epoch.seconds for epoch in epochs if epoch.seconds is not None]
    took = f", {number_text.duration(sum(seconds))}" if seconds else ""
    return f"{stage}: {_some(len(epochs), 'epoch')}{took}"


def _short_stage(stage: str, epochs: Sequence[EpochFacts]) -> str:
    """Returns the only epoch of a stage as a sentence."""
    if not epochs:
        return f"{stage}: no epoch of training."
    loss, metric = cell(epochs[0].loss, "{:.4f}".format), cell(epochs[0].metric, "{:.4f}".format)
    return f"{_stage(stage, epochs)}; loss {loss.text}, validation metric {metric.text}."


def _epoch_cells(stage: str, epoch: EpochFacts) -> list[Cell]:
    return [
        Cell(stage),
        words(epoch.phase),
        Cell(str(epoch.epoch + 1)),
        cell(epoch.loss, "{:.4f}".format),
        cell(epoch.metric, "{:.4f}".format),
        cell(epoch.learning_rate, "{:.3g}".format, "unknown"),
        cell(epoch.seconds, number_text.duration),
    ]


def _notes(report: RunReport, name: str) -> Section:
    shown = charts.note_charts(report.notes, name=f"{name}-note")
    families = charts.note_families(report.notes)
    alone = [keys[0] for keys in families.values() if len(keys) == 1]
    tables = [_note_table(report, "All logged numbers", {key: key for key in alone})] if alone else []
    for family, keys in families.items():
        if len(keys) > 1:
            tables.append(_note_table(report, f"All of {family}", {key: key.partition("/")[2] for key in keys}))
    drawn = [Chart(svg, key) for key, svg in shown.items()]
    count, plural = len(families), "s" if len(tables) > 1 else ""
    rest = [f"{len(shown)} of {count} are drawn; the table{plural} hold{'' if plural else 's'} all."]
    lead = ["What the method logged, from its start (0) to its end (1).", *(rest if len(shown) < count else [])]
    return Section("Numbers logged by the method", lead, drawn, tables, beside=True)


def _note_table(report: RunReport, title: str, columns: Mapping[str, str]) -> Table:
    """Returns logged numbers as a folded table.

    Args:
        columns: key → title.
    """
    rows = [
        [cell(note.get(key), "{:.6g}".format, "not logged") for key in ("progress", *columns)]
        for note in report.notes
        if any(key in note for key in columns)
    ]
    return Table(title, [Column("progress"), *map(Column, columns.values())], [Group(rows)], folded=True)


def _exactness(report: RunReport) -> Section:
    tables = []
    if report.certificate is None:
        certificate = (
            "Nothing was cut, so there was nothing to certify." if nothing_cut(report) else "No certificate was made."
        )
    else:
        certificate = _CERTIFICATE
        found = report.certificate
        content = {
            "removal is exact": found.exact,
            "largest relative error": _error(found.max_relative_error),
            "bound": _error(found.bound),
            "probes": found.probes,
            "arithmetic": found.dtype,
            "seed": found.seed,
            "effect of the input": found.input_effect,
            "effect of the removal": found.removal_effect,
        }
        tables.append(pairs("Certificate", content))
    columns = [Column("network", numeric=False), Column("largest relative error"), Column("allowed"), Column("")]
    rows = [
        [
            Cell(row.name),
            cell(row.parity, number_text.error),
            cell(row.parity_limit, number_text.error, "unknown"),
            _parity_word(row.parity, row.parity_limit),
        ]
        for row in report.networks
    ]
    tables.append(Table("Parity of the ONNX files", columns, [Group(rows)]))
    return Section("Certificate and parity", [certificate, _PARITY], tables=tables, beside=True)


def _parity_word(parity: float | None, limit: float | None) -> Cell:
    if parity is None or limit is None:
        return Cell("unknown", "missing")
    return Cell("within", "good") if parity <= limit else Cell("BROKEN", "bad")


def _protected(report: RunReport) -> Section:
    remarks = [
        f"{label}: {', '.join(names) if names else 'none recorded'}."
        for label, names in (
            ("Shortcuts rewritten exactly", report.rewrites),
            ("Layers not seen by the trace", report.unreached),
            ("Calls that read values of tensors, known for the example input only", report.value_dependent),
        )
    ]
    if not report.protected:
        return Section("Protected layers", ["No protected layers were recorded.", *remarks])
    columns = [Column("layer", numeric=False), Column("width"), Column("why it stays whole", numeric=False, wraps=True)]
    rows = [[Cell(protected.root), words(protected.width), Cell(protected.reason)] for protected in report.protected]
    count = f"{_some(len(report.protected), 'layer')} kept whole."
    table = Table("Protected layers", columns, [Group(rows)], folded=len(rows) > 15)
    return Section("Protected layers", [count, *remarks], tables=[table])


def _method(report: RunReport) -> Section:
    job = {
        "model": report.model,
        "data": report.data,
        "method": report.method,
        "seed": report.seed,
        "recovery epochs": report.recovery_epochs,
        "made": report.created,
        "nni_prune_ext": report.package_version,
    }
    blocks: tuple[tuple[str, Mapping[str, object] | None], ...] = (
        ("Options of the method", report.options),
        ("Facts from the method", report.facts),
        ("Training settings", report.training),
        ("Distillation", report.distillation),
    )
    tables = [pairs("Job", job), *(pairs(title, content, missing="none") for title, content in blocks if content)]
    absent = [title.lower() for title, content in blocks if not content]
    lead = [f"Empty or not recorded: {', '.join(absent)}."] if absent else []
    return Section("Method and settings", lead, tables=tables, beside=True)


def _recipe(report: RunReport) -> Section:
    if not report.recipe:
        return Section("Recipe", ["No recipe was recorded."])
    import yaml  # imported here because few pages have a recipe

    code = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=100)
    return Section(
        "Recipe", ["The same job again: save this as recipe.yaml, then nni-prune-ext run recipe.yaml."], code=code
    )


def _error(value: float | None) -> str | None:
    return None if value is None else number_text.error(value)


def _some(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
