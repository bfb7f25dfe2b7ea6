"""COCO's average precision of a torchvision detector, by torchmetrics and pycocotools."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError, DataError
from nni_prune_ext.training.forward_only import modes_kept


def average_precision(
    model: nn.Module, batches: Iterable[tuple[Tensor, list[dict[str, Tensor]]]], class_names: tuple[str, ...] = ()
) -> dict[str, float]:
    """Returns AP (the mean over intersections over union of 0.50 to 0.95), AP50, AP75, and AP per class, 0–1 each.

    Lin et al., "Microsoft COCO: Common Objects in Context", 2014; at most 100 boxes per image count. A class that the
    images do not show has no entry. Objects with ``iscrowd`` are neither to be found nor wrong to find.

    Args:
        model: a detector that maps a list of images ``(3, H, W)`` to dicts of boxes, labels and scores.
        batches: as :class:`~nni_prune_ext.data.detection.DetectionBatches` gives them.
        class_names: of the labels 1, 2, and so on.

    Raises:
        ConfigError: torchmetrics or pycocotools is not installed.
        DataError: there is no object to be found.
    """
    metric = detection_metric()
    device = next(model.parameters()).device
    with modes_kept(model), torch.no_grad():
        model.eval()
        for images, targets in batches:
            found = model(list(send_to_device(images, device).unbind()))
            metric.update(send_to_device(found, "cpu"), send_to_device(targets, "cpu"))
    result: Mapping[str, Any] = metric.compute()
    if float(result["map"]) < 0:
        raise DataError("The images show 0 objects, expected at least one to be found. Check the annotations.")
    named = {"AP": result["map"], "AP50": result["map_50"], "AP75": result["map_75"]}
    per_class = zip(result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1).tolist())
    names = {f"AP {class_names[label - 1] if label <= len(class_names) else label}": own for label, own in per_class}
    return {name: float(own) for name, own in {**named, **names}.items() if float(own) >= 0}


def detection_metric() -> Any:
    """Returns torchmetrics' metric; it has no types.

    Raises:
        ConfigError: torchmetrics or pycocotools is not installed.
    """
    try:
        importlib.import_module("pycocotools")
        made = importlib.import_module("torchmetrics.detection").MeanAveragePrecision
    except ImportError as error:
        raise ConfigError(
            f"Average precision needs torchmetrics and pycocotools, of which one cannot be imported ({error}). Run: "
            "pip install 'nni_prune_ext[detection]'"
        ) from error
    metric = made(class_metrics=True, backend="pycocotools")
    metric.warn_on_many_detections = False  # those beyond the 100 best count for nothing, as in COCO
    return metric
