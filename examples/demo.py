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
from pathlib import Path

import torch
from rich.console import Console

import nni_prune_ext as npe
from nni_prune_ext.deployment import Variant, check_writable, compare_variants, result_facts
from nni_prune_ext.evaluation import environment
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.registry import plugins
from nni_prune_ext.report import before_after_table, markdown_table, write_report, write_text
from nni_prune_ext.training import EpochLog, TrainingSettings


def main() -> None:
    arguments = parse()
    console = Console(width=160)
    out = Path(arguments.out)
    check_writable(out)
    torch.manual_seed(arguments.seed)
    source = npe.open_data(arguments.data, image_size=arguments.image_size, limit=arguments.limit, seed=arguments.seed)
    channels, height, width = source.input_shape
    model = npe.build_model(arguments.model, num_classes=source.num_classes, in_channels=channels)
    example = (torch.randn(1, channels, height, width),)
    train = npe.split_batches(source, "train", 64 if len(source.train) < 5000 else 128, seed=arguments.seed)
    test = npe.split_batches(source, "test", 500)
    console.print(
        f"{arguments.model} on {source.name}: {len(source.train)} training and {len(source.test)} test images, "
        f"{channels}×{height}×{width}, {source.num_classes} classes",
        highlight=False,
    )

    def show(log: EpochLog) -> None:
        console.print(
            f"  {log.phase} epoch {log.epoch + 1}: loss {log.loss:.3f}, {log.seconds:.1f} s",
            style="dim",
            highlight=False,
        )

    heavy = height * width * len(source.train) > 5e6
    dense_settings = TrainingSettings(learning_rate=0.1, precision="bf16" if heavy else "fp32", channels_last=heavy)
    recovery = TrainingSettings(learning_rate=0.02, precision=dense_settings.precision, channels_last=heavy)
    began = time.perf_counter()
    npe.fit(model, train, epochs=arguments.epochs, settings=dense_settings, on_epoch=show)
    variants = [Variant("dense", model, seconds=time.perf_counter() - began)]
    longer, began = copy.deepcopy(model), time.perf_counter()
    npe.fit(longer, train, epochs=arguments.recover_epochs, settings=recovery)
    variants.append(Variant("dense-trained-longer", longer, seconds=time.perf_counter() - began))
    groups = npe.verify_groups(model, example, npe.trace_channel_groups(model, example))
    facts: dict[str, object] = {}
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
            train_batches=train,
            recover_epochs=arguments.recover_epochs,
            settings=recovery,
            seed=arguments.seed,
        )
        seconds = time.perf_counter() - began
        console.print(f"  {name}: pruned and recovered in {seconds:.1f} s", style="dim", highlight=False)
        variants.append(Variant(name, result.model, result, seconds))
        facts[name] = result_facts(result)
    rows, latency = compare_variants(
        variants,
        out,
        example,
        test_batches=test,
        progress=lambda text: console.print(f"  {text}", style="dim", highlight=False),
    )
    job = {
        "model": arguments.model,
        "data": arguments.data,
        "image_size": arguments.image_size,
        "limit": arguments.limit,
        "num_classes": source.num_classes,
        "input_shape": list(source.input_shape),
        "target": arguments.target,
        "epochs": arguments.epochs,
        "recover_epochs": arguments.recover_epochs,
        "multiple": arguments.multiple,
        "seed": arguments.seed,
    }
    write_report(
        out / "report.json",
        rows,
        {"job": job, "environment": environment(), "latency": latency.to_dict(), "methods": facts},
    )
    write_text(out / "table.md", markdown_table(rows))
    console.print(
        before_after_table(
            rows,
            title=f"{arguments.model} on {source.name}, target {arguments.target}",
            caption=f"latency: {latency.clock} time, 1 thread, batch 1, A/A error {100 * latency.error_bar:.1f} %; "
            f"trained {arguments.epochs} epochs, recovered {arguments.recover_epochs}; artefacts in {out}",
        )
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits", help="digits, cifar10:ROOT or imagefolder:PATH")
    parser.add_argument("--out", default="demo_output", help="folder for the artefacts and the table")
    parser.add_argument("--model", default="resnet20", help="a model of `nni-prune-ext list models`")
    parser.add_argument("--target", default="macs=0.5")
    parser.add_argument(
        "--multiple", type=int, default=4, help="widths stay multiples of this: ONNX Runtime's CPU is slow below 4"
    )
    parser.add_argument("--epochs", type=int, default=12, help="training of the dense network")
    parser.add_argument("--recover-epochs", type=int, default=3, help="training after the cut")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--limit", type=int, default=None, help="at most so many images per split")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
