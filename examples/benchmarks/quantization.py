"""What pruning and what lower precision costs and gains, apart and together: float32, int8 and fp16, dense and pruned.

``--part cifar``: ResNet-56, L1, recovery. ``--part mobilenet``: MobileNetV2 at
224 pixels, dense. ``--part resnet50``: ResNet-50 at 224 pixels with random weights and images, so latency only. Files
are calibrated on images that accuracy is not measured on, and all of a part are timed side by side on ONNX Runtime's
CPU, one image and one thread. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import nni_prune_ext as npe
from nni_prune_ext.data.image_arrays import ImageArrays
from nni_prune_ext.deployment import compare_latency
from nni_prune_ext.evaluation import environment, file_size_bytes
from nni_prune_ext.text_files import write_text

HERE = Path(__file__).resolve().parent
EXAMPLE_IMAGES = 8
Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    """Makes the rows of one part and puts them into the results file."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        part = {"cifar": cifar, "mobilenet": mobilenet, "resnet50": resnet50}[options.part](options, Path(folder))
    out = Path(options.out)
    results = json.loads(out.read_text()) if out.exists() else {}
    given = {name: str(value).rpartition("/")[2] if name in PATHS else value for name, value in vars(options).items()}
    results[options.part] = {
        **part,
        "settings": given,
        "environment": environment(),
        "seconds": round(time.perf_counter() - began),
    }
    write_text(out, json.dumps(results, indent=1) + "\n")
    print(json.dumps(part["rows"], indent=1))


