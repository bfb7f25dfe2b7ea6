"""Average precision: one for perfect boxes, known values for known mistakes, crowds left out."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError, DataError
from nni_prune_ext.transfer.average_precision import average_precision

BOXES = torch.tensor([[10.0, 10, 40, 40], [50, 50, 90, 80]])
Found = tuple[Tensor, Sequence[int], Sequence[float]]


class Says(nn.Module):
    """A detector that always finds the same."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.found = found

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        boxes, labels, scores = self.found
        return [{"boxes": boxes, "labels": torch.tensor(labels), "scores": torch.tensor(scores)} for _ in images]


def measured(
    found: Found, *, crowd: Sequence[int] = (0, 0), names: tuple[str, ...] = ("cat", "dog")
) -> dict[str, float]:
    target = {"boxes": BOXES, "labels": torch.tensor([1, 2]), "iscrowd": torch.tensor(crowd)}
    batches = [(torch.zeros(2, 3, 100, 100), [target, target]), (torch.zeros(1, 3, 100, 100), [target])]
    model = Says(found).train()
    result = average_precision(model, batches, names)
    assert model.training, "modes are put back"
    return result


def test_perfect_boxes_give_one() -> None:
    found = measured((BOXES, [1, 2], [0.9, 0.8]))

    assert {"AP": 1.0, "AP50": 1.0, "AP75": 1.0, "AP cat": 1.0, "AP dog": 1.0} == pytest.approx(found)


def test_a_class_that_is_missed_counts_as_nothing() -> None:
    found = measured((BOXES[:1], [1], [0.9]))

    assert found["AP"] == pytest.approx(0.5)
    assert (found["AP cat"], found["AP dog"]) == pytest.approx((1, 0))


def test_a_box_that_overlaps_by_three_quarters_counts_at_the_lower_thresholds() -> None:
    moved = BOXES.clone()
    moved[0, 2] = 10 + 30 * 0.72  # intersection over union 0.72: right at 0.50 to 0.70, wrong from 0.75 on

    found = measured((moved, [1, 2], [0.9, 0.8]))

    assert found["AP cat"] == pytest.approx(0.5)
    assert (found["AP50"], found["AP75"]) == pytest.approx((1, 0.5))


def test_swapped_classes_are_all_wrong() -> None:
    assert measured((BOXES, [2, 1], [0.9, 0.8]))["AP"] == pytest.approx(0)


def test_a_wrong_box_with_a_higher_score_halves_the_precision() -> None:
    wrong = torch.cat([BOXES[:1] + 45, BOXES])

    found = measured((wrong, [1, 1, 2], [0.99, 0.9, 0.8]))

    assert found["AP cat"] == pytest.approx(0.5, abs=0.01)
    assert found["AP dog"] == pytest.approx(1)


def test_a_crowd_is_neither_to_be_found_nor_wrong_to_find() -> None:
    assert measured((BOXES[:1], [1], [0.9]), crowd=(0, 1))["AP"] == pytest.approx(1)
    assert measured((BOXES, [1, 2], [0.9, 0.8]), crowd=(0, 1))["AP"] == pytest.approx(1)


def test_classes_without_a_name_keep_their_number() -> None:
    assert "AP 2" in measured((BOXES, [1, 2], [0.9, 0.8]), names=("cat",))


def test_images_without_an_object_are_told() -> None:
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    with pytest.raises(DataError, match="0 objects"):
        average_precision(Says((BOXES, [1, 2], [0.9, 0.8])), [(torch.zeros(1, 3, 9, 9), [target])])


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *given: Any) -> object:
        if name == "pycocotools":
            raise ImportError("No module named 'pycocotools'")
        return real(name, *given)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"nni_prune_ext\[detection\]"):
        measured((BOXES, [1, 2], [0.9, 0.8]))
