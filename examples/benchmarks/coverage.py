"""Which published networks can be pruned exactly: one row per model, from trace to checked ONNX file.

Every model runs in a process of its own with a limit on CPU time and memory, so that no model can hang or take the
machine down. Rows are appended to a CSV as they are made; models that have a row are skipped, so a run can be stopped
and started again. See README.md beside this file for the commands and for what a row means.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # this process stays light; the processes of the models import what they need
    from multiprocessing.context import ForkServerContext, ForkServerProcess

    from torch import Tensor, nn

    from nni_prune_ext.costs import Costs
    from nni_prune_ext.graph.channel_groups import ChannelGroups
    from nni_prune_ext.inputs import ExampleInputs
    from nni_prune_ext.plan import PruningPlan

HERE = Path(__file__).resolve().parent
Exporter = Literal["auto", "dynamo", "torchscript"]
SETS = ("torchvision-classification", "torchvision-segmentation", "torchvision-detection", "timm")
TARGET = 0.65
LEAST_CUT = 0.30
PARITY = 1e-4
PARITY_WORTH_COMPARING = 1e-5
LEAST_INPUT_EFFECT = 0.001
STAGES = ("build", "trace", "verify", "allocate", "cut", "certify", "export")
IN_PRUNING_LIMIT = STAGES[1:6]
COLUMNS = (
    "set",
    "model",
    "verdict",
    "input",
    "params",
    "params_after",
    "macs_of",
    "macs_before",
    "macs_after",
    "macs_cut",
    "target_macs",
    "groups",
    "channels",
    "protected_layers",
    "protected_reason",
    "exact",
    "certificate_error",
    "certificate_bound",
    "dtype",
    "input_effect",
    "removal_effect",
    "exporter",
    "parity_max_rel",
    "dense_parity_max_rel",
    *(f"cpu_s_{stage}" for stage in STAGES),
    "cpu_s_pruning",
    "peak_rss_gb",
    "source",
    "error",
)
_INPUT_SIZES = {"inception_v3": 299, "maxvit_t": 224, "alexnet": 64}
_FULL_SIZE_PREFIXES = ("vit_", "swin_")


class OutOfCpuTime(BaseException):
    """The part that is running has used its CPU seconds; not an Exception, so that nothing swallows it."""


@dataclass(frozen=True)
class Case:
    """One model of one set and what it is called with."""

    set: str
    model: str
    pixels: int


# -- the parent: which models, in which order, into which file ---------------------------------------------------------


def main() -> None:
    """Runs the models of one set that have no row yet, and summarises the file."""
    options = _parser().parse_args()
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(out)
    wanted = [c for c in cases(options.set) if not options.model or c.model in options.model] if options.set else []
    if options.retry:
        again = {(c.set, c.model) for c in wanted}
        again = {key for key in again & rows.keys() if options.model or rows[key]["verdict"] != "ok"}
        rows = {key: row for key, row in rows.items() if key not in again}
        write_rows(out, rows)
    todo = [case for case in wanted if (case.set, case.model) not in rows]
    print(f"{len(todo)} of {len(wanted)} models to run, {len(rows)} rows in {out.name}", flush=True)
    lock, context = threading.Lock(), _fork_server(options.set)

    def run(case: Case) -> None:
        row = _run_in_process(case, options, context)
        with lock:
            rows[case.set, case.model] = row
            write_rows(out, rows)
            summarise(out, rows)
        print(_line(row), flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, todo))
    summarise(out, rows)


def cases(chosen: str) -> list[Case]:
    """Returns the models of a set, small ones first."""
    if chosen == "timm":
        lines = (HERE / "coverage_timm_models.txt").read_text().splitlines()
        return [Case(chosen, *_name_and_pixels(line)) for line in lines if line and not line.startswith("#")]
    import torchvision.models as zoo

    module = {"classification": zoo, "segmentation": zoo.segmentation, "detection": zoo.detection}[chosen.split("-")[1]]
    names = zoo.list_models(module=module)
    params = {name: zoo.get_model_weights(name).DEFAULT.meta["num_params"] for name in names}
    return [Case(chosen, name, _pixels(chosen, name)) for name in sorted(names, key=params.__getitem__)]


def _name_and_pixels(line: str) -> tuple[str, int]:
    name, pixels = line.split()
    return name, int(pixels)


def _pixels(chosen: str, name: str) -> int:
    if chosen == "torchvision-detection":
        return 320
    if name.startswith(_FULL_SIZE_PREFIXES):
        return 224
    return _INPUT_SIZES.get(name, 64)


def _run_in_process(case: Case, options: argparse.Namespace, context: ForkServerContext) -> dict[str, str]:
    """Runs one model in a process of its own; whatever happens to it, there is a row."""
    with tempfile.TemporaryDirectory() as folder:
        row_path, log_path = Path(folder) / "row.json", Path(folder) / "log"
        process = context.Process(target=_work, args=(case, row_path, log_path, options.cpu_seconds, options.exporter))
        process.start()
        killed = _watch(process, options.memory_gb, wall_seconds=10 * options.cpu_seconds)
        row = json.loads(row_path.read_text()) if row_path.exists() else {"set": case.set, "model": case.model}
        if killed:
            row |= {"verdict": killed, "error": f"{killed} in stage '{row.get('stage', 'start')}'"}
        elif process.exitcode:
            tail = (log_path.read_text().strip().splitlines() or [""])[-1] if log_path.exists() else ""
            row |= {"verdict": "error", "error": f"the process ended with {process.exitcode}: {tail}"}
    return {column: _text(row.get(column, "")) for column in COLUMNS}


def _fork_server(chosen: str | None) -> ForkServerContext:
    """Returns where the processes of models are forked from: one that has imported what they need."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch",
            "torchvision",
            "onnxruntime",
            "nni_prune_ext.certificate",
            "nni_prune_ext.export.onnx_static",
            *(["timm"] if chosen == "timm" else []),
        ]
    )
    return context


