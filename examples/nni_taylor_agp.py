"""NNI's Taylor pruner on an AGP schedule, made physical: what an NNI script looks like with our ModelSpeedup.

Everything but two imports and two lines is NNI's: train a network, prune it in steps while it trains, speed it up,
fine-tune. The marked lines are all that changes. ``--smoke`` trains for seconds instead of minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import nni
import torch
from nni.compression import TorchEvaluator
from nni.compression.pruning import AGPPruner, TaylorPruner
from torch import Tensor, nn
from torch.nn import functional

import nni_prune_ext as npe
from nni_prune_ext.speedup import ModelSpeedup  # was: from nni.compression.speedup import ModelSpeedup
from nni_prune_ext.training import accuracy
from nni_prune_ext.utils import align_batchnorm, auto_set_denpendency_group_ids  # was: from nni.compression.utils …

INTERVAL = 10
"""Training steps between two updates of the masks; Taylor collects gradients for as many."""


def main() -> None:
    """Trains, prunes, speeds up and fine-tunes, and prints sizes and accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    smoke = parser.parse_args().smoke
    torch.manual_seed(0)
    data = npe.open_data("digits", image_size=8 if smoke else 16)
    train, test = npe.split_batches(data, "train", 64), npe.split_batches(data, "test", 500)
    model = npe.build_model("resnet20", num_classes=data.num_classes, in_channels=1)
    dummy_input = torch.randn(8, *data.input_shape)

    def loss_of(batch: tuple[Tensor, Tensor], net: nn.Module) -> Tensor:
        return functional.cross_entropy(net(batch[0]), batch[1])

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9)
    loop = training_loop(train)
    loop(model, optimizer, loss_of, max_epochs=1 if smoke else 8)
    print(f"dense: {count(model):,} parameters, top-1 {accuracy(model, test):.3f}")

    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    config_list = auto_set_denpendency_group_ids(model, config_list, dummy_input)
    config_list = align_batchnorm(model, config_list, dummy_input)  # new: no shift is left
    evaluator = TorchEvaluator(loop, optimizer, loss_of)
    pruner = AGPPruner(
        TaylorPruner(model, config_list, evaluator, training_steps=INTERVAL),
        interval_steps=INTERVAL,
        total_times=2 if smoke else 10,
    )
    _, masks = pruner.compress(max_steps=INTERVAL * (2 if smoke else 15), max_epochs=None)
    print(f"simulated: top-1 {accuracy(model, test):.3f}")
    pruner.unwrap_model()

    ModelSpeedup(model, dummy_input, masks, constants="absorb").speedup_model()  # new: exactly the simulated model
    print(f"removed: {count(model):,} parameters, top-1 {accuracy(model, test):.3f}")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  # the parameters are new
    loop(model, optimizer, loss_of, max_epochs=1 if smoke else 4)
    print(f"fine-tuned: {count(model):,} parameters, top-1 {accuracy(model, test):.3f}")


def training_loop(batches: Iterable[Any]) -> Callable[..., None]:
    """Returns a training function with the arguments that NNI calls it by."""

    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_of: Callable[..., Tensor],
        lr_scheduler: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.train()
        step, epoch = 0, 0
        while (max_steps is None or step < max_steps) and (max_epochs is None or epoch < max_epochs):
            for batch in batches:
                optimizer.zero_grad()
                loss_of(batch, model).backward()
                optimizer.step()
                step += 1
                if max_steps is not None and step >= max_steps:
                    break
            epoch += 1
        model.eval()

    return train


def count(model: nn.Module) -> int:
    """Returns the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
