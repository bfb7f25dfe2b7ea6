"""The doctor on MobileNetV2: cut with widths as the scores ask, diagnosed, cut again with the advice.

What is predicted is the gain of the same plan with the advised widths rounded up; what is measured is a new plan for
the same target whose widths keep the advised multiples, all networks in turns. Multiples of 8 and 16 everywhere stand
beside it. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import nni_prune_ext as npe
from nni_prune_ext.deployment import runtime
from nni_prune_ext.evaluation import environment, measure_latency
from nni_prune_ext.runtimes.base import RunnableModel
from nni_prune_ext.text_files import write_text

HERE = Path(__file__).parent


def main() -> None:
    options = _options()
    example = torch.randn(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(options.seed))
    model = npe.build_model(options.model).eval()
    if options.weights:
        npe.load_weights(model, options.weights)
    draws = np.random.default_rng(options.seed)
    inputs = [[draws.standard_normal(example.shape).astype(np.float32)] for _ in range(4)]
    with TemporaryDirectory() as folder:
        files = {"dense": Path(folder) / "dense.onnx"}
        npe.export_onnx(model, example, files["dense"], exporter="torchscript")
        networks = {"dense": {"macs": npe.count_costs(model, example).macs}}

        def cut(name: str, limits: npe.Limits) -> None:
            result = npe.prune(model, example, method="l1", target=options.target, limits=limits)
            files[name] = Path(folder) / f"{name.replace(' ', '_')}.onnx"
            npe.export_onnx(result.model, example, files[name], exporter="torchscript")
            networks[name] = {"macs": result.costs.macs}
            print(f"{name}: {result.costs.macs:,} MACs")

        cut("as the scores ask", npe.Limits(multiple=1))
        found = npe.diagnose(
            files["dense"], files["as the scores ask"], inputs, rounds=options.rounds, min_seconds=options.seconds
        )
        print("\n".join(found.sentences()))
        if found.limits is not None:
            cut("with the advice", found.limits)
        cut("multiples of 8", npe.Limits(multiple=8))
        cut("multiples of 16", npe.Limits(multiple=16))
        on = runtime("onnxruntime-cpu")
        latency = measure_latency(
            {name: (on, RunnableModel(onnx_path=path)) for name, path in files.items()},
            inputs, rounds=2 * options.rounds, min_seconds=2 * options.seconds,
        )  # fmt: skip
    for row in latency.rows:
        networks[row.name] |= {"p50_ms": row.p50_ms, "ratio": row.ratio}
    facts = {
        "model": options.model,
        "trained_weights": options.weights is not None,
        "image_size": options.size,
        "environment": environment(),
        "target": options.target,
        "networks": networks,
        "gain_ms": _gains(found, networks, latency.error_bar),
        "latency": latency.to_dict(),
        "diagnosis": found.to_dict(),
    }
    write_text(options.out, json.dumps(facts, indent=1) + "\n")
    print(json.dumps({"networks": networks, "gain_ms": facts["gain_ms"]}, indent=1))


def _gains(
    found: npe.Diagnosis, networks: Mapping[str, Mapping[str, float]], error_bar: float
) -> dict[str, dict[str, float] | None]:
    """Returns what the advice promised, and what the new cut gained."""
    if not found.advice:
        return {"predicted": None, "measured": None}
    before, after = (networks[name]["p50_ms"] for name in ("as the scores ask", "with the advice"))
    return {
        "predicted": asdict(found.advice[-1].together),
        "measured": {"ms": before - after, "error_ms": error_bar * before},
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="torchvision:mobilenet_v2")
    parser.add_argument("--weights", type=Path, help="trained weights; random ones without")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--target", default="macs=0.5")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "doctor_mobilenet_v2.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
