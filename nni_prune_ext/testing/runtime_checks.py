"""What every runtime promises: it runs the model where it says, or says in a sentence why it cannot."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nni_prune_ext.errors import ModelError, RuntimeUnavailableError
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.runtimes.base import InferenceRuntime, InferenceSession, RunnableModel

_SHAPE = (3, 8, 8)
_TOLERANCE = 1e-4


def tiny_runnable(folder: Path) -> RunnableModel:
    """Writes a tiny network to a folder; returns it in the forms that runtimes take. It maps (N, 3, 8, 8) to (N, 5)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        ).eval()
    path = folder / "tiny.onnx"
    export_onnx(module, torch.zeros(1, *_SHAPE), path)
    return RunnableModel(path, module)


def check_runtime(runtime: InferenceRuntime, model: RunnableModel) -> None:
    """Checks every promise of a runtime.

    Args:
        runtime: the runtime.
        model: what ``tiny_runnable`` returned.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    _require(bool(runtime.name.strip()), "A runtime has a name.")
    availability = runtime.availability()
    reason = availability.reason.strip()
    _require(
        " " in reason and reason.endswith("."), "Availability explains itself in a sentence that ends with a full stop."
    )
    if not availability.usable:
        _require(
            _refuses(runtime, model),
            "A runtime that is not usable raises RuntimeUnavailableError when a session opens.",
        )
        return
    assert model.module is not None
    model.module.train()
    threads = torch.get_num_threads()
    try:
        with runtime.session(model) as session:
            _check_session(session, model)
        _require(model.module.training, "A runtime leaves the module in the mode in which it found it.")
        _require(threads == torch.get_num_threads(), "A runtime gives PyTorch's threads back.")
        _require(_lets_errors_out(runtime, model), "A session does not swallow errors.")
    finally:
        model.module.eval()
    _require(
        _refuses_nothing_to_run(runtime), "A runtime refuses a source without the form that it needs with a ModelError."
    )


def _check_session(session: InferenceSession, model: RunnableModel) -> None:
    generator = np.random.default_rng(0)
    for batch_size in (1, 4):
        x = generator.standard_normal((batch_size, *_SHAPE)).astype(np.float32)
        before = x.copy()
        outputs = session.run([x])
        _require(
            len(outputs) == 1 and outputs[0].dtype == np.float32,
            "Outputs are float32 arrays, one per output of the model.",
        )
        expected = _reference(model, x)
        _require(
            outputs[0].shape == expected.shape, f"The output has the shape {expected.shape}, not {outputs[0].shape}."
        )
        error = float(np.abs(outputs[0].astype(np.float32) - expected).max() / np.abs(expected).max())
        _require(error <= _TOLERANCE, f"A runtime computes what PyTorch computes: relative difference {error:.1e}.")
        _require(np.array_equal(outputs[0], session.run([x])[0]), "A second run gives the same numbers.")
        session.bind([x])()
        _require(np.array_equal(before, x), "A runtime leaves its inputs unchanged.")
    placement = session.node_placement
    _require(bool(session.providers), "A session reports its providers.")
    _require(bool(placement), "A session that has run reports how many nodes each provider ran.")
    _require(
        placement.get(session.providers[0], 0) > 0,
        f"The first provider, {session.providers[0]}, runs the model; it fell back to {', '.join(placement)}.",
    )
    _require(set(placement) <= set(session.providers), "Only reported providers run nodes.")
    _require(bool(session.device), "A session names its device.")


def _reference(model: RunnableModel, x: NDArray[np.float32]) -> NDArray[np.float32]:
    assert model.module is not None
    device = next(model.module.parameters()).device
    mode = model.module.training
    with torch.no_grad():
        result: NDArray[np.float32] = model.module.eval()(torch.from_numpy(x).to(device)).cpu().numpy()
    model.module.train(mode)
    return result


def _refuses(runtime: InferenceRuntime, model: RunnableModel) -> bool:
    try:
        with runtime.session(model):
            return False
    except RuntimeUnavailableError:
        return True


def _refuses_nothing_to_run(runtime: InferenceRuntime) -> bool:
    try:
        with runtime.session(RunnableModel()):
            return False
    except ModelError:
        return True


def _lets_errors_out(runtime: InferenceRuntime, model: RunnableModel) -> bool:
    swallowed = False
    with suppress(_OwnError):
        with runtime.session(model):
            raise _OwnError
        swallowed = True  # type: ignore[unreachable]  # reached if the session swallows the error
    return not swallowed


class _OwnError(Exception):
    """An error that no runtime knows."""


def _require(condition: bool, promise: str) -> None:
    if not condition:
        raise AssertionError(promise)