def _watch(process: ForkServerProcess, memory_gb: float, *, wall_seconds: float) -> str | None:
    """Waits for the process and ends it when it holds too much memory or sits there; returns why, or ``None``."""
    import psutil

    seen, end = psutil.Process(process.pid), time.monotonic() + wall_seconds
    while process.is_alive():
        try:
            used = seen.memory_info().rss
        except psutil.NoSuchProcess:
            used = 0
        if used > memory_gb * 1e9 or time.monotonic() > end:
            process.kill()
            process.join()
            return "out of memory" if used > memory_gb * 1e9 else "hung"
        process.join(0.1)
    return None


def read_rows(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Reads the rows by set and model."""
    if not path.exists():
        return {}
    with path.open(newline="") as handle:
        return {(row["set"], row["model"]): row for row in csv.DictReader(handle)}


def write_rows(path: Path, rows: Mapping[tuple[str, str], Mapping[str, str]]) -> None:
    """Writes the file anew and puts it in place at once."""
    draft = path.with_suffix(".tmp")
    with draft.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows.values(), key=lambda row: (SETS.index(row["set"]), row["model"])))
    draft.replace(path)


def summarise(path: Path, rows: Mapping[tuple[str, str], Mapping[str, str]]) -> None:
    """Writes counts per set and the models that are not ok, as JSON and as Markdown, beside the CSV."""
    from nni_prune_ext.evaluation import environment

    counts = {s: Counter(row["verdict"] for key, row in rows.items() if key[0] == s) for s in SETS}
    totals = {s: {"models": sum(c.values()), **dict(sorted(c.items()))} for s, c in counts.items() if c}
    failed = [
        {key: row[key] for key in ("set", "model", "verdict", "error")}
        for _, row in sorted(rows.items())
        if row["verdict"] != "ok"
    ]
    document = {"sets": totals, "not_ok": failed, "target": f"macs={TARGET}", "environment": environment()}
    path.with_name(f"{path.stem}_summary.json").write_text(json.dumps(document, indent=1) + "\n")
    verdicts = sorted({v for c in counts.values() for v in c}, key=lambda v: (v != "ok", v))
    lines = ["| set | models run | " + " | ".join(verdicts) + " |", "|---" * (2 + len(verdicts)) + "|"]
    lines += [_table_row(name, t["models"], *(t.get(v, 0) for v in verdicts)) for name, t in totals.items()]
    if failed:
        lines += ["", "| not ok | set | verdict | why |", "|---|---|---|---|"]
        lines += [_table_row(row["model"], row["set"], row["verdict"], row["error"]) for row in failed]
    path.with_name(f"{path.stem}_summary.md").write_text("\n".join(lines) + "\n")


def _table_row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _line(row: Mapping[str, str]) -> str:
    cut, error, parity, cpu = (
        row[key] or "-" for key in ("macs_cut", "certificate_error", "parity_max_rel", "cpu_s_pruning")
    )
    return (
        f"{row['model']:<34}{row['verdict']:<18}cut {cut:<8}error {error:<10}parity {parity:<10}cpu {cpu} s  "
        f"{row['error'][:150]}"
    )


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split())[:400]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--set", choices=SETS, help="without it, only the summary is written anew")
    parser.add_argument("--model", action="append", help="only this model; may be repeated")
    parser.add_argument("--out", default=str(HERE / "results" / "coverage.csv"))
    parser.add_argument("--cpu-seconds", type=float, default=180.0, help="for pruning, and again for the export")
    parser.add_argument("--memory-gb", type=float, default=12.0, help="largest resident memory of one model's process")
    parser.add_argument("--jobs", type=int, default=1, help="models at the same time")
    parser.add_argument("--exporter", choices=("auto", "dynamo", "torchscript"), default="torchscript")
    parser.add_argument("--retry", action="store_true", help="run again what is not ok (with --model: whatever it is)")
    return parser


# -- the worker: one model ---------------------------------------------------------------------------------------------


class _Row:
    """The row of one model, written to its file at every change, so that it survives the process."""

    def __init__(self, path: Path, case: Case) -> None:
        self.path = path
        self.values: dict[str, object] = {"set": case.set, "model": case.model, "source": _source()}

    def note(self, **values: object) -> None:
        """Adds values and writes the row."""
        self.values.update(values)
        self.values["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        self.path.write_text(json.dumps(self.values))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the CPU time of a stage, also of one that fails."""
        self.note(stage=name)
        start = time.process_time()
        try:
            yield
        finally:
            used = time.process_time() - start
            pruning = float(str(self.values.get("cpu_s_pruning", 0.0))) + (used if name in IN_PRUNING_LIMIT else 0.0)
            self.note(**{f"cpu_s_{name}": used, "cpu_s_pruning": pruning})


def _work(case: Case, row_path: Path, log_path: Path, cpu_seconds: float, exporter: Exporter) -> None:
    """Runs all stages on one model; what they print goes to the log."""
    import torch

    with log_path.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row = _Row(row_path, case)
    try:
        with row.stage("build"):
            model, inputs = build(case)
        _allow_cpu_seconds(cpu_seconds)
        compact = _prune(model, inputs, row, case)
        _allow_cpu_seconds(cpu_seconds)
        if compact is not None:
            _export(model, compact, inputs, row, exporter)
    except OutOfCpuTime:
        stage = row.values.get("stage")
        row.note(verdict="out of CPU time", error=f"{cpu_seconds:g} CPU s used up in stage '{stage}'")
    except Exception as error:  # noqa: BLE001 (whatever a model does, its row says so)
        row.note(verdict="error", error=f"{row.values.get('stage')}: {type(error).__name__}: {error}")
    finally:
        _set_cpu_limit(resource.RLIM_INFINITY)


def build(case: Case) -> tuple[nn.Module, ExampleInputs]:
    """Builds the model with random weights, in evaluation mode, and its example inputs."""
    import torch

    x = torch.randn(1, 3, case.pixels, case.pixels)
    if case.set == "timm":
        import timm

        sized: dict[str, Any] = {"img_size": case.pixels} if "dinov2" in case.model else {}
        return timm.create_model(case.model, pretrained=False, **sized).eval(), x
    import torchvision

    settings: dict[str, object] = {"weights": None}
    if case.set == "torchvision-classification":
        if case.model in ("googlenet", "inception_v3"):
            settings["init_weights"] = False  # minutes of truncated normal numbers that are randomised anyway
        return torchvision.models.get_model(case.model, **settings).eval(), x
    settings["weights_backbone"] = None
    if case.set == "torchvision-segmentation":
        return torchvision.models.get_model(case.model, **settings).eval(), x
    if not case.model.startswith("ssd"):
        settings |= {"min_size": case.pixels, "max_size": case.pixels}
    if "rcnn" in case.model:
        settings["box_score_thresh"] = 0.01  # untrained, all of the 91 classes are about equally likely
    return torchvision.models.get_model(case.model, **settings).eval(), ([torch.rand(3, case.pixels, case.pixels)],)


def _prune(model: nn.Module, inputs: ExampleInputs, row: _Row, case: Case) -> nn.Module | None:
    """Does what ``nni_prune_ext.prune`` does with L1 scores, stage by stage; ``None`` if there is nothing to export."""
    from nni_prune_ext.certificate import certify_plan, verify_groups
    from nni_prune_ext.costs import count_costs
    from nni_prune_ext.graph.channel_groups import trace_channel_groups
    from nni_prune_ext.surgery import cut_channels

    part = "backbone." if case.set == "torchvision-detection" else ""
    row.note(input=case.pixels, params=sum(p.numel() for p in model.parameters()), macs_of=part.rstrip(".") or "model")
    with row.stage("trace"):
        groups = trace_channel_groups(model, inputs)
    row.note(groups=len(groups))
    with row.stage("verify"):
        groups = verify_groups(model, inputs, groups)
    reasons = Counter(re.sub(r"'[^']*\.[^']*'", "…", p.reason) for p in groups.protected)
    common = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(2))
    row.note(groups=len(groups), channels=groups.num_channels)
    row.note(protected_layers=len(groups.protected), protected_reason=common)
    with row.stage("allocate"):
        dense = _only(count_costs(model, inputs), part)
        plan = _plan(model, groups, dense, row)
    if not plan.num_removed:
        row.note(verdict="nothing to cut", error=f"all layers are protected: {common}", macs_before=dense.macs)
        return None
    with row.stage("cut"):
        removal = cut_channels(model, plan, inputs, groups=groups)
        after = _only(count_costs(removal.model, inputs), part)
    row.note(
        params_after=sum(p.numel() for p in removal.model.parameters()),
        macs_before=dense.macs,
        macs_after=after.macs,
        macs_cut=1 - after.macs / dense.macs,
    )
    with row.stage("certify"):
        certificate = certify_plan(model, plan, inputs, groups=groups)
    row.note(
        exact=certificate.exact,
        certificate_error=certificate.max_relative_error,
        certificate_bound=certificate.bound,
        input_effect=certificate.input_effect,
        removal_effect=certificate.removal_effect,
        dtype=certificate.dtype,
    )
    if not certificate.exact:
        row.note(verdict="not exact", error=certificate.flaw())
    elif 1 - after.macs / dense.macs < LEAST_CUT:
        row.note(verdict="cut too small", error=f"limits and protected layers allow no more: {common}")
    return removal.model


