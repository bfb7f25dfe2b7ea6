"""Reconstruction tickets beside their controls: pruned on one task, trained on others, compared in pairs.

Tickets of one network at one target differ in how their channels were chosen, and in nothing else: all have the first
weights, cut, with statistics of norms measured anew. ``lambda10`` is the method, ``lambda0`` the same rounds without
the reconstruction loss, ``imp`` those without rewinding, ``l1`` and the two criteria of torch-pruning choose in one
shot, ``random_weights`` has the architecture of ``lambda10`` and random weights. Every ticket is measured on its own
task without training (images that pruning has not seen), its images are rebuilt by the frozen decoder, and it is
trained on other tasks: flowers (classification) and blood cells (detection). Nothing is selected; the last epoch
counts.

Finished cells are kept in a file of JSON lines, tickets and unfinished cells in ``--work``, so that the script can be
stopped and started again. ``--cost`` times the joint loss beside the task loss; ``--summary`` writes the tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch
import torch_pruning as tp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import nni_prune_ext as npe
from nni_prune_ext.checkpoints import Checkpoints, fingerprint
from nni_prune_ext.data.batches import BatchLoader
from nni_prune_ext.data.detection import open_detection
from nni_prune_ext.data.image_arrays import DataSource, ImageArrays
from nni_prune_ext.data.image_folders import class_folders, class_images, decode_images
from nni_prune_ext.data.splitting import split_off
from nni_prune_ext.evaluation import environment
from nni_prune_ext.methods.trained_decoder import JointLoss, joint_loss, reconstruction_error
from nni_prune_ext.pipeline import PruneResult
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.text_files import write_text
from nni_prune_ext.torch_pruning import CertifiedPruner
from nni_prune_ext.training import EpochLog, TrainingSettings, Watcher
from nni_prune_ext.transfer import transfer_networks

HERE = Path(__file__).resolve().parent
ROUNDS: Mapping[str, Mapping[str, object]] = {
    "lambda0": {"reconstruction_weight": 0},
    "lambda10": {"reconstruction_weight": 10},
    "imp": {"reconstruction_weight": 0, "rewind": False},
}
"""Arms that are rounds of the method → options."""
TRAINING = {"precision": "bf16", "channels_last": True, "select_best": False}


@dataclass(frozen=True)
class Task:
    """A second task: its data, and how long and how every network is trained on it."""

    epochs: int
    batch_size: int
    learning_rate: float
    size: tuple[int, int]
    limit: int | None = None


@dataclass(frozen=True)
class Plan:
    """A network, its own task, how it is pruned, and what it is transferred to."""

    model: str
    size: int
    images: int
    learning_rate: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    cells: tuple[tuple[str, str], ...]
    options: Mapping[str, object]
    tasks: Mapping[str, Task]
    seeds: int = 2
    tune_epochs: int = 0


MANY = ("lambda0", "lambda10", "l1", "random_weights", "tp_taylor")
ALL = (*MANY, "tp_group_norm", "imp", "random")
"""All arms that remove channels, in the order in which they are run; ``random`` keeps random channels."""


def crossed(targets: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, str], ...]:
    """Returns (target, arm), the dense network first."""
    return (("none", "dense"), *((target, arm) for target, arms in targets.items() for arm in arms))


IMAGENET, ODD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SHORT: Mapping[str, object] = {
    "rounds": 3, "round_epochs": 2, "decoder_epochs": 6, "decoder_learning_rate": 1e-3, "criterion": "taylor",
    "score_batches": 20,
}  # fmt: skip
NARROW = {"feature_maps": "features.1,features.3,features.6,features.13,features.17"}
"""The feature maps of MobileNetV2 without its last layer of 1,280 channels, which would make a decoder of 60 M."""
PUBLISHED: Mapping[str, object] = {"rounds": 8, "round_epochs": 10, "decoder_epochs": 50, "criterion": "taylor"}
FEW = ("lambda0", "lambda10")
PLANS: Mapping[str, Plan] = {
    "mobilenet_v2": Plan(
        "torchvision:mobilenet_v2", 128, 800, 0.002, *ODD, crossed({"macs=0.5": MANY, "macs=0.25": FEW}),
        {**SHORT, **NARROW}, {"bccd": Task(8, 4, 1e-3, (240, 320)), "flowers": Task(3, 32, 1e-3, (96, 96))},
    ),
    "resnet20": Plan(
        "resnet20", 32, 5_000, 0.02, *IMAGENET, crossed({"macs=0.5": MANY, "macs=0.25": FEW}), SHORT,
        {"flowers": Task(4, 32, 1e-3, (48, 48))}, tune_epochs=2,
    ),
    "weights": Plan(
        "resnet20", 32, 5_000, 0.02, *IMAGENET, crossed({"sparsity=0.7903": ("lambda0", "lambda10")}),
        {**SHORT, "rounds": 7, "round_epochs": 1}, {"flowers": Task(4, 32, 1e-3, (48, 48))}, tune_epochs=2,
    ),
    "mobilenet_v2-full": Plan(
        "torchvision:mobilenet_v2", 224, 800, 0.002, *ODD, crossed({"macs=0.5": ALL, "macs=0.25": ALL}), PUBLISHED,
        {"bccd": Task(60, 4, 1e-3, (480, 640)), "flowers": Task(30, 32, 1e-3, (128, 128))}, seeds=5,
    ),
    "resnet20-full": Plan(
        "resnet20", 32, 45_000, 0.02, *IMAGENET, crossed({"macs=0.5": ALL, "macs=0.25": ALL}), PUBLISHED,
        {"flowers": Task(30, 32, 1e-3, (64, 64))}, seeds=5, tune_epochs=40,
    ),
}  # fmt: skip


def main() -> None:
    """Runs the cells of a plan that the results file does not hold, or one of the other jobs."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    results = Path(options.results)
    if options.summary:
        write_text(results / "reconstruction.md", "\n".join(summary(results)) + "\n")
        print((results / "reconstruction.md").read_text())
        return
    if options.cost:
        write_text(results / "reconstruction_cost.json", json.dumps(cost(options), indent=1) + "\n")
        return
    out = results / f"reconstruction_{options.plan.replace('-', '_')}.jsonl"
    if options.weights is None:
        raise SystemExit("error: --weights is missing, expected the weights of the dense network.")
    bench = Bench(options)
    seeds = range(PLANS[options.plan].seeds) if options.seed is None else [options.seed]
    for seed in seeds:
        for target, arm in PLANS[options.plan].cells:
            for task in ("ticket", *PLANS[options.plan].tasks):
                run_cell(bench, Cell(task, target, arm, seed), out, options.only)


