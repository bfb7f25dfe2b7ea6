"""Whether a recipe makes sense: every mistake as one sentence that names the key and where it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nni_prune_ext.allocation import parse_targets, sparsity_of
from nni_prune_ext.errors import NniPruneExtError, PluginError, RecipeError
from nni_prune_ext.latency import latency_refusal
from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.methods.options import policy_with_data
from nni_prune_ext.recipes.recipe import Recipe, all_keys, section_in
from nni_prune_ext.recipes.yaml_files import KeyPath, Origins, override, read_yaml
from nni_prune_ext.registry import load_plugin
from nni_prune_ext.specs import did_you_mean, import_object

_LONGEST_VALUE = 60
_EXPECTED = {
    "model_type": "a mapping: keys with values",
    "dict_type": "a mapping: keys with values",
    "tuple_type": "a list",
    "string_type": "text",
    "path_type": "a path as text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}
"""The kinds of a value by the type of pydantic's error."""


def load_recipe(path: Path, overrides: Sequence[str] = (), *, complete: bool = True) -> Recipe:
    """Reads and checks a recipe file.

    Args:
        overrides: ``key=value`` with a dotted key, for example ``training.learning_rate=0.1``; values are YAML.
        complete: the recipe must say all that a run needs.

    Raises:
        RecipeError: it cannot be read, or a key is unknown, given twice, out of range or in conflict with another one.
    """
    values, origins = read_yaml(path)
    override(values, origins, overrides)
    return recipe_from(values, origins=origins, complete=complete)


def recipe_from(values: Mapping[str, object], *, origins: Origins | None = None, complete: bool = True) -> Recipe:
    """Makes a checked recipe from nested values.

    Raises:
        RecipeError: see :func:`load_recipe`.
    """
    origins = origins or Origins()
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda one: origins.position(tuple(one["loc"])))
        raise RecipeError("\n".join(_explained(one, origins, Recipe) for one in found)) from error
    return checked_recipe(recipe, origins=origins, complete=complete)


def checked_recipe(recipe: Recipe, *, origins: Origins | None = None, complete: bool = True) -> Recipe:
    """Returns the recipe with all options of its method, if its parts fit each other.

    Raises:
        RecipeError: an option of the method is unknown or out of range, or keys are in conflict.
    """
    origins = origins or Origins()
    epochs = 0
    if recipe.method is not None:
        recipe, epochs = _with_method_options(recipe, origins)
    for keys, reason in _conflicts(recipe, epochs, complete):
        path = tuple(keys[0].split("."))
        places = [origins.mention(key) for key in keys[1:]]
        verb = "conflicts with" if any(places) else "without"
        others = " or ".join(place or key for place, key in zip(places, keys[1:]))
        raise RecipeError(f"{origins.subject(path)} {verb} {others}: {reason}")
    return recipe


def method_epochs(recipe: Recipe) -> int:
    """Returns the epochs that the method of a checked recipe trains between its steps."""
    return 0 if recipe.method is None else _with_method_options(recipe, Origins())[1]


def _with_method_options(recipe: Recipe, origins: Origins) -> tuple[Recipe, int]:
    """Returns the recipe with the method's options written out, and the epochs of the method's phases."""
    try:
        spec = _spec(recipe.method or "")
    except NniPruneExtError as error:
        raise RecipeError(f"{origins.subject(('method',))} is '{recipe.method}': {error}") from error
    try:
        options = spec.options.model_validate(recipe.options)
        epochs = sum(phase.epochs for phase in spec.build(options).phases())
    except ValidationError as error:
        lines = [
            _explained({**one, "loc": ("options", *one["loc"])}, origins, Recipe, inner=spec.options)
            for one in error.errors()
        ]
        raise RecipeError("\n".join(lines)) from error
    except NniPruneExtError as error:
        raise RecipeError(f"{origins.subject(('options',))}: {error}") from error
    _check_registered(options, origins)
    return recipe.model_copy(update={"options": options.model_dump(mode="json")}), epochs


def _check_registered(options: BaseModel, origins: Origins) -> None:
    """Refuses names of schedulers that nobody registered, which a method would only find out at its first cut."""
    for key, info in type(options).model_fields.items():
        extra, name = info.json_schema_extra, getattr(options, key)
        if isinstance(extra, dict) and "registered" in extra and isinstance(name, str):
            try:
                load_plugin("schedulers", name)
            except NniPruneExtError as error:
                raise RecipeError(f"{origins.subject(('options', key))}: {error}") from error


def _spec(name: str) -> MethodSpec:
    found = import_object(name, error=PluginError) if ":" in name else load_plugin("pruners", name)
    if not isinstance(found, MethodSpec):
        raise PluginError(f"It is a {type(found).__name__}, expected a MethodSpec. See docs/how-to/write_a_method.md.")
    return found


