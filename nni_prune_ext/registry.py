"""Plugins by name: pruners (methods), schedulers and runtimes.

The built-in table and the entry points of other packages hold strings ("module:object"); nothing is imported until a
plugin is asked for. A name that is taken twice, or a plugin that does not import, is an error with its cause, never
skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from operator import attrgetter
from types import MappingProxyType
from typing import Literal

from nni_prune_ext.errors import PluginError, UnknownPluginError

Kind = Literal["pruners", "schedulers", "runtimes"]

BUILT_IN: Mapping[Kind, Mapping[str, str]] = MappingProxyType(
    {
        "pruners": MappingProxyType(
            {
                "fpgm": "nni_prune_ext.methods.baselines:FPGM",
                "l1": "nni_prune_ext.methods.baselines:L1",
                "l2": "nni_prune_ext.methods.baselines:L2",
                "ftwt": "nni_prune_ext.methods.ftwt:FTWT",
                "lottery_jackpots": "nni_prune_ext.methods.lottery_jackpots:LOTTERY_JACKPOTS",
                "psap": "nni_prune_ext.methods.psap:PSAP",
                "reconstruction": "nni_prune_ext.methods.reconstruction:RECONSTRUCTION",
                "random": "nni_prune_ext.methods.baselines:RANDOM",
                "taylor": "nni_prune_ext.methods.baselines:TAYLOR",
            }
        ),
        "schedulers": MappingProxyType(
            {
                "agp": "nni_prune_ext.schedules:AGP",
                "asfp": "nni_prune_ext.schedules:ASFP",
                "cosine": "nni_prune_ext.schedules:COSINE",
                "firing_signature": "nni_prune_ext.methods.ftwt_ratios:FIRING_SIGNATURE",
                "ftwt_ratio": "nni_prune_ext.methods.ftwt_ratios:FTWT_RATIO",
                "linear": "nni_prune_ext.schedules:LINEAR",
                "one_shot": "nni_prune_ext.schedules:ONE_SHOT",
                "psap_ratio": "nni_prune_ext.methods.psap_ratios:PSAP_RATIO",
                "replace": "nni_prune_ext.schedules:REPLACE",
                "rewinding": "nni_prune_ext.schedules:REWINDING",
                "short_restriction": "nni_prune_ext.schedules:SHORT_RESTRICTION",
                "short_restriction_cosine": "nni_prune_ext.schedules:SHORT_RESTRICTION_COSINE",
                "uniform_ratio": "nni_prune_ext.schedules:UNIFORM_RATIO",
            }
        ),
        "runtimes": MappingProxyType(
            {
                "onnxruntime-cpu": "nni_prune_ext.runtimes.onnxruntime_cpu:OnnxRuntimeCpu",
                "onnxruntime-cuda": "nni_prune_ext.runtimes.onnxruntime_cuda:OnnxRuntimeCuda",
                "onnxruntime-tensorrt": "nni_prune_ext.runtimes.onnxruntime_tensorrt:OnnxRuntimeTensorRT",
                "torch-compile": "nni_prune_ext.runtimes.torch_compile:TorchCompile",
                "torch-eager": "nni_prune_ext.runtimes.torch_eager:TorchEager",
            }
        ),
    }
)
"""The built-in plugins; a test asserts that the package's entry points say the same."""


@dataclass(frozen=True)
class Plugin:
    """One registered name: where its object is, and which distribution registered it."""

    name: str
    location: str
    distribution: str


def plugins(kind: Kind) -> dict[str, Plugin]:
    """Returns all registered plugins of a kind by name, sorted; nothing is imported.

    Raises:
        PluginError: two distributions claim the same name.
    """
    found = {name: Plugin(name, location, "nni_prune_ext") for name, location in BUILT_IN[kind].items()}
    for entry in entry_points(group=f"nni_prune_ext.{kind}"):
        distribution = entry.dist.name if entry.dist else "unknown"
        location = f"{entry.module}:{entry.attr}"
        known = found.get(entry.name)
        if known is not None and known.location != location:
            raise PluginError(
                f"Two {kind} are called '{entry.name}': '{known.location}' from {known.distribution} "
                f"and '{location}' from "
                f"{distribution}. Names must be unique; uninstall or rename one of them."
            )
        found.setdefault(entry.name, Plugin(entry.name, location, distribution))
    return dict(sorted(found.items()))


def load_plugin(kind: Kind, name: str) -> object:
    """Imports and returns the object registered under a name.

    Raises:
        UnknownPluginError: the name is not registered; the nearest names are suggested.
        PluginError: it is registered but cannot be imported.
    """
    known = plugins(kind)
    if name not in known:
        cutoff = 0.6 if len(name) > 3 else 0.5  # of two letters, one may be wrong
        close = get_close_matches(name, known, n=3, cutoff=cutoff)
        hint = f"Did you mean {' or '.join(repr(c) for c in close)}?" if close else f"There are: {', '.join(known)}."
        raise UnknownPluginError(f"There is no {kind[:-1]} called '{name}'. {hint} `nni-prune-ext list` shows all.")
    plugin = known[name]
    module, _, attribute = plugin.location.partition(":")
    try:
        return attrgetter(attribute)(import_module(module))
    except Exception as error:  # a stranger's module may raise anything while it is imported
        raise PluginError(
            f"The {kind[:-1]} '{name}' of {plugin.distribution} cannot be loaded from '{plugin.location}': "
            f"{type(error).__name__}: {error}. Install what it needs, or uninstall that package."
        ) from error
