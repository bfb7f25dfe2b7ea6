"""How fast gated networks run on ONNX Runtime's CPU at a given firing rate: masks, open filters only, static networks.

Weights are random or given, heads are set, layer by layer, so that every unit fires for a given share of real images:
a measurement of the runtime, not of a trained network. For each network the dense file, the mask form, the compact
form with single filters and with blocks of 16, what that becomes when it is specialised for this machine, and a static
network (L1, every group pruned alike, widths in multiples of 16) with about the same MACs are timed side by side: one
thread, one image at a time, interleaved CPU time, rotating over the images, the dense file twice (A/A). Finished rows
are kept in a file of JSON lines, so that the script can be stopped and started again; of two rows of one cell the last
one counts, and rows from before there were specialised files are measured again.

    python examples/benchmarks/ftwt_latency.py --images imagefolder:ROOT --out results/ftwt_latency.jsonl
    python examples/benchmarks/ftwt_latency.py --summary results/ftwt_latency.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import nni_prune_ext as npe
from nni_prune_ext.deployment import runtime
from nni_prune_ext.evaluation import environment, measure_latency
from nni_prune_ext.gates.blocks import block_size
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.heads import GateHead
from nni_prune_ext.gates.placement import chosen_places, new_gates
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.runtimes.base import RunnableModel

RATES = (0.25, 0.5, 0.75)
BLOCKS = (1, 16)


@dataclass(frozen=True)
class Network:
    """A network at a size of images; ``layers`` are gated, the static network keeps widths in multiples."""

    name: str
    model: str
    size: int
    layers: tuple[str, ...] | None = None
    multiple: int = 16


NETWORKS = (
    Network("resnet18@128", "torchvision:resnet18", 128),
    Network("resnet18@128, inner", "torchvision:resnet18", 128, ("layer*.conv1",)),
    Network("vgg16_bn@32", "vgg16_bn", 32),
    Network("resnet20@32", "resnet20", 32, multiple=4),
    Network("resnet50@224", "torchvision:resnet50", 224, ("layer*.conv1", "layer*.conv2")),
)


def main() -> None:
    """Measures every network at every rate that is not in the file yet, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="digits", help="imagefolder:ROOT with real images")
    parser.add_argument("--networks", nargs="*", help="names of networks; all by default")
    parser.add_argument("--rates", nargs="*", type=float, default=RATES, help="firing rates")
    parser.add_argument("--count", type=int, default=64, help="images that heads are set on and parity is checked on")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="one small network, one rate, few rounds")
    parser.add_argument("--out", type=Path, default=Path("ftwt_latency.jsonl"))
    parser.add_argument("--summary", type=Path, help="print the table of this file and measure nothing")
    options = parser.parse_args()
    if options.summary:
        print(table(rows_of(options.summary)))
        return
    torch.set_num_threads(1)
    chosen = [own for own in NETWORKS if not options.networks or own.name in options.networks]
    if options.smoke:
        chosen = [own for own in NETWORKS if own.name == "resnet20@32"]
    for network in chosen:
        for rate in (0.5,) if options.smoke else options.rates:
            done = {(row["network"], row["rate"]) for row in rows_of(options.out) if "specialised" in row}
            if (network.name, rate) not in done:
                row = measured(network, rate, options.images, 8 if options.smoke else options.count, options.rounds)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(table([row]), flush=True)


def measured(network: Network, rate: float, source: str, count: int, rounds: int) -> dict[str, object]:
    """Measures one network at one firing rate."""
    torch.manual_seed(0)
    data = npe.open_data(source, image_size=network.size, limit=max(count, 8) * 4)
    images = next(iter(npe.split_batches(data, "test", count)))[0]
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    model = randomised(npe.build_model(network.model, num_classes=10), images)
    example = images[:1]
    macs = npe.count_costs(model, example).macs
    with tempfile.TemporaryDirectory() as folder:
        files = {"dense": Path(folder) / "dense.onnx"}
        npe.export_onnx(model, example, files["dense"])
        gates, parities = {}, {}
        for block in BLOCKS:
            gated = calibrated(model, example, images, rate, block, network.layers)
            expected, firing = npe.measure_gating(gated, example, [images], data=source)
            gates[str(block)] = {
                "macs_share": expected.share,
                "firing_rate": float(torch.cat([own.rate for own in firing.values()]).mean()),
                "varying": sum(own.varying for own in firing.values()) / sum(len(own.rate) for own in firing.values()),
            }
            for flavour in ("mask", "compact") if block == 1 else ("compact",):
                name = f"{flavour} {block}" if flavour == "compact" else flavour
                files[name] = Path(folder) / f"{name}.onnx"
                made = npe.export_gated(
                    gated,
                    example,
                    files[name],
                    flavour=flavour,
                    images=images,
                    gathered="all" if flavour == "compact" else None,
                )
                assert made.parity is not None
                parities[name] = made.parity.to_dict()
        cached = npe.specialise_ort_cpu(files["compact 16"], images, cache_folder=Path(folder), rounds=rounds)
        if cached.reason is None:
            files["specialised 16"] = cached.path
        share = gates["1"]["macs_share"]
        files["static"] = Path(folder) / "static.onnx"
        limits = npe.Limits(multiple=network.multiple, max_ratio=0.95)
        static = npe.prune(model, example, target=f"macs={share:.4f}", limits=limits, scope="local")
        npe.export_onnx(static.model, example, files["static"])
        entries = {name: (runtime("onnxruntime-cpu"), RunnableModel(onnx_path=path)) for name, path in files.items()}
        singles = [[np.ascontiguousarray(image[None].numpy())] for image in images[:16]]
        latency = measure_latency(entries, singles, rounds=rounds, min_seconds=2.0, threads=1)
        sizes = {name: path.stat().st_size for name, path in files.items()}
    return {
        "network": network.name,
        "rate": rate,
        "images": source.partition(":")[0],
        "macs": macs,
        "static_macs_share": static.costs.macs / macs,
        "gates": gates,
        "parity": parities,
        "specialised": cached.to_dict() | {"path": None, "portable": None},
        "bytes": sizes,
        "latency": latency.to_dict(),
        "environment": environment(),
    }


