"""The workbench: carries out a recipe from the dense network to checked artefacts and a report, and can be resumed."""

from __future__ import annotations

from nni_prune_ext.workbench.execution import RunResult, execute
from nni_prune_ext.workbench.folder_state import check_recipe_survives, checked_folder
from nni_prune_ext.workbench.preparation import Job, Prepared, calibration_images, open_job, prepare, work_to_do

__all__ = [
    "Job",
    "Prepared",
    "RunResult",
    "calibration_images",
    "check_recipe_survives",
    "checked_folder",
    "execute",
    "open_job",
    "prepare",
    "work_to_do",
]
