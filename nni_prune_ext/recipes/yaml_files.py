"""Recipe files: YAML with unique keys, the line of each, and ``--set key=value`` on top."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import yaml

from nni_prune_ext.errors import NniPruneExtError, RecipeError
from nni_prune_ext.recipes.recipe import SHORT_FORMS

KeyPath: TypeAlias = tuple[str | int, ...]
_OPEN_KEYS = (("limits", "layers"),)  # whose own keys may hold dots
_MOST_NODES, _DEEPEST = 10_000, 20  # of a recipe file: anchors could make it endless


@dataclass(frozen=True)
class Origins:
    """Where the keys of a recipe were written: ``recipe.yaml:12``, ``--set seed=1``, ``--seed``; for messages."""

    whole: str = "recipe"
    places: dict[KeyPath, str] = field(default_factory=dict)

    def of(self, path: KeyPath) -> str:
        """Returns the place of a key, of an option below it, or of the nearest section around it."""
        for around in (path[:n] for n in range(len(path), 0, -1)):
            if around in self.places:
                return self.places[around]
            inside = (place for known, place in self.places.items() if known[: len(around)] == around)
            option = next((place for place in inside if place.startswith("--")), None)
            if option is not None:
                return option
        return self.whole

    def position(self, path: KeyPath) -> int:
        """Returns how many keys were written before this one, to tell mistakes in the order of the file."""
        known = list(self.places)
        return next((known.index(path[:n]) for n in range(len(path), 0, -1) if path[:n] in self.places), 0)

    def subject(self, path: KeyPath) -> str:
        """Returns the beginning of a message about a key; an option that sets just this key stands for it."""
        place, name = self.of(path), dotted(path)
        return place if place.startswith("--") and " " not in place and path in self.places else f"{place}: {name}"

    @contextmanager
    def named(self, *path: str | int) -> Iterator[None]:
        """Puts a key and its place before the message of a mistake that the block finds."""
        try:
            yield
        except NniPruneExtError as error:
            raise self.placed(error, *path) from error

    def placed(self, error: NniPruneExtError, *path: str | int) -> NniPruneExtError:
        """Returns an error of the same kind that begins with a key and its place, where places are known."""
        return type(error)(f"{self.subject(path)}: {error}") if self.places else error

    def mention(self, name: str) -> str | None:
        """Returns a key with its place in brackets; ``None`` for a key that was not given."""
        place = self.places.get(tuple(name.split(".")))
        if place is None:
            return None
        return place if place.startswith("--") else f"{name} ({place})"


class _Loader(yaml.SafeLoader):
    """Reads ``2:4`` as text, as YAML 1.2 does; YAML 1.1 means 124 by it, minutes and seconds."""


def _number(loader: _Loader, node: yaml.ScalarNode) -> object:
    if ":" in node.value:
        return loader.construct_scalar(node)
    return (loader.construct_yaml_int if node.tag.endswith(":int") else loader.construct_yaml_float)(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


def read_yaml(path: Path) -> tuple[dict[str, object], Origins]:
    """Reads a YAML file whose keys are unique, and the line of each.

    Raises:
        RecipeError: it cannot be read, is no mapping, or has a key twice.
    """
    origins = Origins(path.name)
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{path.name} holds no keys, expected a recipe such as 'model: resnet20'. Write one.")
        origins.places.update(_lines(node, path.name, (), [0]))
        values = loader.construct_document(node)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Cannot read the recipe '{path}': {error}. Expected a YAML file. Check the path.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = path.name if mark is None else f"{path.name}:{mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{place}: not readable as YAML: {problem}. Check indentation, colons and quotes.") from error
    return {str(key): value for key, value in values.items()}, origins


def override(values: dict[str, object], origins: Origins, overrides: Sequence[str]) -> None:
    """Sets ``key=value`` texts in nested values.

    Raises:
        RecipeError: a text is not of this form, or its key leads through something that has no keys.
    """
    for text in overrides:
        name, equals, value = text.partition("=")
        path = _path(name.strip())
        if not equals or not all(path):
            raise RecipeError(
                f"Cannot read --set '{text}'. Expected KEY=VALUE, for example training.learning_rate=0.1."
            )
        try:
            _set(values, path, yaml.load(value, _Loader))
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {text}: the value is not readable as YAML. Expected for example 0.1.") from error
        except TypeError as error:
            raise RecipeError(f"--set {text}: '{error}' has no keys below it. Set it as a whole.") from error
        for known in [known for known in origins.places if known[: len(path)] == path]:
            del origins.places[known]
        origins.places[path] = f"--set {text}"


def _path(name: str) -> tuple[str, ...]:
    parts = tuple(name.split("."))
    for start in _OPEN_KEYS:
        if parts[: len(start)] == start and len(parts) > len(start) + 1:
            return (*start, ".".join(parts[len(start) :]))
    return parts


def _set(values: dict[str, object], path: Sequence[str], value: object) -> None:
    """Puts a value at a path, making sections that are not there; ``TypeError`` names what cannot hold keys."""
    section = values
    for depth, part in enumerate(path[:-1]):
        inner = section.get(part)
        if depth == 0 and part in SHORT_FORMS and inner is not None and not isinstance(inner, dict):
            inner = {SHORT_FORMS[part]: inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise TypeError(".".join(path[: depth + 1]))
        section[part] = inner
        section = inner
    section[path[-1]] = value


def _lines(node: yaml.Node, file: str, path: KeyPath, seen: list[int]) -> Iterator[tuple[KeyPath, str]]:
    """Yields the place of every key and list item; refuses keys that are given twice or are no text."""
    seen[0] += 1
    if seen[0] > _MOST_NODES or len(path) > _DEEPEST:
        raise RecipeError(f"{file}: too many or too deeply nested values, expected a recipe. Remove anchors, if any.")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), f"{file}:{item.start_mark.line + 1}"
            yield from _lines(item, file, (*path, index), seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, str] = {}
    for key, value in node.value:
        place, name = f"{file}:{key.start_mark.line + 1}", str(key.value)
        if key.tag == "tag:yaml.org,2002:merge":
            yield from _lines(value, file, path, seen)
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise RecipeError(f"{place}: the key {name} is not text, expected a name. Put it in quotes.")
        if name in first:
            raise RecipeError(
                f"{place}: {dotted((*path, name))} is given twice, first at {first[name]}, expected once. Remove one."
            )
        first[name] = place
        yield (*path, name), place
        yield from _lines(value, file, (*path, name), seen)


def dotted(path: KeyPath) -> str:
    """Returns a key as it is written in messages and after ``--set``."""
    return ".".join(str(part) for part in path)
