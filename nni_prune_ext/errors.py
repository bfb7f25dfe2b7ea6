"""The exception tree: everything that a user can cause is a subclass of NniPruneExtError.

Every message has four parts: what was wrong, the value seen, what was expected, what to do next. The command
line prints the message without a traceback and leaves with exit code 2.

    NniPruneExtError
    ├── UnknownPluginError   a pruner, scheduler or runtime name that nobody registered
    ├── PluginError          a registered plugin that does not load or breaks its contract
    ├── ConfigError          an option out of range
    ├── ModelError           a model that cannot be built, or example inputs that do not fit
    ├── WeightsError         a weights file that is missing, unsafe or of another model
    ├── DataError            a data source that cannot be opened
    ├── TraceError           a model whose channels cannot be followed
    ├── PlanError            a plan that is corrupt, foreign or for another model
    ├── TargetError          a target that is out of range or cannot be reached
    ├── CertificateError     a removal that is not exact
    ├── ExportError          a model that cannot be written as ONNX
    │   └── ParityError      an ONNX file whose outputs differ from PyTorch's
    ├── RuntimeUnavailableError   a runtime that cannot be used here, or that fell back silently
    └── OutputError          a place that cannot be written to
"""

from __future__ import annotations


class NniPruneExtError(Exception):
    """Base of all errors that a user of this package can cause and mend."""


class UnknownPluginError(NniPruneExtError):
    """No pruner, scheduler or runtime is registered under the name asked for."""


class PluginError(NniPruneExtError):
    """A registered plugin cannot be imported, or what it returns breaks its contract."""


class ConfigError(NniPruneExtError):
    """An option has a value outside its range."""


class ModelError(NniPruneExtError):
    """A model specification cannot be built, or the example inputs do not fit the model."""


class WeightsError(NniPruneExtError):
    """A weights file is missing, unsafe to read, or belongs to another model."""


class DataError(NniPruneExtError):
    """A data source cannot be opened or holds nothing usable."""


class TraceError(NniPruneExtError):
    """The channels of a model cannot be followed from its inputs to its outputs."""


class PlanError(NniPruneExtError):
    """A pruning plan is corrupt, of a foreign format, or made for another model."""


class TargetError(NniPruneExtError):
    """A target is out of range, or no plan within the limits reaches it."""


class CertificateError(NniPruneExtError):
    """Removing the planned channels does not give the same function as silencing them."""


class ExportError(NniPruneExtError):
    """A model cannot be written as an ONNX file."""


class ParityError(ExportError):
    """The outputs of an exported file differ from those of the PyTorch model."""


class RuntimeUnavailableError(NniPruneExtError):
    """A runtime cannot be used on this machine, or fell back to another provider."""


class OutputError(NniPruneExtError):
    """The place where results should go cannot be written to."""
