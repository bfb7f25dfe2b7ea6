"""What a run's folder holds already: nothing, an unfinished run, this very run, or something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nni_prune_ext.checkpoints import Json, differences
from nni_prune_ext.errors import ArtefactError, CheckpointError, ConfigError, OutputError, RecipeError
from nni_prune_ext.export.artefact_folder import ONNX, WEIGHTS, check_unused, check_writable
from nni_prune_ext.export.manifest import checked_manifest
from nni_prune_ext.recipes import Recipe
from nni_prune_ext.training.processes import from_main, is_main
from nni_prune_ext.workbench.run_folder import CHECKPOINTS, PAGE, RECIPE, REPORT
from nni_prune_ext.workbench.run_lock import check_free

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


def check_recipe_survives(file: Path, out: Path | None) -> None:
    """Refuses to replace a run whose folder holds the very recipe file that was given.

    Raises:
        RecipeError: the run writes where the file lies.
    """
    place, folder = file.resolve(), (out or Path()).resolve()
    if out is None or not place.is_relative_to(folder):
        return
    inside = place.relative_to(folder)
    if len(inside.parts) > 1 or inside.name in (RECIPE, REPORT, PAGE):
        raise RecipeError(
            f"The recipe '{file}' lies in the folder '{out}' that --overwrite replaces, expected it elsewhere: it "
            "would be lost. Copy it out of the folder first, or choose another folder with --out."
        )


def _problem_with(out: Path, *, resume: bool, overwrite: bool) -> str | None:
    try:
        check_free(out)
    except OutputError as error:
        return str(error)
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


def is_finished(out: Path, identity: Mapping[str, Json], tell: Callable[[str], None]) -> bool:
    """Says whether a folder holds this very run, whole; what is missing is told, and delivered again if it can be.

    Raises:
        CheckpointError: it holds another whole run, and no checkpoints of this one.
        ArtefactError: a part of this run is missing or damaged, and there are no checkpoints to make it anew from.
    """
    if not (out / RECIPE).exists() or not (out / REPORT).exists():
        return False
    try:
        content = json.loads((out / REPORT).read_bytes())
        saved = content.get("identity")
        names = [str(row["name"]) for row in content["rows"] if row.get("of") is None]  # others have no folder
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # damaged: it will be written anew
        return False
    different = differences(saved, json.loads(json.dumps(identity)))
    resumable = _holds_checkpoints(out / CHECKPOINTS)
    if different and not resumable:
        raise CheckpointError(
            f"'{out}' holds a finished run of another job: {'; '.join(different)}. Expected the same recipe and model. "
            "Undo the change, choose another folder with --out, or replace the run with --overwrite."
        )
    flaw = None if different else _flaw(out, names)
    if flaw and not resumable:
        raise ArtefactError(
            f"The finished run in '{out}' is no longer whole: {flaw} Expected all that it delivered; there are no "
            "checkpoints to make it anew from. Copy the folder again, or repeat the run with --overwrite."
        )
    if flaw:
        tell(f"the finished run is no longer whole: {flaw} It is delivered again from its checkpoints.")
    return not different and not flaw


def _flaw(out: Path, names: Sequence[str]) -> str | None:
    """Says what of a finished run is missing or damaged."""
    if not (out / PAGE).is_file():
        return f"{PAGE} is missing."
    try:
        for name in names:
            checked_manifest(out / name, needed=(WEIGHTS, ONNX))
    except ArtefactError as error:
        return str(error)
    return None


def remove_checkpoints(folder: Path) -> None:
    """Removes the checkpoints of a run; a folder that holds other files is somebody else's and stays."""
    doomed = folder.with_name(f".unfinished-removal-{folder.name}")  # killed half-way, it is not continued
    for place in (doomed, folder):
        if place.is_dir() and not any(path.is_file() and not _is_of_checkpoint(path) for path in place.rglob("*")):
            if place is folder and not doomed.exists():
                place = folder.rename(doomed)
            shutil.rmtree(place, ignore_errors=True)


def remove_empty_claim(folder: Path) -> None:
    """Removes the checkpoints of a run that failed before anything was saved, so that a corrected one may begin."""
    if all(path.name == _CHECKPOINT_FILES[0] for path in folder.rglob("*") if path.is_file()):
        remove_checkpoints(folder)


def _holds_checkpoints(folder: Path) -> bool:
    return any(path.is_file() and _is_of_checkpoint(path) for path in folder.rglob("*"))


def _is_of_checkpoint(path: Path) -> bool:
    return path.name in _CHECKPOINT_FILES or path.name.startswith(".")
