"""One JSON object per line for machines: each says in ``event`` what it is, and holds no NaN or infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TypeAlias

Strict: TypeAlias = "dict[str, Strict] | list[Strict] | str | int | float | bool | None"


def json_line(event: str, values: Mapping[str, object]) -> str:
    """Returns one line without its end; NaN and infinity become ``null``, which every JSON reader takes.

    Example:
        >>> json_line("epoch", {"loss": float("nan"), "metric": 0.5})
        '{"event": "epoch", "loss": null, "metric": 0.5}'
    """
    return json.dumps({"event": event, **finite_values(values)}, allow_nan=False)


def finite_values(values: Mapping[str, object]) -> dict[str, Strict]:
    """Returns JSON values, with ``None`` for every number that is NaN or infinite, however deep."""
    return {str(key): _finite(value) for key, value in values.items()}


def _finite(value: object) -> Strict:
    if isinstance(value, Mapping):
        return finite_values(value)
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"A {type(value).__name__} is no JSON value")
