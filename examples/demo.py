"""The main job from end to end: train, prune with every registered method, recover, export, check, measure.

    python examples/demo.py                                   # digits that ship with scikit-learn: the smoke test
    python examples/demo.py --data cifar10:ROOT --epochs 10   # CIFAR-10, as batches or as image folders
    python examples/demo.py --data imagefolder:PATH --image-size 64

One dense network is trained once and shared. Beside the pruned networks the table shows the dense network trained for
as many more epochs as the pruned ones recover. The test images are used for the numbers in the table only.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import nni_prune_ext as npe
from nni_prune_ext.deployment import (
    Variant,
    check_writable,
    compare_variants,
    result_facts,
)
from nni_prune_ext.evaluation import latency_caption, measurement_facts
from nni_prune_ext.export.artefact_folder import ModelSpec
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.registry import plugins
from nni_prune_ext.report import RunReport, before_after_table, markdown_table, write_html, write_report
from nni_prune_ext.text_files import write_text
from nni_prune_ext.training import EpochLog, Watcher

CONSOLE = Console(width=160)


def main() -> None:
    arguments = parse()
    out = Path(arguments.out)
    check_writable(out)
    torch.manual_seed(arguments.seed)
    source = npe.open_data(arguments.data, image_size=arguments.image_size, limit=arguments.limit, seed=arguments.seed)
    model = npe.build_model(arguments.model, num_classes=source.num_classes, in_channels=source.input_shape[0])
    example = (torch.randn(1, *source.input_shape),)
    size = "×".join(str(n) for n in source.input_shape)
    tell(f"{arguments.model} on {source.name}: {len(source.train)} training, {len(source.test)} test images of {size}")
    variants = [*dense_networks(model, source, arguments), *pruned_networks(model, example, source, arguments)]
    spec = ModelSpec(
        model=arguments.model, num_classes=source.num_classes, input_shape=(1, *source.input_shape), mean=source.mean,
        std=source.std,
    )  # fmt: skip
    test = npe.split_batches(source, "test", 500)
    rows, latency, _ = compare_variants(variants, out, example, test_batches=test, progress=tell, spec=spec)
    job = {**vars(arguments), "num_classes": source.num_classes, "input_shape": list(source.input_shape)}
    results = {variant.name: variant.result for variant in variants if variant.result}
    methods = {name: result_facts(result) for name, result in results.items()}
    curves = {name: [vars(log) for log in result.logs] for name, result in results.items()}
    facts = {"title": f"{arguments.model} on {source.name}, every method", "model": arguments.model, "curves": curves,
             "data": arguments.data, "seed": arguments.seed, "job": job, "methods": methods}  # fmt: skip
    write_report(out / "report.json", rows, {**facts, **measurement_facts(latency)})
    write_html(out / "report.html", [RunReport.load(out)])
    write_text(out / "table.md", markdown_table(rows))
    title = f"{arguments.model} on {source.name}, target {arguments.target}"
    epochs = f"trained {arguments.epochs} epochs, recovered {arguments.recover_epochs}; artefacts in {out}"
    CONSOLE.print(before_after_table(rows, title=title, caption=f"{latency_caption(latency)}; {epochs}"))


def dense_networks(model: nn.Module, source: npe.DataSource, arguments: argparse.Namespace) -> Iterator[Variant]:
    """Trains the dense network, then a copy of it for as long as the pruned ones recover."""
    train = training_batches(source, arguments)
    began = time.perf_counter()
    npe.fit(model, train, epochs=arguments.epochs, settings=settings(source, 0.1), watcher=Told())
    yield Variant("dense", model, seconds=time.perf_counter() - began)
    longer, began = copy.deepcopy(model), time.perf_counter()
    npe.fit(longer, train, epochs=arguments.recover_epochs, settings=settings(source, 0.02))
    yield Variant("dense-trained-longer", longer, seconds=time.perf_counter() - began)


def pruned_networks(
    model: nn.Module, example: tuple[Tensor], source: npe.DataSource, arguments: argparse.Namespace
) -> Iterator[Variant]:
    """Prunes the trained network with every registered method, each with its own demo options."""
    groups = npe.verify_groups(model, example, npe.trace_channel_groups(model, example))
    for name in plugins("pruners"):
        began = time.perf_counter()
        result = npe.prune(
            model,
            example,
            method=name,
            target=arguments.target,
            options=method_spec(name).demo_options,
            groups=groups,
            limits=npe.Limits(multiple=arguments.multiple),
            train_batches=training_batches(source, arguments),
            recover_epochs=arguments.recover_epochs,
            settings=settings(source, 0.02),
            seed=arguments.seed,
        )
        seconds = time.perf_counter() - began
        tell(f"{name}: pruned and recovered in {seconds:.1f} s")
        yield Variant(name, result.model, result, seconds)


def training_batches(source: npe.DataSource, arguments: argparse.Namespace) -> npe.BatchLoader:
    return npe.split_batches(source, "train", 64 if len(source.train) < 5000 else 128, seed=arguments.seed)


def settings(source: npe.DataSource, learning_rate: float) -> npe.TrainingSettings:
    """Large images or many of them are trained in bfloat16 and channels-last, which is several times faster on CPUs."""
    heavy = len(source.train) * source.input_shape[1] * source.input_shape[2] > 5e6
    return npe.TrainingSettings(learning_rate=learning_rate, precision="bf16" if heavy else "fp32", channels_last=heavy)


class Told(Watcher):
    """Tells of every epoch."""

    def epoch(self, log: EpochLog) -> None:
        """Prints one line."""
        tell(f"{log.phase} epoch {log.epoch + 1}: loss {log.loss:.3f}, {log.seconds:.1f} s")


def tell(text: str) -> None:
    CONSOLE.print(f"  {text}", style="dim", highlight=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits", help="digits, cifar10:ROOT or imagefolder:PATH")
    parser.add_argument("--out", default="demo_output", help="folder for the artefacts and the table")
    parser.add_argument("--model", default="resnet20", help="a model of `nni-prune-ext list models`")
    parser.add_argument("--target", default="macs=0.5")
    parser.add_argument("--multiple", type=int, default=4, help="of widths: below 4, ONNX Runtime is slow on CPUs")
    parser.add_argument("--epochs", type=int, default=12, help="training of the dense network")
    parser.add_argument("--recover-epochs", type=int, default=3, help="training after the cut")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--limit", type=int, default=None, help="at most so many images per split")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
