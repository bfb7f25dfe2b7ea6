"""What the user has before pruning comes in: a trained network, its data, its training. Shared by both programs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

import nni_prune_ext as npe

PARSER = argparse.ArgumentParser(description="L1 pruning of ResNet-20 with NNI's interface")
PARSER.add_argument("--data", default="digits", help="digits or cifar10:ROOT")
PARSER.add_argument("--weights", type=Path, help="trained weights; without them the network is trained first")
PARSER.add_argument("--mean", help="of the pictures, for example 0.485,0.456,0.406")
PARSER.add_argument("--std", help="of the pictures")
PARSER.add_argument("--ratio", type=float, default=0.5)
PARSER.add_argument("--train-epochs", type=int, default=10, help="before pruning, where there are no weights")
PARSER.add_argument("--finetune-epochs", type=int, default=3)
PARSER.add_argument("--fx", action="store_true", help="NNI's workaround: hand ModelSpeedup a torch.fx graph")
PARSER.add_argument("--smoke", action="store_true", help="seconds: a few pictures, one epoch")


class Task:
    """The network, its data, its training and its test."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.options = options
        norm = {} if options.mean is None else {"mean": _numbers(options.mean), "std": _numbers(options.std)}
        digits = options.data == "digits"
        self.data = npe.open_data(options.data, image_size=16 if digits else None, **norm)
        self.train = npe.split_batches(self.data, "train", 128, seed=0)
        self.test = npe.split_batches(self.data, "test", 500)
        self.model = npe.build_model(
            "resnet20", num_classes=self.data.num_classes, in_channels=self.data.input_shape[0]
        )
        self.dummy_input = torch.rand(2, *self.data.input_shape)
        if options.weights is not None:
            npe.load_weights(self.model, options.weights)
        else:
            self.fit(self.model, 1 if options.smoke else options.train_epochs, 0.1)

    def fit(self, model: nn.Module, epochs: int, rate: float) -> None:
        """Trains a model in place, as the user always did."""
        fast = self.options.data != "digits"
        settings = npe.TrainingSettings(
            learning_rate=rate, precision="bf16" if fast else "fp32", channels_last=fast, weight_decay=5e-4
        )
        if epochs:
            npe.fit(model, self.train, epochs=epochs, settings=settings)

    def report(self, name: str, model: nn.Module, **more: object) -> None:
        """Prints size and accuracy of a model as one line of JSON."""
        params = sum(parameter.numel() for parameter in model.parameters())
        macs = npe.count_costs(model, self.dummy_input[:1]).macs
        top1 = round(npe.accuracy(model, self.test), 4)
        print(json.dumps({"network": name, "params": params, "macs": macs, "top1": top1, **more}), flush=True)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))
