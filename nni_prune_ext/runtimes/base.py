"""What a runtime is: something that can say whether it works here, and that opens sessions which run a model.

A runtime that third parties add fulfils `InferenceRuntime`; it needs no base class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import nn

Array: TypeAlias = npt.NDArray[np.generic]
Precision: TypeAlias = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Availability:
    """Whether a runtime can be used on this machine, and a sentence that says why or why not."""

    usable: bool
    reason: str


@dataclass(frozen=True)
class RunnableModel:
    """One model in the forms that runtimes take; a runtime refuses a model whose form it needs is missing."""

    onnx_path: Path | None = None
    module: nn.Module | None = None


class InferenceSession(Protocol):
    """A model that is loaded and ready to run."""

    @property
    def providers(self) -> tuple[str, ...]:
        """What may run the model, in order of preference."""
        ...

    @property
    def node_placement(self) -> Mapping[str, int]:
        """How many nodes of the model each provider really ran; empty before the first run."""
        ...

    @property
    def device(self) -> str:
        """``"cpu"`` if threads of this process do the work, so that CPU time counts it; else the kind of device."""
        ...

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Runs the model on arrays in the order of its inputs; returns its outputs as arrays on the host."""
        ...

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        """Puts the inputs where the model runs; returns a function that runs it once and waits for the device.

        For timing: calls of that function copy nothing between host and device.
        """
        ...


ProfileEvent: TypeAlias = Mapping[str, object]
"""One event of ONNX Runtime's own profile, as its JSON file holds it."""


class ProfiledSession(Protocol):
    """A loaded model whose runs are recorded node by node."""

    def run(self, inputs: Sequence[Array]) -> object:
        """Runs the model once."""
        ...

    def end(self) -> list[ProfileEvent]:
        """Ends the recording; returns the events of all runs."""
        ...


@runtime_checkable
class ProfilingRuntime(Protocol):
    """A runtime that can say how long each node of a model takes; whether one can is asked with ``isinstance``."""

    def profiled(self, source: RunnableModel, *, threads: int | None = 1) -> AbstractContextManager[ProfiledSession]:
        """Loads a model for the length of a ``with`` block; see `InferenceRuntime.session`."""
        ...


class InferenceRuntime(Protocol):
    """A way of running a model."""

    @property
    def name(self) -> str:
        """The name under which the runtime is registered."""
        ...

    def availability(self) -> Availability:
        """Says whether the runtime can be used on this machine, without raising."""
        ...

    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> AbstractContextManager[InferenceSession]:
        """Loads a model for the length of a ``with`` block.

        Args:
            source: The model.
            threads: CPU threads for one run; None leaves the choice to the runtime.
            precision: Type of the arithmetic; inputs and outputs stay float32.

        Raises:
            RuntimeUnavailableError: If the runtime is not usable, or if parts of the model fell back to another device.
            ModelError: If the source lacks the form that the runtime needs.
        """
        ...
