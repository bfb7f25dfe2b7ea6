"""What the runtimes of PyTorch share: a module in eval mode on its device, and a session around what runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ModelError
from nni_prune_ext.inputs import tensors_in
from nni_prune_ext.runtimes.base import Array, Precision, RunnableModel


@contextmanager
def module_in_use(
    source: RunnableModel, runtime_name: str, *, threads: int | None, precision: Precision
) -> Iterator[nn.Module]:
    """Yields the module in eval mode, and PyTorch with the number of threads; both are switched back at the end.

    Raises:
        ModelError: If the source has no module.
    """
    if source.module is None:
        raise ModelError(
            f"The runtime {runtime_name} needs a PyTorch module, but got an ONNX file only. Expected "
            "RunnableModel(module=...). Pass the module, or use an ONNX Runtime."
        )
    module = deepcopy(source.module).half() if precision == "fp16" else source.module
    training = {part: part.training for part in module.modules()}
    threads_before = torch.get_num_threads()
    try:
        module.eval()
        if threads is not None:
            torch.set_num_threads(threads)
        yield module
    finally:
        torch.set_num_threads(threads_before)
        for part, mode in training.items():
            part.training = mode


class TorchSession:
    """A module on its device, run by itself or by what was compiled from it."""

    def __init__(
        self, module: nn.Module, run_module: Callable[..., object], *, name: str, precision: Precision
    ) -> None:
        self._module = module
        self._run_module = run_module
        self._name = name
        self._dtype = torch.float16 if precision == "fp16" else None
        self._device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))

    @property
    def device(self) -> str:
        """The kind of device where the module is."""
        return self._device.type

    @property
    def providers(self) -> tuple[str, ...]:
        """What runs the module, and where."""
        return (f"{self._name}-{self.device}",)

    @property
    def node_placement(self) -> Mapping[str, int]:
        """The number of layers; all of them run in one place."""
        return {self.providers[0]: sum(1 for part in self._module.modules() if not list(part.children()))}

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Runs the module; outputs are float32 on the host."""
        with torch.no_grad():
            outputs = list(tensors_in(self._run_module(*self._on_device(inputs))))
        return [(t.float() if t.is_floating_point() else t).cpu().numpy() for t in outputs]

    def bind(self, inputs: Sequence[Array]) -> Callable[[], object]:
        """Puts the inputs on the device; returns what runs the module once and waits for the device."""
        tensors = self._on_device(inputs)

        def run_once() -> None:
            with torch.no_grad():
                self._run_module(*tensors)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        return run_once

    def _on_device(self, inputs: Sequence[Array]) -> list[Tensor]:
        tensors = [torch.from_numpy(np.array(array)).to(self._device) for array in inputs]  # a copy, since writable
        return [t.to(self._dtype) if t.is_floating_point() else t for t in tensors]
