"""Do three hosts decide alike? One score, one ratio; the plans of our pipeline, torch-pruning and NNI side by side.

Per model and ratio, on copies of one model with random weights:

* own: ``nni_prune_ext.prune`` with ``scope="local"``;
* torch-pruning: its own ``BasePruner`` with our importance, the plan read back from its history, and the pruned tensors
  compared with ours bit for bit;
* certified: ``CertifiedPruner``, the plan from its report;
* replay: our plan written as torch-pruning's history and replayed by torch-pruning, tensors compared bit for bit;
* NNI: our NNI pruner over all convolutions and linear layers but the protected ones, the plan of its masks.

The hosts round differently: torch-pruning removes n − ⌊n (1 − r)⌋ channels of a layer with n, NNI ⌊n r⌋, ours as few as
give the ratio over all layers. At a ratio of 0.5 and even widths these are one number; at other ratios the counts
differ by one per layer, which the table shows.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

from nni_prune_ext import prune, trace_channel_groups, verify_groups
from nni_prune_ext.errors import NniPruneExtError
from nni_prune_ext.evaluation import environment
from nni_prune_ext.graph.channel_groups import ChannelGroups
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.pruning import pruner_for
from nni_prune_ext.torch_pruning import CertifiedPruner, importance_for, plan_from_history, plan_to_history

HERE = Path(__file__).resolve().parent
MODELS = [
    "resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0",
    "regnet_y_400mf", "densenet121", "googlenet", "squeezenet1_1", "alexnet", "convnext_tiny", "fcn_resnet50",
    "deeplabv3_mobilenet_v3_large", "shufflenet_v2_x0_5",
]  # fmt: skip
WITHOUT_EXTRAS: dict[str, dict[str, object]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "fcn_resnet50": {"weights_backbone": None},
    "deeplabv3_mobilenet_v3_large": {"weights_backbone": None},
}
Row = dict[str, object]


def main() -> None:
    """Measures every model and ratio, and writes the rows as JSON after each."""
    options = _parser().parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    models, ratios = (["resnet18"], [0.5]) if options.smoke else (options.models, options.ratios)
    out = options.out or ("" if options.smoke else str(HERE / "results" / "three_ways.json"))
    rows: list[Row] = []
    for name in models:
        for ratio in ratios:
            row = compared(name, ratio, options)
            rows.append(row)
            print(line_of(row), flush=True)
            if out:
                document = {
                    "date": datetime.now(tz=timezone.utc).isoformat(timespec="seconds"),
                    "environment": environment(),
                    "method": options.method,
                    "pixels": options.pixels,
                    "rows": rows,
                }
                Path(out).write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
                Path(out).with_suffix(".md").write_text(table(rows), encoding="utf-8")


def compared(name: str, ratio: float, options: argparse.Namespace) -> Row:
    """Returns one row: what each host would remove, and whether that is the same."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **WITHOUT_EXTRAS.get(name, {})).eval()
    x = torch.randn(1, 3, options.pixels, options.pixels)
    started = time.process_time()
    groups = verify_groups(model, x, trace_channel_groups(model, x))
    own = prune(model, x, method=options.method, target=f"ratio={ratio}", scope="local", groups=groups)
    plans: dict[str, PruningPlan | str] = {"own": own.plan}
    for host, run in {"torch_pruning": vanilla, "certified": certified, "nni": through_nni}.items():
        try:
            plans[host] = run(copy.deepcopy(model), x, groups, ratio, options.method, own.removed_only.state_dict())
        except (NniPruneExtError, RuntimeError, ZeroDivisionError, TypeError, IndexError) as error:
            plans[host] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    row: Row = {"model": name, "ratio": ratio, "groups": len(groups), "channels": sum(own.plan.widths.values())}
    row["replay"] = replayed(copy.deepcopy(model), x, groups, own.plan, own.removed_only.state_dict())
    for host, plan in plans.items():
        if isinstance(plan, str):
            row[host] = plan
        else:
            row[host] = {
                "removed": plan.num_removed,
                "same_plan": plan.removed == own.plan.removed,
                "nested": all(
                    nested(plan.removed.get(root, ()), channels) for root, channels in own.plan.removed.items()
                ),
            }
    row["cpu_seconds"] = round(time.process_time() - started, 1)
    return row


