"""What the verbs share: options become a recipe, a recipe is carried out, and its result is told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nni_prune_ext.cli.json_lines import json_line
from nni_prune_ext.cli.options import RECIPE_KEYS
from nni_prune_ext.errors import ConfigError

if TYPE_CHECKING:
    from nni_prune_ext.export.artefact_folder import ModelSpec
    from nni_prune_ext.graph.channel_groups import ChannelGroups
    from nni_prune_ext.recipes import KeyPath, Origins, Recipe
    from nni_prune_ext.workbench import Job, RunResult


NO_ADVICE = "no_advice"
"""In a file of limits: why ``doctor`` had none to give."""


def recipe_of(
    context: typer.Context, settings: Sequence[str], *, method: str | None, complete: bool = True
) -> tuple[Recipe, Origins]:
    """Returns the recipe that the options of a command say, checked, and which option said what, for messages.

    Args:
        settings: ``--set`` texts, which win.
        complete: the recipe must say all that a run needs.
    """
    from nni_prune_ext.recipes import Origins, override, recipe_from  # imported here to keep --help instant

    values: dict[str, object] = {"method": method}
    origins = Origins("command line")
    limits = context.params.get("limits")
    if limits is not None:
        values["limits"] = read_limits(limits)
        origins.places[("limits",)] = f"--limits {limits}"
    set_options(context, values, origins)
    override(values, origins, settings)
    return recipe_from(values, origins=origins, complete=complete), origins


def set_options(context: typer.Context, values: dict[str, object], origins: Origins) -> None:
    """Sets what was given on the command line in the nested values of a recipe."""
    given = {
        name: value
        for name, value in context.params.items()
        if name in RECIPE_KEYS and getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"
    }
    if given.get("image_size") and not given.get("data") and "input_shape" not in given and "model" in given:
        size = given.pop("image_size")  # without data it is the size of the example input
        given["input_shape"] = f"1,3,{size},{size}"
    for name, value in given.items():
        path: tuple[str, ...] = tuple(RECIPE_KEYS[name].split("."))
        place = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
        if name == "option":
            _put_each(values, origins, path, read_options(_texts(value)), "--option")
        elif name == "layer":
            _put_each(values, origins, path, read_layers(_texts(value)), "--layer")
        else:
            _put(values, path, list(value) if isinstance(value, (list, tuple)) else value)
            origins.places[path] = "--no-" + place[2:] if value is False else place


def carry_out(recipe: Recipe, origins: Origins, *, dry_run: bool, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Carries out a recipe and tells what came of it; a missed target ends the command with exit code 1."""
    from nni_prune_ext.cli.progress import progress_watcher  # imported here to keep --help instant
    from nni_prune_ext.training import Watcher
    from nni_prune_ext.training.processes import is_main
    from nni_prune_ext.workbench import checked_folder, execute

    if dry_run:
        if recipe.out is not None:
            checked_folder(recipe, resume=resume, overwrite=overwrite)
        _tell_work(recipe, origins, as_json=as_json)
        return
    with progress_watcher(as_json) if is_main() else nullcontext(Watcher()) as watcher:
        result = execute(recipe, resume=resume, overwrite=overwrite, watcher=watcher, origins=origins)
    if not is_main():
        return
    if as_json:
        tell_json("done", **result.summary())
    else:
        _show(recipe, result)
    if not result.met:
        raise typer.Exit(1)


def _tell_work(recipe: Recipe, origins: Origins, *, as_json: bool) -> None:
    from nni_prune_ext.workbench import prepare, work_to_do  # imported here to keep --help instant

    work = work_to_do(prepare(recipe, origins=origins))
    if as_json:
        tell_json("dry-run", recipe=recipe.model_dump(mode="json"), work=work)
    else:
        typer.echo(recipe.to_yaml() + "".join(f"# {line}\n" for line in work) + "# dry run: nothing was written")


def open_job(
    model: str,
    *,
    weights: Path | None,
    pretrained: bool,
    data: str | None,
    num_classes: int | None,
    input_shape: str | None,
    image_size: int | None,
    limit_images: int | None,
    download: bool,
    mean: str | None,
    std: str | None,
    seed: int,
    known: ModelSpec | None = None,
) -> Job:
    """Builds the model and opens the data; example inputs are one image of the data, or of ``--input-shape``.

    Args:
        known: what an artefact folder says about classes and inputs; the options given win.
    """
    from nni_prune_ext import workbench  # imported here to keep --help instant
    from nni_prune_ext.recipes import Origins, recipe_from

    values: dict[str, dict[str, object]] = {
        "model": {
            "name": model,
            "weights": weights,
            "pretrained": pretrained,
            "num_classes": num_classes,
            "input_shape": input_shape,
        }
    }
    if data is not None:
        values["data"] = {
            "source": data,
            "image_size": image_size,
            "limit_images": limit_images,
            "download": download,
            "mean": mean,
            "std": std,
        }
    places: dict[KeyPath, str] = {
        tuple(key.split(".")): f"--{name.replace('_', '-')}" for name, key in RECIPE_KEYS.items() if name != "model"
    }
    origins = Origins("command line", {**places, ("model", "name"): "MODEL"})
    recipe = recipe_from({**values, "seed": seed}, origins=origins, complete=False)
    return workbench.open_job(recipe, known=known, image_size=image_size)