def _conflicts(recipe: Recipe, epochs: int, complete: bool) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields keys that do not fit each other, and why; ``epochs``: of the method's phases."""
    spec = _spec(recipe.method) if recipe.method else None
    sparsity = sparsity_of(parse_targets(recipe.target)) if recipe.target else None
    if complete and spec is not None and sparsity is not None and "weight_masks" not in spec.products:
        yield (
            ("target", "method"),
            f"a sparsity masks single weights, and '{spec.name}' removes channels only. Ask for macs, params, memory "
            "or ratio, or choose a method whose products name weight masks (`nni-prune-ext list METHOD`).",
        )
    if recipe.aims_at_latency and spec is not None and latency_refusal(spec) is not None:
        yield ("target", "method"), f"a latency cannot be aimed at: {latency_refusal(spec)}"
    if recipe.latency is not None and not recipe.aims_at_latency:
        reason = "no target is about latency. Ask for example for latency=0.7 or latency=2.0ms, or leave it out."
        yield ("latency", "target"), reason
    if recipe.model.pretrained and recipe.model.weights:
        yield ("model.pretrained", "model.weights"), "two sources of weights, expected at most one. Leave one out."
    if recipe.data is None:
        missing = "it needs training data, none was given. Add data (CLI: --data)."
        if recipe.train:
            yield ("train", "data"), missing
        if recipe.recovery_epochs:
            yield ("recovery.epochs", "data"), missing
        if spec is not None and spec.needs_data:
            yield ("method", "data"), missing
        elif spec is not None and (policy := policy_with_data(spec.options.model_validate(recipe.options))):
            yield (f"options.{policy}", "data"), missing
        if epochs:
            yield ("options", "data"), f"with training between its steps {missing}"
        if recipe.quantize and "int8" in recipe.quantize.precision and recipe.quantize.calibration != "dynamic":
            yield ("quantize", "data"), "int8 is calibrated on training images. Add data, or choose fp16."
        if recipe.training.patience:
            yield ("training.patience", "data"), "there is no validation split to stop by. Add data, or leave it out."
    if recipe.distillation and not recipe.recovery_epochs:
        yield ("distillation", "recovery"), "the teacher is only used in recovery. Add recovery, or leave it out."
    if recipe.control and not recipe.recovery_epochs and not epochs:
        yield ("control", "recovery"), "nothing trains, so there is nothing to compare with. Leave control out."
    if recipe.method is None:
        for key in ("options", "target", "recovery", "distillation", "control"):
            if getattr(recipe, key):
                yield (key, "method"), "without a method nothing is pruned. Name a method, or leave it out."
    if complete and recipe.method is None and recipe.train is None:
        yield ("model", "method", "train"), "there is nothing to do. Add a method and a target, or train."
    if complete and recipe.method is not None and not recipe.target:
        yield ("method", "target"), "it needs a goal. Ask for example for macs=0.5 (CLI: --target)."


def _explained(
    error: ErrorDetails, origins: Origins, model: type[BaseModel], *, inner: type[BaseModel] | None = None
) -> str:
    """Returns one mistake as a sentence with its place; ``inner``: the configuration behind the first key."""
    path: KeyPath = tuple(error["loc"])
    subject = origins.subject(path)
    if error["type"] == "extra_forbidden":
        around = (inner if inner and len(path) == 2 else _model_at(model, path[:-1])) or model
        return f"{subject}: there is no such key.{_suggestion(str(path[-1]), around, model)}"
    if error["type"] == "missing":
        return f"{subject} is missing, expected a value. Add it."
    if error["type"] == "value_error" and _reason(error)[0].isupper():  # a whole sentence, which names the value
        return f"{subject}: {_reason(error)}"
    value = repr(error["input"])
    seen = "has an unusable value" if len(value) > _LONGEST_VALUE else f"is {value}"
    known = f" Known options: {', '.join(inner.model_fields) or 'none'}." if inner else ""
    return f"{subject} {seen}: {_reason(error)}{known}"


def _reason(error: ErrorDetails) -> str:
    if error["type"] == "literal_error":
        expected = str(error.get("ctx", {}).get("expected", ""))
        names = expected.replace("'", "").replace(" or ", ", ").split(", ")
        return f"expected {expected}.{did_you_mean(str(error['input']), names)}"
    if error["loc"][:1] == ("target",) and error["type"] in _EXPECTED:
        return "expected text such as macs=0.5, or a list of it."
    if error["type"] in _EXPECTED:
        return f"expected {_EXPECTED[error['type']]}."
    text = error["msg"].removeprefix("Value error, ").rstrip(".")
    for start, ours in {"Input should be greater": "a value greater", "Input should be less": "a value less"}.items():
        text = text.replace(start, f"expected {ours}")
    text = text.replace("Input should be", "expected")
    return f"{text}." if error["type"] == "value_error" else f"{text[0].lower()}{text[1:]}."


def _suggestion(name: str, around: type[BaseModel], model: type[BaseModel]) -> str:
    hint = did_you_mean(name, around.model_fields)
    elsewhere = [key for key in all_keys(model) if key.rpartition(".")[2] == name]
    if not hint and elsewhere:
        hint = f" Did you mean {' or '.join(repr(key) for key in elsewhere)}?"
    return f"{hint} Known options: {', '.join(around.model_fields) or 'none'}."


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    found: type[BaseModel] | None = model
    for part in path:
        info = found.model_fields.get(str(part)) if found else None
        if info is not None:  # otherwise an item of a list, or a key of an open section
            found = section_in(info.annotation)
    return found
