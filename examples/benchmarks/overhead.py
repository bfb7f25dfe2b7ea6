"""What exact pruning costs: CPU time of tracing, allocation and removal against torch-pruning's own one-shot step.

Both work on fresh copies of one ResNet-50, in turn within one process and one thread, in random order in every round.
See README.md beside this file for what is in each number.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch_pruning as tp
import torchvision
from torch import nn

from nni_prune_ext.allocation import CostModel, Target, allocate
from nni_prune_ext.certificate import certify_plan, verify_groups
from nni_prune_ext.costs import count_costs
from nni_prune_ext.evaluation import environment
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.scoring.group_reduction import group_importance
from nni_prune_ext.scoring.weight_norms import l1_norm
from nni_prune_ext.surgery import cut_channels

HERE = Path(__file__).resolve().parent
OWED = 1.5
Stages = dict[str, float]


def main() -> None:
    """Measures the rounds and writes medians, ratios and the environment as JSON."""
    options = _parser().parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.model, weights=None).eval()
    x = torch.randn(1, 3, options.pixels, options.pixels)
    entries: dict[str, Callable[[nn.Module, torch.Tensor], tuple[nn.Module, Stages]]] = {
        "nni_prune_ext": ours,
        "torch_pruning": theirs,
    }
    times: dict[str, list[Stages]] = {name: [] for name in entries}
    macs: dict[str, int] = {"dense": count_costs(model, x).macs}
    order = random.Random(0)
    for number in range(options.rounds + 1):
        for name in order.sample(list(entries), len(entries)):
            compact, stages = entries[name](copy.deepcopy(model), x)
            macs[name] = count_costs(compact, x).macs
            if number:  # the first round warms up
                times[name].append(stages)
        print(f"round {number} of {options.rounds}", flush=True)
    document = report(times, macs, options)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: document[key] for key in ("median_cpu_s", "ratio", "macs_left")}, indent=1))


def ours(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, Stages]:
    """Prunes to half of the MACs by L1 scores; certified as by ``nni_prune_ext.prune``, timed stage by stage."""
    clock = _Clock()
    groups = trace_channel_groups(model, x)
    clock.lap("trace")
    cost_model = CostModel.of(model, groups, count_costs(model, x))
    tensors = dict(model.named_parameters())
    scores = {group.name: group_importance(group, tensors, l1_norm) for group in groups}
    plan = allocate(scores, cost_model, targets=[Target("macs", 0.5)]).plan
    clock.lap("allocate")
    compact = cut_channels(model, plan, x, groups=groups).model
    clock.lap("remove")
    verify_groups(model, x, groups)
    clock.lap("verify groups")
    certificate = certify_plan(model, plan, x, groups=groups)
    clock.lap("certify plan")
    assert certificate.exact
    return compact, clock.laps


def theirs(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, Stages]:
    """Prunes 30 % of the channels (about half of the MACs) in one step, as torch-pruning's read-me does."""
    clock = _Clock()
    pruner = tp.pruner.BasePruner(
        model,
        (x,),
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.3,
        ignored_layers=[list(model.modules())[-1]],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    clock.lap("build graph")
    pruner.step()
    clock.lap("step")
    return model, clock.laps


def report(times: dict[str, list[Stages]], macs: dict[str, int], options: argparse.Namespace) -> dict[str, object]:
    """Summarises: medians over the rounds, and medians of the ratios within rounds."""
    own = times["nni_prune_ext"]
    totals = {
        "nni_prune_ext without certificate": [t["trace"] + t["allocate"] + t["remove"] for t in own],
        "nni_prune_ext certificate": [t["verify groups"] + t["certify plan"] for t in own],
        "torch_pruning": [sum(t.values()) for t in times["torch_pruning"]],
    }
    ratios = {
        name: statistics.median(a / b for a, b in zip(totals[name], totals["torch_pruning"]))
        for name in totals
        if name != "torch_pruning"
    }
    stages = {
        f"{name}: {stage}": statistics.median(t[stage] for t in rounds)
        for name, rounds in times.items()
        for stage in rounds[0]
    }
    return {
        "model": options.model,
        "input": [1, 3, options.pixels, options.pixels],
        "rounds": options.rounds,
        "clock": "CPU time of the process, one thread",
        "median_cpu_s": {name: round(statistics.median(values), 4) for name, values in totals.items()},
        "range_cpu_s": {name: [round(min(values), 4), round(max(values), 4)] for name, values in totals.items()},
        "stages_median_cpu_s": {name: round(value, 4) for name, value in stages.items()},
        "ratio": {name: round(value, 3) for name, value in ratios.items()},
        "owed": f"without certificate at most {OWED}",
        "met": ratios["nni_prune_ext without certificate"] <= OWED,
        "macs_left": {name: round(value / macs["dense"], 4) for name, value in macs.items()},
        "torch_pruning": metadata.version("torch-pruning"),
        "environment": environment(),
    }


class _Clock:
    """CPU time between laps."""

    def __init__(self) -> None:
        self.laps: Stages = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        """Notes the CPU time since the last lap."""
        now = time.process_time()
        self.laps[name] = now - self._last
        self._last = time.process_time()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="resnet50", help="a torchvision classification network")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default=str(HERE / "results" / "overhead.json"))
    return parser


if __name__ == "__main__":
    main()