def _only(costs: Costs, part: str) -> Costs:
    """Returns the costs of the layers whose names start with ``part``."""
    layers = tuple(layer for layer in costs.layers if layer.name.startswith(part))
    return replace(costs, layers=layers, macs=sum(layer.macs for layer in layers)) if part else costs


def _plan(model: nn.Module, groups: ChannelGroups, dense: Costs, row: _Row) -> PruningPlan:
    """Plans with L1 scores for the target or, where it is out of reach, for the least that can be reached."""
    from nni_prune_ext.allocation import CostModel, Limits, Target, allocate, check_feasible
    from nni_prune_ext.scoring.group_reduction import group_importance
    from nni_prune_ext.scoring.weight_norms import l1_norm

    cost_model, limits = CostModel.of(model, groups, dense), Limits(max_ratio=0.9, multiple=1)
    lowest = check_feasible(cost_model, [], limits)["macs"]
    bound = max(TARGET * dense.macs, lowest)
    row.note(target_macs=bound / dense.macs)
    tensors = dict(model.named_parameters())
    tensors |= dict(model.named_buffers())  # type: ignore[arg-type]
    scores = {group.name: group_importance(group, tensors, l1_norm) for group in groups}
    return allocate(scores, cost_model, targets=[Target("macs", bound)], limits=limits).plan


