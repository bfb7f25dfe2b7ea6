"""PyTorch compiled by ``torch.compile`` with its default compiler, inductor, on the device where the module is.

A network that does not compile in one piece would run in part without compilation: it is refused, never measured.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType

import torch
from torch import nn

from nni_prune_ext.errors import RuntimeUnavailableError
from nni_prune_ext.runtimes.base import Availability, InferenceSession, Precision, RunnableModel
from nni_prune_ext.runtimes.torch_session import TorchSession, module_in_use


class TorchCompile:
    """Compiles the whole module for every shape of its inputs, at the first run on that shape."""

    name = "torch-compile"

    def availability(self) -> Availability:
        """Says whether the compilers are there that inductor calls: C++ for the CPU, Triton for a GPU."""
        missing = _missing_for_cpu()
        if missing:
            return Availability(False, f"torch.compile cannot build code for this CPU: {missing}.")
        if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
            return Availability(False, "torch.compile cannot build code for this GPU: the package triton is missing.")
        return Availability(True, f"PyTorch {torch.__version__} and a C++ compiler are installed.")

    @contextmanager
    def session(
        self, source: RunnableModel, *, threads: int | None = 1, precision: Precision = "fp32"
    ) -> Iterator[InferenceSession]:
        """Prepares a module for compilation, which happens at the first run; see `InferenceRuntime.session`.

        Raises:
            RuntimeUnavailableError: If a compiler is missing, here or at the first run, or if the module does not
                compile in one piece.
            ModelError: If the source has no module.
        """
        availability = self.availability()
        if not availability.usable:
            raise RuntimeUnavailableError(
                f"The runtime {self.name} cannot be used here. {availability.reason} Expected a C++ compiler with the "
                "headers of Python. Install what is missing or choose another runtime."
            )
        with module_in_use(source, self.name, threads=threads, precision=precision) as module:
            yield TorchSession(module, _compiled(module), name="inductor", precision=precision)


def _missing_for_cpu() -> str | None:
    """Returns what inductor needs besides PyTorch to build code for the CPU and does not find here."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX") or default
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler '{compiler}'; install one, or name it in CXX"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if headers.is_file() else f"the headers of Python are missing ('{headers}'); install them"


def _compiled(module: nn.Module) -> Callable[..., object]:
    """Returns what compiles the module at the first call on every shape, and refuses to run any part uncompiled."""

    def call(*inputs: object) -> object:
        return module(*inputs)

    # PyTorch (2.11) counts compiled versions per code object and gives up after eight. A code object of its own keeps
    # the versions of one session apart from those of all other sessions.
    own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    compiled = torch.compile(own, fullgraph=True, dynamic=False)

    def checked(*inputs: object) -> object:
        try:
            return compiled(*inputs)
        except _failures() as error:
            first = str(error).strip().partition("\n")[0]
            raise RuntimeUnavailableError(
                f"The runtime torch-compile cannot compile the model in one piece: {type(error).__name__}: {first}. "
                "Expected a module without control flow that depends on its data, at no more than eight shapes, and a "
                "compiler that works. Measure it with torch-eager; if an earlier compilation was interrupted, name an "
                "empty folder in TORCHINDUCTOR_CACHE_DIR."
            ) from error

    return checked


def _failures() -> tuple[type[Exception], ...]:
    """Returns what dynamo and inductor raise (2.11); the limit of versions is no TorchDynamoException."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # imported here: it takes a second

    return TorchDynamoException, FailOnRecompileLimitHit
