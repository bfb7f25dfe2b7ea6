"""How accuracy answers when one channel group alone is pruned, and what that says about limits for the next plan.

Every group in turn loses its least important channels, at several ratios, all other groups stay whole, nothing is
trained. After Li et al., "Pruning Filters for Efficient ConvNets", 2017, section 3.2, https://arxiv.org/abs/1608.08710;
here whole channel groups are cut (coupled layers together), and batch-norm statistics may be measured anew after a cut.

Drops of single groups do not add up: limits from them say where to be careful, not what a whole plan will cost.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path

import torch
from torch import Tensor, nn

from nni_prune_ext.allocation import CostModel, LayerLimit, Limits, Target, allocate
from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.checkpoints import Json, differences, fingerprint
from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import CheckpointError, ConfigError
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, trace_channel_groups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.pipeline import method_options, method_spec
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.registry import plugins
from nni_prune_ext.report.number_text import TOP1
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.text_files import write_text
from nni_prune_ext.training import Batches, LossFunction, cross_entropy, recalibrate_batchnorm
from nni_prune_ext.training.forward_only import modes_kept
from nni_prune_ext.training.method_run import MethodRun, seeded

FORMAT = 1
RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Latency:
    """How the latency of a network is measured: where, in words, and as a multiple of the dense network's."""

    where: str
    ratio: Callable[[nn.Module], float]


@dataclass(frozen=True)
class SensitivityPoint:
    """One group, pruned alone.

    Attributes:
        group: name of the group.
        ratio: share of its channels that went, 0–1, as cut.
        metric: of the network after the cut.
        macs_share: MACs left, as a share of the dense network's.
        latency_ratio: latency, as a multiple of the dense network's; ``None`` if it was not measured.
    """

    group: str
    ratio: float
    metric: float
    macs_share: float
    latency_ratio: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """What was measured, group by group.

    Attributes:
        dense: metric of the dense network.
        channels: group → number of its channels, in the order of the network.
        layers: group → layers that write it.
        points: all points; those of one group by rising ratio.
        method: whose scores ranked the channels.
        data: what the metric was measured on, in words.
        metric_name: ``top-1`` (0–1), or what another metric is called.
    """

    dense: float
    channels: Mapping[str, int]
    layers: Mapping[str, tuple[str, ...]]
    points: tuple[SensitivityPoint, ...]
    method: str
    data: str = ""
    metric_name: str = TOP1

    def of(self, group: str) -> list[SensitivityPoint]:
        """Returns the points of one group, by rising ratio."""
        return sorted((own for own in self.points if own.group == group), key=lambda own: own.ratio)

    def drop(self, point: SensitivityPoint) -> float:
        """Returns by how much the metric fell, in its own unit; negative where it rose."""
        return self.dense - point.metric

    def largest_ratios(self, max_drop: float) -> dict[str, float]:
        """Returns group → the largest ratio (0–1) up to which the metric falls by no more than ``max_drop``.

        Between two measured ratios the drop is taken to grow linearly; nothing is concluded beyond the largest one.

        Raises:
            ConfigError: ``max_drop`` is negative or no number.
        """
        checked_drop(max_drop)
        return {name: self._largest_ratio(name, max_drop) for name in self.channels}

    def limits(self, max_drop: float) -> Limits:
        """Returns limits for the allocator: every group's largest ratio as that of the layers that write it.

        Raises:
            ConfigError: see ``largest_ratios``.
        """
        found = self.largest_ratios(max_drop)
        return Limits(layers={escape(self.layers[n][0]): LayerLimit(max_ratio=ratio) for n, ratio in found.items()})

    def nni_config(self, max_drop: float) -> list[dict[str, object]]:
        """Returns the same as a ``config_list`` of NNI 3; layers that share their channels share a mask there.

        Raises:
            ConfigError: see ``largest_ratios``.
        """
        result: list[dict[str, object]] = []
        for number, (name, ratio) in enumerate(self.largest_ratios(max_drop).items()):
            if ratio > 0:
                shared = {"dependency_group_id": f"group_{number}"} if len(self.layers[name]) > 1 else {}
                result.append({"op_names": list(self.layers[name]), "sparse_ratio": round(ratio, 4), **shared})
        return result

    def to_dict(self) -> dict[str, object]:
        """Returns it as JSON-ready values."""
        return asdict(self)

    def _largest_ratio(self, group: str, max_drop: float) -> float:
        before = (0.0, 0.0)
        for point in self.of(group):
            drop = self.drop(point)
            if not drop <= max_drop:
                way = (max_drop - before[1]) / (drop - before[1]) if math.isfinite(drop) else 0.0
                return before[0] + way * (point.ratio - before[0])
            before = (point.ratio, drop)
        return before[0]