def tell_what_is_not_pruned(groups: ChannelGroups) -> None:
    """Prints what the trace did not see: parameters without use, and branches on values."""
    if groups.unreached:
        typer.echo(f"not reached by the forward pass, left as they are: {', '.join(groups.unreached)}")
    if groups.value_dependent:
        typer.echo(
            f"warning: the forward pass reads values of tensors ({', '.join(groups.value_dependent)}); if it branches "
            "on them, only the branch that the example input took is known to be exact",
            err=True,
        )


def read_limits(path: Path) -> dict[str, object]:
    """Reads limits from a JSON file; says so where the doctor had no advice to write into it.

    Raises:
        ConfigError: it cannot be read, or holds no limits.
    """
    from pydantic import ValidationError  # imported here to keep --help instant

    from nni_prune_ext.allocation import Limits

    try:
        values = json.loads(path.read_bytes())
        reason = values.pop(NO_ADVICE, None) if isinstance(values, dict) else None
        found = Limits.model_validate_json(json.dumps(values))
    except (OSError, ValueError) as error:
        seen = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            seen = ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
        raise ConfigError(
            f"--limits: '{path}' holds no limits ({seen}). Expected a file with JSON such as "
            '{"layers": {"layer3.0.conv1": {"multiple": 16}}}.'
        ) from error
    if reason is not None:
        typer.echo(f"warning: --limits: '{path}' limits nothing, the doctor had no advice: {reason}", err=True)
    return found.model_dump(exclude_unset=True)  # what it does not say stays open


def read_layers(texts: Sequence[str]) -> dict[str, object]:
    """Reads ``PATTERN=MIN:MAX`` limits of layers.

    Raises:
        ConfigError: a text is not of this form.
    """
    layers: dict[str, object] = {}
    for text in texts:
        pattern, _, span = text.rpartition("=")
        low, _, high = span.partition(":")
        try:
            layers[pattern] = {"min_ratio": float(low or 0), "max_ratio": float(high or 1)}
        except ValueError as error:
            raise ConfigError(
                f"Cannot read the layer limit '{text}'. Expected PATTERN=MIN:MAX with ratios in 0–1, for "
                "example 'layer1.*=0:0.3'."
            ) from error
    return layers


def read_options(texts: Sequence[str]) -> dict[str, object]:
    """Reads ``KEY=VALUE`` options of a method; values are JSON where they parse, text otherwise.

    Raises:
        ConfigError: a text is not of this form.
    """
    result: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"Cannot read the option '{text}'. Expected KEY=VALUE, for example steps=4.")
        try:
            result[key] = json.loads(value)
        except json.JSONDecodeError:
            result[key] = value
    return result


def read_numbers(option: str, text: str | None) -> list[float] | None:
    """Reads one number per channel, with commas.

    Raises:
        ConfigError: a text is not of this form.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"Cannot read {option} '{text}'. Expected one number per channel, for example 0.5,0.5."
        ) from error


def _texts(value: object) -> list[str]:
    return [str(text) for text in value] if isinstance(value, (list, tuple)) else []


def _put_each(
    values: dict[str, object], origins: Origins, path: tuple[str, ...], found: Mapping[str, object], option: str
) -> None:
    for key, value in found.items():
        full = (*path, key)
        _put(values, full, value)
        origins.places[full] = f"{option} {key}"


def _put(values: dict[str, object], path: Sequence[str], value: object) -> None:
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        assert isinstance(inner, dict)  # a recipe file's own short forms are written out before
        values = inner
    values[path[-1]] = value


def tell_json(event: str, **facts: object) -> None:
    """Prints one line of JSON."""
    typer.echo(json_line(event, facts))


def _show(recipe: Recipe, result: RunResult) -> None:
    from rich.console import Console  # imported here to keep --help instant

    from nni_prune_ext.lower_precision import drop_sentences
    from nni_prune_ext.report import before_after_table

    if result.already_done:
        typer.echo(f"already done: {result.folder} holds the finished run of this recipe; report in {result.report}")
        return
    if result.groups is not None:
        tell_what_is_not_pruned(result.groups)
    console = Console(width=160)
    console.print(before_after_table(result.rows, title=result.title, caption=result.caption))
    for sentence in (*result.targets, *drop_sentences(result.rows)):
        console.print(sentence, highlight=False)
    if result.result is not None and result.result.latency is not None:
        console.print(result.result.latency.outcome(), highlight=False, markup=False, soft_wrap=True)
    console.print(f"artefacts in {result.artefacts[-1]}, report in {result.report}", highlight=False, soft_wrap=True)
