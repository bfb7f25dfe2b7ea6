"""What only a GPU machine can show: dense and pruned networks on PyTorch and ONNX Runtime with CUDA and TensorRT.

    python examples/benchmarks/gpu_evidence.py --artefacts demo_output      # what `make gpu-evidence` runs

Reads the artefacts of ``examples/demo.py`` (made first if they are missing) and measures, for every method, runtime
and precision, the pruned network against the dense one, interleaved in one run: accuracy, agreement with PyTorch in
float32, p50/p95/p99 of one image, throughput in batches, memory in use. Each such piece is one JSON file, so the run
can be stopped and continued at any time; ``--budget-seconds`` (540) stops it by itself before the next piece. A piece
counts only for the ONNX files that it was measured on; what could not be measured is tried again. Neither nni nor
torch-pruning is imported. Without a GPU nothing is measured and nothing is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # works from a source tree that was never installed

import nni_prune_ext as npe  # noqa: E402 (the path comes first)
from nni_prune_ext.deployment import runtime  # noqa: E402
from nni_prune_ext.errors import NniPruneExtError, RuntimeUnavailableError  # noqa: E402
from nni_prune_ext.evaluation import accuracy_of_session, environment, file_size_bytes, measure_latency, throughput  # noqa: E402
from nni_prune_ext.evidence.networks import rebuilt  # noqa: E402
from nni_prune_ext.runtimes.base import RunnableModel  # noqa: E402
from nni_prune_ext.text_files import write_text  # noqa: E402

Piece = tuple[str, str, str]


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailableError(
            "No CUDA device is visible to PyTorch, so there is nothing to measure; nothing was written. Run this on a "
            "machine with an NVIDIA GPU, or try the script itself with "
            "--device cpu --runtimes torch-eager,onnxruntime-cpu."
        )
    artefacts = Path(arguments.artefacts)
    if not (artefacts / "report.json").exists():
        subprocess.run([sys.executable, str(ROOT / "examples" / "demo.py"), "--out", str(artefacts)], check=True)
    job = json.loads((artefacts / "report.json").read_text())["job"]
    pieces_folder = Path(arguments.results) / "gpu_evidence"
    pieces_folder.mkdir(parents=True, exist_ok=True)
    source = npe.open_data(
        arguments.data or job["data"], image_size=job["image_size"], limit=job["limit"], seed=job["seed"]
    )
    test = list(npe.split_batches(source, "test", arguments.batch))
    began = time.monotonic()
    todo = [piece for piece in pieces(artefacts, arguments) if not is_done(pieces_folder, piece, artefacts)]
    for number, piece in enumerate(todo):
        if time.monotonic() - began > arguments.budget_seconds:
            print(f"stopped after {number} pieces, {len(todo) - number} are left: run the same command again")
            break
        found = measure(piece, artefacts, test, arguments)
        write_text(piece_path(pieces_folder, piece), json.dumps(found, indent=1) + "\n")
        print(" ".join(piece), json.dumps({k: found[k] for k in ("status", "latency_ratio") if k in found}))
    merged = {"job": job, "pieces": current_pieces(pieces_folder, artefacts)}
    write_text(Path(arguments.results) / "gpu_evidence.json", json.dumps(merged, indent=1) + "\n")


def pieces(artefacts: Path, arguments: argparse.Namespace) -> Iterator[Piece]:
    """Yields (runtime, precision, network) for every pruned network."""
    networks = sorted(path.parent.name for path in artefacts.glob("*/plan.json"))
    for name in arguments.runtimes.split(","):
        for precision in arguments.precisions.split(","):
            for network in networks:
                yield name, precision, network


def piece_path(folder: Path, piece: Piece) -> Path:
    return folder / f"{'--'.join(piece)}.json"


def is_done(folder: Path, piece: Piece, artefacts: Path) -> bool:
    """Says whether a piece was measured on the ONNX files that are there now."""
    path = piece_path(folder, piece)
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    return found["status"] == "measured" and found.get("onnx_sha256") == fingerprints(artefacts, piece[2])


def current_pieces(folder: Path, artefacts: Path) -> list[dict[str, object]]:
    """Returns all pieces, of this call and of earlier ones, that belong to the ONNX files that are there now."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [piece for piece in found if piece.get("onnx_sha256", "") == fingerprints(artefacts, piece["network"])]


