"""Reads ONNX Runtime's profile: how long each node took in each run.

The profile names nodes of the *optimised* graph and times them by the wall clock, in whole microseconds. On the CPU
that is the time of the kernel; on a GPU it is what the host spent on launching it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from nni_prune_ext.errors import ModelError
from nni_prune_ext.runtimes.base import ProfileEvent

_SUFFIX = "_kernel_time"
_CONTAINERS = frozenset(
    {"If", "Loop", "Scan"}
)  # their time is that of the nodes inside, which have events of their own


@dataclass(frozen=True)
class NodeTimes:
    """One node of the graph that ONNX Runtime really runs.

    Attributes:
        name: of the node; `read_profile` keeps nodes of one name apart by their index.
        op: its operator, which fusion may have changed.
        provider: what ran it.
        output_shape: of its first output in the last run; empty where the profile holds none.
        ms: ``(num_runs,)`` milliseconds, 0 where the node did not run.
    """

    name: str
    op: str
    provider: str
    output_shape: tuple[int, ...]
    ms: NDArray[np.float64]


def load_profile(path: Path) -> list[ProfileEvent]:
    """Reads a profile that ONNX Runtime wrote (``SessionOptions.enable_profiling``).

    Raises:
        ModelError: the file cannot be read or is no profile.
    """
    try:
        events = json.loads(path.read_bytes())
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise ValueError("it is no list of events")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"'{path}' cannot be read as a profile ({error}). Expected the JSON file that ONNX Runtime writes with "
            "SessionOptions.enable_profiling when end_profiling() is called. Record it again."
        ) from error
    return events


def read_profile(events: Sequence[ProfileEvent], *, skip: int = 1) -> tuple[NodeTimes, ...]:
    """Returns the times of all nodes, in the order of their first run.

    Args:
        events: of one session.
        skip: runs at the beginning that do not count.

    Raises:
        ModelError: the events hold no runs beyond those skipped, or lack what a profile has.
    """
    try:
        starts = sorted(_number(event, "ts") for event in events if event.get("name") == "model_run")[skip:]
        found: dict[tuple[str, str], list[tuple[int, ProfileEvent]]] = {}
        for event in events:
            name = str(event["name"])
            if event.get("cat") != "Node" or not name.endswith(_SUFFIX):
                continue
            run = bisect_right(starts, _number(event, "ts")) - 1
            arguments = _arguments(event)
            if run >= 0 and arguments["op_name"] not in _CONTAINERS:
                key = (name.removesuffix(_SUFFIX), str(arguments.get("node_index")))
                found.setdefault(key, []).append((run, event))
        if not found:
            raise ValueError(f"{len(starts)} runs after the first {skip}, with no node in them")
        return tuple(_node(name, seen, len(starts)) for (name, _), seen in found.items())
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"This is not a usable profile of ONNX Runtime ({error}). Expected events of several runs of one session, "
            "with names, times and operators of nodes. Record it again."
        ) from error


def _node(name: str, seen: Sequence[tuple[int, ProfileEvent]], num_runs: int) -> NodeTimes:
    ms = np.zeros(num_runs)
    for run, event in seen:  # a node in a loop occurs several times in a run
        ms[run] += _number(event, "dur") / 1e3
    arguments = _arguments(seen[-1][1])
    shapes = cast("Sequence[Mapping[str, Sequence[int]]]", arguments.get("output_type_shape") or [{}])
    shape = next(iter(shapes[0].values()), ())
    return NodeTimes(name, str(arguments["op_name"]), str(arguments.get("provider", "")), tuple(shape), ms)


def _arguments(event: ProfileEvent) -> Mapping[str, object]:
    return cast("Mapping[str, object]", event["args"])


def _number(event: ProfileEvent, key: str) -> float:
    return float(cast("float", event[key]))
