"""Errors of the speedup: each is one of NNI's and one of ours, and names the layer and the remedy."""

from __future__ import annotations

from nni.compression.speedup import error_code

from nni_prune_ext.errors import NniPruneExtError


class SpeedupError(NniPruneExtError, error_code.SpeedupError):  # type: ignore[misc]  # NNI has no types
    """Masks cannot be turned into a smaller model."""


class WrappedModelError(SpeedupError):
    """The model still carries the wrappers of a compressor."""


class MaskFileError(SpeedupError):
    """There are no masks: no such file, an unsafe file, or something else than masks in it."""


class FineGrainedMaskError(SpeedupError):
    """The masks silence single weights but no channel."""


class ConstantError(SpeedupError):
    """The compact model cannot be exactly the masked one: a value that no bias stands for, or masks that disagree."""


class ShapeMisMatchError(SpeedupError, error_code.ShapeMisMatchError):  # type: ignore[misc]
    """The masks are those of another model."""

    def __init__(self, msg: str) -> None:
        error_code.SpeedupError.__init__(self, msg)  # NNI's own constructor takes no message


class EmptyLayerError(SpeedupError, error_code.EmptyLayerError):  # type: ignore[misc]
    """A layer would lose all its channels."""

    def __init__(self, msg: str) -> None:
        error_code.SpeedupError.__init__(self, msg)  # NNI's own constructor takes no message
