"""Data sources by name: digits, CIFAR-10, image folders and the user's own; and seeded batches of them."""

from __future__ import annotations

from nni_prune_ext.data.image_arrays import DataSource, ImageArrays
from nni_prune_ext.data.loaders import Loaders

__all__ = ["DataSource", "ImageArrays", "Loaders"]
