"""NNI's masks made physical, model by model and pruner by pruner: by our ModelSpeedup, NNI's, and NNI's with torch.fx.

One row of JSON per model and pruner is appended to results/nni_speedup.jsonl as it is made; cells that have a row are
skipped, so a run can be stopped and started again. The table in results/nni_speedup.md is written anew at the end.

What happens in a cell, on 64 × 64 images (96 for Inception v3, 128 for the detector), batch 2, in one thread:

1. The model has random weights, also where it is initialised to constants. NNI's pruner makes masks at ratio 0.5 of
   all convolutions (first linear layer of every MLP in transformers; class convolutions and detection heads left out),
   with two to four steps of training where it needs them. Coupled layers share a dependency id and batch norms are
   aligned to their convolutions, by our helpers; Level has no groups, as NNI refuses them there, and Slim masks the
   batch norms themselves.
2. What NNI's own simulation, the wrapped model, computes is kept; then the model is unwrapped. Slim's simulation scales
   its batch norms besides, so there the product of weights and masks stands for it.
3. Copies are sped up in four ways: ``ours``; ``exact``, ours with constants absorbed; ``fx``, NNI's with
   ``graph_module=torch.fx.symbolic_trace(model)``; and
   ``documented``, NNI's as its documentation calls it. A way works if it returns, the result runs, and parameters went.
4. Outputs are compared, relative to the largest: with the simulation, and ours with those of ``fx`` where parameters
   are equally many. Where channels still carry a constant (Slim; norms over concatenations or over channels), or
   masks do not agree in coupled layers (grouped convolutions, shuffles), ``ours`` and ``fx`` differ from the simulation
   by NNI's semantics; ``exact`` equals it, or refuses.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODELS = (
    "resnet18",
    "resnet50",
    "vgg16_bn",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "fcn_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)
PRUNERS = ("level", "l1", "l2", "fpgm", "slim", "taylor", "linear", "agp", "movement")
EQUAL = 1e-4
"""Largest relative difference of outputs, in float32, that counts as equal."""
RATIO = 0.5
NO_NORMS = ("vit_b_16", "swin_t", "convnext_tiny")
"""Models without batch norms, which Slim cannot prune."""


def main() -> None:
    """Runs the missing cells, each model in a process of its own, and writes the table."""
    options = _parser().parse_args()
    rows = HERE / "results" / "nni_speedup.jsonl" if options.out is None else Path(options.out)
    rows.parent.mkdir(parents=True, exist_ok=True)
    if options.child:
        logging.disable(logging.ERROR)
        warnings.simplefilter("ignore")
        run_model(options.models[0], options.pruners, rows)
        return
    done = {(row["model"], row["pruner"]) for row in read(rows)}
    for model in options.models:
        missing = [pruner for pruner in options.pruners if (model, pruner) not in done]
        if missing:
            command = [
                sys.executable,
                __file__,
                "--child",
                "--out",
                str(rows),
                "--models",
                model,
                "--pruners",
                *missing,
            ]
            try:
                finished = subprocess.run(command, timeout=options.seconds, check=False)
                print(f"{model}: {'done' if finished.returncode == 0 else f'process ended with {finished.returncode}'}")
            except subprocess.TimeoutExpired:
                print(f"{model}: more than {options.seconds} s")
    rows.with_suffix(".md").write_text(table(read(rows)), encoding="utf-8")
    print(rows.with_suffix(".md"))


def run_model(name: str, pruners: list[str], rows: Path) -> None:
    """Makes the rows of one model: it is built, traced and grouped once."""
    import torch  # the parent process stays light

    from nni_prune_ext.utils import align_batchnorm, auto_set_dependency_group_ids

    torch.set_num_threads(1)
    model, x, config, loss = build(name)
    grouped = auto_set_dependency_group_ids(model, config, x)
    aligned = align_batchnorm(model, grouped, x)
    for pruner in pruners:
        row: dict[str, Any] = {"model": name, "pruner": pruner, "params": count(model)}
        if pruner == "slim" and name in NO_NORMS:
            row["masks"] = "no batch norms"
        else:
            row |= cell(pruner, copy.deepcopy(model), x, config if pruner == "level" else aligned, loss)
        row |= conditions()
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name} {pruner}: ours {row.get('ours')}, documented {row.get('documented')}, fx {row.get('fx')}")


def cell(pruner: str, model: Any, x: Any, config: list[dict[str, Any]], loss: Callable[..., Any]) -> dict[str, Any]:
    """Makes masks with NNI's pruner and removes them in three ways."""
    import torch
    from nni.compression.speedup import ModelSpeedup as NnisSpeedup

    from nni_prune_ext.speedup import ModelSpeedup

    row: dict[str, Any] = {}
    try:
        masks, simulated = masks_of(pruner, model, x, config, loss)
    except Exception as error:  # noqa: BLE001 whatever NNI raises is the result
        return {"masks": said(error)}
    row["masks"] = "made"
    results = {}

    def ours(copied: Any) -> Any:
        speedup = ModelSpeedup(copied, x, masks, logger=logging.getLogger("quiet"))
        result = speedup.speedup_model()
        row["ours_kept_layers"] = len(speedup.report.kept)
        row["certificate"] = speedup.report.certificate and speedup.report.certificate.max_relative_error
        return result

    def fx(copied: Any) -> Any:
        graph = torch.fx.symbolic_trace(copied)
        return NnisSpeedup(copied, x, copy.deepcopy(masks), graph_module=graph).speedup_model()

    def documented(copied: Any) -> Any:
        return NnisSpeedup(copied, x, copy.deepcopy(masks)).speedup_model()

    def exact(copied: Any) -> Any:
        options = {"logger": logging.getLogger("quiet"), "constants": "absorb"}
        return ModelSpeedup(copied, x, masks, **options).speedup_model()

    for way, call in (("ours", ours), ("exact", exact), ("fx", fx), ("documented", documented)):
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                compact = call(copy.deepcopy(model)).eval()
                results[way] = output_of(compact, x)
            row[f"{way}_params"] = count(compact)
            row[way] = "works" if count(compact) < count(model) else "nothing removed"
        except Exception as error:  # noqa: BLE001 whatever a host raises is the result
            row[way] = said(error)
        row[f"{way}_seconds"] = round(time.perf_counter() - start, 2)
    row["ours_vs_simulation"] = apart(results.get("ours"), simulated)
    row["exact_vs_simulation"] = apart(results.get("exact"), simulated)
    row["fx_vs_simulation"] = apart(results.get("fx"), simulated)
    if row.get("ours_params") == row.get("fx_params"):
        row["ours_vs_fx"] = apart(results.get("ours"), results.get("fx"))
    return row


