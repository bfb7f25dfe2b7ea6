"""FTWT beside its controls: filters switched per image, the same filters for all images, and fewer filters.

Every arm starts from the same weights, sees the same images for the same number of epochs, and is tested at its last
epoch on the TEST images: nothing is selected. Expected MACs are counted on the test images, honestly and as the paper's
code counts; what was foreseen before training comes from training images. ``static`` opens the same filters for every
image, as many per layer as the targets ask for; ``l1`` removes channels until the MACs are those that the ``ftwt`` cell
of the same mass and seed really needs on the test images, and trains as long. The learning rate falls along one cosine.

The plan of the flowers trains a ResNet-18 from scratch, then gates it in blocks, or makes it narrower; ``--latency``
exports what came out and times all of it side by side on ONNX Runtime. Finished cells are kept in a file of JSON
lines, unfinished ones in checkpoints and networks in ``--work``, so that the script can be stopped and started again.
``--estimates`` says what gates would save before any training; ``--summary`` writes the tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import nni_prune_ext as npe
from nni_prune_ext.checkpoints import Checkpoints, fingerprint
from nni_prune_ext.data.batches import BatchLoader
from nni_prune_ext.data.image_arrays import DataSource
from nni_prune_ext.evaluation import environment, measure_latency
from nni_prune_ext.export.onnx_gated import Flavour, export_gated
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.gates.estimates import estimate_gating, measure_gating, rule_of
from nni_prune_ext.gates.expected_macs import ExpectedMacs
from nni_prune_ext.gates.firing import LayerFiring, firing_facts
from nni_prune_ext.gates.gated_network import GatedNetwork, Gates
from nni_prune_ext.gates.prediction import PredictionCounter
from nni_prune_ext.gates.static_core import ReachCounter, leak
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.methods.base import MethodContext, Phase
from nni_prune_ext.methods.ftwt import FTWT, Ftwt, build_gated
from nni_prune_ext.methods.ftwt_options import FtwtOptions
from nni_prune_ext.pipeline import PruneResult
from nni_prune_ext.plan import removed_channels
from nni_prune_ext.runtimes.base import RunnableModel
from nni_prune_ext.runtimes.onnxruntime_cpu import OnnxRuntimeCpu
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.text_files import write_text
from nni_prune_ext.training import EpochLog, TrainingSettings, Watcher, fit

HERE = Path(__file__).resolve().parent
HEADS_FIRST: Mapping[str, object] = {"softmax": False, "head_epochs": 6, "head_learning_rate": 0.5}
"""Heads learn alone first, without softmax: in short training they hardly learn otherwise."""
ARMS: Mapping[str, Mapping[str, object]] = {
    "ftwt": HEADS_FIRST,
    "paper": {},
    "paper, heads first": {"head_epochs": 6, "head_learning_rate": 3.0},
    "static": {"selection": "static"},
    "joint": {**HEADS_FIRST, "mode": "joint"},
    "uniform": {**HEADS_FIRST, "targets": "uniform"},
    "block4": {**HEADS_FIRST, "block": 4},
    "block16": {**HEADS_FIRST, "block": 16},
}
"""Arm → options; ``dense`` prunes nothing and ``l1`` removes channels. ``paper``: softmax, heads at rate 0.1."""
GOAL = 0.05
"""How far the honest MACs may lie from what was foreseen, as a share of the dense MACs."""
FLAVOURS: Sequence[tuple[Flavour, bool]] = (("mask", False), ("compact", False), ("compact", True))
"""Flavour of the export, and whether layers that do not gain lose their gates."""
MASSES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Cell:
    """One run: how, at which mass or at which share of the dense MACs, and with which seed."""

    arm: str
    level: float | None
    seed: int

    @property
    def key(self) -> str:
        """Returns what a finished cell is known by."""
        return f"{self.arm} {'-' if self.level is None else f'{self.level:g}'} {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A table: a network, how long it is trained, and its cells.

    Attributes:
        level: what the level of a cell is: the mass, or a share of the dense MACs that the mass is solved for.
        start_epochs: epochs in which the dense network is trained from scratch; 0 takes given weights.
        multiple: of the widths that ``l1`` leaves.
        few_steps: options of all gated arms, where heads have few steps to learn.
    """

    model: str
    epochs: int
    cells: tuple[Cell, ...]
    limit: int | None = None
    learning_rate: float = 0.01
    size: int = 32
    batch: int = 128
    level: Literal["mass", "macs"] = "mass"
    start_epochs: int = 0
    start_learning_rate: float = 0.03
    calibration_batches: int = 16
    multiple: int = 1
    few_steps: Mapping[str, object] = field(default_factory=dict)


