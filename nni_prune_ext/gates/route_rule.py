"""From the first heads of a network to the route of an image: a linear rule, learnt by ridge regression.

The first gates often say the same for all images while the logits behind them differ, so the rule reads logits. How
many layers it reads is decided on images that a fold of the regression has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_SHARE = 0.25
"""What the layers that are read may cost, as a share of the network's MACs."""
_NEARLY = 0.05
"""Skill that is given up for a shorter prefix."""
_FOLDS = 5
_RIDGE = 0.01
"""Times the number of images."""
_CONSTANT = 1e-4
"""Spread below which a logit says nothing."""


@dataclass(frozen=True)
class RouteRule:
    """Names the route of an image from the logits of the first gated layers: the largest value counts.

    Attributes:
        layers: whose logits are read, one behind the other.
        weight: ``(logits, routes)`` float32.
        bias: ``(routes,)`` float32.
    """

    layers: tuple[str, ...]
    weight: Tensor
    bias: Tensor

    def assign(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Returns the route of every image, ``(N,)`` int64, from layer → ``(N, U)``."""
        return (torch.cat([logits[layer] for layer in self.layers], 1) @ self.weight + self.bias).argmax(1)


def skill(agreement: float, most_frequent: float) -> float:
    """Returns how far a rule is from always naming the most frequent route (0) towards being always right (1).

    Args:
        agreement: share of the images for which it names the right route.
        most_frequent: share of the images whose route is the most frequent one.
    """
    return (agreement - most_frequent) / (1 - most_frequent) if most_frequent < 1 else 0.0


def learn_rule(logits: Mapping[str, Tensor], right: Tensor, costs: Sequence[float]) -> RouteRule:
    """Learns a rule that reads as few layers as are nearly as good as any that may be read.

    Args:
        logits: layer → ``(N, U)``, in forward order; a thousand images are plenty.
        right: the routes of these images, ``(N,)`` int64.
        costs: per layer, what it takes to reach its head, as a share of the network's MACs; the first one may always be
            read, the others up to ``LARGEST_SHARE``.
    """
    layers = list(logits)
    layers = layers[: max(1, sum(cost <= LARGEST_SHARE for cost in costs))]
    wanted = functional.one_hot(right).double()
    most_frequent = float(wanted.mean(0).max())
    kernel, skills = torch.zeros(len(right), len(right), dtype=torch.float64), []
    for layer in layers:
        read = _standard(logits[layer])[0]
        kernel = kernel + read @ read.T
        skills.append(skill(_unseen_agreement(kernel, wanted, right), most_frequent))
    count = next(k for k, own in enumerate(skills, 1) if own >= max(skills) - _NEARLY)
    return _fitted(tuple(layers[:count]), logits, wanted)


def _standard(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits with mean 0 and spread 1 (0 for constant ones), with means and factors, float64."""
    values = logits.double()
    mean, spread = values.mean(0), values.std(0, correction=0)
    factor = torch.where(spread > _CONSTANT, 1 / spread, torch.zeros_like(spread))
    return (values - mean) * factor, mean, factor


def _unseen_agreement(kernel: Tensor, wanted: Tensor, right: Tensor) -> float:
    """Returns how often rules that are learnt without a fold of the images are right in it."""
    fold, hits = torch.arange(len(right)) % _FOLDS, 0
    for k in range(min(_FOLDS, len(right))):
        known, unseen = fold != k, fold == k
        found = kernel[unseen][:, known] @ _solved(kernel[known][:, known], wanted[known]) + wanted[known].mean(0)
        hits += int((found.argmax(1) == right[unseen]).sum())
    return hits / len(right)


def _solved(kernel: Tensor, wanted: Tensor) -> Tensor:
    """Returns the weights of the images, ``(N, K)``."""
    ridge = _RIDGE * len(kernel) * torch.eye(len(kernel), dtype=kernel.dtype)
    found: Tensor = torch.linalg.solve(kernel + ridge, wanted - wanted.mean(0))
    return found


def _fitted(layers: tuple[str, ...], logits: Mapping[str, Tensor], wanted: Tensor) -> RouteRule:
    read, mean, factor = _standard(torch.cat([logits[layer] for layer in layers], 1))
    weight = read.T @ _solved(read @ read.T, wanted) * factor[:, None]
    return RouteRule(layers, weight.float(), (wanted.mean(0) - mean @ weight).float())
