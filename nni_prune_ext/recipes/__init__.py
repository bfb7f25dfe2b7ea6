"""Recipes: a whole job in one YAML file, checked before any work; a mistake is named with its key and its line."""

from __future__ import annotations

from nni_prune_ext.recipes.checks import checked_recipe, load_recipe, method_epochs, recipe_from
from nni_prune_ext.recipes.recipe import (
    DataSection,
    MeasureSection,
    ModelSection,
    Recipe,
    RecoverySection,
    TrainSection,
    all_keys,
)
from nni_prune_ext.recipes.yaml_files import KeyPath, Origins, override, read_yaml

__all__ = [
    "DataSection",
    "KeyPath",
    "MeasureSection",
    "ModelSection",
    "Origins",
    "Recipe",
    "RecoverySection",
    "TrainSection",
    "all_keys",
    "checked_recipe",
    "load_recipe",
    "method_epochs",
    "override",
    "read_yaml",
    "recipe_from",
]