def _export(model: nn.Module, compact: nn.Module, inputs: ExampleInputs, row: _Row, exporter: Exporter) -> None:
    """Exports the compact model and compares; where it differs, also the dense one."""
    with row.stage("export"):
        used, difference = _exported_difference(compact, inputs, exporter)
        row.note(exporter=used, parity_max_rel=difference)
        allowed = PARITY
        if not difference <= PARITY_WORTH_COMPARING:
            _, own = _exported_difference(model, inputs, exporter)
            row.note(dense_parity_max_rel=own)
            allowed = max(PARITY, own)
    if "verdict" in row.values:
        return
    same = difference <= allowed
    row.note(verdict="ok" if same else "ONNX differs", error="" if same else f"relative difference {difference:.2g}")


def _exported_difference(model: nn.Module, inputs: ExampleInputs, exporter: Exporter) -> tuple[str, float]:
    """Exports a copy on which a difference would show, and returns the exporter used and the relative difference."""
    import torch

    from nni_prune_ext.errors import ExportError
    from nni_prune_ext.export.onnx_static import export_onnx

    twin, dynamic, failures = _awake(model, inputs), isinstance(inputs, torch.Tensor), []
    order: tuple[Exporter, ...] = ("torchscript", "dynamo") if exporter == "torchscript" else (exporter,)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for name in order:
            try:
                result = export_onnx(
                    twin, inputs, path, exporter=name, dynamic_batch=dynamic, check=dynamic, fail=sys.float_info.max
                )
            except ExportError as error:
                failures.append(f"{name}: {error}")
                continue
            if result.parity is None:
                return result.exporter, _unmatched_detections(twin, inputs, path)
            assert result.parity.varied, "the outputs of the exported model do not move with the input"
            return result.exporter, result.parity.max_rel
    raise ExportError(" | ".join(failures))


