"""What a run's folder holds already: nothing, an unfinished run, this very run, or something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from nni_prune_ext.checkpoints import Json, differences
from nni_prune_ext.errors import CheckpointError, ConfigError, OutputError, RecipeError
from nni_prune_ext.export.artefact_folder import WEIGHTS, check_unused, check_writable
from nni_prune_ext.recipes import Recipe
from nni_prune_ext.training.processes import from_main, is_main
from nni_prune_ext.workbench.run_folder import CHECKPOINTS, RECIPE, REPORT

_CHECKPOINT_FILES = ("identity.json", "state.json", "tensors.safetensors")


def checked_folder(recipe: Recipe, *, resume: bool, overwrite: bool) -> Path:
    """Returns the folder of a run, if the run may write there; nothing is made yet.

    Raises:
        RecipeError: the recipe names none.
        ConfigError: going on and starting anew are both asked for.
        OutputError: it cannot be written to, or holds something that must not be mixed with the run.
    """
    if resume and overwrite:
        raise ConfigError("Both --resume and --overwrite were given, expected at most one. Go on, or start anew.")
    if recipe.out is None:
        raise RecipeError("out is missing, expected the run's folder. Add it to the recipe (CLI: --out).")
    problem = from_main(_problem_with(recipe.out, resume=resume, overwrite=overwrite) if is_main() else None)
    if problem is not None:
        raise OutputError(problem)
    return recipe.out


def _problem_with(out: Path, *, resume: bool, overwrite: bool) -> str | None:
    try:
        (check_writable if resume or overwrite else check_unused)(out)
    except OutputError as error:
        resumable = _holds_checkpoints(out / CHECKPOINTS)
        return f"{error} It holds the checkpoints of a run: go on with it with --resume." if resumable else str(error)
    return _foreign(out) if resume and out.exists() else None


def _foreign(out: Path) -> str | None:
    """Says what is wrong with going on in a folder that holds things, but nothing of a run."""
    found = [path for path in sorted(out.iterdir()) if not path.name.startswith(".")]
    known = any(path.name in (CHECKPOINTS, REPORT, RECIPE) or (path / WEIGHTS).exists() for path in found)
    if known or not found:
        return None
    return (
        f"The folder '{out}' holds '{found[0].name}' and no run, expected an interrupted run to resume, or an empty or "
        "new folder. Check --out."
    )


def is_finished(out: Path, identity: Mapping[str, Json]) -> bool:
    """Says whether a folder holds this very run, whole.

    Raises:
        CheckpointError: it holds another whole run, and no checkpoints of this one.
    """
    if not (out / RECIPE).exists() or not (out / REPORT).exists():
        return False
    try:
        saved = json.loads((out / REPORT).read_bytes()).get("identity")
    except (OSError, ValueError, AttributeError):  # damaged: it will be written anew
        return False
    different = differences(saved, json.loads(json.dumps(identity)))
    if different and not _holds_checkpoints(out / CHECKPOINTS):
        raise CheckpointError(
            f"'{out}' holds a finished run of another job: {'; '.join(different)}. Expected the same recipe and model. "
            "Undo the change, choose another folder with --out, or replace the run with --overwrite."
        )
    return not different


def remove_checkpoints(folder: Path) -> None:
    """Removes the checkpoints of a run; a folder that holds other files is somebody else's and stays."""
    if not any(path.is_file() and not _is_of_checkpoint(path) for path in folder.rglob("*")):
        doomed = folder.with_name(f".unfinished-removal-{folder.name}")  # killed half-way, it is not continued
        shutil.rmtree(doomed, ignore_errors=True)
        if folder.is_dir():
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _holds_checkpoints(folder: Path) -> bool:
    return any(path.is_file() and _is_of_checkpoint(path) for path in folder.rglob("*"))


def _is_of_checkpoint(path: Path) -> bool:
    return path.name in _CHECKPOINT_FILES or path.name.startswith(".")