@dataclass(frozen=True)
class Cell:
    """One measurement: ``ticket`` on the network's own task, or a transfer."""

    task: str
    target: str
    arm: str
    seed: int

    @property
    def key(self) -> str:
        """Returns what a finished cell is known by."""
        return f"{self.task} {self.target} {self.arm} {self.seed}"


def run_cell(bench: Bench, cell: Cell, out: Path, only: str | None) -> None:
    """Runs a cell unless it is done."""
    if cell.key in {row["key"] for row in read_rows(out)} or (only and only not in cell.key):
        return
    began = time.perf_counter()
    found = bench.ticket_row(cell) if cell.task == "ticket" else bench.transfer_row(cell)
    when = {"seconds": round(time.perf_counter() - began, 1), "date": str(date.today()), "environment": environment()}
    row = {"key": cell.key, **asdict(cell), **found, **when}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(
        cell.key, {k: v for k, v in found.items() if k not in ("removed", "losses")}, f"{row['seconds']} s", flush=True
    )


@dataclass(frozen=True)
class Ticket:
    """A network with first weights, and what was cut."""

    model: nn.Module
    plan: npe.PruningPlan | None
    masks: Mapping[str, Tensor]
    facts: Mapping[str, float]


class Bench:
    """The network, its own task, the tickets and the second tasks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.plan = options, PLANS[options.plan]
        self.work = Path(options.work) / options.plan
        self.work.mkdir(parents=True, exist_ok=True)
        own = self.plan
        self.source = cifar(options, own) if "resnet" in own.model else imagenet(options, own)
        self.dense = npe.build_model(
            own.model, num_classes=len(self.source.class_names), weights=options.weights
        ).to(options.device).eval()  # fmt: skip
        told = {"weights": fingerprint(self.dense), "plan": repr(replace(own, cells=(), tasks={}, seeds=0))}
        Checkpoints(self.work / "identity", told).claim()  # tickets of another network or setting are not taken
        self.example = torch.zeros(1, 3, own.size, own.size, device=options.device)
        self.settings = TrainingSettings(learning_rate=own.learning_rate, **TRAINING)
        self.batch = 32 if own.size > 64 else 128
        self._tickets: dict[tuple[str, str, int], Ticket] = {}

    def train(self, seed: int) -> BatchLoader:
        """Returns training batches of the network's own task."""
        return npe.split_batches(self.source, "train", self.batch, seed=seed, device=self.options.device)

    def ticket_row(self, cell: Cell) -> dict:
        """Prunes, unless that was done before, and measures on the network's own task, without training and with."""
        own = self.ticket(cell)
        test = npe.split_batches(self.source, "test", 100, device=self.options.device)
        costs, dense = npe.count_costs(own.model, self.example), npe.count_costs(self.dense, self.example)
        row = {
            "macs": costs.macs / dense.macs, "params": costs.params / dense.params,
            "own_task": npe.accuracy(own.model, test), "facts": dict(own.facts),
            "rebuilt_error": self.rebuilt(own, cell), "removed": {},
        }  # fmt: skip
        if own.plan is not None:
            row["removed"] = {root: bits(gone, own.plan.widths[root]) for root, gone in own.plan.removed.items()}
        if own.masks:
            gone = sum(int((~mask).sum()) for mask in own.masks.values())
            row["masked"] = gone / sum(mask.numel() for mask in own.masks.values())
            row["params"] -= gone / dense.params
            if cell.arm == "lambda10":
                row["overlap_with_lambda0"] = overlap(own.masks, self.ticket(replace(cell, arm="lambda0")).masks)
        if self.plan.tune_epochs:
            tuned = copy.deepcopy(own.model)
            npe.fit(tuned, self.train(cell.seed), epochs=self.plan.tune_epochs, settings=self.settings, seed=cell.seed,
                    weight_masks=own.masks, watcher=Told(cell.key))  # fmt: skip
            npe.recalibrate_batchnorm(tuned, self.train(cell.seed))
            row["own_task_trained"] = npe.accuracy(tuned, test)
        return row

    def transfer_row(self, cell: Cell) -> dict:
        """Trains a ticket on a second task."""
        own, task = self.ticket(cell), self.plan.tasks[cell.task]
        settings = TrainingSettings(
            optimizer="adamw", learning_rate=task.learning_rate, weight_decay=0.01, warmup_epochs=0.5,
            max_gradient_norm=10.0, **TRAINING,
        )  # fmt: skip
        report = transfer_networks(
            {cell.arm: own.model}, self.second(cell.task), epochs=task.epochs, seeds=[cell.seed], settings=settings,
            batch_size=task.batch_size, normalisation=(self.plan.mean, self.plan.std),
            pyramid_channels=64, weight_masks={cell.arm: own.masks}, folder=self.work / cell.key.replace(" ", "_"),
            watcher=Told(cell.key),
        )  # fmt: skip
        row = report.rows[0]
        return {"metric": report.metric, **row.metrics, "parameters": dict(row.parameters), "losses": list(row.losses)}

    def ticket(self, cell: Cell) -> Ticket:
        """Returns a ticket, from its file if it was made before."""
        where = (cell.target, cell.arm, cell.seed)
        if where not in self._tickets:
            self._tickets = {where: self._ticket(cell)}  # one at a time: a full plan has many
        return self._tickets[where]

    def _ticket(self, cell: Cell) -> Ticket:
        if cell.arm == "dense":
            return Ticket(self.dense, None, {}, {})
        if cell.arm == "random_weights":
            own = self._ticket(replace(cell, arm="lambda10"))
            torch.manual_seed(cell.seed)
            fresh = npe.build_model(self.plan.model, num_classes=len(self.source.class_names)).to(self.options.device)
            assert own.plan is not None
            return Ticket(cut_channels(fresh.eval(), own.plan, self.example).model, own.plan, {}, {})
        file = self.work / f"ticket {cell.target} {cell.arm} {cell.seed}".replace(" ", "_").replace("=", "-")
        described, weights = (file.with_name(f"{file.name}.{kind}") for kind in ("json", "safetensors"))
        if not described.exists():
            result = self._pruned(cell)
            masks = dict(result.outcome.weight_masks or {}) if isinstance(result, PruneResult) else {}
            facts = dict(result.outcome.facts) if isinstance(result, PruneResult) else {}
            tensors = {f"model/{k}": v.contiguous().clone() for k, v in result.model.state_dict().items()}
            tensors |= {f"mask/{k}": v.to(torch.uint8) for k, v in masks.items()}
            save_file(tensors, weights)
            content = {"plan": json.loads(result.plan.to_json()), "facts": facts}
            write_text(described, json.dumps(content))
        content = json.loads(described.read_text())
        plan = npe.PruningPlan.from_json(json.dumps(content["plan"]))
        tensors = load_file(weights)
        model = cut_channels(self.dense, plan, self.example).model
        model.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
        masks = {k.removeprefix("mask/"): v.bool() for k, v in tensors.items() if k.startswith("mask/")}
        return Ticket(model.eval(), plan, masks, content["facts"])

    def _pruned(self, cell: Cell) -> PruneResult | Cut:
        if cell.arm.startswith("tp_"):
            return self._by_torch_pruning(cell)
        if cell.arm not in ROUNDS:
            return npe.prune(self.dense, self.example, method=cell.arm, target=cell.target, seed=cell.seed,
                             train_batches=self.train(cell.seed), limits=npe.Limits(multiple=1))  # fmt: skip
        chosen = {**self.plan.options, **ROUNDS[cell.arm]}
        if chosen["reconstruction_weight"]:
            chosen["decoder_from"] = str(self.decoder())
        result = npe.prune(
            self.dense, self.example, method="reconstruction", target=cell.target, options=chosen, seed=cell.seed,
            train_batches=self.train(cell.seed), settings=self.settings, watcher=Told(cell.key),
            limits=npe.Limits(multiple=1),
        )  # fmt: skip
        return result

    def decoder(self) -> Path:
        """Returns the file of the decoder that all tickets of the plan share, trained if it is not there."""
        path = self.work / "decoder.safetensors"
        if not path.exists():
            short = {**self.plan.options, "reconstruction_weight": 10, "rounds": 1, "round_epochs": 1}
            npe.prune(self.dense, self.example, method="reconstruction", target="macs=0.9", seed=0,
                      options={**short, "decoder_to": str(path)}, train_batches=self.train(0),
                      settings=self.settings, watcher=Told("decoder"))  # fmt: skip
        return path

    def rebuilt(self, own: Ticket, cell: Cell) -> float:
        """Returns the frozen decoder's mean squared error on test images, over their variance."""
        joint = joint_loss(self.dense, self.example, self.decoder(), task=forward_only)
        if own.plan is not None:
            joint = joint.after_cut(cut_channels(self.dense, own.plan, self.example).kept)
        errors, variances = [], []
        model = copy.deepcopy(own.model).eval()
        with torch.no_grad():
            for images, _ in npe.split_batches(self.source, "test", 100, device=self.options.device):
                taking_off = joint.reading.attach(model)
                model(images)
                error, image, _ = reconstruction_error(joint.decoder, joint.reading)
                for take_off in taking_off:
                    take_off()
                errors.append(float(error))
                variances.append(float(image.var(0, correction=0).mean()))
        return statistics.fmean(errors) / statistics.fmean(variances)

    def _by_torch_pruning(self, cell: Cell) -> Cut:
        """Finds torch-pruning's ratio, ranked over all layers, that meets the MACs, by halving."""
        bound = float(cell.target.removeprefix("macs="))
        dense = npe.count_costs(self.dense, self.example).macs
        groups = npe.trace_channel_groups(self.dense, self.example)
        low, high, best = 0.0, 1.0, None
        for _ in range(8):
            ratio = (low + high) / 2
            plan = self._selected(cell, groups, ratio)
            if npe.count_costs(cut_channels(self.dense, plan, self.example).model, self.example).macs <= bound * dense:
                high, best = ratio, plan
            else:
                low = ratio
        assert best is not None, "a ratio near 1 meets every bound"
        model = npe.remove_channels(self.dense, best, self.example).model
        npe.recalibrate_batchnorm(model, self.train(cell.seed))
        return Cut(model, best)

    def _selected(self, cell: Cell, groups: npe.ChannelGroups, ratio: float) -> npe.PruningPlan:
        model = copy.deepcopy(self.dense)
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        if cell.arm == "tp_taylor":
            importance = tp.importance.GroupTaylorImportance()
            for number, (images, labels) in enumerate(self.train(cell.seed)):
                if number == self.plan.options.get("score_batches", 50):
                    break
                functional.cross_entropy(model(images), labels).backward()
        ignored = [model.get_submodule(p.root) for p in groups.protected if f"{p.root}.weight" in groups.shapes]
        pruner = CertifiedPruner(
            model, self.example, importance, pruning_ratio=ratio, global_pruning=True, ignored_layers=ignored,
            max_pruning_ratio=0.95,
        )  # fmt: skip
        removal = pruner.step().removal
        return npe.plan_from_channels(groups, {}) if removal is None else removal.plan

    def second(self, name: str) -> object:
        """Opens the data of a second task."""
        task = self.plan.tasks[name]
        if name == "bccd":
            return open_detection(f"voc:{self.options.bccd}", image_size=task.size, limit=task.limit)
        return npe.open_data(f"imagefolder:{self.options.flowers}", image_size=task.size[0], limit=task.limit,
                             mean=self.plan.mean, std=self.plan.std)  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """What torch-pruning has chosen, cut by us."""

    model: nn.Module
    plan: npe.PruningPlan


