"""What a cut in MACs saves in time: MACs and latency as shares of the dense network's, at 70, 50 and 30 % of its MACs.

Torchvision networks, 224 × 224 pixels, L1 with default settings, and for comparison with widths as the scores ask
(``multiple=1``). All files of one network are timed in turns. Each network, runtime, batch and precision is one line of
JSON; what OUT holds already is not measured again, and a runtime that is missing is a line with the reason:

    python examples/benchmarks/macs_and_latency.py OUT.jsonl [--network resnet50]
        [--on onnxruntime-cuda --batch 1 --batch 32 --precision fp32 --precision fp16]
        [--weights mobilenet_v2.pt --data FOLDER]

Weights are random, unless ``--weights`` gives those of MobileNetV2: then accuracy is measured, too, on FOLDER with one
folder per ImageNet class. Every image is judged by a network whose batch norms were measured anew on the other half.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torchvision
from quantization import one_image_per_class, padded_mobilenet
from torch import Tensor, nn

import nni_prune_ext as npe
from nni_prune_ext.deployment import runtime
from nni_prune_ext.evaluation import environment, measure_latency
from nni_prune_ext.runtimes.base import RunnableModel
from nni_prune_ext.text_files import write_text
from nni_prune_ext.training import recalibrate_batchnorm

NETWORKS = ("resnet50", "mobilenet_v2", "vgg16_bn")
SHARES = (0.7, 0.5, 0.3)
LIMITS = {"default": npe.Limits(), "multiple=1": npe.Limits(multiple=1)}
SESSIONS = 5
DENSE = "dense"
KEY = ("network", "runtime", "batch", "precision")


def main() -> None:
    options = _parser().parse_args()
    done = {key(row) for row in rows(options.out) if "cells" in row}
    for name in options.network or NETWORKS:
        asked = list(product(options.on or ["onnxruntime-cpu"], options.batch or [1], options.precision or ["fp32"]))
        todo = [one for one in asked if (name, *one) not in done]
        for on, batch, precision in [one for one in todo if not runtime(one[0]).availability().usable]:
            todo.remove((on, batch, precision))
            put(options.out, {**of(name, on, batch, precision), "not_measured": runtime(on).availability().reason})
        if todo:
            measure(name, todo, options)
    print(table(rows(options.out)))


def measure(name: str, todo: list[tuple[str, int, str]], options: argparse.Namespace) -> None:
    """Cuts a network, and times it where it was not timed yet."""
    torch.manual_seed(options.seed)
    weights = options.weights if name == "mobilenet_v2" else None
    dense = padded_mobilenet(weights) if weights else getattr(torchvision.models, name)(weights=None).eval()
    one = torch.randn(1, 3, 224, 224)
    cells, models = {DENSE: {"macs": 1.0}}, {DENSE: dense}
    for share, (limits, given) in product(SHARES, LIMITS.items()):
        result = npe.prune(dense, one, method="l1", target=f"macs={share}", limits=given)
        cut = f"macs={share}, {limits}"
        models[cut], cells[cut] = result.model, {"macs": result.costs.macs / result.dense.macs}
    half_wanted = any(precision == "fp16" for _, _, precision in todo)
    if half_wanted and not weights:  # values of untrained networks leave the range of fp16
        for model in models.values():
            recalibrate_batchnorm(model, [torch.randn(4, 3, 224, 224)])
    if weights and options.data:
        images = one_image_per_class(options.data)
        for cut, model in models.items():
            cells[cut] |= accuracy(model, images, as_it_is=cut == DENSE)
            print(cut, cells[cut], flush=True)
    with TemporaryDirectory() as folder:
        files = {cut: Path(folder) / f"{number}.onnx" for number, cut in enumerate(models)}
        for cut, model in models.items():
            npe.export_onnx(model, one, files[cut], check=False)
        models.clear()
        half = {cut: path.with_suffix(".fp16.onnx") for cut, path in files.items()}
        if half_wanted:
            for cut, path in files.items():
                looked_at = [
                    (torch.randn(8, 3, 224, 224), torch.zeros(8, dtype=torch.long))
                ]  # no labels: how far off counts
                made = npe.convert_to_fp16(path, half[cut], test_batches=looked_at, max_drop=1)
                cells[cut] |= {"fp16_max_rel": made.parity.max_rel}
        for on, batch, precision in todo:
            timed = times(half if precision == "fp16" else files, one.repeat(batch, 1, 1, 1), on)
            row = {
                **of(name, on, batch, precision), "weights": "trained" if weights else "random", "seed": options.seed,
                **{name: value for name, value in timed.items() if name != "rows"},
                "cells": {cut: {**cells[cut], **timed["rows"][cut]} for cut in cells},
                "environment": environment(),
            }  # fmt: skip
            put(options.out, row)
            print(table([row]), flush=True)


def of(*values: object) -> dict[str, object]:
    return dict(zip(KEY, values, strict=True))


def key(row: dict) -> tuple[object, ...]:
    return tuple(row[name] for name in KEY)


def put(out: Path, row: dict) -> None:
    """Adds a row, in the place of an older one about the same."""
    kept = [*(old for old in rows(out) if key(old) != key(row)), row]
    write_text(out, "".join(json.dumps(one) + "\n" for one in kept))


def times(files: Mapping[str, Path], images: Tensor, on: str) -> dict:
    """Returns times in several sessions of each file, all files in turns."""
    used, array = runtime(on), images.numpy()
    entries = {key: (used, RunnableModel(path)) for key, path in files.items()}
    reports = [
        measure_latency(entries, [[array]], rounds=20, min_seconds=1.0, threads=1, seed=seed)
        for seed in range(SESSIONS)
    ]  # fmt: skip
    return {
        "clock": reports[0].clock,
        "sessions": SESSIONS,
        "rounds": sum(report.rounds for report in reports),
        "aa_error": median(report.error_bar for report in reports),
        "aa_error_of_sessions": [report.error_bar for report in reports],
        "rows": {
            key: {
                "ms": median(report.rows[number].p50_ms for report in reports),
                "latency": median(report.rows[number].ratio for report in reports),
                "latency_of_sessions": [report.rows[number].ratio for report in reports],
            }
            for number, key in enumerate(files)
        },
    }


def accuracy(model: nn.Module, images: Tensor, *, as_it_is: bool) -> dict[str, float]:
    """Returns the share of images that are right, each judged after batch norms have seen the other half only."""
    labels = torch.arange(len(images))
    right = 0.0
    for part in range(2):
        test, others = labels % 2 == part, labels % 2 != part
        batches = list(zip(images[test].split(50), labels[test].split(50), strict=True))
        own = copy.deepcopy(model).eval()
        if not as_it_is:
            recalibrate_batchnorm(own, images[others].split(50))
        right += float(npe.accuracy(own, batches)) * int(test.sum()) / len(images)
    return {"top1": right}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def table(found: list[dict]) -> str:
    lines = ["| network | runtime | asked | widths | MACs × dense | latency × dense | MACs / latency | top 1 |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in found:
        where = f"{row['runtime']}, batch {row['batch']}, {row['precision']}"
        if "not_measured" in row:
            lines.append(f"| {row['network']} | {where} | not measured: {row['not_measured']} |  |  |  |  |  |")
        for name, cell in row.get("cells", {}).items():
            asked, _, widths = name.partition(", ")
            ratio = f"{cell['macs']:.3f} | {cell['latency']:.3f} | {cell['macs'] / cell['latency']:.2f}"
            top1 = f"{100 * cell['top1']:.1f} %" if "top1" in cell else "–"
            lines.append(f"| {row['network']} | {where} | {asked} | {widths} | {ratio} | {top1} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--network", action="append", choices=NETWORKS)
    parser.add_argument("--on", action="append", help="a registered runtime; may be repeated")
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--precision", action="append", choices=("fp32", "fp16"))
    parser.add_argument("--weights", type=Path, help="of MobileNetV2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
