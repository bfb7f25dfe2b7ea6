"""The section about networks whose filters are switched per input: how they fire, what they cost, how they export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nni_prune_ext.report import number_text
from nni_prune_ext.report.facts import RunReport
from nni_prune_ext.report.gate_charts import break_even_charts, firing_charts
from nni_prune_ext.report.gate_facts import GatedFileFacts, GateLayerFacts, GateMacsFacts, GatingFacts
from nni_prune_ext.report.page_parts import Cell, Chart, Column, Group, Section, Table, cell

_FIRING = "Filters that run always / for some images / never"
_BREAK_EVEN = "Firing rate / break-even rate, layer by layer"
_ENTROPY = (
    "Entropy: of a filter's being open, mean over the filters; 0 means the same for every image, 1 a coin toss. "
    "Break-even: the firing rate below which computing the open filters only is faster, measured once on one kind of "
    "machine; a layer is gathered if it stays well below it on the images of the export, so that reasons may name "
    "rates that differ slightly from those here."
)
_COUNTING = (
    "What an image needs counts inputs that no gate silences, heads and ungated layers in full. The paper's code "
    "leaves heads and classifier out and takes the stream behind a residual addition for as narrow as the gate before "
    "it: for comparison with its tables only."
)


def gates_sections(report: RunReport, *, name: str) -> Iterator[Section]:
    """Yields one section per gated network of a run.

    Args:
        name: makes the identifiers of the charts unique in the page.
    """
    for number, own in enumerate(report.gating):
        title = "Gates per input" if len(report.gating) == 1 else f"Gates per input: {own.network}"
        charts = [Chart(svg, _FIRING) for svg in firing_charts(own.layers, name=f"{name}-firing-{number}")]
        bounded = break_even_charts(own.layers, own.gathered, name=f"{name}-break-even-{number}")
        charts += [Chart(svg, _BREAK_EVEN) for svg in bounded]
        tables = [
            *([_macs(own.macs)] if own.macs else []),
            *([_layers(own)] if own.layers else []),
            *([_files(own.files)] if own.files else []),
            *([_failed(own)] if own.failed else []),
        ]
        yield Section(title, [_lead(report, own)], charts, tables)


def _lead(report: RunReport, own: GatingFacts) -> str:
    if own.images is None:
        return "How filters fire was not measured."
    filters = sum(layer.filters for layer in own.layers)
    never, always, varying = (
        sum(getattr(layer, kind) for layer in own.layers) for kind in ("never", "always", "varying")
    )
    return (
        f"Measured on {own.images:,} {own.data or 'images'} (data: {report.data or 'unknown'}). Of {filters:,} filters "
        f"in {len(own.layers)} gated layers, {always:,} run always, {never:,} never, and {varying:,} vary: they "
        "run for some images only."
    )


def _macs(macs: GateMacsFacts) -> Table:
    columns = [Column("counting", numeric=False), Column("mean"), Column("share of dense")]
    columns += [Column("standard deviation"), Column("smallest"), Column("largest")]
    nothing = [Cell("–", "missing")] * 3
    spread = [cell(value, number_text.count) for value in (macs.spread, macs.smallest, macs.largest)]
    rows = [
        [Cell("what an image needs"), *_mean(macs.mean, macs.dense), *spread],
        [Cell("of these, heads"), *_mean(macs.heads, macs.dense), *nothing],
        [Cell("official: as the paper's code counts"), *_mean(macs.official, macs.dense), *nothing],
        [Cell("dense network"), *_mean(macs.dense, macs.dense), *nothing],
    ]
    return Table("MACs per image", columns, [Group(rows)], note=_COUNTING)


def _mean(value: float, dense: float) -> list[Cell]:
    return [cell(value, number_text.count), Cell(number_text.share(value, dense))]


def _layers(own: GatingFacts) -> Table:
    compact = [file for file in own.files if file.flavour == "compact"]
    headings = ("filters", "units", "always", "varying", "never", "firing rate", "entropy (bits)", "break-even")
    columns = [Column("layer", numeric=False), *map(Column, headings)]
    columns += [Column(f"in {file.name}", numeric=False, wraps=True) for file in compact]
    rows = [[*_layer_cells(layer), *(_fate(file, layer.layer) for file in compact)] for layer in own.layers]
    return Table("Gated layers", columns, [Group(rows)], note=_ENTROPY, folded=len(rows) > 25)


def _layer_cells(layer: GateLayerFacts) -> list[Cell]:
    counts = (layer.filters, layer.units, layer.always, layer.varying, layer.never)
    return [
        Cell(layer.layer),
        *(Cell(f"{count:,}") for count in counts),
        cell(layer.rate, "{:.3f}".format),
        cell(layer.entropy_bits, "{:.3f}".format),
        cell(layer.break_even, "{:.2f}".format, "none"),
    ]


def _fate(file: GatedFileFacts, layer: str) -> Cell:
    if layer in file.gathered:
        return Cell("gathered", "good")
    if layer in file.folded:
        return Cell("folded: no longer gated")
    return Cell(f"masked: {file.masked.get(layer, 'reason unknown')}")


def _files(files: Sequence[GatedFileFacts]) -> Table:
    columns = [Column("file", numeric=False), Column("mask bits that agree"), Column("images with all bits alike")]
    columns += [Column(heading) for heading in ("largest difference there", "allowed", "gathered", "masked", "folded")]
    columns += [Column("limits", numeric=False, wraps=True)]
    rows = [[Cell(file.name), *_agreement(file), *_counts(file), Cell(file.limits)] for file in files]
    note = "Each file is compared with PyTorch: mask bits first, then outputs, on the images whose bits all agree."
    return Table("ONNX files of the gated network", columns, [Group(rows)], note=note)


def _agreement(file: GatedFileFacts) -> list[Cell]:
    found = file.agreement
    if found is None:
        return [cell(None, number_text.plain)] * 4
    return [
        Cell(f"{round(found.agreement * found.bits):,} of {found.bits:,}", exact=f"{found.agreement:.6g}"),
        Cell(f"{found.compared:,} of {found.images:,}"),
        cell(found.max_rel, number_text.error),
        cell(found.fail, number_text.error),
    ]


def _counts(file: GatedFileFacts) -> list[Cell]:
    return [Cell(str(len(layers))) for layers in (file.gathered, file.masked, file.folded)]


def _failed(own: GatingFacts) -> Table:
    columns = [Column("missing row", numeric=False), Column("why its file was not written", numeric=False, wraps=True)]
    rows = [[Cell(name), Cell(reason, "bad")] for name, reason in own.failed.items()]
    return Table("Not written", columns, [Group(rows)])
