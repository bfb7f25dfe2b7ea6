"""Lottery Jackpots: a mask is searched in frozen weights and what is left is tuned; beside it, what this must beat.

    python examples/jackpots.py --smoke                      # digits that ship with scikit-learn; half a minute
    python examples/jackpots.py --controls                   # digits, with all controls
    python examples/jackpots.py --controls --unstructured    # single weights instead of channels: nine of ten go
    python examples/jackpots.py --controls --data cifar10:ROOT --weights dense.pt --search-epochs 30

All networks start from the same weights, see the same images, and are trained for the same number of epochs; the last
epoch counts, nothing is selected. "top-1 cut" is search-only: no weight has been trained. "top-1" is after the tuning.
Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import nni_prune_ext as npe
from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.deployment import Measurement, Variant, compare_variants
from nni_prune_ext.evaluation import latency_caption
from nni_prune_ext.export.artefact_folder import ModelSpec
from nni_prune_ext.report import before_after_table

CONSOLE = Console(width=160)
CONTROLS = {"magnitude": "recalibrated", "random-start": "random_start", "unrestricted": "unrestricted"}
"""Row → the option ``control``. The magnitude mask is tuned as long as search and tuning last, so its row holds two
controls: with statistics measured anew, and with fine-tuning of equal length."""


@dataclass(frozen=True)
class Job:
    """What all rows have in common."""

    arguments: argparse.Namespace
    source: npe.DataSource
    saved: Checkpoints
    example: tuple[Tensor]

    @property
    def train(self) -> npe.BatchLoader:
        """The training batches, from the beginning of their order."""
        return npe.split_batches(self.source, "train", self.arguments.batch_size, seed=self.arguments.seed)

    def settings(self, learning_rate: float, weight_decay: float = 0.0) -> npe.TrainingSettings:
        """Returns how weights are trained: the paper's tuning has no weight decay."""
        bf16 = self.arguments.precision == "bf16"
        return npe.TrainingSettings(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            precision=self.arguments.precision,
            channels_last=bf16,
        )


def main() -> None:
    """Trains or loads the base, searches, tunes, exports, and prints one table."""
    arguments = parse()
    job, model = prepared(arguments)
    if arguments.weights is None:
        fitted(model, job, "base", arguments.base_epochs, job.settings(arguments.base_rate, 5e-4))
    variants = [Variant("dense", model), trained_longer(model, job)]
    variants += [searched(model, job, "search", "none"), *controls(model, job)]
    rows, latency, _ = compare_variants(
        variants,
        Path(arguments.out),
        job.example,
        test_batches=npe.split_batches(job.source, "test", 500),
        progress=tell,
        spec=ModelSpec(
            model=arguments.model, num_classes=job.source.num_classes, input_shape=(1, *job.source.input_shape)
        ),
        measurement=None if arguments.smoke else Measurement(),
    )
    measured = "latency: not measured" if latency is None else latency_caption(latency)
    CONSOLE.print(
        before_after_table(
            rows,
            title=f"{arguments.model} on {job.source.name}, {arguments.target}",
            caption=f"top-1 cut: search-only; top-1: tuned; {measured}; artefacts in {arguments.out}",
        )
    )


def prepared(arguments: argparse.Namespace) -> tuple[Job, nn.Module]:
    """Opens the data and builds the dense network."""
    torch.manual_seed(arguments.seed)
    source = npe.open_data(arguments.data, image_size=arguments.image_size, limit=arguments.limit, seed=arguments.seed)
    model = npe.build_model(
        arguments.model, num_classes=source.num_classes, in_channels=source.input_shape[0], weights=arguments.weights
    )
    identity = {key: str(value) for key, value in vars(arguments).items() if key not in ("controls", "out")}
    saved = Checkpoints(Path(arguments.out) / "checkpoints", identity, tell=tell)
    return Job(arguments, source, saved, (torch.randn(1, *source.input_shape),)), model


def fitted(model: nn.Module, job: Job, name: str, epochs: int, settings: npe.TrainingSettings) -> float:
    """Trains a dense network in place; returns the seconds it took."""
    began = time.perf_counter()
    npe.fit(model, job.train, epochs=epochs, settings=settings, checkpoints=job.saved.stage(name), name=name)
    tell(f"{name}: {epochs} epochs")
    return time.perf_counter() - began


