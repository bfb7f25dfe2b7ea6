"""Runtimes by the name under which they are registered."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import cast

from nni_prune_ext.errors import ConfigError, PluginError, RuntimeUnavailableError
from nni_prune_ext.registry import load_plugin
from nni_prune_ext.runtimes.base import InferenceRuntime


def runtime(name: str, options: Mapping[str, object] | None = None) -> InferenceRuntime:
    """Returns a registered runtime.

    Args:
        options: keyword arguments of its class.

    Raises:
        UnknownPluginError: no such name.
        ConfigError: it does not take these options.
    """
    made = load_plugin("runtimes", name)
    if not callable(made):
        raise PluginError(f"The runtime '{name}' is a {type(made).__name__}, expected a class without arguments.")
    known = list(inspect.signature(made).parameters)
    unknown = [key for key in options or {} if key not in known]
    if unknown:
        raise ConfigError(
            f"The runtime '{name}' has no option '{unknown[0]}', expected one of: {', '.join(known) or 'none'}. See "
            "docs/reference/runtimes.md."
        )
    return cast("InferenceRuntime", made(**(options or {})))


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