def build(name: str) -> tuple[Any, Any, list[dict[str, Any]], Callable[..., Any]]:
    """Returns a model with random batch norms, inputs, the config_list and a loss; all small."""
    import torch
    from torch import nn
    from torchvision.models import get_model

    torch.manual_seed(0)
    extra: dict[str, Any] = {"num_classes": 10}
    if name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"):
        extra["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        extra |= {"init_weights": False} | ({"aux_logits": False} if name == "googlenet" else {})
    if name == "vit_b_16":
        extra["image_size"] = 64
    model = get_model(name, weights=None, **extra).eval()
    if name == "inception_v3":
        model.AuxLogits, model.aux_logits = None, False
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        for parameter in model.parameters():
            first = float(parameter.flatten()[0])
            if parameter.numel() > 1 and bool((parameter == first).all()):  # as it is initialised, not as trained
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (1 if 0 < first < 1e-3 else first))
    pixels = {"inception_v3": 96}.get(name, 64)
    image = torch.randn(2, 3, pixels, pixels)
    config: dict[str, Any] = {"op_types": ["Conv2d"], "sparse_ratio": RATIO}
    if name in ("vit_b_16", "swin_t"):
        config = {"op_names_re": [r".*mlp\.0$"], "op_types": ["Linear"], "sparse_ratio": RATIO}
    elif name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large"):
        config["exclude_op_names"] = ["classifier.4"]
    elif name.startswith("fasterrcnn"):
        config["exclude_op_names_re"] = [r"rpn\..*", r"roi_heads\..*"]
        images = torch.rand(2, 3, 128, 128)
        return model, ([images[0], images[1]],), [config], lambda net: sum_of(net.backbone(images))
    return model, image, [config], lambda net: sum_of(net(image))


def sum_of(outputs: Any) -> Any:
    """Returns a loss of whatever a model returns: the mean square of its tensors."""
    from nni_prune_ext.inputs import tensors_in

    return sum(tensor.square().mean() for tensor in tensors_in(outputs))