def vanilla(
    model: nn.Module, x: Tensor, groups: ChannelGroups, ratio: float, method: str, expected: dict[str, Tensor]
) -> PruningPlan:
    """Prunes with torch-pruning's own pruner and our importance; at equal plans the tensors must be equal, too."""
    pruner = tp.pruner.BasePruner(
        model, (x,), importance_for(method)(model, x), pruning_ratio=ratio, ignored_layers=protected(model, groups),
        in_channel_groups={}, out_channel_groups={}, num_heads={},
    )  # fmt: skip
    pruner.step()
    plan = plan_from_history(groups, pruner.pruning_history())
    found = model.state_dict()
    if all(found[key].shape == value.shape for key, value in expected.items()):
        unequal = [key for key, value in expected.items() if not torch.equal(found[key], value)]
        if unequal:
            raise RuntimeError(f"{len(unequal)} tensors differ from ours, the first being {unequal[0]}")
    return plan


def certified(
    model: nn.Module, x: Tensor, groups: ChannelGroups, ratio: float, method: str, expected: dict[str, Tensor]
) -> PruningPlan:
    """Prunes with our certified pruner."""
    pruner = CertifiedPruner(
        model, x, importance_for(method)(model, x), pruning_ratio=ratio, ignored_layers=protected(model, groups)
    )
    removal = pruner.step().removal
    if removal is None or removal.certificate is None or not removal.certificate.exact:
        raise RuntimeError("nothing was removed, or without an exact certificate")
    return removal.plan


def through_nni(
    model: nn.Module, x: Tensor, groups: ChannelGroups, ratio: float, method: str, expected: dict[str, Tensor]
) -> PruningPlan:
    """Makes masks with our NNI pruner and reads them as a plan."""
    names = {id(module): name for name, module in model.named_modules()}
    kept = {names[id(module)] for module in protected(model, groups)}
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and n not in kept]
    pruner = pruner_for(method)(model, [{"op_names": layers, "sparse_ratio": ratio}], dummy_input=x)
    pruner.compress()
    plan: PruningPlan = pruner.plan()
    return plan


def replayed(model: nn.Module, x: Tensor, groups: ChannelGroups, plan: PruningPlan, expected: dict[str, Tensor]) -> str:
    """Says whether torch-pruning, replaying our plan's history on a fresh model, leaves our tensors."""
    try:
        graph = tp.DependencyGraph().build_dependency(model, (x,), verbose=False)
    except ZeroDivisionError as error:
        return type(error).__name__
    graph.load_pruning_history(plan_to_history(plan, groups))
    found = model.state_dict()
    return "equal" if all(torch.equal(found[key], value) for key, value in expected.items()) else "DIFFERENT"


def protected(model: nn.Module, groups: ChannelGroups) -> list[nn.Module]:
    """Returns the layers whose channels must stay: the outputs."""
    return [model.get_submodule(p.root) for p in groups.protected if f"{p.root}.weight" in groups.shapes]


def nested(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Says whether one set of channels holds the other: the hosts agree on the order and differ in the count."""
    return set(first) <= set(second) or set(second) <= set(first)


def line_of(row: Row) -> str:
    """Returns one row of the table."""
    cells = [str(row["model"]), str(row["ratio"]), str(row["channels"])]
    for host in ("own", "torch_pruning", "certified", "nni"):
        found = row[host]
        if not isinstance(found, dict):
            cells.append(str(found).split(":")[0])
        elif host == "own":
            cells.append(str(found["removed"]))
        else:
            verdict = "same" if found["same_plan"] else "same order" if found["nested"] else "DIFFERENT"
            cells.append(f"{found['removed']} ({verdict})")
    cells.append(str(row["replay"]))
    return f"| {' | '.join(cells)} |"


def table(rows: list[Row]) -> str:
    """Returns all rows as a Markdown table, with a count of agreements."""
    lines = ["| model | ratio | channels | own | torch-pruning | CertifiedPruner | NNI | replay |", "|---" * 8 + "|"]
    lines += [line_of(row) for row in rows]
    hosts = ("torch_pruning", "certified", "nni")
    counts = []
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        asked = [row for row in rows if row["ratio"] == ratio]
        same = [row for row in asked if all(isinstance(row[host], dict) and row[host]["same_plan"] for host in hosts)]  # type: ignore[index]
        counts.append(f"Ratio {ratio}: one plan from all hosts for {len(same)} of {len(asked)} models.")
    equal = sum(row["replay"] == "equal" for row in rows)
    return (
        "\n".join(lines) + f"\n\n{' '.join(counts)} Replay equal in {equal} of {len(rows)} rows. "
        "'channels' counts prunable output channels of layers that write them first, the other cells those that go; "
        "'same order': the smaller set is part of the larger one, only the rounding differs.\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="torchvision names")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--method", default="l1", help="registered criterion without data")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--out", default="", help="JSON to write, a table beside it; results/three_ways.json")
    parser.add_argument("--smoke", action="store_true", help="one model, nothing is written unless --out is given")
    return parser


if __name__ == "__main__":
    main()
