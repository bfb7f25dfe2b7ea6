"""What the user asks for: targets, and the limits that no plan may exceed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nni_prune_ext.errors import ConfigError, TargetError
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups
from nni_prune_ext.graph.label_book import Role

Metric = Literal["macs", "params", "memory", "ratio", "sparsity", "latency"]
SHARES = ("ratio", "sparsity")
"""The metrics that say how much goes; the others say how much may stay."""
Scope = Literal["global", "local"]
LATENCY_TOLERANCE = 0.03
"""By how much a measured latency may lie above the one asked for and still meet it, as a share of it."""
WIDE = 128
"""Networks with a layer of so many channels or more keep widths at multiples unless the user says otherwise."""
_SMALLEST_ABSOLUTE = 1000
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_PER_MILLISECOND = {"us": 1e3, "µs": 1e3, "ms": 1.0, "s": 1e-3}
_NUMBER = r"([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)"


@dataclass(frozen=True)
class Target:
    """What the user asks for.

    Attributes:
        metric: ``macs``, ``params`` or ``memory`` (bytes of the weights): an upper bound; ``ratio``: the share of
            prunable channels to remove, a lower bound; ``sparsity``: the share of single weights to mask, a lower bound
            for methods that hand over masks of weights; ``latency``: an upper bound for the measured time of one run.
        value: up to 1 a share of the dense model (``macs=0.5`` leaves half), above 1 an absolute number.
        unit: ``ms`` where ``value`` is a latency in milliseconds; empty for everything else, shares of the dense
            latency included.
    """

    metric: Metric
    value: float
    unit: Literal["", "ms"] = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads ``metric=value`` with an optional k, M or G, for example ``macs=0.5`` or ``params=1.2M``.

        A latency is a share of the dense one (``latency=0.7``) or has a unit: ``2.0ms``, ``350us``, ``0.002s``.

        Raises:
            TargetError: it is not of that form, out of range, or neither a share nor a plausible absolute number.
        """
        if re.match(r"\s*latency\s*=", text):
            return cls._parse_latency(text)
        match = re.fullmatch(rf"\s*(macs|params|memory|ratio|sparsity)\s*=\s*{_NUMBER}\s*([kKmMgG]?)\s*", text)
        if match is None:
            raise TargetError(
                f"Cannot read the target '{text}'. Expected METRIC=VALUE with METRIC macs, params, memory, latency, "
                "ratio or sparsity and VALUE a share (macs=0.5) or a number with k, M or G (macs=62M)."
            )
        target = cls(cast("Metric", match[1]), _number(match[2], text) * _UNITS[match[3].lower()])
        value = target.value
        target.check()
        if 1 < value < _SMALLEST_ABSOLUTE and not match[3]:
            raise TargetError(
                f"The target {target} is out of range: above 1 it is an absolute number, and hardly a network is that "
                f"small. Did you mean a share like 0.5? If not, write the number in thousands: "
                f"{target.metric}={value / 1000:g}k."
            )
        return target

    @classmethod
    def _parse_latency(cls, text: str) -> Target:
        match = re.fullmatch(rf"\s*latency\s*=\s*{_NUMBER}\s*([^\W\d]*)\s*", text)
        if match is None or (match[2] and match[2] not in _PER_MILLISECOND):
            raise TargetError(
                f"Cannot read the target '{text}'. Expected a share of the dense latency (latency=0.7), or a time with "
                "one of the units us, ms and s: latency=2.0ms, latency=350us."
            )
        value = _number(match[1], text)
        target = cls("latency", value / _PER_MILLISECOND[match[2]], "ms") if match[2] else cls("latency", value)
        target.check()
        return target

    def check(self) -> None:
        """Refuses values out of range.

        Raises:
            TargetError: not positive, a share to remove of 1 or more, or a latency above 1 without a unit.
        """
        if self.unit and self.metric != "latency":
            raise TargetError(
                f"The target {self} has the unit '{self.unit}', but only a latency has one. Leave the unit out."
            )
        if self.metric == "latency" and not self.unit and self.value > 1:
            raise TargetError(
                f"The target {self} has no unit, expected one above 1: up to 1 it is a share of the dense latency. "
                f"Write latency={self.value:g}ms, or a share such as latency=0.7."
            )
        if not self.value > 0 or (self.metric in SHARES and self.value >= 1) or not math.isfinite(self.value):
            span = "above 0 and below 1" if self.metric in SHARES else "above 0: a share up to 1, or an absolute number"
            raise TargetError(f"The target {self} is out of range. Expected a value {span}.")

    def bound(self, dense: float) -> float:
        """Returns the bound in the metric's own unit, given the dense model's value."""
        absolute = self.metric in SHARES or self.value > 1 or self.unit
        return self.value if absolute else self.value * dense

    def __str__(self) -> str:
        """Returns ``metric=value``, with the unit of a latency."""
        return f"{self.metric}={self.value:g}{self.unit}"