def masks_of(
    pruner: str, model: Any, x: Any, config: list[dict[str, Any]], loss: Callable[..., Any]
) -> tuple[dict[str, Any], list[Any]]:
    """Returns the masks of one of NNI's pruners, and what its simulation computes; the model is unwrapped."""
    import nni
    import torch
    from nni.compression import TorchEvaluator
    from nni.compression import pruning as nnis

    def train(
        net: Any, optimizer: Any, step: Any, _: Any = None, max_steps: Any = None, max_epochs: Any = None
    ) -> None:
        for _ in range(max_steps or 2):
            optimizer.zero_grad()
            step(None, net).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # a random network's gradients may be huge
            optimizer.step()

    def evaluator() -> Any:
        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=1e-4)
        return TorchEvaluator(train, optimizer, lambda batch, net: loss(net))

    def taylor(steps: int) -> Any:
        return nnis.TaylorPruner(model, config, evaluator(), training_steps=steps)

    norms = [{"op_types": ["BatchNorm2d"], "sparse_ratio": RATIO}]
    makers: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
        "level": lambda: (nnis.LevelPruner(model, config), ()),
        "l1": lambda: (nnis.L1NormPruner(model, config), ()),
        "l2": lambda: (nnis.L2NormPruner(model, config), ()),
        "fpgm": lambda: (nnis.FPGMPruner(model, config), ()),
        "slim": lambda: (nnis.SlimPruner(model, norms, evaluator(), training_steps=2), ()),
        "taylor": lambda: (taylor(2), ()),
        "linear": lambda: (nnis.LinearPruner(taylor(1), interval_steps=1, total_times=2), (2, None)),
        "agp": lambda: (nnis.AGPPruner(taylor(1), interval_steps=1, total_times=2), (2, None)),
        "movement": lambda: (nnis.MovementPruner(model, config, evaluator(), 1, 3), (4, None)),
    }
    made, steps = makers[pruner]()
    _, masks = made.compress(*steps)
    model.eval()
    simulated = output_of(model, x)
    made.unwrap_model()
    if pruner == "slim":
        masked = copy.deepcopy(model)
        with torch.no_grad():
            for name, module in masked.named_modules():
                for target, mask in masks.get(name, {}).items():
                    getattr(module, target).mul_(mask)
        simulated = output_of(masked, x)
    return masks, simulated


def output_of(model: Any, x: Any) -> list[Any]:
    """Returns the tensors that a model computes, in evaluation mode; of a detector, those that its heads get."""
    import torch

    from nni_prune_ext.inputs import call_model, tensors_in

    with torch.no_grad():
        result = model.backbone(torch.stack(x[0])) if hasattr(model, "roi_heads") else call_model(model, x)
        return list(tensors_in(result))


def apart(first: list[Any] | None, second: list[Any] | None) -> float | None:
    """Returns the largest relative difference; ``None`` where there is nothing to compare."""
    if not first or not second or [t.shape for t in first] != [t.shape for t in second]:
        return None
    pairs = [(a, b) for a, b in zip(first, second) if a.numel() and a.is_floating_point()]
    return max((float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs), default=None)


def count(model: Any) -> int:
    """Returns the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def said(error: Exception) -> str:
    """Returns an error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]


def conditions() -> dict[str, str]:
    """Returns when and with what a row was made."""
    from importlib import metadata

    versions = {package: metadata.version(package) for package in ("nni", "torch", "torchvision", "nni_prune_ext")}
    return {"date": time.strftime("%Y-%m-%d"), **versions, "python": sys.version.split()[0]}


def read(rows: Path) -> list[dict[str, Any]]:
    """Returns the rows made so far."""
    if not rows.exists():
        return []
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines() if line.strip()]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the counts per model and every cell, as Markdown."""
    made = [row for row in rows if row["masks"] == "made"]
    lines = [
        "# NNI's masks made physical",
        "",
        f"{len(rows)} cells, {len(made)} with masks. Made by `nni_speedup.py`, which says what the columns mean.",
        "",
        "| model | masks | ours works | = simulation | = fx | exact works | = simulation | documented | fx works |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in [*dict.fromkeys(row["model"] for row in rows), "all"]:
        own = [row for row in made if name in (row["model"], "all")]
        counts = [
            len(own),
            *(sum(row["ours"] == "works" for row in own), _equal(own, "ours_vs_simulation"), _equal(own, "ours_vs_fx")),
            *(sum(row["exact"] == "works" for row in own), _equal(own, "exact_vs_simulation")),
            *(sum(row[way] == "works" for row in own) for way in ("documented", "fx")),
        ]
        lines.append(f"| {name} | " + " | ".join(str(value) for value in counts) + " |")
    lines += [
        "",
        "| model | pruner | ours | params | = simulation | = fx | exact | = simulation | documented | fx | params |",
    ]
    lines.append("|---|---|---|--:|--:|--:|---|--:|---|---|--:|")
    for row in rows:
        cells = [
            row["model"],
            row["pruner"],
            *(row.get("ours", row["masks"]), _number(row.get("ours_params"))),
            *(_error(row.get("ours_vs_simulation")), _error(row.get("ours_vs_fx"))),
            *(row.get("exact", "–"), _error(row.get("exact_vs_simulation"))),
            *(row.get("documented", "–"), row.get("fx", "–"), _number(row.get("fx_params"))),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "/")[:60] for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _equal(rows: list[dict[str, Any]], key: str) -> int:
    way = key.split("_")[0]
    return sum(row[way] == "works" and row.get(key) is not None and row[key] <= EQUAL for row in rows)


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--pruners", nargs="+", default=list(PRUNERS), choices=PRUNERS, metavar="PRUNER")
    parser.add_argument("--seconds", type=int, default=900, help="limit per model")
    parser.add_argument("--out", help="file of the rows; the table is written beside it")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
