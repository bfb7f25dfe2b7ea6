"""torch-pruning with this package's criterion, schedule and certificate: one script, three changes.

A small network learns scikit-learn's digits, torch-pruning's pruner removes half of its channels in three steps, ranked
by our Taylor criterion along the AGP schedule, with training in between. Run with ``--smoke`` for a few seconds.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional

import nni_prune_ext as npe
from nni_prune_ext.torch_pruning import CertifiedPruner, TaylorImportance, agp
from nni_prune_ext.training import accuracy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--smoke", action="store_true", help="one epoch at a time")
epochs = 1 if parser.parse_args().smoke else 5

torch.manual_seed(0)
data = npe.open_data("digits", image_size=8)
train = npe.split_batches(data, "train", 64)
test = npe.split_batches(data, "test", 500)
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 32, 3, padding=1, bias=False), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
    torch.nn.Conv2d(32, 64, 3, padding=1, bias=False), torch.nn.BatchNorm2d(64), torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(256, data.num_classes),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train_for(count: int) -> None:
    model.train()
    for _ in range(count):
        for images, labels in train:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


train_for(2 * epochs)
print(f"dense: accuracy {accuracy(model, test):.3f}")

example = torch.randn(1, *data.input_shape)
pruner = CertifiedPruner(  # instead of torch_pruning.pruner.BasePruner
    model,
    example,
    TaylorImportance(model, example, batches=train, options={"batches": 4}),  # instead of tp.importance.…
    pruning_ratio=0.5,
    iterative_steps=3,
    iterative_pruning_ratio_scheduler=agp,
    ignored_layers=[model[-1]],
    optimizer=optimizer,  # follows every cut, momentum included
)
for _ in range(3):
    report = pruner.step()
    train_for(epochs)
    print(report)
    print(f"accuracy after training {accuracy(model, test):.3f}")
