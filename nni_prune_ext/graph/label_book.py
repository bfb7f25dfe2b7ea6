"""The book of channel labels: which indices of which tensors are one and the same channel.

A label is a positive integer; 0 means "not a channel". Labels are made for the output channels of every layer that
writes channels and are merged (union–find) wherever two tensors must keep the same channels. An entry of the book says
which labels stand along one dimension of one parameter or buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


class Role(str, Enum):
    """What one dimension of a tensor does with a channel."""

    WRITER = "writer"
    """Produces the channel: the output dimension of a convolution, linear layer or embedding."""
    BIAS = "bias"
    NORM = "norm"
    """Scale, shift and statistics of a normalisation."""
    DEPTHWISE = "depthwise"
    """Reads and writes the same channel."""
    CONSUMER = "consumer"
    """Reads the channel: the input dimension of a convolution or linear layer."""
    PARAMETER = "parameter"
    """Is combined with the channel element by element: layer scale, position embedding, PReLU slope."""


@dataclass
class Entry:
    """The labels along one dimension of one tensor.

    Attributes:
        role: that of the first use.
        also_reads: whether the tensor is read as a consumer besides (an embedding tied to the last linear layer).
    """

    role: Role
    labels: Labels
    also_reads: bool = False


class LabelBook:
    """Makes, merges and freezes channel labels."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, int], Entry] = {}
        self._parent: Labels = np.zeros(1, dtype=np.int64)
        self._frozen: dict[int, str] = {}

    def new(self, count: int) -> Labels:
        """Returns ``count`` fresh labels."""
        start = len(self._parent)
        fresh = np.arange(start, start + count, dtype=np.int64)
        self._parent = np.concatenate([self._parent, fresh])
        return fresh

    def find(self, labels: Labels) -> Labels:
        """Returns the representative of every label; merged labels have the same one."""
        return self._parent[labels]

    def merge(self, first: Labels, second: Labels, reason: str) -> None:
        """Makes ``first[i]`` and ``second[i]`` one channel; a label that meets 0 is frozen with ``reason``."""
        a, b = self.find(first.reshape(-1)), self.find(second.reshape(-1))
        lonely = (a == 0) != (b == 0)
        if lonely.any():
            self.freeze((a + b)[lonely], reason)
        both = (a != 0) & (b != 0) & (a != b)
        a, b = a[both], b[both]
        while a.size:
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))
            self._compress()
            a, b = self.find(a), self.find(b)
            different = a != b
            a, b = a[different], b[different]

    def freeze(self, labels: Labels, reason: str) -> None:
        """Protects the channels of ``labels``; the first reason given stays."""
        for label in np.unique(self.find(labels.reshape(-1))):
            if label:
                self._frozen.setdefault(int(label), reason)

    def frozen(self) -> dict[int, str]:
        """Returns representative → reason for every protected channel."""
        result: dict[int, str] = {}
        for label, reason in self._frozen.items():
            result.setdefault(int(self._parent[label]), reason)
        return result

    def bind(self, tensor: str, dim: int, role: Role, labels: Labels, where: str) -> None:
        """Says that ``labels`` stand along dimension ``dim`` of ``tensor``; a second binding merges with the first."""
        entry = self.entries.get((tensor, dim))
        if entry is None:
            self.entries[tensor, dim] = Entry(role, labels.copy())
        else:
            entry.also_reads |= role is Role.CONSUMER and entry.role is not Role.CONSUMER
            self.merge(entry.labels, labels, f"'{tensor}' is used with different channels (last in {where})")

    def written(self, tensor: str, dim: int, size: int, role: Role = Role.WRITER) -> Labels:
        """Returns the labels of a dimension that makes channels of its own, fresh ones at the first use."""
        entry = self.entries.get((tensor, dim))
        if entry is None:
            entry = self.entries[tensor, dim] = Entry(role, self.new(size))
        elif role is Role.WRITER and entry.role is Role.CONSUMER:
            entry.role, entry.also_reads = Role.WRITER, True
        return entry.labels

    def _compress(self) -> None:
        while True:
            shorter = self._parent[self._parent]
            if np.array_equal(shorter, self._parent):
                return
            self._parent = shorter
