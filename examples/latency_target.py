"""A pretrained torchvision network, pruned to a latency on the runtime that it will run on, as a measured ONNX file.

    python examples/latency_target.py --network mobilenet_v2 --weights mobilenet_v2.pth --target latency=0.7 \
        --train FOLDER --data FOLDER --recover-epochs 5 --out faster

Run it on the machine that you deploy on. OUT gets the artefact folders ``dense`` and ``pruned`` (plan, weights, checked
``model.onnx``) and ``results.json``: all of it, or nothing on an error. Exit codes: 0 the target is met; 1 it is missed,
or the work failed; 2 wrong input, or a runtime that cannot be used here.
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

import nni_prune_ext as npe
from nni_prune_ext import errors
from nni_prune_ext.allocation import Achieved
from nni_prune_ext.data.image_arrays import ImageArrays
from nni_prune_ext.data.image_folders import class_folders, class_images, decode_images
from nni_prune_ext.data.sources import IMAGENET_MEAN, IMAGENET_STD
from nni_prune_ext.evaluation import LatencyReport, accuracy_of_session, environment, measure_latency
from nni_prune_ext.export.artefact_folder import ModelSpec, check_writable, complete_or_absent, first_foreign
from nni_prune_ext.runtimes.base import RunnableModel
from nni_prune_ext.runtimes.registered import usable_runtime
from nni_prune_ext.text_files import write_text

SESSIONS = 5  # of each file: where the memory of a session lies moves a time by up to 2 %


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    try:
        return 0 if run(given).met else 1
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
    train, held_out = (image_batches(given, split) for split in ("train", "data"))
    example = torch.randn(spec.input_shape)
    result = npe.prune(
        dense,
        example,
        method="l1",
        target=target,
        latency=conditions,
        train_batches=train,  # BN statistics are measured anew on them, then the network recovers
        recover_epochs=given.recover_epochs,
        settings=npe.TrainingSettings(learning_rate=given.learning_rate),
        watcher=Told(),
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
            "target": str(target),
            "asked_ms": achieved.asked,
            "achieved_ms": achieved.achieved,
            "dense_ms": achieved.dense,
            "met": achieved.met,
            "error_bar": max(report.error_bar for report in reports),
            "clock": reports[0].clock,
            "conditions": conditions.model_dump(mode="json"),
            "macs": {"dense": result.dense.macs, "pruned": result.costs.macs},
            "params": {"dense": result.dense.params, "pruned": result.costs.params},
            "parity": {name: one.export.parity.max_rel for name, one in made.items()},
            "top1": top1(result, files, held_out, conditions) if held_out else "not measured",
            "notes": notes(given),
            "sessions": [report.to_dict() for report in reports],
            "aimed": result.latency.to_dict(),  # how the target was aimed at: predictions, and networks on the way
            "environment": environment(),
            "seed": given.seed,
        }  # fmt: skip
        write_text(draft / "results.json", json.dumps(facts, indent=1) + "\n")
    tell(facts, achieved, f"{conditions}, {reports[0].clock} time")
    return achieved


def image_batches(given: argparse.Namespace, split: str) -> npe.BatchLoader | None:
    """Opens the images to train on (``train``) or those held out (``data``), if they are given."""
    folders = {name: folder for name, folder in (("train", given.train), ("data", given.data)) if folder}
    if split not in folders:
        return None
    classes = sorted({name for folder in folders.values() for name in class_folders(folder)})
    if len(classes) != given.num_classes:
        raise errors.DataError(f"There are {len(classes)} class folders, expected --num-classes {given.num_classes}.")
    files = {name: class_images(folder, classes) for name, folder in folders.items()}
    shared = set.intersection(*({path.resolve() for path in one.paths} for one in files.values()))
    if shared and len(files) == 2:
        raise errors.DataError(f"'{min(shared)}' is in --train and in --data. Hold out images that train nothing.")
    size, edge = given.image_size, given.image_size // 14  # 16 pixels of 224: the usual cut from 256
    pixels = decode_images(files[split].paths, (size + 2 * edge, size + 2 * edge))
    pixels = pixels[:, :, edge : edge + size, edge : edge + size]
    varied = {"shuffle": True, "augment": "crop_flip" if given.recover_epochs else "none", "drop_last": True}
    return npe.BatchLoader(ImageArrays(pixels, files[split].labels), min(64, len(pixels)), mean=given.mean,
                           std=given.std, seed=given.seed, **(varied if split == "train" else {}))  # fmt: skip


def measured(
    files: Mapping[str, RunnableModel], conditions: npe.LatencyConditions, example: torch.Tensor
) -> list[LatencyReport]:
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


def top1(
    result: npe.PruneResult,
    files: Mapping[str, RunnableModel],
    held_out: npe.BatchLoader,
    conditions: npe.LatencyConditions,
) -> dict[str, float]:
    """Returns the accuracies (0–1) on the held-out images, in PyTorch and on the runtime."""
    models = {name: file.module for name, file in files.items()}
    models["pruned, before recalibration and recovery"] = result.removed_only
    found = {name: npe.accuracy(model, held_out) for name, model in models.items()}
    for name, file in files.items():
        with usable_runtime(conditions.runtime).session(file, threads=conditions.threads) as session:
            batches = ((images.numpy(), labels.numpy()) for images, labels in held_out)
            found[f"{name} on {conditions.runtime}"] = accuracy_of_session(session, batches)
    return {"images": len(held_out.arrays), **found}


def notes(given: argparse.Namespace) -> list[str]:
    """Says what the figures do not say."""
    found = []
    if given.smoke:
        found.append("a smoke run with random weights and small images: no figure means anything")
    if not given.data:
        found.append("accuracy is UNKNOWN: no held-out images were given (--data)")
    if not given.recover_epochs:
        found.append("not recovered: a pruned network wants training before it ships (--train, --recover-epochs)")
    else:
        found.append("the dense network was not trained longer, so a gain may be due to the training alone")
    return found


def tell(facts: Mapping[str, object], achieved: Achieved, how: str) -> None:
    """Prints what the engineer has to know."""
    print(achieved)
    print(f"measured afresh on the files that ship: {how}, A/A error {100 * facts['error_bar']:.1f} %")
    for name in ("macs", "params"):
        counts = facts[name]
        print(f"{name}: {counts['dense']:,} -> {counts['pruned']:,} ({counts['pruned'] / counts['dense']:.3f})")
    print("largest difference of ONNX to PyTorch: " + ", ".join(f"{k} {v:.1e}" for k, v in facts["parity"].items()))
    if isinstance(facts["top1"], str):
        print(f"top-1: {facts['top1']}")
    else:
        images = facts["top1"]["images"]
        for name, share in facts["top1"].items():
            if name != "images":
                error = (share * (1 - share) / images) ** 0.5
                print(f"top-1 of {name}: {share:.3f}, standard error {error:.3f} with {images} images")
    for note in facts["notes"]:
        print(f"note: {note}")


class Told(npe.Watcher):
    """Tells what is being done, for measuring takes minutes."""

    def note(self, text: str) -> None:
        """Prints it."""
        print(f"  {text}", flush=True)

    def epoch(self, log: npe.EpochLog) -> None:
        """Prints one line."""
        print(f"  {log.phase} epoch {log.epoch + 1}: loss {log.loss:.3f}, {log.seconds:.0f} s", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--weights", type=Path, help="a state dict of the network: torch.save of tensors, or safetensors")
    start.add_argument("--pretrained", action="store_true", help="download the weights that torchvision publishes")
    start.add_argument("--smoke", action="store_true", help="random weights, small images: seconds, and no meaning")
    smoke = "--smoke" in (sys.argv if arguments is None else arguments)
    add = parser.add_argument
    add("--network", default="squeezenet1_1" if smoke else "mobilenet_v2", help="a classification network")
    add("--num-classes", type=int, default=1000)
    add("--image-size", type=int, default=32 if smoke else 224)
    add("--mean", type=float, nargs=3, default=IMAGENET_MEAN, help="what the weights were trained with")
    add("--std", type=float, nargs=3, default=IMAGENET_STD)
    add("--train", type=Path, help="FOLDER/CLASS/image: for batch-norm statistics and recovery; held in memory")
    add("--data", type=Path, help="FOLDER/CLASS/image: held-out images for the accuracy, and for nothing else")
    add("--target", default="latency=0.7", help="latency=0.7 of the dense network's, or latency=2.0ms")
    add("--on", default="onnxruntime-cpu", help="a runtime of `nni-prune-ext list runtimes`")
    add("--batch", type=int, default=1, help="images per run")
    add("--threads", type=int, default=1)
    add("--recover-epochs", type=int, default=0)
    add("--learning-rate", type=float, default=0.01)
    add("--out", type=Path, default=Path("latency_target"))
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