def forward_only(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Returns no loss of a batch."""
    return model(batch[0]).sum() * 0


def cifar(options: argparse.Namespace, plan: Plan) -> DataSource:
    """Opens CIFAR-10; the test split stays whole."""
    whole = npe.open_data(options.data, mean=plan.mean, std=plan.std)
    short = npe.open_data(options.data, limit=plan.images, mean=plan.mean, std=plan.std)
    return replace(whole, train=short.train)


def imagenet(options: argparse.Namespace, plan: Plan) -> DataSource:
    """Opens a folder with one folder per class, in the order of the classes; a fifth of the images is held out."""
    root = Path(options.data)
    names = class_folders(root)
    files = class_images(root, names)
    arrays = ImageArrays(decode_images(files.paths, (plan.size, plan.size)), files.labels)
    held = torch.arange(len(arrays)) % 5 == 0
    train = arrays.subset((~held).nonzero()[:, 0])
    train = train if plan.images >= len(train) else train.subset(split_off(train.labels, plan.images, seed=0)[1])
    test = arrays.subset(held.nonzero()[:, 0])
    return DataSource("imagenet", train, test, test, names, (3, plan.size, plan.size), plan.mean, plan.std, "crop_flip")


def overlap(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Returns intersection over union of the weights that two tickets masked."""
    common = sum(int((~one[name] & ~two[name]).sum()) for name in one)
    return common / sum(int((~one[name] | ~two[name]).sum()) for name in one)


def bits(gone: tuple[int, ...], width: int) -> str:
    """Returns the removed channels of a layer as hexadecimal digits, with the width."""
    return f"{width}:{sum(1 << channel for channel in gone):x}"


class Told(Watcher):
    """Prints one line per epoch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def epoch(self, log: EpochLog) -> None:
        """Prints an epoch."""
        print(f"  {self.name} {log.phase} {log.epoch + 1}: loss {log.loss:.3f}, {log.seconds:.0f} s", flush=True)


def cost(options: argparse.Namespace) -> dict:
    """Times a training step on the joint loss beside one on the task loss, in turn; CPU time, made images."""
    rows = {}
    for name, size, batch in (("resnet20", 32, 128), ("torchvision:mobilenet_v2", 128, 16)):
        model = npe.build_model(name, num_classes=10).train().to(memory_format=torch.channels_last)
        folder = Path(options.work)
        folder.mkdir(parents=True, exist_ok=True)
        path, example = folder / f"cost_{size}.safetensors", torch.zeros(1, 3, size, size)
        data = [(torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,)))]
        npe.prune(model, example, method="reconstruction", target="macs=0.9", train_batches=data,
                  options={"decoder_epochs": 1, "rounds": 1, "round_epochs": 1, "decoder_to": str(path)})  # fmt: skip
        joint = joint_loss(model, example, path)
        losses: dict[str, Callable[[nn.Module, object], Tensor] | JointLoss] = {"task": joint.task, "joint": joint}
        times: dict[str, list[float]] = {arm: [] for arm in losses}
        for _ in range(options.cost):
            for arm, loss in losses.items():
                began = time.process_time()
                with torch.autocast("cpu", torch.bfloat16):
                    value = loss(model, data[0])
                value.backward()
                times[arm].append(time.process_time() - began)
        ratios = [a / b for a, b in zip(times["joint"], times["task"])]
        rows[name] = {
            "image_size": size, "batch": batch, "steps": options.cost, "ratio": statistics.median(ratios),
            "cpu_s": {arm: statistics.median(found) for arm, found in times.items()},
        }  # fmt: skip
    return {"networks": rows, "threads": options.threads, "environment": environment(), "date": str(date.today())}


def summary(results: Path) -> Iterator[str]:
    """Yields the tables of all plans; plans without a cell are named as not run."""
    yield "# Reconstruction tickets beside their controls"
    for name, plan in PLANS.items():
        rows = read_rows(results / f"reconstruction_{name.replace('-', '_')}.jsonl")
        cells = len(plan.cells) * plan.seeds * (1 + len(plan.tasks))
        yield f"\n## {name}: {plan.model}, {plan.images:,} images of {plan.size} pixels\n"
        if not rows:
            yield f"Not run ({cells} cells): `reconstruction.py --plan {name} …`"
            continue
        trained = ", ".join(
            f"{task} {own.epochs} epochs at {own.size[0]} × {own.size[1]}" for task, own in plan.tasks.items()
        )
        yield f"{len(rows)} of {cells} cells. {trained}. Mean over seeds (each seed); in %.\n"
        yield from table(rows, plan)
        yield from differences(rows, plan)
        yield from overlaps(rows)
    path = results / "reconstruction_cost.json"
    if path.exists():
        yield "\n## Cost of the joint loss\n"
        for name, own in json.loads(path.read_text())["networks"].items():
            setting = f"images of {own['image_size']} pixels, batches of {own['batch']}"
            yield (
                f"* {name}, {setting}: a step takes {own['ratio']:.2f} times the CPU time of one on the task loss "
                f"(median of {own['steps']} pairs)"
            )


def table(rows: list[dict], plan: Plan) -> Iterator[str]:
    """Yields one line per target and arm."""
    columns = columns_of(plan)
    titles = {"own_task": "own task, untrained", "own_task_trained": f"own task, {plan.tune_epochs} epochs",
              "bccd": "blood cells, AP", "bccd:AP RBC": "red cells alone, AP"}  # fmt: skip
    yield (
        "| target | ticket | MACs | parameters | error rebuilt | "
        + " | ".join(titles.get(c, c) for c in columns)
        + " |"
    )
    yield "|---|---|---:|---:|---:|" + "---:|" * len(columns)
    for target, arm in plan.cells:
        own = [row for row in rows if (row["target"], row["arm"], row["task"]) == (target, arm, "ticket")]
        if not own:
            continue
        cells = [spread([100 * s for s in scores(rows, target, arm, column).values()]) for column in columns]
        macs, params, error = (statistics.fmean(row[key] for row in own) for key in ("macs", "params", "rebuilt_error"))
        yield f"| {target} | {arm} | {macs:.3f} | {params:.3f} | {error:.3f} | " + " | ".join(cells) + " |"


def scores(rows: list[dict], target: str, arm: str, column: str) -> dict[int, float]:
    """Returns seed → score of a ticket in a column."""
    task, _, metric = ("ticket", "", column) if column.startswith("own_task") else column.partition(":")
    found = [row for row in rows if (row["target"], row["arm"], row["task"]) == (target, arm, task)]
    return {row["seed"]: row[metric or row["metric"]] for row in found}


def columns_of(plan: Plan) -> list[str]:
    """Returns what is compared; beside the mean over classes the one that most boxes are of."""
    tasks = [own for task in plan.tasks for own in ([task, "bccd:AP RBC"] if task == "bccd" else [task])]
    return ["own_task", *(["own_task_trained"] if plan.tune_epochs else []), *tasks]


def spread(values: list[float]) -> str:
    """Returns a mean and what it is of."""
    return f"{statistics.fmean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})" if values else "–"


def differences(rows: list[dict], plan: Plan) -> Iterator[str]:
    """Yields λ = 10 minus every other ticket of the same target, paired by seed."""
    yield "\nPaired differences, ``lambda10`` minus the other, in points:\n"
    for target in dict.fromkeys(target for target, _ in plan.cells if target != "none"):
        for arm in dict.fromkeys(arm for _, arm in plan.cells if arm not in ("dense", "lambda10")):
            parts = []
            for column in columns_of(plan):
                ours, other = (scores(rows, target, own, column) for own in ("lambda10", arm))
                paired = [100 * (ours[seed] - other[seed]) for seed in ours if seed in other]
                if paired:
                    parts.append(f"{column} {statistics.fmean(paired):+.1f} ({', '.join(f'{v:+.1f}' for v in paired)})")
            if parts:
                yield f"* {target}, {arm}: {'; '.join(parts)}"


def overlaps(rows: list[dict]) -> Iterator[str]:
    """Yields how far two tickets removed the same channels: intersection over union, all layers together."""
    for row in rows:
        if "overlap_with_lambda0" in row:
            yield (
                f"\n{row['target']}, seed {row['seed']}: masked weights that ``lambda10`` and ``lambda0`` have in "
                f"common, intersection over union: {row['overlap_with_lambda0']:.3f}"
            )
    if not any(row.get("removed") for row in rows):
        return
    yield "\nRemoved channels in common (intersection over union), ``lambda10`` and the other:\n"
    tickets = {(r["target"], r["arm"], r["seed"]): r["removed"] for r in rows if r["task"] == "ticket" and r["removed"]}
    for (target, arm, seed), other in tickets.items():
        own = tickets.get((target, "lambda10", seed))
        if own is None or arm in ("lambda10", "random_weights"):
            continue
        common = either = 0
        for root in own.keys() | other.keys():
            one, two = (int(found.get(root, "0:0").partition(":")[2], 16) for found in (own, other))
            common, either = common + (one & two).bit_count(), either + (one | two).bit_count()
        yield f"* {target}, {arm}, seed {seed}: {common / max(either, 1):.2f}"


def read_rows(path: Path) -> list[dict]:
    """Returns the finished cells of a file, none if it is not there; a line that was cut off by a kill is dropped."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=list(PLANS), default="mobilenet_v2")
    parser.add_argument("--data", default=".", help="cifar10:ROOT, or a folder with one folder per ImageNet class")
    parser.add_argument("--weights", type=Path, help="safetensors or state dict of the dense network")
    parser.add_argument("--bccd", default="bccd", help="PASCAL VOC folder of the blood cells")
    parser.add_argument("--flowers", default="flowers", help="image folder of the flowers")
    parser.add_argument("--only", help="run the cells whose key contains this")
    parser.add_argument("--seed", type=int, help="run the cells of this seed")
    parser.add_argument("--work", default="reconstruction_work", help="folder for tickets and checkpoints")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", default=str(HERE / "results"))
    parser.add_argument("--cost", type=int, metavar="STEPS", help="time so many steps instead")
    parser.add_argument("--summary", action="store_true", help="write results/reconstruction.md")
    return parser


if __name__ == "__main__":
    main()
