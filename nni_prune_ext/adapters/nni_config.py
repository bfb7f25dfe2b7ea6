"""Checks of an NNI ``config_list`` before anything is wrapped: what NNI accepts in silence is an error with a name.

What NNI's own schema refuses comes through as NNI's error, unchanged.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any, cast

import torch
from nni.compression.base.compressor import register_scalers
from nni.compression.base.config import default_config_schema, select_modules_by_config, trans_legacy_config_list
from nni.compression.base.setting import INPUT_PREFIX, OUTPUT_PREFIX, PruningSetting
from nni.compression.base.target_space import TargetType
from torch import Tensor, nn

from nni_prune_ext.adapters.nni_targets import turn_transposed
from nni_prune_ext.errors import ConfigListError

_logger = logging.getLogger(__name__)

Entry = dict[str, Any]  # what the user writes; the schema and the checks below say what may be in it
Shape = tuple[int, ...]
_ACTIVE = ("sparse_ratio", "sparse_threshold")
_GRANULARITY = "out_channel"


@dataclass(frozen=True, eq=False)
class ConfiguredTarget:
    """One tensor that an entry configures, with its settings as NNI completes them."""

    module: str
    target: str
    entry: int
    setting: Mapping[str, Any]
    layer: nn.Module

    @property
    def shape(self) -> Shape | None:
        """The shape of the parameter; ``None`` for an input, an output, or a parameter that the layer goes without."""
        parameter = getattr(self.layer, self.target, None)
        return tuple(parameter.shape) if isinstance(parameter, Tensor) else None

    @property
    def outside(self) -> bool:
        """Says whether the target is an input or an output."""
        return self.target.startswith((INPUT_PREFIX, OUTPUT_PREFIX))

    @property
    def active(self) -> bool:
        """Says whether the target is pruned by itself, not along with another one."""
        return any(self.setting.get(key) is not None for key in _ACTIVE)

    def __str__(self) -> str:
        """Returns the place as an error message names it."""
        return f"'{self.target}' of '{self.module}' (entry {self.entry})"


@dataclass(frozen=True)
class _Pattern:
    """What is made of the settings of a parameter.

    Attributes:
        scaler: NNI's ``Scaling``; ``None`` where every element counts.
        metric: the shape of its scores.
        mask: the shape of its mask, 1 where a mask is the same all along a dimension.
        dims: the dimensions of its source that it follows.
    """

    scaler: Any
    metric: Shape
    mask: Shape
    dims: tuple[int, ...]


def check_config_list(
    model: nn.Module, config_list: Sequence[Entry], granularity: str | None = _GRANULARITY
) -> tuple[ConfiguredTarget, ...]:
    """Checks a config_list against a model that is not wrapped; nothing is changed.

    Args:
        model: the model to prune.
        config_list: NNI's.
        granularity: what the pruner takes for NNI's ``default``; ``None`` for single elements.

    Returns:
        every configured target, by entry and name.

    Raises:
        ConfigListError: an entry selects nothing, is out of range, or contradicts itself or another entry.
        schema.SchemaError: it is not of NNI's form.
    """
    targets: list[ConfiguredTarget] = []
    for number, name, module, settings in selected_modules(model, config_list):
        targets += _module_targets(number, name, module, settings)
    patterns = _check_each(targets, granularity)
    _check_together(targets, patterns)
    return tuple(targets)


def selected_modules(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]]
) -> list[tuple[int, str, nn.Module, Entry]]:
    """Returns number of the entry, name, module and settings of everything that a config_list selects.

    Raises:
        ConfigListError: it is no list of dicts, or an entry names or selects nothing; or the model is still wrapped.
        schema.SchemaError: it is not of NNI's form.
    """
    if (
        not isinstance(config_list, (list, tuple))
        or not config_list
        or not all(isinstance(e, dict) for e in config_list)
    ):
        raise ConfigListError(
            f"The config_list is {_short(config_list)}, expected a list of at least one dict such as {{'op_types': "
            "['Conv2d'], 'sparse_ratio': 0.5}. See docs/how-to/migrate_from_nni.md."
        )
    wrapped = next((name for name, module in model.named_modules() if hasattr(module, "_nni_wrapper")), None)
    if wrapped is not None:
        raise ConfigListError(
            f"'{wrapped}' is still wrapped by another pruner, expected a plain model. Call that pruner's "
            "unwrap_model() first, or make this one with from_compressor."
        )
    entries = cast("list[Entry]", trans_legacy_config_list([dict(entry) for entry in copy.deepcopy(config_list)]))
    schema = default_config_schema("pruning")
    found: list[tuple[int, str, nn.Module, Entry]] = []
    for number, entry in enumerate(entries):
        schema.validate(entry)
        _check_names(model, number, entry)
        selected, settings, _ = select_modules_by_config(model, entry)
        if not selected and "exclude" not in config_list[number]:  # NNI turns its exclusions of version 2 into entries
            raise ConfigListError(
                f"Entry {number} of the config_list, {_short(entry)}, selects no module of {type(model).__name__}, "
                "expected at least one. Widen op_types, op_names or op_names_re, or exclude less."
            )
        found += [(number, name, selected[name], settings) for name in sorted(selected)]
    return found


def _check_names(model: nn.Module, number: int, entry: Entry) -> None:
    """Refuses names, types and patterns that nothing in the model has: a slip would prune nothing.

    What is excluded is only told: one config_list may serve several models, but a slip there prunes what was to stay.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    types = {type(module).__name__ for module in modules.values()}
    known: dict[str, Iterable[str]] = {
        "op_names": modules.keys(),
        "exclude_op_names": modules.keys(),
        "op_types": types,
        "exclude_op_types": types,
    }
    for key, names in known.items():
        elsewhere = PruningSetting.registry if key.endswith("types") else ()  # a kind that this model happens to lack
        for name in entry.get(key) or ():
            if name in names or name in elsewhere:
                continue
            close = get_close_matches(name, list(names), n=3)
            hint = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else f"there are {_some(names)}."
            said = (
                f"Entry {number} of the config_list names '{name}' in {key}, which {type(model).__name__} does not "
                f"have; {hint} Name modules as model.named_modules() does, types by their class name."
            )
            if not key.startswith("exclude"):
                raise ConfigListError(said)
            _logger.warning("%s", said)
    for key in ("op_names_re", "exclude_op_names_re"):
        for pattern in entry.get(key) or ():
            missing = _unmatched(f"The pattern '{pattern}' in {key} of entry {number}", pattern, model, modules)
            if missing and not key.startswith("exclude"):
                raise ConfigListError(missing)
            if missing:
                _logger.warning("%s", missing)


