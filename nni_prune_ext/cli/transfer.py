"""``transfer``: networks of artefact folders trained on a second data set, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o

if TYPE_CHECKING:
    from nni_prune_ext.transfer import TransferReport


def transfer(
    networks: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FOLDER...",
            help="Artefact folders of networks for RGB images; the first one is the reference, usually the dense one.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="voc:FOLDER or coco:FOLDER (boxes); imagefolder:PATH, cifar10:ROOT or module.path:factory (classes)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for report and trained weights.")],
    head: Annotated[
        str | None,
        typer.Option(
            help="retinanet, faster_rcnn or ssdlite for boxes, classifier for classes.",
            show_default="retinanet or classifier",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training, alike for all.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="So many seeds: 0, 1, and so on.")] = 1,
    random_control: Annotated[
        bool,
        typer.Option("--random-control", help="Add the last network's architecture with random weights as a row."),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="module.path:factory, for folders of networks that no name stands for.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="H,W of the images, or one number; the data's own by default.")
    ] = None,
    limit_images: o.LimitImages = None,
    mean: o.Mean = None,
    std: o.Std = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per batch.", show_default="32, or 8 for boxes")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "adamw",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="L2 for sgd, decoupled for adamw.")] = 0.01,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 autocast in training.")] = "fp32",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Train in channels-last memory format.")
    ] = False,
    maps: Annotated[int, typer.Option(min=1, help="Feature maps that a detector reads, from the coarsest on.")] = 3,
    pyramid_channels: Annotated[int, typer.Option(min=1, help="Width of a detector's feature pyramid.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes a GPU if there is one.")] = "auto",
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Trains pruned networks on a second data set, alike, and reports AP or accuracy side by side."""
    from nni_prune_ext.cli.job import read_numbers, tell_json  # imported here to keep --help instant
    from nni_prune_ext.cli.progress import progress_watcher
    from nni_prune_ext.training import checked_settings
    from nni_prune_ext.training.processes import is_main, wait_for_everyone
    from nni_prune_ext.transfer.comparison import transfer_networks
    from nni_prune_ext.transfer.folders import named_networks, on_device, open_second_data, pixel_normalisation
    from nni_prune_ext.transfer.kept import check_folder
    from nni_prune_ext.transfer.page import write_page
    from nni_prune_ext.workbench.preparation import device_called
    from nni_prune_ext.workbench.run_lock import check_free, locked

    settings = checked_settings(
        optimizer=optimizer, learning_rate=learning_rate, weight_decay=weight_decay, precision=precision,
        channels_last=channels_last, warmup_epochs=0.5, max_gradient_norm=10.0, select_best=False,
    )  # fmt: skip
    if is_main():
        check_free(out)
        check_folder(out, resume=resume, overwrite=overwrite)
    wait_for_everyone()
    place = device_called(device)
    found = named_networks(networks, model=model, random_control=random_control)
    normalisation = pixel_normalisation(read_numbers("--mean", mean), read_numbers("--std", std), found)
    source = open_second_data(data, image_size=image_size, limit=limit_images, normalisation=normalisation)
    lock, told = (locked(out), progress_watcher(json)) if is_main() else (nullcontext(), nullcontext(None))
    with lock, told as watcher:
        report = transfer_networks(
            {name: on_device(own.model, place) for name, own in found.items()},
            source,
            head=head,
            epochs=epochs,
            seeds=range(seeds),
            settings=settings,
            batch_size=batch_size,
            weight_masks={name: own.masks for name, own in found.items()},
            normalisation=normalisation,
            maps=maps,
            pyramid_channels=pyramid_channels,
            folder=out,
            anew=overwrite,
            watcher=watcher,
        )
    if is_main():
        write_page(out / "report.html", report)
        if json:
            tell_json("done", out=str(out), **report.to_json())
        else:
            _show(report, out)


def _show(report: TransferReport, out: Path) -> None:
    from rich.console import Console  # imported here to keep --help instant
    from rich.markup import escape
    from rich.table import Table

    from nni_prune_ext.transfer.page import comparison_rows, headings

    facts = report.facts
    table = Table(title=escape(f"{facts['head']} on {facts['data']}, {facts['epochs']} epochs"))
    for number, heading in enumerate(headings(report)):
        table.add_column(escape(heading), justify="right" if number else "left")
    rows: Sequence[Sequence[str]] = comparison_rows(report)
    for row in rows:
        table.add_row(*(escape(text) for text in row))
    Console(width=160).print(table)
    typer.echo(f"report in {out / 'report.html'}, numbers in {out / 'transfer.json'}")
