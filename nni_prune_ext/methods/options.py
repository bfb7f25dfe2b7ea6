"""The options of methods as facts: for listings, for recipes, and as search spaces of NNI.

All of it is read from a method's pydantic model. A field says what it is with ``description=``, and may say in
``json_schema_extra=``:

* ``"source"``: where its default comes from, for example a paper's section;
* ``"search"``: ``[low, high]``, the range worth searching where the valid range is open or wider;
* ``"registered"``: ``"schedule"`` or ``"ratio_policy"``: its values are the registered schedulers of that kind.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Literal, TypeAlias, TypedDict, Union, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel, JsonValue, ValidationError
from pydantic.fields import FieldInfo

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.registry import load_plugin, plugins
from nni_prune_ext.schedules import SchedulerSpec, needs_data

NOTHING = "none"
"""How ``None`` is written among the choices of a search space: NNI takes numbers and texts only."""
Range: TypeAlias = tuple[float, float]


class SearchEntry(TypedDict):
    """One entry of an NNI search space."""

    _type: Literal["choice", "randint", "uniform", "quniform"]
    _value: list[JsonValue]


@dataclass(frozen=True)
class OptionFact:
    """What is known about one option of a method.

    Attributes:
        name: its key.
        type: its Python type as written in Python, without ``None``.
        default: its default, as a JSON value.
        low: smallest valid value; ``None`` if there is none, or if the option is no number.
        high: largest valid value.
        low_open: ``low`` itself is not valid.
        high_open: ``high`` itself is not valid.
        step: valid values are multiples of this.
        choices: all valid values, where they can be listed; ``None`` may be among them.
        search: the range worth searching.
        optional: ``None`` is valid.
        description: what it does.
        source: where its default comes from.
    """

    name: str
    type: str
    default: JsonValue
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    step: float | None = None
    choices: tuple[JsonValue, ...] | None = None
    search: Range | None = None
    optional: bool = False
    description: str = ""
    source: str = ""

    @property
    def valid(self) -> str:
        """Says what values are valid, for a listing; empty if any of its type is."""
        if self.choices is not None:
            return ", ".join(NOTHING if choice is None else str(choice) for choice in self.choices)
        parts = []
        if self.low is not None:
            parts.append(f"{'> ' if self.low_open else '≥ '}{self.low:g}")
        if self.high is not None:
            parts.append(f"{'< ' if self.high_open else '≤ '}{self.high:g}")
        if self.step is not None:
            parts.append(f"multiple of {self.step:g}")
        return ", ".join(parts) + (" or none" if self.optional and parts else "")


def option_facts(options: type[BaseModel]) -> tuple[OptionFact, ...]:
    """Reads the options of a method from its pydantic model, in the order of the fields.

    Raises:
        PluginError: an option takes registered schedulers, and one of them does not load.
    """
    defaults = options().model_dump(mode="json")
    return tuple(_fact(name, field, defaults[name]) for name, field in options.model_fields.items())


def search_space(
    spec: MethodSpec, names: Sequence[str] | None = None, *, ranges: Mapping[str, Range] | None = None
) -> dict[str, SearchEntry]:
    """Returns the options of a method as a search space of NNI.

    Args:
        names: the options to search; all that have choices or a finite range by default.
        ranges: option → lowest and highest value to try, where its own range is open or too wide. Options named here
            are searched in any case.

    Raises:
        ConfigError: no such option, one has neither choices nor a finite range, or a range is empty or outside.

    Example:
        >>> from nni_prune_ext.pipeline import method_spec
        >>> search_space(method_spec("taylor"), ["batches"], ranges={"batches": (1, 4)})
        {'batches': {'_type': 'randint', '_value': [1, 5]}}
    """
    facts, given = {fact.name: fact for fact in option_facts(spec.options)}, dict(ranges or {})
    asked = {*(names or ()), *given}
    for name in asked:
        if name not in facts:
            close = get_close_matches(name, facts, n=2) or list(facts)
            raise ConfigError(
                f"The method '{spec.name}' has no option '{name}', expected one of its own. "
                f"There are: {', '.join(close) or 'none'}."
            )
    chosen = [name for name in facts if names is None or name in asked]
    space = {name: _entry(spec, facts[name], given.get(name), name in asked) for name in chosen}
    return {name: entry for name, entry in space.items() if entry is not None}


def options_from_trial(spec: MethodSpec, parameters: Mapping[str, object]) -> BaseModel:
    """Turns what NNI sampled from a search space back into checked options; the others keep their defaults.

    NNI hands over floats where it rounds to a step, and numbers of NumPy; texts stand for ``None``.

    Raises:
        ConfigError: a parameter is no option of the method, or out of range.
    """
    facts = {fact.name: fact for fact in option_facts(spec.options)}
    values = {name: _from_trial(facts.get(name), value) for name, value in parameters.items()}
    try:
        return spec.options.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"The trial's parameter '{name}' is {first['input']!r}, which method '{spec.name}' does not take: "
            f"{first['msg']}. Known options: {', '.join(facts) or 'none'}. Make the search space with search_space()."
        ) from error


def policy_with_data(options: BaseModel) -> str | None:
    """Returns the name of an option whose value is a ratio policy that looks at data, ``None`` if there is none.

    Raises:
        UnknownPluginError: a ratio policy is not registered.
        PluginError: what is named is no ratio policy.
    """
    for name, field in type(options).model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        value = getattr(options, name)
        if extra.get("registered") == "ratio_policy" and value is not None and needs_data(value):
            return name
    return None


def _fact(name: str, field: FieldInfo, default: JsonValue) -> OptionFact:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not types.NoneType]
    optional = len(kinds) < len(_alternatives(field.annotation))
    choices = _choices(kinds, str(extra.get("registered", "")))
    search = cast("list[float] | None", extra.get("search"))
    return OptionFact(
        name=name,
        type=" or ".join(dict.fromkeys(_type_name(kind) for kind in kinds)),
        default=default,
        **_bounds(field.metadata),
        choices=choices if choices is None or not optional else (*choices, None),
        search=None if search is None else (float(search[0]), float(search[1])),
        optional=optional,
        description=field.description or "",
        source=str(extra.get("source", "")),
    )


def _alternatives(annotation: object) -> tuple[object, ...]:
    """Returns the members of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _type_name(kind: object) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(dict.fromkeys(type(value).__name__ for value in get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)


def _choices(kinds: Sequence[object], registered: str) -> tuple[JsonValue, ...] | None:
    """Lists all values of a type; ``None`` where there are too many to list."""
    if registered:
        specs = {name: load_plugin("schedulers", name) for name in plugins("schedulers")}
        return tuple(
            name for name, spec in specs.items() if isinstance(spec, SchedulerSpec) and spec.kind == registered
        )
    if kinds == [bool]:
        return (False, True)
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        return cast("tuple[JsonValue, ...]", get_args(kinds[0]))
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Enum):
        return tuple(member.value for member in kinds[0])
    return None


