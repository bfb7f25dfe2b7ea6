"""A pretrained torchvision network, pruned to a latency on the runtime that it will run on, as a measured ONNX file.

    python examples/latency_target.py --network mobilenet_v2 --weights mobilenet_v2.pth --target latency=0.7 \
        --train FOLDER --data FOLDER --recover-epochs 5 --out faster

Run it on the machine that you deploy on. OUT gets the artefact folders ``dense`` and ``pruned`` (plan, weights, checked
``model.onnx``) and ``results.json``: all of it, or nothing on an error. Exit codes: 0 the target is met; 1 it is
missed, or the work failed; 2 wrong input, or a runtime that cannot be used here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import nn

import nni_prune_ext as npe
from nni_prune_ext import errors
from nni_prune_ext.allocation import Achieved
from nni_prune_ext.cli.progress import progress_watcher
from nni_prune_ext.data.image_arrays import ImageArrays
from nni_prune_ext.data.image_folders import class_folders, class_images, decode_images
from nni_prune_ext.data.sources import IMAGENET_MEAN, IMAGENET_STD
from nni_prune_ext.evaluation import LatencyReport, accuracy_of_session, environment, measure_latency
from nni_prune_ext.export.artefact_folder import ModelSpec, check_writable, complete_or_absent, first_foreign
from nni_prune_ext.runtimes.base import RunnableModel
from nni_prune_ext.runtimes.registered import usable_runtime
from nni_prune_ext.text_files import write_text

SESSIONS = 5  # of each file: where the memory of a session lies moves a time by up to 2 %
Files = Mapping[str, RunnableModel]  # dense first: the reference


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return 0 if run(parse(arguments)).met else 1
    except errors.NniPruneExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, (errors.CertificateError, errors.ParityError, errors.TrainingError)) else 2


def run(given: argparse.Namespace) -> Achieved:
    """Checks what was given, prunes, exports and measures; returns the target, asked and achieved."""
    check_writable(given.out)
    if first_foreign(given.out) is not None:
        raise errors.OutputError(f"'{given.out}' is not empty, expected a new folder. Choose another one with --out.")
    target = npe.Target.parse(given.target)
    if target.metric != "latency":
        raise errors.TargetError(f"The target is {target}, expected one such as latency=0.7 or latency=2.0ms.")
    conditions = npe.LatencyConditions(runtime=given.on, batch=given.batch, threads=given.threads)
    usable_runtime(given.on)  # refused before anything takes time
    torch.manual_seed(given.seed)
    spec = ModelSpec(model=f"torchvision:{given.network}", num_classes=given.num_classes, mean=given.mean,
                     std=given.std, input_shape=(1, 3, given.image_size, given.image_size))  # fmt: skip
    dense = npe.build_model(  # the file is read without executing code, and must fit this network
        spec.model, num_classes=spec.num_classes, weights=given.weights, pretrained=given.pretrained
    ).eval()
    if given.network not in torchvision.models.list_models(module=torchvision.models):
        raise errors.ModelError(f"'{given.network}' does not classify images. Choose a --network that does.")
    train, held_out = image_batches(given)
    example = torch.randn(spec.input_shape)
    with progress_watcher(json=False) as watcher:  # measuring takes minutes
        result = npe.prune(
            dense,
            example,
            method="l1",
            target=target,
            latency=conditions,
            train_batches=train,  # BN statistics are measured anew on them, then the network recovers
            recover_epochs=given.recover_epochs,
            settings=npe.TrainingSettings(learning_rate=given.learning_rate),
            watcher=watcher,
            seed=given.seed,
        )
    real = [next(iter(images))[0][:16] for images in (held_out, train) if images]
    with complete_or_absent(given.out) as draft:
        networks = {"dense": (dense, None), "pruned": (result.model, result.plan)}
        made = {  # a ParityError, if ONNX Runtime and PyTorch differ by more than 1e-4 of the largest output
            name: npe.write_artefacts(model, draft / name, example, plan=plan, given_inputs=real, spec=spec)
            for name, (model, plan) in networks.items()
        }
        files = {name: RunnableModel(one.onnx, networks[name][0]) for name, one in made.items()}
        reports = measured(files, conditions, example)
        achieved = verdict(target, reports)
        facts = {
            "network": given.network,
            "weights": given.weights.name if given.weights else "published" if given.pretrained else "random",
            "target": str(target), "met": achieved.met,
            "asked_ms": achieved.asked, "achieved_ms": achieved.achieved, "dense_ms": achieved.dense,
            "error_bar": max(report.error_bar for report in reports),
            "clock": reports[0].clock, "conditions": conditions.model_dump(mode="json"),
            "macs": {"dense": result.dense.macs, "pruned": result.costs.macs},
            "params": {"dense": result.dense.params, "pruned": result.costs.params},
            "parity": {name: float(f"{one.export.parity.max_rel:.1e}") for name, one in made.items()},
            "top1": top1(result.removed_only, files, held_out, conditions) if held_out else "not measured",
            "notes": notes(given),
            "sessions": [report.to_dict() for report in reports],
            "aimed": result.latency.to_dict(),  # predictions, and every network that was measured on the way
            "environment": environment(), "seed": given.seed,
        }  # fmt: skip
        write_text(draft / "results.json", json.dumps(facts, indent=1) + "\n")
    print(achieved)  # says MISSED where it is missed
    print(f"measured afresh: {conditions}, {facts['clock']} time, A/A error {100 * facts['error_bar']:.1f} %")
    for name, key in (("MACs", "macs"), ("parameters", "params"), ("parity", "parity"), ("top-1", "top1")):
        told = facts[key] if isinstance(facts[key], str) else [f"{own} {value:,}" for own, value in facts[key].items()]
        print(f"{name}: {told if isinstance(told, str) else ', '.join(told)}")
    print("".join(f"note: {note}\n" for note in facts["notes"]), end="")
    return achieved


def image_batches(given: argparse.Namespace) -> tuple[npe.BatchLoader | None, npe.BatchLoader | None]:
    """Opens the images to train on and those held out, as far as they are given; both in memory."""
    folders = {name: folder for name, folder in (("train", given.train), ("data", given.data)) if folder}
    classes = sorted({name for folder in folders.values() for name in class_folders(folder)})
    if folders and len(classes) != given.num_classes:
        expected = f"expected {given.num_classes}, one per output of the network. Add them, or set --num-classes."
        raise errors.DataError(f"--train and --data hold {len(classes)} class folders together, {expected}")
    files = {name: class_images(folder, classes) for name, folder in folders.items()}
    places = [{path.resolve() for path in one.paths} for one in files.values()]
    if len(places) == 2 and places[0] & places[1]:
        raise errors.DataError(f"'{min(places[0] & places[1])}' is in --train and in --data, expected it in one only.")
    loaders: dict[str, npe.BatchLoader] = {}
    for name, one in files.items():
        size, edge = given.image_size, given.image_size // 14  # 16 pixels of 224: the usual cut from 256
        pixels = decode_images(one.paths, (size + 2 * edge, size + 2 * edge))
        arrays = ImageArrays(pixels[:, :, edge : edge + size, edge : edge + size], one.labels)
        varied = {"shuffle": True, "drop_last": True, "augment": "crop_flip" if given.recover_epochs else "none"}
        loaders[name] = npe.BatchLoader(arrays, min(64, len(pixels)), mean=given.mean, std=given.std, seed=given.seed,
                                        **(varied if name == "train" else {}))  # fmt: skip
    return loaders.get("train"), loaders.get("data")


def measured(files: Files, conditions: npe.LatencyConditions, example: torch.Tensor) -> list[LatencyReport]:
    """Times the files as they ship, side by side, in several sessions each; the first one is the reference."""
    inputs = [[example.repeat(conditions.batch, 1, 1, 1).numpy()]]
    entries = {name: (usable_runtime(conditions.runtime), file) for name, file in files.items()}
    how = {"threads": conditions.threads, "clock": conditions.clock, "min_seconds": 1.0}
    return [measure_latency(entries, inputs, **how, seed=session) for session in range(SESSIONS)]


def verdict(target: npe.Target, reports: Sequence[LatencyReport]) -> Achieved:
    """Compares what was asked for with what was measured, by the ratio within rounds."""
    dense_ms = median(report.rows[0].p50_ms for report in reports)
    ratio = median(report.rows[1].ratio for report in reports)
    return Achieved(target, dense_ms, target.bound(dense_ms), ratio * dense_ms)


def top1(cut: nn.Module, files: Files, held_out: npe.BatchLoader, on: npe.LatencyConditions) -> dict[str, float]:
    """Returns the accuracies (0–1) on the held-out images, in PyTorch and on the runtime."""
    networks = {name: file.module for name, file in files.items()} | {"right after the cut": cut}
    found = {name: npe.accuracy(network, held_out) for name, network in networks.items()}
    for name, file in files.items():
        with usable_runtime(on.runtime).session(file, threads=on.threads) as session:
            batches = ((images.numpy(), labels.numpy()) for images, labels in held_out)
            found[f"{name} on {on.runtime}"] = accuracy_of_session(session, batches)
    found["standard error"] = (found["pruned"] * (1 - found["pruned"]) / len(held_out.arrays)) ** 0.5
    return {"images": len(held_out.arrays), **{name: round(value, 4) for name, value in found.items()}}


def notes(given: argparse.Namespace) -> list[str]:
    """Says what the figures do not say."""
    said = {
        "a smoke run with random weights and small images: no figure means anything": given.smoke,
        "accuracy is UNKNOWN: no held-out images were given (--data)": not given.data,
        "not recovered: a pruned network wants training (--train, --recover-epochs)": not given.recover_epochs,
        "the dense network was not trained as long: what is gained may be due to training": given.recover_epochs,
    }
    return [note for note, holds in said.items() if holds]


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' was given, expected a whole number of at least 1")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument(
        "--weights", type=Path, help="a state dict of the network: torch.save of tensors, or safetensors"
    )
    start.add_argument("--pretrained", action="store_true", help="download the weights that torchvision publishes")
    start.add_argument("--smoke", action="store_true", help="random weights, small images: quick, and no meaning")
    smoke = "--smoke" in (sys.argv if arguments is None else arguments)
    add = parser.add_argument
    add("--network", default="squeezenet1_1" if smoke else "mobilenet_v2", help="a classification network")
    add("--num-classes", type=positive, default=1000)
    add("--image-size", type=positive, default=32 if smoke else 224)
    add("--mean", type=float, nargs=3, default=IMAGENET_MEAN, help="of the pixels, as the weights were trained")
    add("--std", type=float, nargs=3, default=IMAGENET_STD)
    add("--train", type=Path, help="FOLDER/CLASS/image: for batch-norm statistics and recovery")
    add("--data", type=Path, help="FOLDER/CLASS/image: held out, for the accuracy and nothing else")
    add("--target", default="latency=0.7", help="latency=0.7 of the dense network's, or latency=2.0ms")
    add("--on", default="onnxruntime-cpu", help="a runtime of `nni-prune-ext list runtimes`")
    add("--batch", type=positive, default=1, help="images per run")
    add("--threads", type=positive, default=1)
    add("--recover-epochs", type=int, default=0)
    add("--learning-rate", type=float, default=0.01)
    add("--out", type=Path, default=Path("latency_target"))
    add("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if min(given.std) <= 0:
        parser.error(f"--std is {given.std}, expected three numbers above 0")
    return given


if __name__ == "__main__":
    sys.exit(main())
