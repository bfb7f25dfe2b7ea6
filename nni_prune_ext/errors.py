"""The exception tree: everything that a user can cause is a subclass of NniPruneExtError.

Every message has four parts: what was wrong, the value seen, what was expected, what to do next. The command
line prints the message without a traceback and leaves with exit code 2 (1 where the work itself failed honestly:
CertificateError, ParityError, TrainingError).

    NniPruneExtError
    ├── UnknownPluginError   a pruner, scheduler or runtime name that nobody registered
    ├── PluginError          a registered plugin that does not load or breaks its contract
    ├── ConfigError          an option out of range
    │   └── ConfigListError  an entry of an NNI config_list that NNI would accept in silence; also a ValueError
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
    ├── TrainingError        training that cannot go on: a loss that is no number, no memory left, a loader that raised
    ├── CheckpointError      checkpoints of another job, or none that can be read
    ├── RecipeError          a recipe with an unknown, missing or conflicting key
    ├── ArtefactError        an artefact folder with a damaged or foreign part
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


class ConfigListError(ConfigError, ValueError):
    """An entry of an NNI config_list selects nothing, contradicts itself or is out of range."""


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


class TrainingError(NniPruneExtError):
    """Training cannot go on: the loss is no number, memory ran out, or the data loader raised."""


class CheckpointError(NniPruneExtError):
    """Checkpoints belong to another job, or none of them can be read."""


class RecipeError(NniPruneExtError):
    """A recipe has a key that is unknown, missing, out of range or in conflict with another one."""


class ArtefactError(NniPruneExtError):
    """An artefact folder lacks a part, or a part is damaged or foreign."""


class OutputError(NniPruneExtError):
    """The place where results should go cannot be written to."""
