"""Latency targets: asked against achieved.

Torchvision networks with random weights (widths decide the latency, weights do not), L1, ONNX Runtime on one CPU
thread, median of thread CPU time. Each run is one line of JSON; what OUT holds already is not measured again. Runs of
one cell differ by the random weights, hence by what is cut; the layer times that earlier runs measured are used again:

    python examples/benchmarks/latency_targets.py OUT.jsonl [--network mobilenet_v2] [--target latency=0.5] [--runs 10]
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torchvision
from macs_and_latency import rows, times

import nni_prune_ext as npe
from nni_prune_ext.allocation import LATENCY_TOLERANCE
from nni_prune_ext.evaluation import environment

NETWORKS = ("mobilenet_v2", "resnet50", "vgg16_bn")
TARGETS = ("latency=0.7", "latency=0.5")
KEY = ("network", "target", "run", "runtime", "batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--network", action="append", choices=NETWORKS)
    parser.add_argument("--target", action="append")
    parser.add_argument("--runs", type=int, default=1, help="runs of each cell, each with other weights")
    parser.add_argument("--on", default="onnxruntime-cpu")
    parser.add_argument("--batch", type=int, default=1)
    given = parser.parse_args()
    done = {tuple(row[key] for key in KEY) for row in rows(given.out)}
    for name, target in product(given.network or NETWORKS, given.target or TARGETS):
        for run in range(given.runs):
            if (name, target, run, given.on, given.batch) not in done:
                row = cell(name, target, run, given.on, given.batch)
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps({key: row[key] for key in row if key not in ("environment", "evidence")}), flush=True)
    print(table(rows(given.out)))


def cell(name: str, target: str, run: int, on: str, batch: int) -> dict[str, object]:
    torch.manual_seed(run)
    model = getattr(torchvision.models, name)(weights=None).eval()
    images = torch.randn(batch, 3, 224, 224)
    began = time.perf_counter()
    conditions = npe.LatencyConditions(runtime=on, batch=batch)
    result = npe.prune(model, images, method="l1", target=target, latency=conditions)
    seconds = time.perf_counter() - began
    evidence = result.latency
    assert evidence is not None
    with TemporaryDirectory() as folder:  # exported as they ship, and measured afresh
        files = {"dense": Path(folder) / "dense.onnx", "compact": Path(folder) / "compact.onnx"}
        for path, network in zip(files.values(), (model, result.model), strict=True):
            npe.export_onnx(network, images, path, check=False)
        timed = times(files, images, on)
    return {
        "network": name,
        "target": target,
        "run": run,
        "runtime": on,
        "batch": batch,
        "macs_ratio": result.costs.macs / result.dense.macs,
        "latency_ratio": timed["rows"]["compact"]["latency"],
        "dense_ms": timed["rows"]["dense"]["ms"],
        "error_bar": max(timed["aa_error_of_sessions"]),
        "reported_ratio": evidence.achieved_ms / evidence.dense_ms,
        "multiple": evidence.multiple,
        "layers_measured": evidence.layers_measured,
        "networks_measured": len(evidence.networks),
        "seconds": seconds,
        "evidence": evidence.to_dict(),
        "environment": environment(),
    }


def table(found: list[dict]) -> str:
    """Returns one line per network, target, runtime and batch, over all its runs."""
    cells: dict[tuple[str, ...], list[dict]] = {}
    for row in found:
        cells.setdefault((row["network"], f"{row['runtime']}, batch {row['batch']}", row["target"]), []).append(row)
    lines = [
        "| network | runtime | asked | runs | within 3 % | achieved | MACs × dense | largest A/A error | seconds |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for (network, runtime, target), runs in cells.items():
        share = float(target.partition("=")[2])
        achieved = sorted(run["latency_ratio"] for run in runs)
        near = sum(abs(own / share - 1) <= LATENCY_TOLERANCE for own in achieved)
        macs, error, seconds = (median(run[key] for run in runs) for key in ("macs_ratio", "error_bar", "seconds"))
        spread = f"{median(achieved):.3f} ({achieved[0]:.3f} to {achieved[-1]:.3f})"
        head = f"| {network} | {runtime} | {share:g} | {len(runs)} | {near} | {spread} "
        lines.append(f"{head}| {macs:.3f} | {100 * error:.1f} % | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
