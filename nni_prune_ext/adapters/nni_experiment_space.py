"""What NNI samples, and what it means: search spaces made from methods' options, and trials turned into recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import cast

import yaml
from pydantic import JsonValue

from nni_prune_ext.allocation import parse_targets
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.options import Range, SearchEntry, options_from_trial, search_space
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.recipes import Origins, Recipe, recipe_from

NAME, BUDGET, EPOCHS = "_name", "TRIAL_BUDGET", "recovery.epochs"
"""Keys of NNI: the name of a nested choice; what Hyperband and BOHB want spent on a trial, here epochs of recovery."""
TYPES = {
    "choice": None,
    "randint": 2,
    "uniform": 2,
    "quniform": 3,
    "loguniform": 2,
    "qloguniform": 3,
    "normal": 2,
    "qnormal": 3,
    "lognormal": 2,
    "qlognormal": 3,
}
"""NNI's types of search entries, and how many numbers each takes."""


def search_space_for(
    methods: Sequence[str],
    targets: Sequence[str] = (),
    *,
    tune: Mapping[str, Range | None] | None = None,
    epochs: Sequence[int] = (),
    settings: Mapping[str, Sequence[JsonValue]] | None = None,
) -> dict[str, SearchEntry]:
    """Returns a search space of NNI over methods, each with options of its own, targets and epochs of recovery.

    Args:
        methods: registered methods, or ``module.path:SPEC``; the recipe's own if there is none.
        targets: for example ``macs=0.5``; each trial gets one of them, or the recipe's own if there is none.
        tune: options of methods to search, each with the range to search, or ``None`` for its own; a method that has
            no such option goes without. Nothing is tuned by default.
        epochs: epochs of recovery to choose from; the recipe's own by default.
        settings: dotted key of a recipe → values to choose from.

    Raises:
        ConfigError: nothing to choose from, an option that no method has, or one without a range.
        TargetError, UnknownPluginError, PluginError: a target or method that there is not.

    Example:
        >>> search_space_for(["l1"], ["macs=0.5", "macs=0.7"])["target"]
        {'_type': 'choice', '_value': ['macs=0.5', 'macs=0.7']}
    """
    if not methods and not targets and not epochs and not settings:
        raise ConfigError("There is nothing to choose from, expected a method or a target at least. Name several.")
    for target in targets:  # each is a choice; they need not fit together
        parse_targets(target)
    specs, wanted = {name: method_spec(name) for name in methods}, dict(tune or {})
    known = list(dict.fromkeys(option for spec in specs.values() for option in spec.options.model_fields))
    for name in wanted:
        if name not in known:
            close = get_close_matches(name, known, n=2) or known
            raise ConfigError(
                f"None of the methods {', '.join(methods) or '(none)'} has the option '{name}', expected one. "
                f"There are: {', '.join(close) or 'none'}."
            )
    nested: list[JsonValue] = []
    for name, spec in specs.items():
        own = {key: found for key, found in wanted.items() if key in spec.options.model_fields}
        ranges = {key: found for key, found in own.items() if found is not None}
        nested.append(cast("JsonValue", {NAME: name, **search_space(spec, list(own), ranges=ranges)}))
    space: dict[str, SearchEntry] = {}
    if nested:
        space["method"] = _choice(nested)
    if targets:
        space["target"] = _choice(list(dict.fromkeys(targets)))
    if epochs:
        space[EPOCHS] = _choice(list(dict.fromkeys(epochs)))
    for key, values in (settings or {}).items():
        space[key] = _choice(values)
    return space


def _choice(values: Sequence[JsonValue]) -> SearchEntry:
    return {"_type": "choice", "_value": list(values)}


