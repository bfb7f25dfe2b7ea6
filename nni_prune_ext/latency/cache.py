"""Measured times of layers, kept on disk from one run to the next: one JSON file per machine and conditions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from nni_prune_ext.errors import OutputError
from nni_prune_ext.evaluation import environment
from nni_prune_ext.latency.conditions import LatencyConditions
from nni_prune_ext.text_files import write_text

FORMAT = 1
FOLDER_VARIABLE = "NNI_PRUNE_EXT_CACHE"
"""The environment variable that names another folder."""
_LOG = logging.getLogger(__name__)
_DECISIVE = ("cpu", "cpu_capability", "gpu", "gpu_driver", "cuda", "torch", "onnxruntime", "onnxruntime-gpu")
"""What a time depends on, of all that ``environment`` says."""


def cache_folder() -> Path:
    """Returns the folder: ``$NNI_PRUNE_EXT_CACHE``, or ``nni_prune_ext`` in the user's cache folder."""
    own = os.environ.get(FOLDER_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME")
    users = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return Path(own) if own else users / "nni_prune_ext"


class LatencyCache:
    """The times that were measured under the same conditions on the same machine; a damaged file counts as none.

    Args:
        device: where PyTorch's modules are, which decides for ``torch-eager``.
    """

    def __init__(self, conditions: LatencyConditions, device: str, folder: Path | None = None) -> None:
        described = environment()
        self.where: dict[str, object] = {
            "runtime": conditions.runtime,
            "batch": conditions.batch,
            "threads": conditions.threads,
            "clock": conditions.clock,
            "precision": "fp32",
            "device": device,
            "machine": platform.machine(),
            **{name: described[name] for name in _DECISIVE},
        }
        digest = hashlib.sha256(json.dumps(self.where, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / "latency" / f"{conditions.runtime.replace(':', '_')}-{digest}.json"

    def read(self) -> dict[str, float]:
        """Returns operator with sizes → milliseconds."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT or found["where"] != self.where:
                raise ValueError("it is of another format or machine")
            return {str(key): _positive(value) for key, value in found["ms"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            _LOG.warning("The measured times in '%s' cannot be used (%s); they are measured anew.", self.path, error)
            return {}

    def add(self, times: Mapping[str, float]) -> None:
        """Adds times to the file; where it cannot be written, the next run measures again."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            both = {**self.read(), **times}
            write_text(self.path, json.dumps({"format": FORMAT, "where": self.where, "ms": both}, indent=1) + "\n")
        except (OSError, OutputError) as error:
            _LOG.warning("Measured times cannot be kept in '%s' (%s).", self.path, error)


def _positive(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is no time")
    return float(value)
