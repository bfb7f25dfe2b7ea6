"""Data of any task: iterables of batches that only the user's loss and metric look into, and example inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nni_prune_ext.errors import DataError
from nni_prune_ext.inputs import ExampleInputs, tensors_in


@dataclass(frozen=True, eq=False)
class Loaders:
    """Batches for segmentation, detection or any other task: train to fit, val to select, test to report.

    What a batch is, only the loss and the metric of the recipe need to know.

    Attributes:
        train: batches of one epoch; ``set_epoch(n)`` is called before each epoch where it exists.
        val: batches to choose epochs by.
        test: batches to report on, and for nothing else.
        example_inputs: how the model is called; the network is traced, exported and checked with them.
        num_classes: given to the model's factory, if it takes such an argument.
    """

    train: Iterable[object]
    val: Iterable[object]
    test: Iterable[object]
    example_inputs: ExampleInputs
    num_classes: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be read once per epoch, so that a mistake shows where it is made."""
        for split, batches in self.splits().items():
            if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
                raise DataError(
                    f"The {split} loader is a {type(batches).__name__}, expected an iterable that gives its batches "
                    "again in every epoch, such as a DataLoader or a list. Wrap it in an object with __iter__."
                )
        if next(tensors_in(self.example_inputs), None) is None:
            raise DataError(
                f"The example inputs of the loaders are a {type(self.example_inputs).__name__} without a tensor, "
                "expected what the model is called with. Give a tensor, a tuple, a list or a dict."
            )

    def splits(self) -> dict[str, Iterable[object]]:
        """Return the three loaders by their names, train first."""
        return {"train": self.train, "val": self.val, "test": self.test}