class _Bounds(TypedDict, total=False):
    low: float
    high: float
    low_open: bool
    high_open: bool
    step: float


def _bounds(metadata: Sequence[object]) -> _Bounds:
    found: _Bounds = {}
    for item in metadata:
        if isinstance(item, Ge):
            found |= {"low": cast("float", item.ge), "low_open": False}
        elif isinstance(item, Gt):
            found |= {"low": cast("float", item.gt), "low_open": True}
        elif isinstance(item, Le):
            found |= {"high": cast("float", item.le), "high_open": False}
        elif isinstance(item, Lt):
            found |= {"high": cast("float", item.lt), "high_open": True}
        elif isinstance(item, MultipleOf):
            found |= {"step": cast("float", item.multiple_of)}
    return found


def _entry(spec: MethodSpec, fact: OptionFact, given: Range | None, asked: bool) -> SearchEntry | None:
    """Returns the entry of one option; ``None`` if it has no finite range and was not asked for."""
    if given is None and fact.choices is not None:
        return {"_type": "choice", "_value": [NOTHING if choice is None else choice for choice in fact.choices]}
    if fact.type in ("int", "float"):
        low, high = _searched(spec, fact, given)
        if math.isfinite(low) and math.isfinite(high):
            return _number_entry(spec, fact, low, high)
    if not asked:
        return None
    raise ConfigError(
        f"The option '{fact.name}' of method '{spec.name}' is any {fact.type}"
        f"{f' ({fact.valid})' if fact.valid else ''}, expected choices or a finite range to search. "
        + (
            f"Give a range: ranges={{'{fact.name}': (low, high)}}."
            if fact.type in ("int", "float")
            else "Leave it out, and set it for all trials."
        )
    )


def _searched(spec: MethodSpec, fact: OptionFact, given: Range | None) -> Range:
    """Returns the range to search, closed; infinite where nobody set a bound."""
    low = -math.inf if fact.low is None else fact.low
    high = math.inf if fact.high is None else fact.high
    whole = fact.type == "int"
    if fact.low_open:
        low = math.floor(low) + 1 if whole else math.nextafter(low, math.inf)
    if fact.high_open:
        high = math.ceil(high) - 1 if whole else math.nextafter(high, -math.inf)
    inner = given or fact.search
    if inner is None:
        return low, high
    if not (low <= inner[0] <= inner[1] <= high):
        raise ConfigError(
            f"The range {inner[0]:g} to {inner[1]:g} for option '{fact.name}' of method '{spec.name}' is not usable, "
            f"expected an ascending one within its valid values ({fact.valid or fact.type}). Change it."
        )
    return inner


def _number_entry(spec: MethodSpec, fact: OptionFact, low: float, high: float) -> SearchEntry:
    whole, step = fact.type == "int", fact.step
    if step is not None:  # NNI rounds to the step and clips to the bounds, which must therefore be multiples
        low, high = math.ceil(low / step - 1e-9) * step, math.floor(high / step + 1e-9) * step
    elif whole:
        low, high = math.ceil(low), math.floor(high)
    if low > high:
        raise ConfigError(
            f"No valid value of option '{fact.name}' of method '{spec.name}' lies in the range to search, expected at "
            f"least one ({fact.valid or fact.type}). Give a wider range."
        )
    if low == high:  # NNI refuses ranges of one value
        return {"_type": "choice", "_value": [int(low) if whole else low]}
    if step is not None:
        return {"_type": "quniform", "_value": [low, high, step]}
    return (
        {"_type": "randint", "_value": [int(low), int(high) + 1]}
        if whole
        else {"_type": "uniform", "_value": [float(low), float(high)]}
    )


def _from_trial(fact: OptionFact | None, value: object) -> object:
    item = getattr(value, "item", None)  # a number of NumPy
    plain = item() if callable(item) else value
    if fact is None:
        return plain
    if plain == NOTHING and fact.optional:
        return None
    if fact.type == "int" and isinstance(plain, float) and abs(plain - round(plain)) < 1e-6:
        return round(plain)
    return plain
