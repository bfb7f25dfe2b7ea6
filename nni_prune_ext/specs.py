"""The grammar of `module.path:factory` and the "did you mean" of names, for models and data sources alike."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable

from nni_prune_ext.errors import NniPruneExtError


def import_factory(spec: str, *, error: type[NniPruneExtError], prefixes: Iterable[str] = ()) -> Callable[..., object]:
    """Import the callable that ``module.path:factory`` names.

    Args:
        spec: The whole specification, for example ``my_package.nets:build``.
        error: The class of the error to raise.
        prefixes: Words that mean something else before a colon, to recognise one that was misspelt.

    Raises:
        NniPruneExtError: of the class `error`, if there is no such module, no such name in it, or it is not callable.
    """
    factory = import_object(spec, error=error, prefixes=prefixes)
    if not callable(factory):
        raise error(
            f"'{spec}' is a {type(factory).__name__}, expected a function or class. Name the factory after the colon."
        )
    return factory


def import_object(spec: str, *, error: type[NniPruneExtError], prefixes: Iterable[str] = ()) -> object:
    """Import the object that ``module.path:name`` names; see `import_factory`."""
    module_name, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError, TypeError) as reason:
        raise error(
            f"'{spec}' cannot be imported ({type(reason).__name__}: {reason}). Expected module.path:factory, a module "
            f"that Python finds and a function in it. Check the spelling, and run from the module's folder or set "
            f"PYTHONPATH.{did_you_mean(module_name, prefixes)}"
        ) from reason


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` with up to three close names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
