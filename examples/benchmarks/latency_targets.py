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
from torch import nn

import nni_prune_ext as npe
from nni_prune_ext.deployment import compare_latency
from nni_prune_ext.evaluation import LatencyReport, environment

NETWORKS = ("mobilenet_v2", "resnet50", "vgg16_bn")
TARGETS = ("latency=0.7", "latency=0.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--network", action="append", choices=NETWORKS)
    parser.add_argument("--target", action="append")
    parser.add_argument("--runs", type=int, default=1, help="runs of each cell, each with other weights")
    parser.add_argument("--repeats", type=int, default=5, help="sessions of each network in the last measurement")
    given = parser.parse_args()
    done = {(row["network"], row["target"], row["run"]) for row in rows(given.out)}
    for name, target in product(given.network or NETWORKS, given.target or TARGETS):
        for run in range(given.runs):
            if (name, target, run) not in done:
                row = cell(name, target, run, given.repeats)
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps({key: row[key] for key in row if key not in ("environment", "evidence")}), flush=True)
    print(table(rows(given.out)))


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def cell(name: str, target: str, run: int, repeats: int) -> dict[str, object]:
    torch.manual_seed(run)
    model = getattr(torchvision.models, name)(weights=None).eval()
    images = torch.randn(1, 3, 224, 224)
    began = time.perf_counter()
    result = npe.prune(model, images, method="l1", target=target)
    seconds = time.perf_counter() - began
    reports = measured(model, result.model, images, repeats)
    evidence = result.latency
    return {
        "network": name,
        "target": target,
        "run": run,
        "macs_ratio": result.costs.macs / result.dense.macs,
        "latency_ratio": median(report.rows[1].ratio for report in reports),
        "dense_ms": median(report.rows[0].p50_ms for report in reports),
        "error_bar": max(report.error_bar for report in reports),
        "reported_ratio": evidence and evidence.achieved_ms / evidence.dense_ms,
        "multiple": evidence.multiple if evidence else 1,
        "layers_measured": evidence and evidence.layers_measured,
        "networks_measured": evidence and len(evidence.networks),
        "seconds": seconds,
        "evidence": evidence and evidence.to_dict(),
        "environment": environment(),
    }


def measured(dense: nn.Module, compact: nn.Module, images: torch.Tensor, repeats: int) -> list[LatencyReport]:
    """Exports both networks as they ship and times them side by side, in several sessions each."""
    with TemporaryDirectory() as folder:
        paths = {"dense": Path(folder) / "dense.onnx", "compact": Path(folder) / "compact.onnx"}
        for path, model in zip(paths.values(), (dense, compact)):
            npe.export_onnx(model, images, path, check=False)
        return [compare_latency(paths, images, rounds=20, min_seconds=1.0) for _ in range(repeats)]


def table(found: list[dict[str, object]]) -> str:
    lines = ["| network | target | MACs × dense | latency × dense | off by | MACs / latency | seconds |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in found:
        metric, _, asked = str(row["target"]).partition("=")
        macs, latency = float(row["macs_ratio"]), float(row["latency_ratio"])  # type: ignore[arg-type]
        off = f"{100 * (latency / float(asked) - 1):+.1f} %" if metric == "latency" else "–"
        head = f"| {row['network']} | {row['target']} | {macs:.3f} | {latency:.3f} | {off} "
        lines.append(f"{head}| {macs / latency:.2f} | {float(row['seconds']):.0f} |")  # type: ignore[arg-type]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