def crossed(arms: Sequence[str], levels: Sequence[float], seeds: Sequence[int]) -> tuple[Cell, ...]:
    """Returns all cells, seed by seed, the dense network first; ``l1`` needs the ``ftwt`` cell before it."""
    found = []
    for seed in seeds:
        found += [Cell("dense", None, seed), *(Cell(arm, level, seed) for level in levels for arm in arms)]
    return tuple(found)


MAIN = ("ftwt", "l1", "static")
GRID = (0.7, 0.8, 0.85, 0.9, 0.95)
SINGLE = tuple(Cell(arm, 0.8, 0) for arm in ("paper", "block16", "joint", "paper, heads first", "uniform", "block4"))
FULL = crossed((*MAIN, "paper"), GRID, range(3))
PLANS: Mapping[str, Plan] = {
    "resnet20": Plan(
        "resnet20", 6,
        (*crossed(MAIN, (0.8, 0.9), [0]), *SINGLE[:3], *crossed(MAIN, (0.8, 0.9), [1]), *SINGLE[3:]),
        limit=3_000,
        batch=64,
    ),
    "flowers-resnet18": Plan(
        "torchvision:resnet18", 3,
        (
            Cell("block16", 0.5, 0), Cell("l1", 0.5, 0), Cell("dense", None, 0), Cell("block16", 0.35, 0),
            Cell("l1", 0.7, 0), Cell("ftwt", 0.5, 0), Cell("block16", 0.7, 0), Cell("l1", 0.35, 0), Cell("l1", 0.85, 0),
            Cell("dense", None, 1), Cell("block16", 0.5, 1), Cell("l1", 0.5, 1), Cell("l1", 0.35, 1),
        ), limit=800, size=128, batch=16, level="macs", start_epochs=6, start_learning_rate=0.02,
        calibration_batches=10, multiple=16, few_steps={"head_epochs": 4},
    ),
    "vgg16": Plan(
        "vgg16_bn", 3,
        (
            Cell("block16", 0.35, 0), Cell("l1", 0.35, 0), Cell("l1", 0.1, 0), Cell("dense", None, 0),
            Cell("block16", 0.35, 1), Cell("l1", 0.35, 1), Cell("l1", 0.1, 1), Cell("dense", None, 1),
        ), limit=6_000, batch=64, level="macs", start_epochs=8, start_learning_rate=0.05,
        multiple=16, few_steps={"head_epochs": 3},
    ),
    "mobilenetv1": Plan(
        "mobilenet_v1", 3, (Cell("dense", None, 0), Cell("ftwt", 0.6, 0), Cell("l1", 0.6, 0)),
        limit=3_000, batch=64, level="macs", start_epochs=8, start_learning_rate=0.05,
        multiple=4, few_steps={"head_epochs": 3},
    ),
    "resnet20-full": Plan("resnet20", 50, FULL),
    "resnet56-full": Plan("resnet56", 50, FULL),
    "vgg16-full": Plan("vgg16_bn", 50, FULL),
}  # fmt: skip


def main() -> None:
    """Runs the cells of a plan that the results file does not hold, or one of the other jobs."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    results = Path(options.results)
    if options.summary:
        write_text(results / "ftwt.md", "\n".join(summary(results)) + "\n")
        print((results / "ftwt.md").read_text())
    elif options.latency:
        write_text(results / f"ftwt_{stem(options.plan)}_latency.json", json.dumps(latency(options), indent=1) + "\n")
    elif options.estimates:
        found = Bench(PLANS[options.plan], options).estimates()
        write_text(results / f"ftwt_{stem(options.plan)}_estimates.json", json.dumps(found, indent=1) + "\n")
    else:
        run_plan(options, results / f"ftwt_{stem(options.plan)}.jsonl")


def stem(plan: str) -> str:
    """Returns a plan's name as it is written in files."""
    return plan.replace("-", "_")


def run_plan(options: argparse.Namespace, out: Path) -> None:
    """Runs the cells that are missing, one after the other."""
    plan = PLANS[options.plan]
    if options.epochs or options.limit:
        plan = replace(plan, epochs=options.epochs or plan.epochs, limit=options.limit or plan.limit,
                       start_epochs=min(plan.start_epochs, options.epochs or plan.start_epochs))  # fmt: skip
    bench = None
    for cell in plan.cells:
        others = options.seed is not None and options.seed != cell.seed
        done = {row["key"]: row for row in read_rows(out)}
        if cell.key in done or others or (options.only and options.only not in cell.key):
            continue
        bench = bench or Bench(plan, options)
        began = time.perf_counter()
        found = bench.run(cell, done)
        row = {"key": cell.key, "plan": options.plan, **asdict(cell), "epochs": plan.epochs, "limit": plan.limit,
               **found, "seconds": round(time.perf_counter() - began, 1), "date": str(date.today()),
               "environment": environment()}  # fmt: skip
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        told = ("accuracy", "macs", "official", "predicted", "seconds")
        print(cell.key, {name: row.get(name) for name in told}, flush=True)


