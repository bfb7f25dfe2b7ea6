"""What the granularities of a config_list ask a method for: channels, blocks of weights, or single weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from nni.compression.pruning.tools import fpgm_metrics, norm_metrics

from nni_prune_ext.adapters.nni_config import ConfiguredTarget
from nni_prune_ext.adapters.nni_targets import Masks, is_finer_than_channels
from nni_prune_ext.errors import ConfigError, ConfigListError
from nni_prune_ext.methods.base import MethodSpec, Unit

BLOCK_METRICS: Mapping[str, Callable[..., Masks]] = {
    "l1": lambda data, spaces: cast("Masks", norm_metrics(p=1, data=data, target_spaces=spaces)),
    "l2": lambda data, spaces: cast("Masks", norm_metrics(p=2, data=data, target_spaces=spaces)),
    "fpgm": lambda data, spaces: cast("Masks", fpgm_metrics(p=2, data=data, target_spaces=spaces)),
}
"""The criteria that are defined on any block of weights, not only on channels: NNI's own measure of them."""


def asked_unit(method: MethodSpec, targets: Sequence[ConfiguredTarget]) -> Unit:
    """Returns what a config_list asks a method for: to remove channels, or to mask single weights.

    Single weights are a granularity of ones, ``[1, 1, 1, 1]`` for a convolution and ``[1, 1]`` for a linear layer.
    Blocks count as channels where the method can measure them: its scores then decide.

    Raises:
        ConfigError: the method cannot prune so finely.
        ConfigListError: blocks, channels and single weights together, or settings that single weights do not have.
    """
    active = [place for place in targets if place.active]
    fine = [place for place in active if is_finer_than_channels(place.setting.get("granularity"))]
    if not fine or method.name in BLOCK_METRICS:
        return "channel"
    if "weight_masks" not in method.products:
        does = "decides over" if method.scores is None else "scores"
        raise ConfigError(
            f"The granularity {fine[0].setting['granularity']!r} of {fine[0]} is finer than channels, but the method "
            f"'{method.name}' {does} channels. Expected 'out_channel' or 'in_channel'; or use LevelPruner, "
            "L1NormPruner, L2NormPruner or FPGMPruner."
        )
    _check_single_weights(method, fine, [place for place in active if place not in fine])
    return "weight"


def _check_single_weights(
    method: MethodSpec, fine: Sequence[ConfiguredTarget], coarse: Sequence[ConfiguredTarget]
) -> None:
    for place in fine:
        if any(step != 1 for step in place.setting["granularity"]):
            raise ConfigListError(
                f"The granularity {place.setting['granularity']!r} of {place} is a block of weights, but the method "
                f"'{method.name}' removes channels or masks single weights. Expected 'out_channel', or a 1 for every "
                f"dimension: {[1] * len(place.shape or ())}."
            )
        if place.setting.get("sparse_ratio") is None or place.setting.get("dependency_group_id") is not None:
            key = "sparse_threshold" if place.setting.get("sparse_ratio") is None else "dependency_group_id"
            raise ConfigListError(
                f"{place} has the {key} {place.setting[key]!r}, but the method '{method.name}' masks an exact number "
                "of single weights of each tensor. Expected a sparse_ratio, and a global_group_id if one threshold is "
                f"to hold for several layers. Leave the {key} out."
            )
    if coarse:
        raise ConfigListError(
            f"{coarse[0]} is to lose channels and {fine[0]} single weights, but the method '{method.name}' decides "
            "over one of the two in a run. Expected one granularity for all. Prune in two runs: channels first, then "
            "single weights of the smaller network."
        )