def _unmatched(place: str, pattern: str, model: nn.Module, names: Iterable[str]) -> str | None:
    """Returns what is to be said of a pattern that matches nothing.

    Raises:
        ConfigListError: it is no regular expression.
    """
    try:
        found = any(re.match(pattern, name) for name in names)
    except re.error as error:
        raise ConfigListError(
            f"{place} is no regular expression ({error}), expected one as Python's re has them, such as 'layer1[.].*'. "
            "Write a plain name into op_names or exclude_op_names."
        ) from error
    if found:
        return None
    return (
        f"{place} matches no module of {type(model).__name__}, expected at least one. It is matched from the "
        "beginning of "
        "the name. Correct it, or leave it out."
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
    return [ConfiguredTarget(name, target, number, setting, module) for target, setting in found.items()]


def _check_each(targets: Sequence[ConfiguredTarget], granularity: str | None) -> dict[ConfiguredTarget, _Pattern]:
    """Checks every target alone; returns what is masked of each parameter."""
    patterns = {}
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
        if place.active and place.outside:
            raise ConfigListError(
                f"{place} is to be pruned by itself, expected a parameter: inputs and outputs have no values of their "
                "own to score. Give it an 'align' with the weight of a layer instead."
            )
        if not place.active and setting.get("align") is None:
            raise ConfigListError(
                f"{place} has neither sparse_ratio nor sparse_threshold nor align, expected one of them. Add a ratio, "
                "or leave the target out of target_names."
            )
        if not place.outside and not isinstance(getattr(place.layer, place.target, 0), (Tensor, type(None))):
            raise ConfigListError(
                f"{place} is no parameter of this {type(place.layer).__name__}, expected one of "
                f"{_some(place.layer._parameters)}. Correct target_names and target_settings."
            )
        if place.shape is not None:
            patterns[place] = _pattern(place, granularity)
    return patterns


def _pattern(place: ConfiguredTarget, default: str | None) -> _Pattern:
    """Makes of the settings, on a tensor without values, what the pruners make of them on the wrapped layer."""
    assert place.shape is not None
    granularity, values = place.setting.get("granularity"), torch.empty(place.shape, device="meta")
    space = SimpleNamespace(
        granularity=granularity,
        _target_type=TargetType.PARAMETER,
        _scaler=None,
        _setting=dict(place.setting),
        _wrapper=SimpleNamespace(module=place.layer),
    )
    spaces = cast("Any", {place.module: {place.target: space}})
    try:
        register_scalers(spaces, lambda _: default)
        turn_transposed(spaces)
        dims = tuple((space._setting.get("align") or {"dims": ()})["dims"])
        if space._scaler is None:
            return _Pattern(None, place.shape, place.shape, dims)
        metric = space._scaler.shrink(values, keepdim=True)
        mask = space._scaler.expand(metric, list(place.shape), keepdim=True, full_expand=False)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigListError(
            f"The granularity {granularity!r} of {place}, of shape {_sizes(place.shape)}, does not fit; expected "
            "'out_channel' (dimension 0), 'in_channel' (dimension 1), or a list with one step per dimension that "
            "divides its size, -1 for all of it. Change the granularity, or exclude the layer."
        ) from error
    return _Pattern(space._scaler, tuple(metric.shape), tuple(mask.shape), dims)


def _check_together(targets: Sequence[ConfiguredTarget], patterns: Mapping[ConfiguredTarget, _Pattern]) -> None:
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
        if place in patterns and source in patterns:
            _check_alignment(place, patterns[place], source, patterns[source].mask)
    for key in ("dependency_group_id", "global_group_id"):
        members = [place for place in targets if place.active and place.setting.get(key) is not None]
        _check_groups(key, members)
        if key == "dependency_group_id":
            _check_fusion([place for place in members if place in patterns], patterns)


def _check_alignment(place: ConfiguredTarget, pattern: _Pattern, source: ConfiguredTarget, mask: Shape) -> None:
    """Refuses a target that does not have as many values as the mask that it follows."""
    sizes = [mask[dim] for dim in sorted({dim % len(mask) for dim in pattern.dims if -len(mask) <= dim < len(mask)})]
    taken = torch.empty(sizes, device="meta")
    try:
        if pattern.scaler is not None:
            taken = pattern.scaler.expand(taken, list(place.shape or ()))
        taken.expand(place.shape or ())
    except (AssertionError, IndexError, RuntimeError) as error:
        raise ConfigListError(
            f"{place}, of shape {_sizes(place.shape or ())}, cannot take the mask of {source}, which has "
            f"{_sizes(sizes)} values along the dims of the alignment; expected as many as the target. Align it with "
            "another layer or dimension, or leave it out of target_names."
        ) from error


def _check_groups(key: str, members: Sequence[ConfiguredTarget]) -> None:
    first: dict[object, ConfiguredTarget] = {}
    for place in members:
        other = first.setdefault(place.setting[key], place)
        ratio, expected = place.setting.get("sparse_ratio"), other.setting.get("sparse_ratio")
        if ratio is None:
            raise ConfigListError(
                f"{place} has the {key} {place.setting[key]!r} and a sparse_threshold, which cannot be shared; "
                f"expected a sparse_ratio in a group. Give a ratio, or leave the {key} out."
            )
        if ratio != expected:
            raise ConfigListError(
                f"{place} has the sparse_ratio {ratio:g}, but {other}, of the same {key} {place.setting[key]!r}, has "
                f"{expected:g}; expected one ratio for the group. Set them alike, or use two groups."
            )


def _check_fusion(members: Sequence[ConfiguredTarget], patterns: Mapping[ConfiguredTarget, _Pattern]) -> None:
    """Refuses dependency groups whose scores cannot be averaged, or not be divided into their blocks."""
    groups: dict[object, list[ConfiguredTarget]] = {}
    for place in members:
        groups.setdefault(place.setting["dependency_group_id"], []).append(place)
    for number, group in groups.items():
        first = patterns[group[0]].metric
        for place in group:
            if patterns[place].metric != first:
                raise ConfigListError(
                    f"{place} is masked in {_sizes(patterns[place].metric)} parts, but {group[0]}, of the same "
                    f"dependency_group_id {number!r}, in {_sizes(first)}; expected layers of one kind, width and "
                    "granularity. Use two groups, or leave the id out."
                )
        blocks = math.lcm(*(place.setting.get("internal_metric_block") or 1 for place in group))
        if math.prod(first) % blocks:
            raise ConfigListError(
                f"The internal_metric_block of the dependency_group_id {number!r} ({group[0]} and {len(group) - 1} "
                f"more) is {blocks}, expected a divisor of its {math.prod(first)} parts. Correct it: it is the number "
                "of groups of a convolution."
            )


def _sizes(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "no"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _some(names: Iterable[str]) -> str:
    found = [repr(name) for name in names if name]
    return ", ".join([*found[:6], "…"] if len(found) > 6 else found) or "none"