class Observed(Ftwt):
    """FTWT that keeps a copy of the gated network as it was before any channel was removed."""

    before: GatedNetwork | None = None

    def start(self, context: MethodContext, phase: Phase) -> None:
        """Keeps a copy in front of the cut."""
        if phase.name == self.phases()[-1].name:
            self.before = GatedNetwork(copy.deepcopy(context.model), copy.deepcopy(self.gates))
        super().start(context, phase)


class Bench:
    """The network, the data, and how a cell is run."""

    def __init__(self, plan: Plan, options: argparse.Namespace) -> None:
        self.plan, self.options, self.device = plan, options, options.device
        self.work = None if options.work is None else Path(options.work) / options.plan
        self.source = self._opened(plan.limit)
        self.whole = self._opened(None) if plan.limit else self.source  # a limit is one of test images, too
        self.test = npe.split_batches(self.whole, "test", 250, device=self.device)
        self.example = torch.zeros(1, *self.source.input_shape, device=self.device)
        self.settings = TrainingSettings(
            learning_rate=plan.learning_rate, precision="bf16", channels_last=True, select_best=False
        )

    def run(self, cell: Cell, done: Mapping[str, dict]) -> dict:
        """Returns what is known about a cell after it was trained as long as all others."""
        dense = copy.deepcopy(self.start)
        checkpoints = None if self.work is None else self._checkpoints(self.work, cell)
        train = self.train(cell.seed)
        if cell.arm == "dense":
            logs = fit(dense, train, epochs=self.plan.epochs, settings=self.settings, seed=cell.seed,
                       checkpoints=checkpoints, watcher=Told(cell.key))  # fmt: skip
            self._keep(cell, dense, None, None)
            return {"accuracy": npe.accuracy(dense, self.test), "macs": 1.0, "params": 1.0, "losses": losses(logs),
                    "before_training": npe.accuracy(self.start, self.test)}  # fmt: skip
        if cell.arm == "l1":
            assert cell.level is not None
            macs = cell.level if self.plan.level == "macs" else done[replace(cell, arm="ftwt").key]["macs"]
            macs = min(macs, 1.0)  # with its heads a gated network may need more than the dense one
            result = npe.prune(
                dense, self.example, method="l1", target=f"macs={macs:.4f}", train_batches=train, seed=cell.seed,
                recover_epochs=self.plan.epochs, settings=self.settings, checkpoints=checkpoints,
                limits=npe.Limits(multiple=self.plan.multiple), watcher=Told(cell.key),
            )  # fmt: skip
            self._keep(cell, result.model, result, None)
            return {"accuracy": npe.accuracy(result.model, self.test), "macs": result.costs.macs / result.dense.macs,
                    "params": result.costs.params / result.dense.params, "losses": losses(result.logs)}  # fmt: skip
        return self._gated(cell, dense, train, checkpoints)

    def _gated(self, cell: Cell, dense: nn.Module, train: BatchLoader, checkpoints: Checkpoints | None) -> dict:
        assert cell.level is not None
        options: dict[str, object] = {
            **ARMS[cell.arm], **self.plan.few_steps, "epochs": self.plan.epochs,
            "calibration_batches": self.plan.calibration_batches,
            "mass" if self.plan.level == "mass" else "expected_macs": cell.level,
        }  # fmt: skip
        if cell.arm == "uniform":
            options["mass"] = self._uniform(cell.level)
        checked = FtwtOptions.model_validate(options)
        method = Observed(checked)
        result = npe.prune(
            dense, self.example, method=replace(FTWT, build=lambda _: method), target="macs=1.0", options=options,
            limits=npe.Limits(multiple=1),
            train_batches=train, settings=self.settings, seed=cell.seed, checkpoints=checkpoints,
            watcher=Told(cell.key),
        )  # fmt: skip
        assert sum(log.phase != "heads" for log in result.logs) == self.plan.epochs, "weights of all arms train as long"
        network = result.outcome.gated_model
        assert isinstance(network, GatedNetwork)
        self._keep(cell, network, result, checked)
        spent, firing, seen = self.looked_at(network)
        row = {
            "options": checked.model_dump(mode="json"),
            "accuracy": float((seen == self.labels).float().mean()),
            "macs": spent.share,
            "official": spent.official_share,
            "macs_without_heads": (spent.mean - spent.heads) / spent.dense,
            "spread": spent.spread / spent.dense,
            "predicted": result.outcome.facts["predicted_macs_share"],
            "compact_macs": result.costs.macs / result.dense.macs,
            "params": (result.costs.params + sum(p.numel() for p in network.gates.parameters())) / result.dense.params,
            "firing": firing_facts(firing),
            "layers": {name: layer_firing(own) for name, own in firing.items()},
            "facts": dict(result.outcome.facts),
            "losses": losses(result.logs),
        }
        if method.before is not None:
            row |= self._before(method.before, result, seen, method.mass, uniform=checked.targets == "uniform")
        return row

    def looked_at(self, network: GatedNetwork) -> tuple[ExpectedMacs, Mapping[str, LayerFiring], Tensor]:
        """Returns MACs and firing on the test images, and the class of each of them, from one pass."""
        classes: list[Tensor] = []
        handle = network.model.register_forward_hook(lambda _, args, scores: classes.append(scores.argmax(1).cpu()))
        dense = npe.count_costs(self.start, self.example).macs
        spent, firing = measure_gating(network, self.example, self.test, dense=dense)
        handle.remove()
        return spent, firing, torch.cat(classes)[-len(self.labels) :]  # the trace ran the network, too

    def _before(self, network: GatedNetwork, result: PruneResult, after: Tensor, mass: float, *, uniform: bool) -> dict:
        """Returns what the cut did on test images, how well heads predict there, and the gradient of their loss."""
        counter = ReachCounter(result.groups, trace_gate_flow(network.model, self.example))
        prediction, agreed = PredictionCounter(), Agreement()
        network.gates.targets = rule_of(mass, uniform=uniform)

        def add(gates: Gates) -> None:
            counter.add(gates.open_channels())
            prediction.add(gates)
            agreed.add(gates)

        seen = self._classes(network, add)
        gone = {name: torch.from_numpy(own) for name, own in removed_channels(result.plan, result.groups).items()}
        learnt = next(iter(self.train(0)))
        return {
            "accuracy_before_cut": float((seen == self.labels).float().mean()),
            "classes_changed_by_cut": int((seen != after).sum()),
            "removed_channels": result.plan.num_removed,
            "prunable_channels": result.groups.num_channels,
            "leak_test": leak(counter.rates(), gone),
            "heads_test": {**prediction.result(), **agreed.result()},
            **gradients(network, *learnt),
        }

    def estimates(self) -> dict:
        """Returns what gates would save on the dense network, and the accuracy of perfect heads on some test images."""
        few = npe.split_batches(self._opened(2_000), "test", 250, device=self.device)
        train = self._some(8)
        found = estimate_gating(
            self.start, self.example, train, masses=MASSES, evaluate=lambda model: npe.accuracy(model, few)
        )
        return {
            "plan": self.options.plan, "training_images": sum(len(labels) for _, labels in train),
            "test_images": sum(len(labels) for _, labels in few), "dense_accuracy": npe.accuracy(self.start, few),
            "rows": [
                {
                    "mass": own.mass, "open": own.open_loop.share, "closed": own.closed_loop and own.closed_loop.share,
                    "official": own.closed_loop and own.closed_loop.official_share, "accuracy": own.accuracy,
                }
                for own in found
            ],
            "date": str(date.today()), "environment": environment(),
        }  # fmt: skip

    def train(self, seed: int) -> BatchLoader:
        """Returns training batches."""
        return npe.split_batches(self.source, "train", self.plan.batch, seed=seed, device=self.device)

    @cached_property
    def start(self) -> nn.Module:
        """The dense network that every arm starts from; trained once where the plan gives no weights."""
        classes, weights = self.source.num_classes, self.options.weights
        torch.manual_seed(0)
        file = None if self.work is None else self.work / "start.safetensors"
        if not self.plan.start_epochs:
            if weights is None:
                raise SystemExit("error: --weights is missing, expected the weights of the dense network.")
            return npe.build_model(self.plan.model, num_classes=classes, weights=Path(weights)).to(self.device).eval()
        if file is None:
            raise SystemExit("error: --work is missing, expected a folder for the network that is trained first.")
        model = npe.build_model(self.plan.model, num_classes=classes).to(self.device)
        if file.exists():
            model.load_state_dict(load_file(file))
            return model.eval()
        settings = self.settings.model_copy(
            update={"learning_rate": self.plan.start_learning_rate, "warmup_epochs": 1.0}
        )
        job = {"epochs": self.plan.start_epochs, "limit": self.plan.limit, "data": self.options.data}
        fit(model, self.train(100), epochs=self.plan.start_epochs, settings=settings, seed=100, watcher=Told("start"),
            checkpoints=Checkpoints(file.parent / "start", job))  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: own.contiguous() for name, own in model.state_dict().items()}, file)
        return model.eval()

    @cached_property
    def labels(self) -> Tensor:
        """Labels of the test images."""
        return torch.cat([labels.cpu() for _, labels in self.test])

    def kept(self, cell: Cell) -> nn.Module | None:
        """Returns the trained network of a cell from its file, if there is one."""
        file = self._file(cell)
        if file is None or not file.exists():
            return None
        told, tensors = json.loads(file.with_suffix(".json").read_text()), load_file(file)
        model = copy.deepcopy(self.start)
        if told["plan"] is not None:
            plan = npe.PruningPlan.from_json(json.dumps(told["plan"]))
            model = cut_channels(self.start, plan, self.example).model
        if told["options"] is not None:
            model = build_gated(model, FtwtOptions.model_validate(told["options"]), self.example, tensors)
        model.load_state_dict(tensors)
        return model.eval()

    def _keep(self, cell: Cell, network: nn.Module, result: PruneResult | None, options: FtwtOptions | None) -> None:
        file = self._file(cell)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: own.detach().contiguous().clone() for name, own in network.state_dict().items()}, file)
        content = {
            "plan": None if result is None else json.loads(result.plan.to_json()),
            "options": None if options is None else options.model_dump(mode="json"),
        }
        write_text(file.with_suffix(".json"), json.dumps(content))

    def _file(self, cell: Cell) -> Path | None:
        name = cell.key.replace(" ", "_").replace(".", "p")
        return None if self.work is None else self.work / "networks" / f"{name}.safetensors"

    def _classes(self, network: GatedNetwork, add: Callable[[Gates], None]) -> Tensor:
        """Returns the class of every test image; ``add`` is told about the gates after each batch."""
        found = []
        with torch.no_grad():
            for images, _ in self.test:
                scores = network.eval()(images)
                assert isinstance(scores, Tensor)
                found.append(scores.argmax(1).cpu())
                add(network.gates)
        return torch.cat(found)

    def _uniform(self, mass: float) -> float:
        """Returns the share of units to drop that needs the MACs foreseen for a mass, by halving."""
        batches = self._some(4)
        bound = foreseen(self.start, self.example, batches, mass, uniform=False)
        low, high = 0.0, 1.0
        for _ in range(7):
            middle = (low + high) / 2
            if foreseen(self.start, self.example, batches, middle, uniform=True) > bound:
                low = middle
            else:
                high = middle
        return high

    def _some(self, count: int) -> list[tuple[Tensor, Tensor]]:
        return [batch for batch, _ in zip(self.train(0), range(count))]

    def _opened(self, limit: int | None) -> DataSource:
        return npe.open_data(self.options.data, image_size=self.plan.size, limit=limit, **IMAGENET)

    def _checkpoints(self, work: Path, cell: Cell) -> Checkpoints:
        job = {"cell": cell.key, "epochs": self.plan.epochs, "data": self.options.data, "limit": self.plan.limit}
        folder = work / "cells" / cell.key.replace(" ", "_").replace(".", "p")
        return Checkpoints(folder, {**job, "weights": fingerprint(self.start)})