def checked_space(space: Mapping[str, object], base: Recipe) -> list[Recipe]:
    """Makes sure that a search space is one of NNI's, and that every choice in it makes a recipe; returns these.

    Each choice is tried once, among the first values of all other entries.

    Raises:
        ConfigError: an entry is not of NNI's form.
        RecipeError: what would be sampled does not make a recipe.
    """
    if not space:
        raise ConfigError("The search space is empty, expected at least one entry. Add for example a method.")
    choices = {key: list(_samples(key, entry)) for key, entry in space.items()}
    first = {key: values[0] for key, values in choices.items() if values}
    return [trial_recipe(base, {**first, key: value}) for key, values in choices.items() for value in values]


def _samples(key: str, entry: object) -> Iterator[JsonValue]:
    """Yields every choice of an entry, or one number within its range."""
    kind, values = _read_entry(key, entry)
    if kind != "choice":
        low = cast("float", values[0])
        if kind.endswith("normal"):  # the mean, of the logarithm for lognormal
            return
        yield low
        return
    for value in values:
        if not isinstance(value, Mapping):
            yield cast("JsonValue", value)
            continue
        inner = {name: list(_samples(f"{key}.{name}", found)) for name, found in value.items() if name != NAME}
        yield {NAME: value.get(NAME), **{name: found[0] for name, found in inner.items() if found}}


def _read_entry(key: str, entry: object) -> tuple[str, Sequence[object]]:
    found = entry if isinstance(entry, Mapping) else {}
    kind, values = str(found.get("_type")), found.get("_value")
    count = TYPES.get(kind)
    if kind not in TYPES or not isinstance(values, list) or not values or (count and len(values) != count):
        expected = f"{count} numbers" if count else "values to choose from"
        raise ConfigError(
            f"The entry '{key}' of the search space is {entry!r}, expected "
            + (f"'_value' to list {expected}" if kind in TYPES else f"'_type' to be one of {', '.join(TYPES)}")
            + ". Write for example {'_type': 'choice', '_value': [1, 2]}."
        )
    return kind, values


def trial_recipe(base: Recipe, parameters: Mapping[str, object]) -> Recipe:
    """Returns the recipe of one trial: the base with what NNI sampled, checked.

    ``method`` is a name, or a nested choice with the method's options beside ``_name``; ``schedule`` is that option of
    the method; every other key is a dotted key of a recipe. A nested choice under such a key sets further keys.

    Raises:
        ConfigError: an option of the method is unknown or out of range.
        RecipeError: a key or value is none of a recipe's.
    """
    given = dict(_flattened(parameters))
    values = cast("dict[str, object]", yaml.safe_load(base.to_yaml()))
    origins = Origins("trial")
    if "method" in given:
        method = str(given.pop("method"))
        if method != base.method:  # options of another method do not apply
            values["options"] = {}
        values["method"] = method
        origins.places[("method",)] = "trial"
    options = {key.partition(".")[2]: given.pop(key) for key in list(given) if key.startswith("options.")}
    if options:
        spec = method_spec(str(values.get("method")))
        values["options"] = {
            **cast("dict[str, object]", values.get("options") or {}),
            **options_from_trial(spec, options).model_dump(mode="json", include=set(options)),
        }
    for key, value in given.items():
        path = tuple(key.split("."))
        _set(values, path, value)
        origins.places[tuple(path)] = "trial"
    return recipe_from(values, origins=origins)


def _flattened(parameters: Mapping[str, object], *, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields dotted keys of a recipe with plain values."""
    for key, value in parameters.items():
        name = prefix + key if prefix else {BUDGET: EPOCHS, "schedule": "options.schedule"}.get(key, key)
        if isinstance(value, Mapping) and NAME in value:
            inner = {other: found for other, found in value.items() if other != NAME}
            yield name, value[NAME]
            yield from _flattened(inner, prefix="options." if key == "method" else "")
        else:
            yield name, _plain(value)


def _plain(value: object) -> object:
    """Returns a whole number for one that NNI rounded, and so hands over as a float; every number key takes those."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _set(values: dict[str, object], path: Sequence[str], value: object) -> None:
    section = values
    for part in path[:-1]:
        inner = section.get(part)
        section[part] = section = dict(inner) if isinstance(inner, Mapping) else {}
    section[path[-1]] = value
