"""What surrounds the steps of training: looks at the data, modes, memory formats, statistics, rewinding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from small_task import small_batches, small_net
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nni_prune_ext.errors import TrainingError
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.methods.base import MethodContext, Phase, PruningMethod
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.training import MethodRun, TrainingSettings, drive, fit, recalibrate_batchnorm


def test_a_look_at_the_data_beside_the_loop_leaves_persistent_workers_alone() -> None:
    data = TensorDataset(torch.randn(12, 3, 8, 8), torch.randint(3, (12,)))
    loader = DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    run = MethodRun(model=small_net(), batches_=loader)

    seen = [len(run.batches(2)) for _, _ in zip(range(9), loader)]  # at most: a broken one never ends

    assert [2, 2, 2] == seen


def test_data_without_a_length_is_trained_on() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter([(torch.randn(3, 8, 8), torch.tensor(1))] * 6)

    logs = fit(small_net(), DataLoader(Stream(), batch_size=2), epochs=2)

    assert 2 == len(logs)


def test_no_memory_in_the_optimizers_step_is_explained_and_undone() -> None:
    model, steps = small_net(), 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    class Hungry(PruningMethod):
        def phases(self) -> Sequence[Phase]:
            return [Phase("hungry", 1)]

        def after_step(self, context: MethodContext) -> None:
            nonlocal steps
            steps += 1
            if steps == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainingError, match="Memory ran out on a batch of size"):
        drive(Hungry(), MethodRun(model=model, batches_=small_batches()))

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_frozen_batch_norms_keep_their_statistics_and_others_do_not() -> None:
    frozen, free = small_net(), small_net()
    frozen[1].eval().requires_grad_(False)
    before = frozen[1].running_mean.clone()

    for model in (frozen, free):
        fit(model, small_batches(), epochs=1)

    assert torch.equal(before, frozen[1].running_mean)
    assert not torch.equal(before, free[1].running_mean)


def test_channels_last_reaches_images_in_dictionaries_and_named_tuples_and_leaves_other_models_alone() -> None:
    class Pair(NamedTuple):
        images: Tensor
        labels: Tensor

    seen = []

    def loss(model: nn.Module, batch: object) -> Tensor:
        images, labels = (batch["images"], batch["labels"]) if isinstance(batch, dict) else batch
        seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return functional.cross_entropy(model(images), labels)

    images, labels = torch.randn(4, 3, 8, 8), torch.randint(3, (4,))
    settings = TrainingSettings(channels_last=True)

    for batch in ({"images": images, "labels": labels}, Pair(images, labels)):
        fit(small_net(), [batch], epochs=1, settings=settings, loss=loss)
    volume = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 27, 3))
    fit(volume, [(torch.randn(2, 1, 5, 5, 5), torch.tensor([0, 1]))], epochs=1, settings=settings)

    assert [True, True] == seen


def test_statistics_are_put_back_when_the_data_raises_half_way() -> None:
    def broken() -> Iterator[object]:
        yield from small_batches()[:2]
        raise ValueError("torn")

    model = small_net()
    before = model[1].running_mean.clone()

    with pytest.raises(ValueError, match="torn"):
        recalibrate_batchnorm(model, broken())

    assert torch.equal(before, model[1].running_mean)


def test_tied_weights_are_rewound_after_a_cut() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.head((x + self.b(self.a(x).relu())).mean((2, 3)))

    model, example = Tied(), torch.randn(1, 3, 4, 4)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = MethodRun(model=model, example_inputs=example, groups=trace_channel_groups(model, example))
    (group, *_) = run.groups

    removal = run.apply(plan_from_channels(run.groups, {group.name: [0, 3]}))
    run.rewind(dense)

    kept = removal.kept["a.weight"]
    expected = dense["a.weight"][kept[0]][:, kept[1]]
    assert torch.equal(expected, run.model.a.weight)
    assert run.model.a.weight is run.model.b.weight