class Agreement:
    """Compares masks with targets, bit by bit, beside the best choice that is the same for all images."""

    def __init__(self) -> None:
        self._right = self._bits = 0
        self._wanted: dict[str, Tensor] = {}
        self._images = 0

    def add(self, gates: Gates) -> None:
        """Counts the last forward pass, in which targets were made."""
        for layer, wanted in gates.wanted.items():
            self._right += int((gates.opened[layer] == wanted).sum())
            self._bits += wanted.numel()
            self._wanted[layer] = self._wanted.get(layer, torch.zeros(wanted.shape[1])) + wanted.sum(0).cpu()
        self._images += len(next(iter(gates.wanted.values())))

    def result(self) -> dict[str, float]:
        """Returns shares of the bits: right; right for the best constant choice of every unit; wanted."""
        rates = torch.cat(list(self._wanted.values())) / self._images
        return {
            "bits_right": self._right / self._bits,
            "bits_right_constant": float(torch.maximum(rates, 1 - rates).mean()),
            "bits_wanted": float(rates.mean()),
        }


class Told(Watcher):
    """Prints one line per epoch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def epoch(self, log: EpochLog) -> None:
        """Prints an epoch."""
        print(f"  {self.name} {log.phase} {log.epoch + 1}: loss {log.loss:.3f}, {log.seconds:.0f} s", flush=True)


def gradients(network: GatedNetwork, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns the norm of the gradient of the heads' loss on the network, beside that of the task loss."""
    own = copy.deepcopy(network).eval()
    weights = list(own.model.parameters())
    scores = own(images)
    assert isinstance(scores, Tensor)
    found = {"task_gradient": norm(torch.autograd.grad(functional.cross_entropy(scores, labels), weights,
                                                       retain_graph=True, allow_unused=True))}  # fmt: skip
    loss = own.gates.mask_loss()
    parts = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else ()
    return {**found, "mask_gradient": norm(parts)}