def randomised(model: nn.Module, images: Tensor) -> nn.Module:
    """Gives norms the statistics of real images, so that activations neither vanish nor grow."""
    model.train()
    with torch.no_grad():
        for _ in range(8):
            model(images)
    return model.eval()


def calibrated(
    model: nn.Module, example: Tensor, images: Tensor, rate: float, block: int, layers: tuple[str, ...] | None
) -> GatedNetwork:
    """Returns the network with random heads in which every unit is open for a share of the images, its own share."""
    flow = trace_gate_flow(model, example)
    places = chosen_places(flow, layers)
    units = {
        place.layer: torch.arange(place.channels) // block_size(place.channels, block)
        if block > 1
        else torch.arange(place.channels)
        for place in places
    }
    network = GatedNetwork(copy.deepcopy(model), new_gates(places, units=units, softmax=False)).eval()
    handles = [
        network.model.get_submodule(place.layer).register_forward_pre_hook(
            lambda _, args, head=head: set_head(head, args[0], rate)
        )
        for place, head in zip(places, network.gates.all_heads())
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return network


def set_head(head: GateHead, x: Tensor, rate: float) -> None:
    """Draws weights, and sets biases between two images, so that each unit fires for the share ``rate`` of them.

    Images that look alike to a head (the brightest pixel of a photograph is mostly white) fall on the same side: the
    bias lies in the nearest real gap. Units without one fire for all images or for none, a share ``rate`` of them.
    """
    pooled = head.pooled(x)
    head.scale.fill_(float(1 / pooled.std(0).mean().clamp(min=1e-3 * float(pooled.abs().mean()) + 1e-6)))
    head.weight.normal_()
    head.bias.zero_()
    logits = head(x).sort(0, descending=True).values
    gaps = logits[:-1] - logits[1:]
    wide = gaps > 0.01 * (logits[0] - logits[-1]).clamp(min=1e-2)
    distance = (torch.arange(len(gaps))[:, None] - (rate * len(logits) - 1)).abs().expand_as(gaps)
    place = torch.where(wide, distance, torch.inf).argmin(0)
    unit = torch.arange(head.num_units)
    between = -(logits[place, unit] + logits[place + 1, unit]) / 2
    beyond = torch.where(unit < rate * head.num_units, 1.0 - logits[-1], -1.0 - logits[0])
    head.bias.copy_(torch.where(wide.any(0), between, beyond))


def rows_of(path: Path) -> list[dict[str, object]]:
    """Reads what was measured."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(rows: list[dict[str, object]]) -> str:
    """Returns the rows as a Markdown table, ratios to the dense network."""
    last = {(row["network"], row["rate"]): row for row in rows}
    return "\n".join(_lines(last.values()))


def _lines(rows: Iterable[dict[str, object]]) -> Iterator[str]:
    names = ("mask", "compact 1", "compact 16", "specialised 16", "static")
    yield (
        "| network | firing | MACs | dense, ms | mask | compact, single | compact, blocks of 16 | specialised | static "
        "| A/A |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        latency, gates = row["latency"], row["gates"]
        assert isinstance(latency, dict)
        assert isinstance(gates, dict)
        ratios = {own["name"]: own["ratio"] for own in latency["rows"]}
        cells = " | ".join(f"{ratios[name]:.2f}" if name in ratios else "–" for name in names)
        yield (
            f"| {row['network']} | {gates['1']['firing_rate']:.2f} | {gates['1']['macs_share']:.2f} | "
            f"{latency['rows'][0]['p50_ms']:.2f} | {cells} | {latency['aa_ratio']:.3f} |"
        )


if __name__ == "__main__":
    main()