def trained_longer(model: nn.Module, job: Job) -> Variant:
    """Trains a copy of the dense network for as many epochs as the others are searched and tuned."""
    longer, epochs = copy.deepcopy(model), job.arguments.search_epochs + job.arguments.tune_epochs
    seconds = fitted(longer, job, "dense-trained-longer", epochs, job.settings(job.arguments.tune_rate))
    return Variant("dense-trained-longer", longer, seconds=seconds)


def controls(model: nn.Module, job: Job) -> Iterator[Variant]:
    """Runs what the search must beat, if that was asked for."""
    for name, control in CONTROLS.items() if job.arguments.controls else ():
        yield searched(model, job, name, control)


def searched(model: nn.Module, job: Job, name: str, control: str) -> Variant:
    """Searches a mask, removes what it leaves out, and tunes the rest; a row without a search is tuned for longer."""
    own, began = job.arguments, time.perf_counter()
    options = {"search_epochs": own.search_epochs, "tune_epochs": 0, "control": control}
    unsearched = own.search_epochs if control == "recalibrated" else 0
    result = npe.prune(
        model,
        job.example,
        method="lottery_jackpots",
        target=own.target,
        options=options if own.pattern is None else {**options, "pattern": own.pattern},
        train_batches=job.train,
        recover_epochs=own.tune_epochs + unsearched,
        settings=job.settings(own.tune_rate),
        checkpoints=job.saved.stage(name),
        seed=own.seed,
    )
    facts = result.outcome.facts
    tell(
        f"{name}: {facts['swaps_made']:,.0f} of {facts['swaps_requested']:,.0f} swaps made, "
        f"{facts['share_of_first_mask_kept']:.1%} of the first mask kept; {time.perf_counter() - began:.1f} s"
    )
    return Variant(name, result.model, result, time.perf_counter() - began, options)


def tell(text: str) -> None:
    CONSOLE.print(f"  {text}", style="dim", highlight=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small images and few epochs")
    parser.add_argument("--controls", action="store_true", help="a row for each of the controls, too")
    parser.add_argument("--unstructured", action="store_true", help="single weights: the target is sparsity=0.9")
    parser.add_argument("--target", default=None, help="macs=0.5 by default; sparsity=… masks single weights")
    parser.add_argument("--pattern", default=None, help="N:M, for example 2:4, with its sparsity as the target")
    parser.add_argument("--data", default="digits", help="digits, cifar10:ROOT or imagefolder:PATH")
    parser.add_argument("--model", default="resnet20", help="a model of `nni-prune-ext list models`")
    parser.add_argument("--weights", type=Path, default=None, help="of the dense network; trained here without")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--limit", type=int, default=None, help="at most so many images per split")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--base-epochs", type=int, default=None, help="of the dense network; 12")
    parser.add_argument("--base-rate", type=float, default=0.1, help="peak learning rate of the dense network")
    parser.add_argument("--search-epochs", type=int, default=None, help="30 in the paper; 8 here")
    parser.add_argument("--tune-epochs", type=int, default=None, help="10 in the paper; 4 here")
    parser.add_argument("--tune-rate", type=float, default=0.01, help="peak learning rate of all tuning")
    parser.add_argument("--precision", default="fp32", help="fp32, or bf16 (several times faster on recent CPUs)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="jackpots_output", help="folder for the artefacts and the checkpoints")
    arguments = parser.parse_args()
    short = arguments.smoke
    arguments.target = arguments.target or ("sparsity=0.9" if arguments.unstructured else "macs=0.5")
    arguments.base_epochs = arguments.base_epochs or (6 if short else 12)
    arguments.search_epochs = (3 if short else 8) if arguments.search_epochs is None else arguments.search_epochs
    arguments.tune_epochs = (1 if short else 4) if arguments.tune_epochs is None else arguments.tune_epochs
    arguments.image_size = arguments.image_size or (8 if short else None)
    arguments.limit = arguments.limit or (600 if short else None)
    return arguments


if __name__ == "__main__":
    main()