def cifar(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Dense and pruned ResNet-56, both in float32, int8 and fp16."""
    source = npe.open_data(options.data, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), seed=options.seed)
    order = torch.randperm(len(source.train), generator=torch.Generator().manual_seed(options.seed))
    norm = {"mean": source.mean, "std": source.std}
    calibration = _images(source.train.subset(order[: options.calibration]), norm)
    recovery = source.train.subset(order[options.calibration : options.calibration + options.recovery_images])
    shuffled = torch.randperm(len(source.test), generator=torch.Generator().manual_seed(options.seed))
    images = _images(source.test.subset(shuffled[: options.test_images]), norm)
    labels = source.test.labels[shuffled[: options.test_images]]
    test = list(zip(images.split(500), labels.split(500), strict=True))
    print("data are open", flush=True)
    dense = npe.build_model("resnet56", num_classes=10, in_channels=3, weights=Path(options.weights)).eval()
    pruned = npe.prune(
        dense,
        calibration[:1],
        method="l1",
        target=options.target,
        limits=npe.Limits(multiple=options.multiple),
        train_batches=npe.BatchLoader(recovery, 128, shuffle=True, augment=source.augment, **norm),
        recover_epochs=options.epochs,
        settings=npe.TrainingSettings(
            learning_rate=options.learning_rate, precision=options.precision, channels_last=True, nesterov=True
        ),
        seed=options.seed,
    )
    print("pruned and recovered", flush=True)
    models = {"dense": dense, "pruned": pruned.model}
    facts = {"macs": {name: npe.count_costs(model, calibration[:1]).macs for name, model in models.items()}}
    return {**facts, **_rows(models, calibration, test, folder)}


def mobilenet(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Dense MobileNetV2 in float32, int8 and fp16; every tenth image calibrates, the others are tested."""
    images = one_image_per_class(Path(options.data))
    labels = torch.arange(len(images))
    chosen = labels % (len(images) // options.calibration) == 0
    model = padded_mobilenet(Path(options.weights))
    test = list(zip(images[~chosen].split(50), labels[~chosen].split(50), strict=True))
    return _rows({"dense": model}, images[chosen], test, folder)


def resnet50(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Dense and pruned ResNet-50 in float32 and int8, which random weights and images are enough to time."""
    images = torch.randn(20, 3, 224, 224)
    dense = npe.build_model("torchvision:resnet50").eval()
    pruned = npe.prune(
        dense, images[:1], method="l1", target=options.target, limits=npe.Limits(multiple=options.multiple)
    )
    files: dict[str, Path] = {}
    for name, model in {"dense": dense, "pruned": pruned.model}.items():
        files[name] = npe.export_onnx(model, images[:1], folder / f"{name}.onnx", check=False).path
        reduced = npe.quantize_onnx(files[name], folder / f"{name}.int8.onnx", images)
        files[f"{name}-int8"] = reduced.path
    sessions = [compare_latency(files, images[:EXAMPLE_IMAGES], rounds=20, min_seconds=5) for _ in range(5)]
    rows = {
        name: {
            "latency_ms": median(session.rows[number].p50_ms for session in sessions),
            "latency_ratio": median(session.rows[number].ratio for session in sessions),
            "latency_ratio_of_sessions": [session.rows[number].ratio for session in sessions],
            "size_bytes": file_size_bytes(path),
        }
        for number, (name, path) in enumerate(files.items())
    }
    return {
        "macs": {"dense": pruned.dense.macs, "pruned": pruned.costs.macs},
        "rows": rows,
        "aa_error": median(session.error_bar for session in sessions),
        "clock": sessions[0].clock,
        "rounds": sum(session.rounds for session in sessions),
    }


def one_image_per_class(folder: Path) -> Tensor:
    """Returns ``(classes, 3, 224, 224)``, from -1 to 1: the middle of the first image of each class."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    pixels = [np.asarray(Image.open(next(own.iterdir())).convert("RGB"))[16:240, 16:240] for own in classes]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def padded_mobilenet(weights: Path) -> nn.Module:
    """Returns MobileNetV2 for weights that were trained with padding at the bottom and right only."""
    model = npe.build_model("torchvision:mobilenet_v2", weights=weights).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
            layer.padding = (0, 0)
            layer.register_forward_pre_hook(lambda _, inputs: (nn.functional.pad(inputs[0], (0, 1, 0, 1)),))
    return model


def _rows(models: Mapping[str, nn.Module], calibration: Tensor, test: Batches, folder: Path) -> dict[str, object]:
    """Exports, converts, compares and times; the drop of a precision is against the same network in float32."""
    files: dict[str, Path] = {}
    rows: dict[str, dict[str, object]] = {}
    for name, model in models.items():
        file = npe.export_onnx(model, calibration[:1], folder / f"{name}.onnx", given_inputs=[calibration[:16]]).path
        made = {
            "int8": npe.quantize_onnx(file, folder / f"{name}.int8.onnx", calibration, test_batches=test, max_drop=1),
            "fp16": npe.convert_to_fp16(file, folder / f"{name}.fp16.onnx", test_batches=test, max_drop=1),
        }
        files |= {name: file, **{f"{name}-{kind}": one.path for kind, one in made.items()}}
        rows[name] = {"top1": made["int8"].parity.float_top1}
        for kind, one in made.items():
            rows[f"{name}-{kind}"] = {"top1": one.parity.top1, **one.facts()}
        print(json.dumps({own: row["top1"] for own, row in rows.items()}), flush=True)
    latency = compare_latency(files, test[0][0][:EXAMPLE_IMAGES], rounds=30, min_seconds=20)
    for timed in latency.rows:
        size = file_size_bytes(files[timed.name])
        rows[timed.name] |= {"latency_ms": timed.p50_ms, "latency_ratio": timed.ratio, "size_bytes": size}
    return {
        "rows": rows,
        "test_images": sum(len(labels) for _, labels in test),
        "calibration_images": len(calibration),
        "disjoint": True,
        "aa_error": latency.error_bar,
        "clock": latency.clock,
        "rounds": latency.rounds,
    }


def _images(arrays: ImageArrays, norm: Mapping[str, tuple[float, ...]]) -> Tensor:
    return next(iter(npe.BatchLoader(arrays, len(arrays), **norm)))[0]


PATHS = ("data", "weights", "out")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("cifar", "mobilenet", "resnet50"), required=True)
    parser.add_argument("--data", default="", help="cifar10:ROOT; or a folder with one folder per ImageNet class")
    parser.add_argument("--weights", default="")
    parser.add_argument("--calibration", type=int, default=100)
    parser.add_argument("--target", default="macs=0.6")
    parser.add_argument("--multiple", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--recovery-images", type=int, default=5000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the recovery")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(HERE / "results" / "quantization.json"))
    return parser


if __name__ == "__main__":
    main()
