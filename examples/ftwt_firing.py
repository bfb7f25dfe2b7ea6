"""Which filters fire for which class: gates are trained on digits, and what they open is printed and drawn.

    python examples/ftwt_firing.py               # a few minutes on one CPU core
    python examples/ftwt_firing.py --smoke       # half a minute, and too short to be of use

For every gated layer: how many filters run never, always, and for some images only; the filters whose firing tells the
classes apart best. The picture has one row per class and one column per filter, layer by layer: white runs for every
image of the class, black for none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import nni_prune_ext as npe
from nni_prune_ext.gates import GatedNetwork, measure_gating

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    """Trains gates, measures firing per class, prints and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small images and few epochs")
    parser.add_argument("--mass", type=float, default=0.8, help="share of the heat that is kept for an image")
    parser.add_argument("--out", type=Path, default=Path("firing.png"))
    options = parser.parse_args()
    torch.manual_seed(0)
    data = npe.open_data("digits", image_size=8 if options.smoke else 16)
    train, test = npe.split_batches(data, "train", 64), npe.split_batches(data, "test", 500)
    model = npe.build_model("resnet20", num_classes=data.num_classes, in_channels=1)
    example = torch.randn(1, *data.input_shape)
    settings = npe.TrainingSettings(learning_rate=0.05)
    npe.fit(model, train, epochs=3 if options.smoke else 15, settings=settings)
    network = trained(model, example, train, options.mass, epochs=2 if options.smoke else 20)

    expected, firing = measure_gating(network, example, test)
    print(
        f"top-1 {npe.accuracy(network, test):.3f} (dense {npe.accuracy(model, test):.3f}), {expected.share:.0%} of the "
        f"MACs of the static core, standard deviation over images {expected.spread / expected.dense:.1%}"
    )
    rates = per_class(network, test, data.num_classes)
    for layer, own in firing.items():
        spread = rates[layer].std(0, correction=0)
        best = int(spread.argmax())
        classes = ", ".join(f"{share:.0%}" for share in rates[layer][:, best])
        print(f"{layer}: {own.never} never, {own.always} always, {own.varying} varying, {own.entropy:.3f} bits")
        if own.varying:
            print(f"    filter {best} by class: {classes}")
    drawn(rates, options.out)
    print(f"drawn in {options.out}")


def trained(model: torch.nn.Module, example: Tensor, train: npe.BatchLoader, mass: float, epochs: int) -> GatedNetwork:
    """Returns the gated network; ``macs=1`` asks for no cut but that of filters that never fire."""
    result = npe.prune(
        model,
        example,
        method="ftwt",
        target="macs=1.0",
        options={"epochs": epochs, "mass": mass, "softmax": False, "calibration_batches": 8},
        train_batches=train,
        settings=npe.TrainingSettings(learning_rate=0.02),
    )
    gated = result.outcome.gated_model
    assert isinstance(gated, GatedNetwork)
    return gated.eval()


def per_class(network: GatedNetwork, batches: npe.BatchLoader, classes: int) -> dict[str, Tensor]:
    """Returns layer → share of the images of each class for which each filter is open, ``(classes, C)``."""
    opened: dict[str, list[Tensor]] = {place.layer: [] for place in network.gates.places}
    labels = []
    with torch.no_grad():
        for images, target in batches:
            network(images)
            labels.append(target)
            for layer, own in network.gates.open_channels().items():
                opened[layer].append(own.float())
    which = torch.cat(labels)
    return {
        layer: torch.stack([torch.cat(parts)[which == own].mean(0) for own in range(classes)])
        for layer, parts in opened.items()
    }


def drawn(rates: dict[str, Tensor], path: Path) -> None:
    """Draws firing rates, classes over filters."""
    figure, axes = pyplot.subplots(len(rates), 1, figsize=(10, 0.7 * len(rates)), squeeze=False)
    for axis, (layer, own) in zip(axes[:, 0], rates.items()):
        axis.imshow(own.numpy(), aspect="auto", cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_ylabel(layer, rotation=0, ha="right", fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