def fingerprints(artefacts: Path, network: str) -> dict[str, str] | None:
    """Returns the start of the SHA-256 of the dense and the pruned ONNX file; ``None`` where one is missing."""
    files = {which: artefacts / which / "model.onnx" for which in ("dense", network)}
    if not all(path.exists() for path in files.values()):
        return None
    return {which: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for which, path in files.items()}


def measure(piece: Piece, artefacts: Path, test: list, arguments: argparse.Namespace) -> dict[str, object]:
    """Measures one pruned network against the dense one on one runtime; says why where it cannot."""
    name, precision, network = piece
    found: dict[str, object] = {
        "runtime": name,
        "precision": precision,
        "network": network,
        "onnx_sha256": fingerprints(artefacts, network),
        "environment": environment(),
    }
    chosen = runtime(name)
    availability = chosen.availability()
    if not availability.usable:
        return {**found, "status": "NOT MEASURED", "reason": availability.reason}
    models = {
        which: RunnableModel(
            onnx_path=artefacts / which / "model.onnx", module=rebuilt(artefacts / which).to(arguments.device)
        )
        for which in ("dense", network)
    }
    first = test[0][0].numpy()
    singles = [[np.ascontiguousarray(first[i : i + 1])] for i in range(min(8, len(first)))]
    try:
        latency = measure_latency(
            {which: (chosen, model) for which, model in models.items()},
            singles,
            rounds=arguments.rounds,
            min_seconds=arguments.min_seconds,
            precision=precision,
        )
        rates = {}
        for batch in arguments.batches:
            images = [np.ascontiguousarray(np.resize(first, (batch, *first.shape[1:])))]
            for which, model in models.items():
                rate = throughput(chosen, model, images, min_seconds=arguments.min_seconds, precision=precision)
                rates[f"{which}@{batch}"] = rate.images_per_s
        accuracies, agreement = {}, {}
        for which, model in models.items():
            with chosen.session(model, precision=precision) as session:
                accuracies[which] = accuracy_of_session(session, [(x.numpy(), y.numpy()) for x, y in test])
                agreement[which] = relative_difference(session.run([first])[0], reference(artefacts, which, first))
    except NniPruneExtError as error:
        return {**found, "status": "NOT MEASURED", "reason": str(error)}
    return {
        **found,
        "status": "measured",
        "latency": latency.to_dict(),
        "latency_ratio": latency.rows[1].ratio,
        "images_per_s": rates,
        "top1": accuracies,
        "max_rel_to_torch_fp32_cpu": agreement,
        "onnx_bytes": {which: file_size_bytes(model.onnx_path) for which, model in models.items() if model.onnx_path},
        "test_images": sum(len(y) for _, y in test),
    }


def reference(artefacts: Path, which: str, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return rebuilt(artefacts / which)(torch.from_numpy(images)).numpy()


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--artefacts", default="demo_output", help="what examples/demo.py wrote; made if missing")
    parser.add_argument("--results", default=str(ROOT / "examples" / "benchmarks" / "results"))
    parser.add_argument("--data", default=None, help="the demo's own data by default")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu only tries the script")
    parser.add_argument("--runtimes", default="torch-eager,onnxruntime-cuda,onnxruntime-tensorrt")
    parser.add_argument("--precisions", default="fp32,fp16")
    parser.add_argument("--batch", type=int, default=256, help="images per batch for the accuracy")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256], help="batch sizes for the throughput")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--min-seconds", type=float, default=2.0)
    parser.add_argument("--budget-seconds", type=float, default=540)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except NniPruneExtError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
