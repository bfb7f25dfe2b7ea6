"""Runtimes by the name under which they are registered."""

from __future__ import annotations

from typing import cast

from nni_prune_ext.errors import PluginError, RuntimeUnavailableError
from nni_prune_ext.registry import load_plugin
from nni_prune_ext.runtimes.base import InferenceRuntime


def runtime(name: str) -> InferenceRuntime:
    """Returns a registered runtime.

    Raises:
        UnknownPluginError: no such name.
    """
    made = load_plugin("runtimes", name)
    if not callable(made):
        raise PluginError(f"The runtime '{name}' is a {type(made).__name__}, expected a class without arguments.")
    return cast("InferenceRuntime", made())


def usable_runtime(name: str) -> InferenceRuntime:
    """Returns a registered runtime that works on this machine.

    Raises:
        UnknownPluginError: no such name.
        RuntimeUnavailableError: it cannot be used here; its own sentence says why, and what to install.
    """
    found = runtime(name)
    availability = found.availability()
    if not availability.usable:
        raise RuntimeUnavailableError(
            f"Nothing can be measured on the runtime '{name}' here. {availability.reason} Expected a runtime that "
            "works on this machine. Choose another one (`nni-prune-ext list runtimes`), or go where it is."
        )
    return found