def norm(parts: Sequence[Tensor | None]) -> float:
    """Returns the Euclidean norm of gradients, 0 where there are none."""
    return float(sum(float(part.square().sum()) for part in parts if part is not None) ** 0.5)


def foreseen(model: nn.Module, example: Tensor, batches: Sequence[object], mass: float, *, uniform: bool) -> float:
    """Returns the share of the dense MACs that targets would leave, applied to the dense network."""
    found = estimate_gating(model, example, batches, masses=[mass], uniform=uniform)[0].closed_loop
    assert found is not None
    return found.share


def layer_firing(own: LayerFiring) -> dict[str, float]:
    """Returns the firing of one layer in numbers."""
    return {"never": own.never, "always": own.always, "varying": own.varying, "rate": float(own.rate.mean()),
            "entropy": own.entropy}  # fmt: skip


def losses(logs: Sequence[EpochLog]) -> list[float]:
    """Returns the mean loss of every epoch."""
    return [round(log.loss, 4) for log in logs]


def latency(options: argparse.Namespace) -> dict:
    """Exports every kept network of a plan, of its first seed, and times all files side by side.

    Layers that gain are chosen by firing rates on 64 validation images, which parity is checked on, too; times are
    taken on 16 test images in turn.
    """
    bench = Bench(PLANS[options.plan], options)
    assert bench.work is not None, "there are kept networks only with --work"
    folder = bench.work / "onnx"
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.cat([own for own, _ in npe.split_batches(bench.source, "val", 64)])
    generator = torch.Generator().manual_seed(0)
    checked = images[torch.randperm(len(images), generator=generator)[:64]]
    rows = {}
    entries = {}
    cells = sorted(PLANS[options.plan].cells, key=lambda own: own.arm != "dense")  # the first one is the reference
    for cell in cells:
        network = bench.kept(cell) if cell.seed == cells[0].seed else None
        if network is None:
            continue
        for row in exported(bench, cell, network, checked, folder):
            rows[row["name"]] = row
            entries[row["name"]] = (OnnxRuntimeCpu(), RunnableModel(onnx_path=Path(row["file"])))
    shown = torch.cat([own for own, _ in bench.test])
    shown = shown[torch.randperm(len(shown), generator=generator)[:16]]
    report = measure_latency(entries, [[own[None].numpy()] for own in shown], rounds=options.rounds, threads=1)
    for measured in report.rows:
        own = rows[measured.name]
        own |= {
            "file": Path(own["file"]).name,
            "ratio": measured.ratio,
            "p50_ms": measured.p50_ms,
            "p95_ms": measured.p95_ms,
        }
    told = report.to_dict()
    return {"plan": options.plan, "rows": list(rows.values()), "date": str(date.today()), "threads": 1,
            "environment": environment(), "report": {name: told[name] for name in told if name != "rows"}}  # fmt: skip


