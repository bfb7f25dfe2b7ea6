"""The face for hosts: helpers for NNI's config lists, and what else users import from NNI's module of this name."""

from __future__ import annotations

from nni_prune_ext.adapters.nni_dependency import (
    Scaling,
    align_batchnorm,
    auto_set_dependency_group_ids,
    check_ddp_model,
    get_nested_attr,
    has_nested_attr,
    reset_ddp_model,
    set_nested_attr,
)

auto_set_denpendency_group_ids = auto_set_dependency_group_ids
"""The name as NNI spells it."""

__all__ = [
    "Scaling",
    "align_batchnorm",
    "auto_set_denpendency_group_ids",
    "auto_set_dependency_group_ids",
    "check_ddp_model",
    "get_nested_attr",
    "has_nested_attr",
    "reset_ddp_model",
    "set_nested_attr",
]