def _unmatched_detections(model: nn.Module, inputs: ExampleInputs, path: Path) -> float:
    """Returns the share of detections, on random images, that only one of PyTorch and the ONNX file makes.

    Detections are the same with the same label, scores within 1e-4 and boxes within a thousandth of the image. Their
    order, and so an element-wise comparison, hangs on the last bit of scores that are nearly equal.
    """
    import onnxruntime
    import torch

    from nni_prune_ext.inputs import random_like, tensors_in

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator, alone, total = torch.Generator().manual_seed(0), 0, 0
    for _ in range(4):
        images = random_like(inputs, generator)
        with torch.no_grad():
            (expected,) = model(*images)
        values = session.run(None, {p.name: x.numpy() for p, x in zip(session.get_inputs(), tensors_in(images))})
        actual = {key: torch.from_numpy(value) for key, value in zip(expected, values)}
        size = max(next(tensors_in(images)).shape)
        same = (expected["labels"][:, None] == actual["labels"]) & (
            (expected["scores"][:, None] - actual["scores"]).abs() <= 1e-4
        )
        same &= (expected["boxes"][:, None] - actual["boxes"]).abs().amax(2) <= 1e-3 * size
        alone += int((~same.any(1)).sum()) + int((~same.any(0)).sum())
        total += sum(same.shape)
    assert total, "the exported model detects nothing in random images"
    return alone / total