def exported(bench: Bench, cell: Cell, network: nn.Module, images: Tensor, folder: Path) -> Iterator[dict]:
    """Exports a network, a gated one in all flavours; yields name, file, accuracy and firing rate of each."""
    name = cell.key.rpartition(" ")[0]
    plain = {"arm": cell.arm, "level": cell.level, "seed": cell.seed}
    if not isinstance(network, GatedNetwork):
        path = folder / f"{name.replace(' ', '_')}.onnx"
        export_onnx(network, bench.example, path, dynamic_batch=False)
        costs = npe.count_costs(network, bench.example).macs / npe.count_costs(bench.start, bench.example).macs
        yield {**plain, "name": name, "file": str(path), "flavour": "static", "macs": costs,
               "accuracy": npe.accuracy(network, bench.test)}  # fmt: skip
        return
    whole: dict = {}
    for flavour, fold in FLAVOURS:
        told = f"{flavour}, folded" if fold else flavour
        path = folder / f"{name} {told}.onnx".replace(" ", "_").replace(",", "")
        made = export_gated(network, bench.example, path, flavour=flavour, images=images, fold=fold)
        if fold and not made.network.gates.places:
            continue  # nothing gains: a plain network is left
        measured = tested(bench, made.network) if fold else whole or tested(bench, network)
        whole = whole or measured
        yield {**plain, "name": f"{name} ({told})", "file": str(path), "flavour": told, **measured,
               "gathered": list(made.gathered), "left_out": len(made.masked) + len(made.folded),
               "parity": made.parity and made.parity.max_rel}  # fmt: skip


def tested(bench: Bench, network: GatedNetwork) -> dict:
    """Returns accuracy, MACs and firing rates on the test images."""
    spent, firing, seen = bench.looked_at(network)
    rates = {layer: float(own.rate.mean()) for layer, own in firing.items()}
    return {"accuracy": float((seen == bench.labels).float().mean()), "macs": spent.share,
            "firing_rate": firing_facts(firing)["firing_rate"], "rates": rates}  # fmt: skip


