"""Checks of an NNI ``config_list`` before anything is wrapped: what NNI accepts in silence is an error with a name.

What NNI's own schema refuses comes through as NNI's error, unchanged.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast

from nni.compression.base.config import default_config_schema, select_modules_by_config, trans_legacy_config_list
from nni.compression.base.setting import INPUT_PREFIX, OUTPUT_PREFIX, PruningSetting
from torch import nn

from nni_prune_ext.errors import ConfigListError

Entry = dict[str, Any]  # what the user writes; the schema and the checks below say what may be in it
_ACTIVE = ("sparse_ratio", "sparse_threshold")


@dataclass(frozen=True)
class ConfiguredTarget:
    """One tensor that an entry configures, with its settings as NNI completes them."""

    module: str
    target: str
    entry: int
    setting: Mapping[str, Any]

    @property
    def active(self) -> bool:
        """Says whether the target is pruned by itself, not along with another one."""
        return any(self.setting.get(key) is not None for key in _ACTIVE)

    def __str__(self) -> str:
        """Returns the place as an error message names it."""
        return f"'{self.target}' of '{self.module}' (entry {self.entry})"


def check_config_list(model: nn.Module, config_list: Sequence[Entry]) -> tuple[ConfiguredTarget, ...]:
    """Checks a config_list against a model that is not wrapped; nothing is changed.

    Returns:
        every configured target, by entry and name.

    Raises:
        ConfigListError: an entry selects nothing, is out of range, or contradicts itself or another entry.
        schema.SchemaError: it is not of NNI's form.
    """
    if (
        not isinstance(config_list, (list, tuple))
        or not config_list
        or not all(isinstance(e, dict) for e in config_list)
    ):
        raise ConfigListError(
            f"The config_list is {_short(config_list)}, expected a list of at least one dict such as "
            "{'op_types': ['Conv2d'], 'sparse_ratio': 0.5}. See docs/how-to/migrate_from_nni.md."
        )
    wrapped = next((name for name, module in model.named_modules() if hasattr(module, "_nni_wrapper")), None)
    if wrapped is not None:
        raise ConfigListError(
            f"'{wrapped}' is still wrapped by another pruner, expected a plain model. Call that pruner's "
            "unwrap_model() "
            "first, or make this one with from_compressor."
        )
    entries = cast("list[Entry]", trans_legacy_config_list(copy.deepcopy(list(config_list))))
    schema = default_config_schema("pruning")
    targets: list[ConfiguredTarget] = []
    for number, entry in enumerate(entries):
        schema.validate(entry)
        _check_names(model, number, entry)
        selected, settings, _ = select_modules_by_config(model, entry)
        if not selected:
            raise ConfigListError(
                f"Entry {number} of the config_list, {_short(entry)}, selects no module of {type(model).__name__}, "
                "expected at least one. Widen op_types, op_names or op_names_re, or exclude less."
            )
        for name in sorted(selected):
            targets += _module_targets(number, name, selected[name], settings)
    _check_each(targets)
    _check_together(targets)
    return tuple(targets)


def _check_names(model: nn.Module, number: int, entry: Entry) -> None:
    """Refuses names, types and patterns that nothing in the model has: a slip would prune, or spare, nothing."""
    modules = dict(model.named_modules(remove_duplicate=False))
    types = {type(module).__name__ for module in modules.values()}
    known = {"op_names": modules.keys(), "exclude_op_names": modules.keys(), "op_types": types}
    for key, names in known.items():
        for name in entry.get(key) or ():
            if name not in names:
                close = get_close_matches(name, list(names), n=3)
                hint = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else f"there are {_some(names)}."
                raise ConfigListError(
                    f"Entry {number} of the config_list names '{name}' in {key}, which {type(model).__name__} does not "
                    f"have; {hint} Name modules as model.named_modules() does, types by their class name."
                )
    for pattern in entry.get("op_names_re") or ():
        if not any(re.match(pattern, name) for name in modules):
            raise ConfigListError(
                f"The pattern '{pattern}' in op_names_re of entry {number} matches no module of "
                f"{type(model).__name__}, expected at least one. It is matched from the beginning of the name."
            )


def _module_targets(number: int, name: str, module: nn.Module, settings: Entry) -> list[ConfiguredTarget]:
    kind = type(module).__name__
    if kind not in PruningSetting.registry:
        raise ConfigListError(
            f"Entry {number} of the config_list selects '{name}', a {kind}, which NNI cannot prune by itself; expected "
            f"one of {', '.join(PruningSetting.registry)}. Exclude it, or register it with "
            "nni.compression.base.setting.PruningSetting.register()."
        )
    try:
        found = PruningSetting.get(module, settings)
    except KeyError as error:
        raise ConfigListError(
            f"Entry {number} of the config_list names the target {error} of '{name}', a {kind}, without settings for "
            f"it; expected one of {', '.join(PruningSetting.registry[kind])}. Add it to target_settings."
        ) from error
    return [ConfiguredTarget(name, target, number, setting) for target, setting in found.items()]


def _check_each(targets: Sequence[ConfiguredTarget]) -> None:
    for place in targets:
        setting = place.setting
        ratio, least, most = (setting.get(key) for key in ("sparse_ratio", "min_sparse_ratio", "max_sparse_ratio"))
        if ratio is not None and not 0 <= ratio <= 1:
            raise ConfigListError(
                f"The sparse_ratio of {place} is {ratio:g}, expected 0 to 1: the share that is removed. Correct it."
            )
        if least is not None and most is not None and least > most:
            raise ConfigListError(
                f"The min_sparse_ratio of {place} is {least:g}, above its max_sparse_ratio {most:g}. Exchange them."
            )
        outside = place.target.startswith((INPUT_PREFIX, OUTPUT_PREFIX))
        if place.active and outside:
            raise ConfigListError(
                f"{place} is to be pruned by itself, expected a parameter: inputs and outputs have no values of their "
                "own to score. Give it an 'align' with the weight of a layer instead."
            )
        if not place.active and setting.get("align") is None:
            raise ConfigListError(
                f"{place} has neither sparse_ratio nor sparse_threshold nor align, expected one of them. Add a ratio, "
                "or leave the target out of target_names."
            )


def _check_together(targets: Sequence[ConfiguredTarget]) -> None:
    seen: dict[tuple[str, str], ConfiguredTarget] = {}
    for place in targets:
        earlier = seen.setdefault((place.module, place.target), place)
        if earlier is not place:
            raise ConfigListError(
                f"{place} is configured in entry {earlier.entry} as well, expected once: NNI would ignore the later "
                "one. Exclude it from one of the two (exclude_op_names)."
            )
    for place in targets:
        align = place.setting.get("align")
        if align is None:
            continue
        source = seen.get((align["module_name"] or place.module, align["target_name"]))
        if source is None or not source.active:
            raise ConfigListError(
                f"{place} is aligned with '{align['target_name']}' of '{align['module_name'] or place.module}', which "
                "no entry prunes. Prune it, or leave the aligned target out."
            )
    for key in ("dependency_group_id", "global_group_id"):
        _check_groups(key, [place for place in targets if place.active and place.setting.get(key) is not None])


def _check_groups(key: str, members: Sequence[ConfiguredTarget]) -> None:
    first: dict[object, ConfiguredTarget] = {}
    for place in members:
        other = first.setdefault(place.setting[key], place)
        ratio, expected = place.setting.get("sparse_ratio"), other.setting.get("sparse_ratio")
        if ratio is None or ratio != expected:
            raise ConfigListError(
                f"{place} has the sparse_ratio {ratio}, but {other}, of the same {key} {place.setting[key]!r}, has "
                f"{expected}; expected one ratio for the group. Set them alike, or use two groups."
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _some(names: object) -> str:
    found = [repr(name) for name in cast("Sequence[str]", list(cast("Any", names))) if name][:6]
    return f"{', '.join(found)}, …" if found else "none"
