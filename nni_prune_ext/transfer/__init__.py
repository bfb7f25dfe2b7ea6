"""A pruned network on another task: as the backbone of a detector, or as a classifier of other classes; compared."""

from nni_prune_ext.transfer.backbones import FeatureBackbone, feature_backbone
from nni_prune_ext.transfer.comparison import transfer_networks
from nni_prune_ext.transfer.heads import HEADS, classifier, detector
from nni_prune_ext.transfer.results import TransferReport, TransferRow

__all__ = [
    "HEADS",
    "FeatureBackbone",
    "TransferReport",
    "TransferRow",
    "classifier",
    "detector",
    "feature_backbone",
    "transfer_networks",
]