def _awake(model: nn.Module, inputs: ExampleInputs) -> nn.Module:
    """Returns a copy in which no parameter or statistic is constant, so that none can go wrong unseen.

    Weights keep their initialisation, which amplifies rounding least; constants (zero biases and heads, unit scales,
    tiny layer scales) become random. Where inputs then hardly reach the output, or rounding does, statistics follow
    the activations.
    """
    import torch

    from nni_prune_ext.inputs import tensors_in

    twin, generator = copy.deepcopy(model).eval(), torch.Generator().manual_seed(0)
    for tensor in (*twin.parameters(), *twin.buffers()):
        values = tensor.detach()
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((values == values.flatten()[0]).all()):
            constant, normal = float(values.flatten()[0]), torch.randn(values.shape, generator=generator)
            fan_in = values[0].numel() if values.dim() > 1 and values.shape.numel() > max(values.shape) else 100
            scaled = constant * (1 + 0.3 * normal).clamp(0.4, 1.6)
            values.copy_(scaled if abs(constant) > 0.01 else normal / fan_in**0.5)
    if isinstance(inputs, torch.Tensor):
        batch = torch.randn(8, *inputs.shape[1:], generator=generator)
        with torch.no_grad():
            output = next(tensors_in(twin(batch))).flatten(1).double()
            precise = next(tensors_in(copy.deepcopy(twin).double()(batch[:1].double()))).flatten(1)
        rounding = float((output[:1] - precise).abs().max() / precise.abs().max())
        effect = float(output.std(0).mean() / output.abs().mean())
        if not (effect > LEAST_INPUT_EFFECT and rounding < PARITY_WORTH_COMPARING):
            _follow_statistics(twin, batch)
    else:
        _follow_statistics(twin, inputs)
    return twin


def _follow_statistics(model: nn.Module, batch: ExampleInputs) -> None:
    """Sets running statistics to those of a batch, with 5 times the deviation: rounding then stays small."""
    import torch

    from nni_prune_ext.inputs import call_model

    @torch.no_grad()
    def follow(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        dims = [dim for dim in range(args[0].dim()) if dim != 1]
        module.running_mean.copy_(args[0].mean(dims))  # type: ignore[operator]
        module.running_var.copy_(25 * args[0].var(dims) + 1e-3)  # type: ignore[operator]

    normed = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), torch.Tensor)]
    handles = [module.register_forward_pre_hook(follow) for module in normed]
    call_model(model, batch)
    for handle in handles:
        handle.remove()


def _allow_cpu_seconds(seconds: float) -> None:
    """Lets this process use so many more CPU seconds; then ``OutOfCpuTime`` is raised, once."""

    def stop(_: int, __: object) -> None:
        _set_cpu_limit(resource.RLIM_INFINITY)
        raise OutOfCpuTime

    signal.signal(signal.SIGXCPU, stop)
    _set_cpu_limit(math.ceil(time.process_time() + seconds))


def _set_cpu_limit(seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _source() -> str:
    """Identifies the code that prunes: rows with another value were made by another version."""
    import nni_prune_ext

    root = Path(str(nni_prune_ext.__file__)).parent
    digest = hashlib.sha256()
    for pattern in ("graph/*.py", "allocation/*.py", "certificate.py", "plan.py", "surgery.py"):
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


if __name__ == "__main__":
    main()