@dataclass(frozen=True)
class Achieved:
    """One target, asked and reached, in the metric's own unit (latency: milliseconds)."""

    target: Target
    dense: float
    asked: float
    achieved: float

    def __str__(self) -> str:
        """Says what was asked and achieved."""
        if self.target.metric != "latency":
            return f"{self.target}: asked {self.asked:,.6g}, achieved {self.achieved:,.6g}"
        share = self.achieved / self.dense if self.dense else math.nan
        return (
            f"{self.target}: asked {self.asked:,.4g} ms, achieved {self.achieved:,.4g} ms, {share:.3f} of the dense "
            f"{self.dense:,.4g} ms: {'met' if self.met else 'MISSED'}, {LATENCY_TOLERANCE:.0%} count as noise"
        )

    @property
    def met(self) -> bool:
        """Says whether the bound holds."""
        if self.target.metric in SHARES:
            return self.achieved >= self.asked - 1e-12
        if self.target.metric == "latency":  # measured, so it has an error
            return self.achieved <= self.asked * (1 + LATENCY_TOLERANCE)
        return self.achieved <= self.asked + 1e-9


class LayerLimit(BaseModel):
    """Smallest and largest pruning ratio (0–1) of the groups that a name pattern matches, and a multiple of their own.

    Attributes:
        min_ratio: smallest share of the channels that goes.
        max_ratio: largest share of the channels that may go.
        multiple: like that of ``Limits``, in its place; ``None`` leaves that one in force.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_ratio: float = Field(default=0.0, ge=0, lt=1)
    max_ratio: float = Field(default=1.0, ge=0, le=1)
    multiple: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> LayerLimit:
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio {self.min_ratio} is above max_ratio {self.max_ratio}")
        return self


class Limits(BaseModel):
    """What no plan may exceed.

    Attributes:
        max_ratio: largest share of a group's channels that may go.
        min_channels: smallest number of channels that stay in a group.
        multiple: the root's width stays a multiple of this where the group is pruned at all; rounding keeps more
            channels. ``None`` takes what runtimes like in a wide network (``usual_multiple``), but less where a target
            could not be met closely or the group's own limits leave less room, and 1 where ratios say what goes: the
            scope ``local``, a ratio policy, a layer's ``min_ratio``. With a latency target ``prune`` takes what a
            probe of the runtime finds.
        exclude: name patterns (``fnmatch``) of layers whose groups stay whole.
        layers: name pattern → limits of its own; the first match counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_ratio: float = Field(default=0.9, gt=0, le=1)
    min_channels: int = Field(default=1, ge=1)
    multiple: int | None = Field(default=None, ge=1)
    exclude: tuple[str, ...] = ()
    layers: dict[str, LayerLimit] = {}

    def excludes(self, layer: str) -> bool:
        """Says whether a layer is excluded by its own name."""
        return any(fnmatchcase(layer, pattern) for pattern in self.exclude)

    def of_group(self, group: ChannelGroup) -> LayerLimit:
        """Returns the smallest and largest pruning ratio of one group."""
        if any(_matches(group, pattern) for pattern in self.exclude):
            return LayerLimit(min_ratio=0.0, max_ratio=0.0)
        return self._own(group) or LayerLimit(min_ratio=0.0, max_ratio=self.max_ratio)

    def multiple_of(self, group: ChannelGroup) -> int | None:
        """Returns what the width of a group's root stays a multiple of, if the user said so."""
        own = self._own(group)
        return self.multiple if own is None or own.multiple is None else own.multiple

    def check(self, groups: ChannelGroups) -> None:
        """Refuses patterns that match no layer of the model.

        Raises:
            ConfigError: such a pattern, with the nearest names.
        """
        names = {name.rpartition(".")[0] for name in groups.shapes} | {m for g in groups for m in _layer_names(g)}
        for pattern in (*self.exclude, *self.layers):
            if not any(fnmatchcase(name, pattern) for name in names):
                close = get_close_matches(pattern, sorted(names), n=3) or sorted(names)[:3]
                raise ConfigError(
                    f"The limit for '{pattern}' matches no layer of the model. Expected a layer's "
                    "name or a pattern such as "
                    f"'layer1.*'; names near it: {', '.join(close)}. `nni-prune-ext plan` lists all layers."
                )

    def _own(self, group: ChannelGroup) -> LayerLimit | None:
        return next((limit for pattern, limit in self.layers.items() if _matches(group, pattern)), None)


def usual_multiple(width: int, widest: int) -> int:
    """Returns what a width stays a multiple of unless the user says otherwise: 16, 8 or 1.

    Runtimes compute blocks of channels: ONNX Runtime's CPU provider 16 (8 without AVX-512), tensor cores 8. A width
    between two multiples costs as much as the next one or, without a multiple of 4, up to twice that. In a network of
    narrow layers only, steps of that size cost accuracy that time does not repay, so there each channel counts.
    Measured in docs/how-to/choose_a_target.md.

    Args:
        width: of the layer in the dense network.
        widest: that of the network's widest layer with channels to remove.
    """
    if widest < WIDE:
        return 1
    return next((multiple for multiple in (16, 8) if width >= 2 * multiple), 1)


def _number(digits: str, text: str) -> float:
    try:
        return float(digits)
    except ValueError as error:
        raise TargetError(
            f"Cannot read '{digits}' in the target '{text}' as a number. Write for example macs=0.5."
        ) from error


def _matches(group: ChannelGroup, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in _layer_names(group))


def _layer_names(group: ChannelGroup) -> Iterator[str]:
    for member in group.by_role(Role.WRITER, Role.DEPTHWISE):
        yield member.tensor.removesuffix(".weight")
