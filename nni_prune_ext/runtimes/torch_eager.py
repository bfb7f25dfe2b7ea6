"""PyTorch itself, without compilation, on the device where the module is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nni_prune_ext.runtimes.base import Availability, InferenceSession, Precision, RunnableModel
from nni_prune_ext.runtimes.torch_session import TorchSession, module_in_use


class TorchEager:
    """Runs the module as it is; TF32 on GPUs follows PyTorch's own settings."""

    name = "torch-eager"

    def availability(self) -> Availability:
        """Says that PyTorch, which this package needs anyway, is there."""
        return Availability(True, f"PyTorch {torch.__version__} runs on the device of the module.")

    @contextmanager
    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> Iterator[InferenceSession]:
        """Runs the module itself; see `InferenceRuntime.session`.

        Raises:
            ModelError: If the source has no module.
        """
        with module_in_use(source, self.name, threads=threads, precision=precision) as module:
            yield TorchSession(module, module, name="torch", precision=precision)