def summary(results: Path) -> Iterator[str]:
    """Yields the tables of all plans; plans without a cell are named as not run."""
    yield "# FTWT beside its controls"
    for name, plan in PLANS.items():
        planned = {cell.key for cell in plan.cells}
        rows = [row for row in read_rows(results / f"ftwt_{stem(name)}.jsonl") if row["key"] in planned]
        images = f"{plan.limit:,} training images" if plan.limit else "all training images"
        yield f"\n## {name}: {plan.model}, {plan.epochs} epochs, {images}\n"
        if not rows:
            yield f"Not run ({len(plan.cells)} cells): `ftwt.py --plan {name} …`"
            continue
        yield f"{len(rows)} of {len(plan.cells)} cells.\n"
        times = results / f"ftwt_{stem(name)}_latency.json"
        if times.exists():
            yield from latency_table(json.loads(times.read_text()))
        yield from accuracy_table(rows, plan)
        yield from firing_table(rows)
        yield from core_table(rows)
        yield from gradient_lines(rows)
        path = results / f"ftwt_{stem(name)}_estimates.json"
        if path.exists():
            yield from estimates_table(json.loads(path.read_text()))


def accuracy_table(rows: list[dict], plan: Plan) -> Iterator[str]:
    """Yields accuracy and MACs, one line per arm and level."""
    what = "mass r" if plan.level == "mass" else "MACs asked of perfect heads, or of L1"
    yield "Test accuracy in % at the last epoch: mean ± half the range over seeds. MACs: shares of the dense network,"
    yield "honest ones with heads, mean over the test images; foreseen: before training, on training images. `static`:"
    yield "the filters that are open; in brackets what is left to compute once whole channels are cut out.\n"
    yield f"| arm | {what} | seeds | accuracy | honest MACs | foreseen | difference (goal ≤ {GOAL}) | official MACs | "\
          "parameters |"  # fmt: skip
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for (arm, level), cells in gathered(rows).items():
        predicted = [cell["predicted"] for cell in cells if "predicted" in cell]
        honest = mean(cells, "macs")
        gap = "–"
        if predicted:
            worst = max((cell["macs"] - cell["predicted"] for cell in cells), key=abs)
            gap = f"{honest - statistics.fmean(predicted):+.3f}, {'met' if abs(worst) <= GOAL else 'MISSED'}"
        shown = f"{honest:.3f}"
        if arm == "static":
            shown = f"{mean(cells, 'macs_without_heads'):.3f} (cut: {mean(cells, 'compact_macs'):.3f})"
        before, official = "–", "–"
        if predicted:
            before, official = f"{statistics.fmean(predicted):.3f}", f"{mean(cells, 'official'):.3f}"
        yield (
            f"| {arm} | {'–' if level is None else level} | {len(cells)} | {spread([c['accuracy'] for c in cells])} | "
            f"{shown} | {before} | {gap} | {official} | {mean(cells, 'params'):.3f} |"
        )


def firing_table(rows: list[dict]) -> Iterator[str]:
    """Yields how filters fire on test images and how well heads foresee their targets."""
    cells = [row for row in rows if "firing" in row]
    yield "\nFiring on the test images (means over seeds), and heads against the targets of the trained network there:"
    yield "*right* is the share of mask bits that agree with the targets, *constant* that of the best choice per filter"
    yield "that is the same for all images (found on the test images), *wanted* the share of open targets.\n"
    yield "| arm | level | filters | never | always | varying | entropy (bits) | spread of MACs | right | constant | "\
          "wanted | precision | recall | while learning |"  # fmt: skip
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for (arm, level), own in gathered(cells).items():
        firing = [cell["firing"] for cell in own]
        heads = [cell["heads_test"] for cell in own if "heads_test" in cell]
        numbers = [f"{mean(firing, f'filters_{kind}'):.0f}" for kind in ("gated", "never", "always", "varying")]
        learnt = [cell["facts"] for cell in own if "last_learning_head_precision" in cell["facts"]]
        told = ["–"] * 5
        if heads:
            names = ("bits_right", "bits_right_constant", "bits_wanted", "head_precision", "head_recall")
            told = [f"{mean(heads, name):.3f}" for name in names]
        training = "–"
        if learnt:
            names = ("last_learning_head_precision", "last_learning_head_recall")
            training = " / ".join(f"{mean(learnt, name):.3f}" for name in names)
        yield (
            f"| {arm} | {level} | {' | '.join(numbers)} | {mean(firing, 'firing_entropy_bits'):.3f} | "
            f"{mean(own, 'spread'):.3f} | {' | '.join(told)} | {training} |"
        )


def core_table(rows: list[dict]) -> Iterator[str]:
    """Yields what was removed because it never fired on calibration images, and what that does on test images."""
    yield "\nThe static core: channels that reached no reader on the calibration images, removed. Leak: how often one"
    yield "of them would have reached a reader, on other training images and on the test images.\n"
    yield "| arm | level | seed | channels removed | parameters | MACs | leak, training | leak, test | "\
          "test classes changed | accuracy before → after |"  # fmt: skip
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        if "leak_test" not in row:
            continue
        facts = row["facts"]
        yield (
            f"| {row['arm']} | {row['level']} | {row['seed']} | {row['removed_channels']} of "
            f"{row['prunable_channels']} | {percent(facts['never_firing_params_share'])} | "
            f"{percent(facts['never_firing_macs_share'])} | {facts.get('never_firing_leak', float('nan')):.2g} | "
            f"{row['leak_test']:.2g} | {row['classes_changed_by_cut']} | {percent(row['accuracy_before_cut'])} → "
            f"{percent(row['accuracy'])} |"
        )