def measure_sensitivity(
    model: nn.Module,
    example_inputs: ExampleInputs,
    evaluate: Callable[[nn.Module], float],
    *,
    method: str = "l1",
    options: Mapping[str, object] | None = None,
    ratios: Sequence[float] = RATIOS,
    limits: Limits | None = None,
    batches: Batches | None = None,
    recalibration: Batches | None = None,
    loss: LossFunction = cross_entropy,
    latency: Latency | None = None,
    groups: ChannelGroups | None = None,
    file: Path | None = None,
    data: str = "",
    metric_name: str = TOP1,
    told: Callable[[SensitivityPoint, int, int], None] | None = None,
    seed: int = 0,
) -> Sensitivity:
    """Prunes every channel group alone, at several ratios, and measures; the model is left as it was.

    Args:
        evaluate: a metric of a model, higher is better; on validation data, because limits are chosen by it.
        method: registered pruner with scores; which channels go first.
        ratios: shares (0–1) of a group's channels to remove.
        limits: what may go at most; ``exclude`` and ``multiple`` count, too.
        batches: training batches for methods that score from data.
        recalibration: training batches, batch-norm statistics are measured anew on them after every cut.
        latency: how the latency of the cut networks is measured, see ``latency_on``; by default it is not.
        groups: verified groups, to save the trace.
        file: JSON file that is written after every point; an interrupted call with the same arguments goes on there.
        data: what ``evaluate`` measures on, in words; a file is recognised by it.
        metric_name: what ``evaluate`` measures; a file is recognised by it.
        told: is called after every point with the point, its number and the number of all.
        seed: of everything random.

    Raises:
        ConfigError: a ratio out of range, a method without scores, nothing to prune, or data missing.
        CheckpointError: the file is of another job, or damaged.
        OutputError: the file cannot be written.
    """
    ratios = _checked_ratios(ratios)
    spec = method_spec(method)
    if spec.scores is None:
        scoring = [name for name in plugins("pruners") if method_spec(name).scores is not None]
        raise ConfigError(
            f"The method '{method}' has no scores, expected one that ranks channels without training. Use one of "
            f"{', '.join(scoring)}."
        )
    if spec.needs_data and batches is None:
        raise ConfigError(f"The method '{method}' needs training data, none was given. Pass batches (CLI: --data).")
    chosen = method_options(spec, options)
    groups = groups or verify_groups(model, example_inputs, trace_channel_groups(model, example_inputs), seed=seed)
    if not len(groups):
        raise ConfigError("No channel group of the model can be pruned, expected one. See `nni-prune-ext plan`.")
    run = MethodRun(
        model=copy.deepcopy(model), batches_=batches or (), loss=loss, groups=groups, example_inputs=example_inputs,
        seed=seed,
    )  # fmt: skip
    with modes_kept(run.model), seeded(run.model, seed):
        scores = spec.scores(run, chosen)
    plans = list(_plans(scores, run.cost_model(), ratios, limits or Limits()))
    store = _Store(file, {
        "format": FORMAT, "model": fingerprint(model), "method": method, "options": chosen.model_dump(mode="json"),
        "limits": (limits or Limits()).model_dump(mode="json"), "data": data,
        "metric": metric_name, "recalibrated": _amount(recalibration),
        "latency": None if latency is None else latency.where, "seed": seed,
    })  # fmt: skip
    dense = store.dense if store.dense is not None else evaluate(model)
    store.keep(dense)
    macs = count_costs(model, example_inputs).macs
    for number, (name, ratio, plan) in enumerate(plans, start=1):
        point = store.point(name, ratio)
        if point is None:
            cut = cut_channels(model, plan, example_inputs, groups=groups).model
            if recalibration is not None:
                recalibrate_batchnorm(cut, recalibration, forward=loss, seed=seed)
            share = count_costs(cut, example_inputs).macs / max(macs, 1)
            point = SensitivityPoint(name, ratio, evaluate(cut), share, None if latency is None else latency.ratio(cut))
            store.keep(dense, point)
        if told is not None:
            told(point, number, len(plans))
    wanted = {(name, ratio) for name, ratio, _ in plans}
    points = tuple(own for own in store.points if (own.group, own.ratio) in wanted)
    channels = {group.name: group.num_channels for group in groups}
    return Sensitivity(dense, channels, {g.name: _writers(g) for g in groups}, points, method, data, metric_name)


