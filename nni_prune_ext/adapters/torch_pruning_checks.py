"""Arguments of torch-pruning's pruner that it would ignore, misread or share between models."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch_pruning as tp
from torch import nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.specs import did_you_mean

_FRESH = ("in_channel_groups", "out_channel_groups", "num_heads")
"""Dicts that torch-pruning fills; its defaults are one object for all pruners of a process."""


def check_arguments(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments for ``tp.pruner.BasePruner`` with dicts and lists of its own.

    Raises:
        ConfigError: an argument that would be ignored or misread in silence, or crash later.
    """
    known = list(inspect.signature(tp.pruner.BasePruner.__init__).parameters)[4:]
    for key in arguments:
        if key not in known:
            raise ConfigError(
                f"CertifiedPruner was given '{key}', expected keyword arguments of tp.pruner.BasePruner."
                f"{did_you_mean(key, known)} They are: {', '.join(known)}."
            )
    result = dict(arguments)
    for key in _FRESH:
        result[key] = dict(arguments.get(key) or {})
    _check_amount(arguments.get("pruning_ratio", 0.5), arguments.get("iterative_steps", 1))
    _check_ignored(model, arguments.get("ignored_layers"))
    _check_unwrapped(arguments.get("unwrapped_parameters"))
    _check_customized(arguments.get("customized_pruners"))
    if arguments.get("unwrapped_parameters"):
        result["unwrapped_parameters"] = list(arguments["unwrapped_parameters"])
    if arguments.get("isomorphic") and not arguments.get("global_pruning"):
        raise ConfigError(
            "isomorphic=True was given without global_pruning=True, expected both: torch-pruning 1.6 mixes up layers "
            "of different widths otherwise. Set global_pruning=True."
        )
    if arguments.get("prune_num_heads"):
        raise ConfigError(
            "prune_num_heads=True was given, expected False: removing whole heads has no certificate here. Prune the "
            "width of the heads (prune_head_dims=True, the default)."
        )
    for key in ("channel_groups", "ch_sparsity", "ch_sparsity_dict"):
        if arguments.get(key):
            raise ConfigError(
                f"{key} was given, which torch-pruning has deprecated. Use out_channel_groups, pruning_ratio or "
                "pruning_ratio_dict."
            )
    return result


def _check_amount(ratio: float, steps: int) -> None:
    if not 0 <= ratio <= 1 or steps < 1:
        raise ConfigError(
            f"pruning_ratio={ratio} in iterative_steps={steps} was asked for, expected a ratio of 0 to 1 and at "
            "least one step. A ratio is a share of each layer's channels, 0.5 is half."
        )


def _check_ignored(model: nn.Module, ignored: Iterable[object] | None) -> None:
    own = {id(part) for part in (*model.modules(), *model.parameters())}
    for layer in ignored or ():
        if not isinstance(layer, (nn.Module, nn.Parameter)):
            seen = f"the type {layer.__name__}" if isinstance(layer, type) else f"a {type(layer).__name__}"
            raise ConfigError(
                f"ignored_layers holds {seen}, expected layers or parameters of the model: torch-pruning 1.6 passes "
                "over anything else in silence. Write [m for m in model.modules() if isinstance(m, ...)]."
            )
        if id(layer) not in own:
            raise ConfigError(
                f"ignored_layers holds a {type(layer).__name__} that is not of this {type(model).__name__}, expected "
                "its own: torch-pruning 1.6 would prune the layer that was meant. Take it from the model that is "
                "given, not from a copy."
            )


def _check_unwrapped(unwrapped: object) -> None:
    if isinstance(unwrapped, Mapping):
        raise ConfigError(
            "unwrapped_parameters is a dict, expected a list of (parameter, dimension): torch-pruning 1.6 documents "
            "the one and takes the other. Write list(unwrapped_parameters.items())."
        )


def _check_customized(customized: Mapping[object, object] | None) -> None:
    for key in customized or {}:
        if isinstance(key, nn.Module):
            raise ConfigError(
                f"customized_pruners has a layer, a {type(key).__name__}, as key, expected a class: torch-pruning 1.6 "
                "fails on the former. Give the layer a class of its own and name that."
            )
