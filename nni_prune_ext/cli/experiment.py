"""``experiment``: an NNI experiment over a recipe: methods, their options, targets and epochs of recovery."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nni_prune_ext.cli import options as o
from nni_prune_ext.errors import ConfigError

if TYPE_CHECKING:
    from nni_prune_ext.experiments import ExperimentResult
    from nni_prune_ext.recipes import Recipe

INTERRUPTED = 130


def experiment(
    recipe: Annotated[Path, typer.Argument(help="What all trials have in common: a recipe.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the whole experiment; empty or new.")],
    methods: Annotated[
        list[str], typer.Option("--method", help="A method to try, instead of the recipe's; repeatable.")
    ] = [],  # noqa: B006 (typer reads the default, nobody changes it)
    targets: Annotated[
        list[str], typer.Option("--target", help="A target to try, instead of the recipe's; repeatable.")
    ] = [],  # noqa: B006
    recovery: Annotated[
        list[int], typer.Option("--epochs", help="Epochs of recovery to try, instead of the recipe's; repeatable.")
    ] = [],  # noqa: B006
    tune: Annotated[
        list[str], typer.Option(help="NAME or NAME=LOW:HIGH of a method's option to search; repeatable.")
    ] = [],  # noqa: B006
    search: Annotated[
        Path | None, typer.Option(help="An NNI search space (JSON) whose entries replace or join the others.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials in all; 10, and with --resume as many as before.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time; 1, and with --resume as before.")
    ] = None,
    tuner: Annotated[str, typer.Option(help="NNI's tuner: TPE, Random, GridSearch, Evolution, ….")] = "TPE",
    runtime: Annotated[
        str | None, typer.Option(help="Measure the latency of trials on this runtime, instead of the recipe's way.")
    ] = None,
    cost: Annotated[str, typer.Option(help="What --cost-weight weighs: macs, params or latency_ms.")] = "macs",
    cost_weight: Annotated[
        float, typer.Option(min=0, help="Result = validation metric - this x (cost / that of the dense network).")
    ] = 0.0,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of NNI's web portal; 0 finds a free one.")] = 8080,
    config: Annotated[
        Path | None, typer.Option(help="An NNI configuration file, for other machines; our trial is filled in.")
    ] = None,
    settings: o.Settings = [],  # noqa: B006
    dry_run: o.DryRun = False,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Searches with NNI: every trial prunes, recovers, exports, checks and measures one network."""
    from nni_prune_ext import experiments as e  # imported here to keep --help instant
    from nni_prune_ext.cli.progress import progress_watcher
    from nni_prune_ext.recipes import override, read_yaml, recipe_from

    values, origins = read_yaml(recipe)
    override(values, origins, settings)
    if methods:
        values.setdefault("method", methods[0])
    base = recipe_from(values, origins=origins, complete=False)
    space = search_space(base, methods, targets, recovery, tune, search)
    asked = e.ExperimentSettings(
        trials=trials, concurrency=concurrency, tuner=tuner, port=port, config=config, runtime=runtime,
        cost=checked_cost(cost), cost_weight=cost_weight,
    )  # fmt: skip
    e.silence_nni()
    if dry_run:
        e.check_experiment(base, space, asked)
        _tell_plan(base, space, as_json=json)
        return
    with progress_watcher(json) as watcher:
        result = e.run_trials(base, space, out, asked, resume=resume, watcher=watcher)
    _tell(result, base, as_json=json)
    if not result.done:
        raise typer.Exit(INTERRUPTED)
    if result.best is None:
        raise typer.Exit(1)


def search_space(
    recipe: Recipe,
    methods: Sequence[str],
    targets: Sequence[str],
    recovery: Sequence[int],
    tune: Sequence[str],
    file: Path | None,
) -> dict[str, object]:
    """Returns the search space that the options describe; entries of the file win.

    Raises:
        ConfigError: an option or the file cannot be read, or there is nothing to choose from.
    """
    from nni_prune_ext.experiments import search_space_for  # imported here to keep --help instant

    given = read_space(file) if file else {}
    if recipe.method and "method" not in given:
        methods = methods or [recipe.method]
    if len(recipe.target) == 1 and "target" not in given:  # several bounds that hold together are not choices
        targets = targets or recipe.target
    if not methods and not targets and not recovery and given:
        return given
    return {**search_space_for(methods, targets, tune=dict(map(read_tuned, tune)), epochs=recovery), **given}


def read_space(file: Path) -> dict[str, object]:
    """Reads a search space of NNI from JSON.

    Raises:
        ConfigError: it is none.
    """
    try:
        content = json_format.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the search space '{file}': {error}. Expected JSON. Check the file.") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"The search space '{file}' is a {type(content).__name__}, expected an object of entries with _type and "
            "_value. See docs/how-to/run_an_nni_experiment.md."
        )
    return content


def read_tuned(text: str) -> tuple[str, tuple[float, float] | None]:
    """Reads ``NAME`` or ``NAME=LOW:HIGH``.

    Raises:
        ConfigError: it is neither.
    """
    name, equals, span = text.partition("=")
    low, _, high = span.partition(":")
    try:
        return name.strip(), (float(low), float(high)) if equals else None
    except ValueError as error:
        raise ConfigError(
            f"Cannot read --tune '{text}'. Expected NAME or NAME=LOW:HIGH, for example steps=1:4."
        ) from error


def checked_cost(cost: str) -> str:
    """Returns the cost, if trials report it.

    Raises:
        ConfigError: they do not.
    """
    from nni_prune_ext.experiments import COSTS  # imported here to keep --help instant

    if cost not in COSTS:
        raise ConfigError(f"--cost is '{cost}', expected {', '.join(COSTS)}. Choose one of them.")
    return cost


def _tell_plan(base: Recipe, space: Mapping[str, object], *, as_json: bool) -> None:
    from nni_prune_ext.cli.job import tell_json

    if as_json:
        tell_json("dry-run", recipe=base.model_dump(mode="json"), space=dict(space))
        return
    typer.echo(base.to_yaml() + "# search space of NNI:")
    typer.echo("".join(f"#   {key}: {json_format.dumps(entry)}\n" for key, entry in space.items()), nl=False)
    typer.echo("# dry run: nothing was written")


def _tell(result: ExperimentResult, base: Recipe, *, as_json: bool) -> None:
    from rich.console import Console  # imported here to keep --help instant

    from nni_prune_ext.cli.job import tell_json
    from nni_prune_ext.experiments import results_table

    best = result.best
    if as_json:
        tell_json(
            "done", folder=str(result.folder), identity=result.identity, done=result.done,
            best=best and vars(best), trials=[vars(trial) for trial in result.trials],
        )  # fmt: skip
        return
    Console(width=160).print(results_table(result.trials, metric=base.metric or "top-1"))
    failed = [trial for trial in result.trials if trial.error]
    for trial in failed:
        typer.echo(f"trial {trial.id} failed: {trial.error}", err=True)
    if best is not None:
        typer.echo(f"best trial: {best.number} {best.id} ({best.label}); artefact in {best.artefact}")
    typer.echo(f"all trials in {result.folder / 'trials.json'} and trials.csv; NNI calls it {result.identity}")
    if not result.done:
        typer.echo("not all trials have ended: repeat the command with --resume to go on", err=True)