def _amount(batches: Batches | None) -> Json:
    """Returns how many batches there are, as far as they say."""
    return len(batches) if isinstance(batches, Sized) else batches is not None


def checked_drop(max_drop: float) -> float:
    """Returns the largest drop.

    Raises:
        ConfigError: it is negative or no number.
    """
    if not 0 <= max_drop < math.inf:
        raise ConfigError(
            f"The largest drop is {max_drop:g}, expected 0 or more, in the unit of the metric. Ask for example for "
            "0.01, which is one point of accuracy."
        )
    return max_drop


def _checked_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise ConfigError(f"The ratio {ratio:g} is out of range, expected more than 0 and less than 1. Correct it.")
    if not ratios:
        raise ConfigError("There is no ratio to prune at, expected one or more such as 0.5. Give one.")
    return tuple(sorted(set(ratios)))


def _plans(
    scores: Mapping[str, Tensor], costs: CostModel, ratios: Sequence[float], limits: Limits
) -> list[tuple[str, float, PruningPlan]]:
    """Returns group, share of its channels that goes, and the plan; ratios that come to the same cut occur once."""
    groups, total = costs.groups, costs.groups.num_channels
    flat = {group.name: torch.zeros(group.num_channels) for group in groups}
    largest = allocate(flat, costs, targets=(), limits=limits, scope="local").largest
    found: dict[tuple[str, int], PruningPlan] = {}
    for group in groups:
        alone = {other.name: float(other is group) for other in groups}
        most = round(largest[group.name] * group.num_channels)
        for count in sorted({min(round(ratio * group.num_channels), most) for ratio in ratios} - {0}):
            asked = Target("ratio", (count - 0.5) / total)  # the allocator stops at the first count above it
            made = allocate(scores, costs, targets=[asked], limits=limits, ratios=alone)
            found.setdefault((group.name, group.num_channels - made.kept[group.name]), made.plan)
    return [(name, gone / groups[name].num_channels, plan) for (name, gone), plan in found.items()]


def _writers(group: ChannelGroup) -> tuple[str, ...]:
    """Returns the layers that write a group, as limits and NNI know them."""
    names = (member.tensor for member in group.by_role(Role.WRITER, Role.DEPTHWISE))
    return tuple(dict.fromkeys(name.removesuffix(".weight") for name in names if name.endswith(".weight")))


class _Store:
    """The file that points are kept in as they come; without a file they live in memory only."""

    def __init__(self, file: Path | None, job: dict[str, Json]) -> None:
        self._file, self._job = file, job
        self.dense: float | None = None
        self.points: list[SensitivityPoint] = []
        if file is not None and file.exists():
            self._read(file)

    def point(self, group: str, ratio: float) -> SensitivityPoint | None:
        """Returns a point that is known already."""
        return next((own for own in self.points if (own.group, own.ratio) == (group, ratio)), None)

    def keep(self, dense: float, point: SensitivityPoint | None = None) -> None:
        """Adds a point and writes the file."""
        self.dense = dense
        self.points += [] if point is None else [point]
        if self._file is not None:
            content = {"job": self._job, "dense": dense, "points": [asdict(own) for own in self.points]}
            write_text(self._file, json.dumps(content, indent=1) + "\n")

    def _read(self, file: Path) -> None:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            job, dense = content["job"], float(content["dense"])
            points = [SensitivityPoint(**own) for own in content["points"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"'{file}' holds no sensitivities that can be read ({error}). Expected the file of an earlier call, or "
                "none. Delete it, or choose another file."
            ) from error
        other = differences(job, self._job)
        if other:
            raise CheckpointError(
                f"'{file}' is of another job: {'; '.join(other[:3])}. Expected the same model, data and options. "
                "Choose another file, or delete this one to measure anew."
            )
        self.dense, self.points = dense, points