def gradient_lines(rows: list[dict]) -> Iterator[str]:
    """Yields the gradient of the heads' loss on the network, which is none unless they are trained jointly."""
    found = [row for row in rows if "mask_gradient" in row and row["arm"] != "static"]
    joint = [row for row in found if row["arm"] == "joint"]
    others = [row["mask_gradient"] for row in found if row["arm"] != "joint"]
    if others:
        yield f"\nGradient of the heads' loss on the network (one training batch): largest norm of {len(others)} "
        yield f"decoupled cells {max(others):g}" + "".join(
            f"; {row['key']}: {row['mask_gradient']:.3g} (task loss: {row['task_gradient']:.3g})" for row in joint
        )


def estimates_table(found: dict) -> Iterator[str]:
    """Yields what gates would save before any training."""
    yield f"\nBefore any training ({found['training_images']:,} training images; accuracy of perfect heads on "
    yield f"{found['test_images']:,} test images; dense {percent(found['dense_accuracy'])} %):\n"
    yield "| mass r | MACs, open loop | MACs, closed loop | official, closed loop | ceiling accuracy |"
    yield "|---:|---:|---:|---:|---:|"
    for row in found["rows"]:
        yield (
            f"| {row['mass']} | {row['open']:.3f} | {row['closed']:.3f} | {row['official']:.3f} | "
            f"{percent(row['accuracy'])} |"
        )


def latency_table(found: dict) -> Iterator[str]:
    """Yields latency, then accuracy."""
    report = found["report"]
    first = found["rows"][0]["name"]
    yield f"Latency as a multiple of `{first}`: ONNX Runtime, {report['clock']} time, one thread, batch 1, 16 test"
    yield f"images in turn, {report['rounds']} rounds, A/A error {report['error_bar']:.3f}; one seed. By latency.\n"
    yield "| latency | accuracy | arm | flavour | firing rate | MACs | ms | layers gathered |"
    yield "|---:|---:|---|---|---:|---:|---:|---:|"
    for row in sorted(found["rows"], key=lambda own: own["ratio"]):
        rate = f"{row['firing_rate']:.3f}" if "firing_rate" in row else "–"
        level = "" if row["level"] is None else f" {row['level']}"
        yield (
            f"| {row['ratio']:.3f} | {percent(row['accuracy'])} | {row['arm']}{level} | {row['flavour']} | {rate} | "
            f"{row['macs']:.3f} | {row['p50_ms']:.2f} | {len(row['gathered']) if 'gathered' in row else '–'} |"
        )
    yield ""


def gathered(rows: list[dict]) -> dict[tuple[str, float | None], list[dict]]:
    """Returns (arm, level) → the cells of all seeds."""
    found: dict[tuple[str, float | None], list[dict]] = {}
    for row in rows:
        found.setdefault((row["arm"], row["level"]), []).append(row)
    order = [*ARMS, "l1", "dense"]
    return dict(sorted(found.items(), key=lambda item: (-(item[0][1] or 2), order.index(item[0][0]))))


def mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """Returns the mean of a number over cells."""
    return statistics.fmean(row[name] for row in rows)


def spread(values: Sequence[float]) -> str:
    """Returns the mean in per cent, and half the range where there is more than one."""
    half = f" ± {50 * (max(values) - min(values)):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{half}"


def percent(value: float) -> str:
    """Returns a share in per cent."""
    return f"{100 * value:.2f}"


def read_rows(path: Path) -> list[dict]:
    """Returns the finished cells of a file, none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=list(PLANS), default="resnet20")
    parser.add_argument("--data", default="cifar10:.", help="cifar10:ROOT or imagefolder:PATH")
    parser.add_argument("--weights", help="safetensors or state dict of the dense network")
    parser.add_argument("--only", help="run the cells whose key contains this")
    parser.add_argument("--seed", type=int, help="run the cells of this seed")
    parser.add_argument("--work", help="folder for checkpoints within a cell and for trained networks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", default=str(HERE / "results"))
    parser.add_argument("--epochs", type=int, help="instead of the plan's, for a trial")
    parser.add_argument("--limit", type=int, help="training images instead of the plan's, for a trial")
    parser.add_argument("--rounds", type=int, default=40, help="of --latency")
    parser.add_argument("--estimates", action="store_true", help="what gates would save before any training")
    parser.add_argument("--latency", action="store_true", help="export and time the kept networks of a plan")
    parser.add_argument("--summary", action="store_true", help="write results/ftwt.md")
    return parser


if __name__ == "__main__":
    main()
