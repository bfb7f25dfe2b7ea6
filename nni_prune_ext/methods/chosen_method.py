"""The method that a user names, and its configuration, checked."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from nni_prune_ext.errors import ConfigError, PluginError
from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.registry import load_plugin
from nni_prune_ext.specs import import_object


def method_spec(name: str) -> MethodSpec:
    """Returns the registered method, or the one that ``module.path:NAME`` holds.

    Raises:
        UnknownPluginError: no such name.
        PluginError: it cannot be imported, or is not a :class:`MethodSpec`.
    """
    spec = import_object(name, error=PluginError) if ":" in name else load_plugin("pruners", name)
    if not isinstance(spec, MethodSpec):
        raise PluginError(
            f"The pruner '{name}' is a {type(spec).__name__}, expected a MethodSpec. See docs/how-to/write_a_method.md."
        )
    return spec


def method_options(spec: MethodSpec, options: Mapping[str, object] | None) -> BaseModel:
    """Checks the options of a method.

    Raises:
        ConfigError: an unknown option or a value out of range.
    """
    try:
        return spec.options.model_validate(dict(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "options"
        known = ", ".join(spec.options.model_fields) or "none"
        raise ConfigError(
            f"Option '{name}' of method '{spec.name}' is {first['input']!r}: {first['msg']}. Known options: {known}."
        ) from error
