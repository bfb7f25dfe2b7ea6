"""Reports with plausible numbers, as the dictionaries that ``report.json`` holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

DENSE = {
    "name": "dense",
    "kind": "dense",
    "macs": 125_485_696,
    "params": 853_018,
    "top1": 0.8963,
    "top1_onnx": 0.8961,
    "onnx_bytes": 3_436_363,
    "latency_ms": 1.3418,
    "latency_ratio": 1.0,
    "parity": 8.636e-07,
    "parity_limit": 1e-4,
}
CONTROL = {
    **DENSE,
    "name": "dense-trained-longer",
    "kind": "control",
    "top1": 0.8989,
    "top1_onnx": 0.8989,
    "latency_ms": 1.3311,
    "latency_ratio": 1.0004,
    "parity": 4.7498e-07,
    "seconds": 439.84,
    "validation": 0.9012,
}
PRUNED = {
    "name": "l1",
    "kind": "pruned",
    "macs": 62_669_200,
    "params": 440_162,
    "top1_removed": 0.1231,
    "top1": 0.8556,
    "top1_onnx": 0.8557,
    "onnx_bytes": 1_791_281,
    "latency_ms": 1.1091,
    "latency_ratio": 0.8190,
    "certificate": 3.69e-16,
    "parity": 4.9375e-07,
    "parity_limit": 1e-4,
    "seconds": 308.79,
    "validation": 0.8602,
    "weight_sparsity": 0.25,
}


def sample(*, method: str = "l1", model: str = "resnet56", layers: int = 12, met: bool = True) -> dict[str, object]:
    """Returns the report of one run with everything in it."""
    rows = [copy.deepcopy(DENSE), copy.deepcopy(CONTROL), {**PRUNED, "name": method}]
    achieved = 62_669_200.0 if met else 66_120_000.0
    return {
        "format": 1,
        "title": f"{model}, {method}",
        "created": "2026-11-20T12:01:21+00:00",
        "package_version": "0.1.0",
        "model": model,
        "data": "cifar10:ROOT",
        "seed": 7,
        "recipe": {"model": model, "target": ["macs=0.5"], "method": method, "training": {"learning_rate": 0.02}},
        "method": method,
        "options": {"normalisation": "mean", "bias": True, "steps": [0.25, 0.5]},
        "training": {"optimizer": "sgd", "learning_rate": 0.02, "precision": "bf16", "patience": None},
        "distillation": {"temperature": 4.0, "weight": 0.5, "features": ["layer3"]},
        "recovery_epochs": 12,
        "rows": rows,
        "targets": [
            {"target": "macs=0.5", "dense": 125_485_696.0, "asked": 62_742_848.0, "achieved": achieved, "met": met}
        ],
        "certificate": {
            "max_relative_error": 3.69e-16,
            "bound": 1e-09,
            "probes": 2,
            "seed": 0,
            "dtype": "float64",
            "input_effect": 0.1233,
            "removal_effect": 0.9275,
            "exact": True,
        },
        "environment": {"python": "3.11.7", "cpu": "AMD EPYC", "gpu": "none", "torch": "2.11.0"},
        "latency": _latency(rows),
        "widths": [_width(number) for number in range(layers)],
        "protected": [
            {"root": "linear", "width": 10, "reason": "reaches the model's output"},
            {"root": "layer1.0.conv2", "width": 16, "reason": "excluded by the pattern 'layer1.*'"},
        ],
        "rewrites": ["layer2.0.shortcut"],
        "unreached": [],
        "value_dependent": [],
        "facts": {"threshold": 0.0371, "groups": 27.0},
        "curves": {method: _curve(("l1", 2), ("recovery", 10)), "dense-trained-longer": _curve(("dense", 12))},
        "notes": [{"progress": step / 10, "sparsity": 0.5 * step / 10, "penalty": 1e-4 * step} for step in range(11)],
    }


def _latency(rows: Sequence[dict[str, object]]) -> dict[str, object]:
    measured = [
        {
            "name": row["name"],
            "runtime": "onnxruntime-cpu",
            "p50_ms": row["latency_ms"],
            "p95_ms": 1.4309,
            "p99_ms": 1.4582,
            "ratio": row["latency_ratio"],
            "runs_per_sample": 3,
            "providers": ["CPUExecutionProvider"],
            "node_placement": {"CPUExecutionProvider": 136},
            "gpu_memory_bytes": None,
        }
        for row in rows
    ]
    conditions = {"aa_ratio": 0.9925, "error_bar": 0.0075, "clock": "cpu", "rounds": 87, "threads": 1}
    return {"rows": measured, **conditions, "batch_size": 1, "seed": 0}


def _width(number: int) -> dict[str, object]:
    before = 16 << min(number // 20, 5)
    after = max(1, round(before * (0.55 + 0.45 * math.cos(1.7 * number))))
    return {
        "layer": f"layer{number // 20 + 1}.{number % 20 // 2}.conv{number % 2 + 1}",
        "before": before,
        "after": after,
    }


def _curve(*phases: tuple[str, int]) -> list[dict[str, object]]:
    epochs: list[dict[str, object]] = []
    for phase, length in phases:
        for epoch in range(length):
            done = len(epochs) + 1
            epochs.append(
                {
                    "phase": phase,
                    "epoch": epoch,
                    "loss": 0.3 + 1.2 / done,
                    "learning_rate": 0.02 / done,
                    "seconds": 61.5,
                    "metric": 0.87 - 0.3 / done,
                }
            )
    return epochs
