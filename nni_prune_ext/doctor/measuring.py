"""Profiles of two networks, recorded in turns, and the time of a node that does nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.evaluation import WARM_UPS
from nni_prune_ext.runtimes.base import Array, InferenceRuntime, ProfilingRuntime, RunnableModel
from nni_prune_ext.runtimes.onnxruntime_profile import NodeTimes, read_profile

_EMPTY_NODES = 16


def profiling(runtime: InferenceRuntime) -> ProfilingRuntime:
    """Returns a runtime as one that records nodes.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(runtime, ProfilingRuntime):
        raise ConfigError(
            f"The runtime {runtime.name} does not say how long each node takes. Expected one that does, such as "
            "onnxruntime-cpu. For a GPU, record profiles with ONNX Runtime there and pass them (--profile)."
        )
    return runtime


def profile_in_turns(
    runtime: ProfilingRuntime,
    paths: Sequence[Path],
    inputs: Sequence[Sequence[Array]],
    *,
    rounds: int,
    threads: int | None,
    seed: int,
) -> list[tuple[NodeTimes, ...]]:
    """Runs the networks in random order within each round; returns the times of the nodes of each."""
    order = random.Random(seed)
    with ExitStack() as stack:
        models = [RunnableModel(onnx_path=path) for path in paths]
        sessions = [stack.enter_context(runtime.profiled(model, threads=threads)) for model in models]
        for number in range(WARM_UPS + rounds):
            for session in order.sample(sessions, len(sessions)):
                session.run(inputs[number % len(inputs)])
        return [read_profile(session.end(), skip=WARM_UPS) for session in sessions]


def empty_node_ms(runtime: ProfilingRuntime, *, rounds: int, threads: int | None) -> float:
    """Returns the median time of a node that works on one number."""
    names = [f"value{index}" for index in range(_EMPTY_NODES + 1)]
    nodes = [helper.make_node("Neg", [a], [b], name=b) for a, b in pairwise(names)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "empty", ends[:1], ends[1:])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "empty.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
        one = [[np.ones(1, np.float32)]]
        (nodes_run,) = profile_in_turns(runtime, [path], one, rounds=rounds, threads=threads, seed=0)
    return float(np.median([node.ms for node in nodes_run]))
