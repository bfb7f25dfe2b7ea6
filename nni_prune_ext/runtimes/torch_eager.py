"""PyTorch itself, without compilation, on the device where the module is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ModelError
from nni_prune_ext.inputs import tensors_in
from nni_prune_ext.runtimes.base import Array, Availability, InferenceSession, Precision, RunnableModel


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
        """Switches the module to eval mode and PyTorch to the number of threads, and both back at the end.

        Raises:
            ModelError: If the source has no module.
        """
        if source.module is None:
            raise ModelError(
                "The runtime torch-eager needs a PyTorch module, but got an ONNX file only. Expected "
                "RunnableModel(module=...). Pass the module, or use an ONNX Runtime."
            )
        module = deepcopy(source.module).half() if precision == "fp16" else source.module
        training = {part: part.training for part in module.modules()}
        threads_before = torch.get_num_threads()
        try:
            module.eval()
            if threads is not None:
                torch.set_num_threads(threads)
            yield _TorchSession(module, torch.float16 if precision == "fp16" else None)
        finally:
            torch.set_num_threads(threads_before)
            for part, mode in training.items():
                part.training = mode


class _TorchSession:
    """A module on its device; floating-point inputs are cast to `dtype` where one is given."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        self._module = module
        self._dtype = dtype
        self._device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))

    @property
    def device(self) -> str:
        return self._device.type

    @property
    def providers(self) -> tuple[str, ...]:
        return (f"torch-{self.device}",)

    @property
    def node_placement(self) -> Mapping[str, int]:
        return {self.providers[0]: sum(1 for part in self._module.modules() if not list(part.children()))}

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        with torch.no_grad():
            outputs = list(tensors_in(self._module(*self._on_device(inputs))))
        return [(t.float() if t.is_floating_point() else t).cpu().numpy() for t in outputs]

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        tensors = self._on_device(inputs)

        def run_once() -> None:
            with torch.no_grad():
                self._module(*tensors)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        return run_once

    def _on_device(self, inputs: Sequence[Array]) -> list[Tensor]:
        tensors = [torch.from_numpy(np.array(array)).to(self._device) for array in inputs]  # a copy, since writable
        return [t.to(self._dtype) if t.is_floating_point() else t for t in tensors]
