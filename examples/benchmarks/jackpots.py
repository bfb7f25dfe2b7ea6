"""Does a mask search in frozen weights find what magnitude does not? Lottery Jackpots beside its controls.

Every plan is a list of cells (form, target, arm, seed). All arms of a target start from the same network, see the same
images and have the same numbers of epochs; dense networks are trained as long. Search-only (S) is measured right after
the search with batch-norm statistics of its own, search + tune (T) after the tuning; the last epoch counts, nothing is
selected. Finished cells are kept in a file of JSON lines, unfinished ones in checkpoints, so that the script can be
stopped and started again. ``--cost`` times the mask update beside the training step; ``--summary`` writes the tables.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_prune_ext as npe
from nni_prune_ext.certificate import remove_channels, verify_groups
from nni_prune_ext.checkpoints import Checkpoints, fingerprint
from nni_prune_ext.data.batches import EPOCH_STRIDE
from nni_prune_ext.evaluation import environment
from nni_prune_ext.mask_updates import best
from nni_prune_ext.methods.lottery_jackpots import LotteryJackpots
from nni_prune_ext.methods.lottery_jackpots_options import JackpotOptions
from nni_prune_ext.text_files import write_text
from nni_prune_ext.training import (
    Batches,
    EpochLog,
    MethodRun,
    TrainingSettings,
    Watcher,
    drive,
    fit,
    recalibrate_batchnorm,
)

HERE = Path(__file__).resolve().parent
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
ARMS: Mapping[str, Mapping[str, object]] = {
    "recalibrated": {"control": "recalibrated"},
    "tuned": {"control": "tuned"},
    "search": {},
    "short_search": {"search_epochs": 2},
    "unrestricted": {"control": "unrestricted"},
    "cosine": {"restriction": "cosine"},
    "random_start": {"control": "random_start"},
    "random_start_unrestricted": {"initialisation": "random", "restriction": "one"},
    "long_tune": {},
    "tuned_short": {"control": "tuned"},
}
"""Arm → options of the method; the arm ``dense`` prunes nothing. What a short search saves is tuned longer.

Two arms ask why a search loses: ``long_tune`` tunes what was searched for as many epochs as ``tuned`` has, on top of
the search; ``tuned_short`` tunes the magnitude mask for no longer than ``search`` tunes its own.
"""
TUNING_ARMS = ("search", "short_search", "tuned", "long_tune", "tuned_short")


@dataclass(frozen=True)
class Cell:
    """One run: what is asked for, how, and with which seed."""

    target: str
    arm: str
    seed: int
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Returns what a finished cell is known by."""
        extra = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.target} {self.arm} {self.seed}{extra}"


@dataclass(frozen=True)
class Plan:
    """A table: a network, how long it is searched and tuned, and its cells."""

    model: str
    search: int
    tune: int
    cells: tuple[Cell, ...]
    batch: int = 128
    limit: int | None = None


def crossed(targets: list[str], arms: list[str], seeds: int) -> tuple[Cell, ...]:
    """Returns all cells, seed by seed."""
    return tuple(Cell(t, a, s) for s in range(seeds) for t in targets for a in arms)


ALL = ["recalibrated", "tuned", "search", "unrestricted", "random_start"]
LEVERS = tuple(
    Cell("macs=0.5", "search", 0, dict(zip(("gate", "exploration", "normalise_gradients", "learning_rate"), values)))
    for values in [
        ("consumers", 0.1, True, 1e-3), ("consumers", 0.2, True, 1e-3), ("consumers", 0.1, True, 3e-4),
        ("consumers", 0.05, True, 1e-3), ("consumers", 0.1, True, 3e-3), ("consumers", 0.0, True, 1e-3),
        ("norms", 0.0, True, 1e-3), ("norms", 0.1, True, 1e-3), ("consumers", 0.0, True, 1e-2),
        ("consumers", 0.0, True, 1e-4), ("consumers", 0.1, False, 1e-2), ("consumers", 0.0, False, 1e-2),
    ]
)  # fmt: skip
PLANS: Mapping[str, Plan] = {
    "dense": Plan("resnet20", 5, 2, crossed(["none"], ["dense"], 3), limit=12_000),
    "levers": Plan("resnet20", 5, 0, (Cell("macs=0.5", "recalibrated", 0), *LEVERS), limit=12_000),
    "weights": Plan(
        "resnet20", 5, 2,
        (
            *crossed(["sparsity=0.9"], [*ALL, "random_start_unrestricted"], 2),
            *crossed(["sparsity=0.8"], ["recalibrated", "tuned", "search"], 2),
        ),
        limit=12_000,
    ),
    "channels": Plan(
        "resnet20", 5, 2,
        (
            *crossed(["macs=0.5", "macs=0.7"], ["search", "recalibrated", "tuned"], 3),
            *crossed(["macs=0.5"], ["unrestricted", "random_start"], 2),
            *crossed(["macs=0.5"], ["short_search", "long_tune", "tuned_short"], 3),
        ),
        limit=12_000,
    ),
    "weights-full": Plan(
        "resnet32", 30, 10,
        (*crossed(["none"], ["dense"], 3), *crossed(["sparsity=0.9", "sparsity=0.95"], [*ALL, "cosine"], 3)), 256,
    ),
    "weights-vgg19-full": Plan(
        "vgg19_bn", 30, 10,
        (*crossed(["none"], ["dense"], 3), *crossed(["sparsity=0.9", "sparsity=0.95"], [*ALL, "cosine"], 3)), 256,
    ),
    "channels-full": Plan(
        "resnet56", 30, 10,
        (*crossed(["none"], ["dense"], 3), *crossed(["macs=0.7", "macs=0.5"], [*ALL, "cosine"], 3)),
    ),
    "imagenet": Plan(
        "torchvision:resnet50", 5, 10,
        (
            *crossed(["none"], ["dense"], 2),
            *(Cell("sparsity=0.9", arm, seed, {"score_decay": 1e-4}) for seed in range(2) for arm in ALL),
        ),
        256,
    ),
}  # fmt: skip


def main() -> None:
    """Runs the cells of a plan that the results file does not hold, or one of the other jobs."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    results = Path(options.results)
    if options.cost:
        write_text(results / "jackpots_cost.json", json.dumps(mask_update_cost(options), indent=1) + "\n")
    elif options.summary:
        write_text(results / "jackpots.md", "\n".join(summary(results)) + "\n")
        print((results / "jackpots.md").read_text())
    else:
        run_plan(options, results / f"jackpots_{options.plan.replace('-', '_')}.jsonl")


def run_plan(options: argparse.Namespace, out: Path) -> None:
    """Runs the cells that are missing, one after the other."""
    plan = PLANS[options.plan]
    done = {row["key"] for row in read_rows(out)}
    bench = None
    for cell in plan.cells:
        if cell.key in done or (options.only and options.only not in cell.key):
            continue
        bench = bench or Bench(plan, options)
        row = {"key": cell.key, **asdict(cell), **bench.run(cell), "plan": options.plan, "date": str(date.today()),
               "environment": environment()}  # fmt: skip
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(cell.key, {k: row.get(k) for k in ("S_val", "S_test", "T_val", "T_test", "seconds")}, flush=True)


class MemoryData:
    """Images that fit into memory, from any source of the package."""

    def __init__(self, options: argparse.Namespace, plan: Plan) -> None:
        self.source = npe.open_data(options.data, limit=plan.limit, **IMAGENET)
        self.num_classes, self.input_shape = self.source.num_classes, self.source.input_shape
        self.batch, self.device = plan.batch, options.device
        self.held_out = [npe.split_batches(self.source, split, 500, device=self.device) for split in ("val", "test")]

    def train(self, seed: int) -> Batches:
        """Returns shuffled, varied training batches."""
        return npe.split_batches(self.source, "train", self.batch, seed=seed, device=self.device)


class FolderData:
    """Images read from ``ROOT/train`` and ``ROOT/val`` while they are needed, 224 pixels wide, by worker processes.

    ``val`` is the test split; 1 % of the training images, unvaried, are the validation split.
    """

    def __init__(self, options: argparse.Namespace, plan: Plan) -> None:
        from torchvision import datasets, transforms

        root = Path(options.data.removeprefix("folder:"))
        end = [transforms.ToTensor(), transforms.Normalize(*IMAGENET.values())]
        varied = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *end]
        plain = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *end])
        self.images = datasets.ImageFolder(root / "train", transforms.Compose(varied))
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0)).tolist()
        cut = max(len(order) // 100, 1)
        self.chosen, self.num_classes, self.input_shape = order[cut:], len(self.images.classes), (3, 224, 224)
        self.batch, self.workers = plan.batch, options.workers
        same = torch.utils.data.Subset(datasets.ImageFolder(root / "train", plain), order[:cut])
        self.held_out = [self._loader(part) for part in (same, datasets.ImageFolder(root / "val", plain))]

    def train(self, seed: int) -> Batches:
        """Returns shuffled, varied training batches."""
        return _FolderEpochs(self, torch.utils.data.Subset(self.images, self.chosen), seed)

    def _loader(self, images: torch.utils.data.Dataset, **how: object) -> Batches:
        return torch.utils.data.DataLoader(images, self.batch, num_workers=self.workers, pin_memory=True, **how)


class _FolderEpochs:
    """Batches whose order depends on seed and epoch only, however often and whoever looks at them in between."""

    def __init__(self, data: FolderData, images: torch.utils.data.Subset, seed: int) -> None:
        self.data, self.images, self.seed, self.epoch = data, images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Is told by the loop which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Counts the batches."""
        return max(len(self.images) // self.data.batch, 1)

    def __iter__(self) -> Iterator[object]:
        """Yields the batches of the epoch."""
        generator = torch.Generator().manual_seed(self.seed * EPOCH_STRIDE + self.epoch)
        last = len(self.images) > self.data.batch
        return iter(self.data._loader(self.images, shuffle=True, generator=generator, drop_last=last))


class Bench:
    """The network, the data, and how a cell is run."""

    def __init__(self, plan: Plan, options: argparse.Namespace) -> None:
        self.plan, self.options = plan, options
        self.data = FolderData(options, plan) if options.data.startswith("folder:") else MemoryData(options, plan)
        device = torch.device(options.device)
        self.device = device
        dense = npe.build_model(
            plan.model, num_classes=self.data.num_classes, in_channels=3, weights=Path(options.weights)
        )
        self.dense = dense.to(device)
        self.example = torch.zeros(1, *self.data.input_shape, device=device)
        self.val, self.test = self.data.held_out
        self.groups = verify_groups(dense, self.example, npe.trace_channel_groups(dense, self.example))
        self.settings = TrainingSettings(
            learning_rate=0.01, weight_decay=0.0, precision="bf16", channels_last=True, select_best=False
        )

    def run(self, cell: Cell) -> dict:
        """Returns accuracies of (S) and (T), the epochs, and what is known about the masks."""
        began = time.perf_counter()
        train = self.data.train(cell.seed)
        total = self.plan.search + self.plan.tune
        if cell.arm == "dense":
            model = copy.deepcopy(self.dense)
            start = self._accuracies(model, "S")
            logs = fit(
                model, train, epochs=total, settings=self.settings, watcher=Told(cell.key),
                checkpoints=self._checkpoints(cell), seed=cell.seed,
            )  # fmt: skip
            return {**start, **self._accuracies(model, "T"), "epochs": [vars(log) for log in logs], **since(began)}
        tunes = cell.arm in TUNING_ARMS and self.plan.tune > 0
        epochs = {"search_epochs": self.plan.search, "tune_epochs": 0, "freeze_epochs": 1}
        searched = "recalibrated" if cell.arm in ("tuned", "tuned_short") else ARMS[cell.arm].get("control", "none")
        chosen = {**epochs, **ARMS[cell.arm], **cell.options, "control": searched}
        method = LotteryJackpots(JackpotOptions.model_validate(chosen))
        run = MethodRun(
            model=copy.deepcopy(self.dense), batches_=train, groups=self.groups, example_inputs=self.example,
            settings=self.settings, targets=(npe.Target.parse(cell.target),), seed=cell.seed, watcher=Told(cell.key),
            evaluate=lambda model: self._recalibrated_accuracy(model, train), checkpoints=self._checkpoints(cell),
        )  # fmt: skip
        start = {"val_at_start": self._accuracy_of_start(method, run, train)} if self.plan.search else {}
        outcome = drive(method, run)
        masks = outcome.weight_masks or {}
        model = run.model
        if outcome.plan.num_removed:
            model = remove_channels(run.model, outcome.plan, self.example, groups=run.groups).model
        frozen = all(torch.equal(p, q) for p, q in zip(run.model.parameters(), self.dense.parameters()))
        silence(model, masks)
        row = {
            **start,
            **self._accuracies(model, "S"),
            "epochs": [vars(log) for log in run.logs],
            "notes": run.notes,
            "facts": dict(outcome.facts),
            "macs": npe.count_costs(model, self.example).macs / npe.count_costs(self.dense, self.example).macs,
            "sparsity": 1 - mean_of(masks) if masks else 0.0,
            "weights_frozen": frozen,  # right after the search, before anything is masked or tuned
        }
        if masks and cell.arm not in ("recalibrated", "tuned"):
            row["overlap"] = self.overlaps(masks, method._first_masks, train, cell.seed)
        if tunes:
            logs = fit(
                model, train, epochs=self._tuning_epochs(cell.arm, method.options.search_epochs),
                settings=self.settings,
                weight_masks=masks, watcher=Told(f"{cell.key} tune"), seed=cell.seed, name="tune",
                checkpoints=self._checkpoints(cell, "tune"),
            )  # fmt: skip
            row |= {**self._accuracies(model, "T"), "tune_epochs": [vars(log) for log in logs]}
        return {**row, **since(began)}

    def _tuning_epochs(self, arm: str, searched: int) -> int:
        total = self.plan.search + self.plan.tune
        return {"long_tune": total, "tuned_short": self.plan.tune}.get(arm, total - searched)

    def overlaps(self, masks: Mapping[str, Tensor], first: Mapping[str, Tensor], train: Batches, seed: int) -> dict:
        """Returns, per layer, the overlap (IoU) of masks with magnitude's, SNIP's, a draw and the first mask."""
        model = copy.deepcopy(self.dense).train()
        for images, labels in itertools.islice(train, 8):
            functional.cross_entropy(model(images.to(self.device)), labels.to(self.device)).backward()
        weights = dict(model.named_parameters())
        generator, found = torch.Generator().manual_seed(seed + 1_000_003), {}  # not the draw that a search begins with
        for name, mask in masks.items():
            weight, keep = weights[name], int(mask.sum())
            density = keep / mask.numel()
            others = {
                "magnitude": best(weight.detach().abs(), keep),
                "snip": best((weight.grad * weight.detach()).abs(), keep),
                "random": best(torch.rand(mask.shape, generator=generator).to(mask.device), keep),
                "start": first[name],
            }
            found[name] = {kind: float((mask & other).sum() / (mask | other).sum()) for kind, other in others.items()}
            found[name] |= {"chance": density / (2 - density), "density": density}
        return found

    def _accuracy_of_start(self, method: LotteryJackpots, run: MethodRun, train: Batches) -> float | None:
        """Returns the validation accuracy of the first mask: epoch 0 of the curve."""
        fresh = LotteryJackpots(method.options.model_copy(update={"search_epochs": 0, "freeze_epochs": 0}))
        probe = MethodRun(
            model=copy.deepcopy(self.dense), batches_=train, groups=self.groups, example_inputs=self.example,
            settings=self.settings, targets=run.targets, seed=run.seed,
        )  # fmt: skip
        outcome = drive(fresh, probe)
        model = (
            npe.silence_channels(probe.model, outcome.plan, self.example) if outcome.plan.num_removed else probe.model
        )
        silence(model, outcome.weight_masks or {})
        return self._recalibrated_accuracy(model, train)

    def _recalibrated_accuracy(self, model: nn.Module, train: Batches) -> float:
        """Returns the validation accuracy with statistics of 20 batches; the model is left as it was."""
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        recalibrate_batchnorm(model, train, count=20)
        value = npe.accuracy(model, self.val)
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        return value

    def _accuracies(self, model: nn.Module, kind: str) -> dict:
        found = {f"{kind}_val": npe.accuracy(model, self.val)}
        if self.options.plan != "levers":  # they choose the variant
            found[f"{kind}_test"] = npe.accuracy(model, self.test)
        return found

    def _checkpoints(self, cell: Cell, stage: str = "search") -> Checkpoints | None:
        if self.options.work is None:
            return None
        folder = Path(self.options.work) / self.options.plan / cell.key.replace(" ", "_").replace("=", "-") / stage
        data = {"spec": self.options.data, "limit": self.plan.limit, "batch": self.plan.batch}
        job = {"cell": cell.key, "search": self.plan.search, "tune": self.plan.tune, "data": data}
        return Checkpoints(folder, {**job, "weights": fingerprint(self.dense)})


def silence(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Sets masked weights to zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])


def mean_of(masks: Mapping[str, Tensor]) -> float:
    """Returns the share of all entries that is kept."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def since(began: float) -> dict:
    """Returns the seconds that a cell took."""
    return {"seconds": round(time.perf_counter() - began, 1)}


def mask_update_cost(options: argparse.Namespace) -> dict:
    """Times training steps and mask updates in turn, in each quarter of a search with the default restriction.

    Beside ours, on the same scores, runs an update that sorts whole layers and walks Python lists: our reconstruction
    of how the authors' code goes about it. The network is ResNet-32 at random weights, the images are made.
    """
    model = npe.build_model("resnet32", num_classes=10, in_channels=3).to(options.device)
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(256, 3, 32, 32, generator=generator), torch.randint(0, 10, (256,), generator=generator))
        for _ in range(options.cost)
    ]
    method = _TimedSearch(JackpotOptions(search_epochs=4, freeze_epochs=0, tune_epochs=0))
    example = data[0][0][:1].to(options.device)
    run = MethodRun(
        model=model, batches_=data, groups=npe.trace_channel_groups(model, example),
        example_inputs=example, targets=(npe.Target.parse("sparsity=0.9"),),
        settings=TrainingSettings(precision="bf16", channels_last=True),
    )  # fmt: skip
    drive(method, run)
    quarters = {}
    for quarter in range(4):
        own = [entry for entry in method.times if entry["quarter"] == quarter][1:]
        medians = {key: statistics.median(entry[key] for entry in own) for key in own[0]}
        shares = {key: medians[f"{key}_s"] / medians["step_s"] for key in ("ours", "sort_and_lists")}
        quarters[quarter + 1] = {**medians, "share_of_step": shares}
    return {
        "network": "resnet32", "batch": 256, "sparsity": 0.9, "steps_per_quarter": options.cost - 1,
        "quarters": quarters, "environment": environment(), "date": str(date.today()), "threads": options.threads,
    }  # fmt: skip


class _TimedSearch(LotteryJackpots):
    """The search with a clock at its mask update, and the same update by sorting and lists beside it."""

    def __init__(self, options: JackpotOptions) -> None:
        super().__init__(options)
        self.times: list[dict[str, float]] = []
        self._last = time.perf_counter()

    def after_step(self, context: MethodRun) -> None:
        """Times both; only ours changes the masks."""
        _wait(context.model)
        step = time.perf_counter() - self._last
        scores = {name: score.detach().clone() for name, score in self.scores.items()}
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        requested = self._swaps.requested
        began = time.perf_counter()
        super().after_step(context)
        _wait(context.model)
        ours = time.perf_counter() - began
        began = time.perf_counter()
        for name, mask in masks.items():
            sort_and_lists(mask, scores[name], self._share())
            assert int(mask.sum()) == int(self.masks[name].sum())
        _wait(context.model)
        anchor = time.perf_counter() - began
        self.times.append(
            {"quarter": self._epoch, "ours_s": ours, "sort_and_lists_s": anchor, "step_s": step + ours,
             "requested": self._swaps.requested - requested}
        )  # fmt: skip
        self._last = time.perf_counter()


def sort_and_lists(mask: Tensor, scores: Tensor, share: float) -> None:
    """Updates a mask in place: sorts the whole layer, and pairs Python lists of positions."""
    flat, values = mask.view(-1), scores.flatten()
    threshold = values.sort().values[int((~flat).sum()) - 1]
    entering = (~flat & (values > threshold)).nonzero().flatten()
    leaving = (flat & (values <= threshold)).nonzero().flatten()
    if not len(entering) or len(entering) != len(leaving):
        return
    best_first = sorted(zip((-values[entering]).tolist(), entering.tolist()))
    worst_first = sorted(zip(values[leaving].tolist(), leaving.tolist()))
    count = math.ceil(share * len(entering))
    flat[[position for _, position in best_first[:count]]] = True
    flat[[position for _, position in worst_first[:count]]] = False


def _wait(model: nn.Module) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def summary(results: Path) -> Iterator[str]:
    """Yields the tables of all plans; plans without a cell are named as not run."""
    yield "# Lottery Jackpots beside its controls"
    for name, plan in PLANS.items():
        planned = {cell.key for cell in plan.cells}
        rows = [row for row in read_rows(results / f"jackpots_{name.replace('-', '_')}.jsonl") if row["key"] in planned]
        yield f"\n## {name}: {plan.model}, {plan.search} epochs of search, {plan.tune} of tuning" + (
            f", {plan.limit:,} training images" if plan.limit else ""
        )
        if not rows:
            yield f"\nNot run ({len(plan.cells)} cells): `jackpots.py --plan {name} …`"
            continue
        split = "Validation" if name == "levers" else "Test"
        yield f"\n{len(rows)} of {len(plan.cells)} cells. {split} accuracy in %, mean (each seed).\n"
        if name in ("weights", "channels"):  # the dense network is trained as long in a plan of its own
            rows = [*read_rows(results / "jackpots_dense.jsonl"), *rows]
        yield from levers_table(rows) if name == "levers" else table(rows)
    cost = results / "jackpots_cost.json"
    if cost.exists():
        found = json.loads(cost.read_text())
        yield f"\n## Mask update: share of a training step ({found['network']}, batch {found['batch']})\n"
        yield "| quarter of the search | ours | sorting and lists | swaps requested | step in s |"
        yield "|---|---|---|---|---|"
        for quarter, entry in found["quarters"].items():
            shares = entry["share_of_step"]
            yield (
                f"| {quarter} | {shares['ours']:.2%} | {shares['sort_and_lists']:.2%} | {entry['requested']:,.0f} | "
                f"{entry['step_s']:.2f} |"
            )


def levers_table(rows: list[dict]) -> Iterator[str]:
    """Yields validation accuracy per lever: the variant is fixed by this table."""
    yield "| gate | exploration | gradients divided | rate | (S) | swaps | first mask kept |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        own, facts = row["options"], row["facts"]
        yield (
            f"| {own['gate']} | {own['exploration']:g} | {own['normalise_gradients']} | {own['learning_rate']:g} | "
            f"{100 * row['S_val']:.2f} | {facts['swaps_made']:,} | {facts['share_of_first_mask_kept']:.2f} |"
            if own
            else f"| none: the mask that the search begins with | | | | {100 * row['S_val']:.2f} | 0 | 1 |"
        )


def table(rows: list[dict]) -> Iterator[str]:
    """Yields one line per target and arm, then the paired differences, overlaps and epochs to equal accuracy."""
    kept: dict[tuple[str, str], dict[int, dict]] = {}
    for row in rows:
        kept.setdefault((row["target"], row["arm"]), {})[row["seed"]] = row
    yield "| target | arm | (S) | (T) | swaps made | MACs | sparsity |"
    yield "|---|---|---|---|---|---|---|"
    for (target, arm), cells in kept.items():
        first = next(iter(cells.values()))
        made = statistics.fmean(row.get("facts", {}).get("swaps_made", 0) for row in cells.values())
        yield (
            f"| {target} | {arm} | {_accuracies(cells, 'S_test')} | {_accuracies(cells, 'T_test')} | {made:,.0f} | "
            f"{first.get('macs', 1):.3f} | {first.get('sparsity', 0):.3f} |"
        )
    if all(arm == "dense" for _, arm in kept):
        return
    yield "\nDifferences in points at the same seed (order of data and draws; one base), mean ± standard deviation:\n"
    for target in dict.fromkeys(target for target, arm in kept if arm != "dense"):
        pairs = [("search", "S", "recalibrated", "S"), ("search", "S", "random_start", "S"),
                 ("search", "S", "unrestricted", "S"), ("search", "T", "tuned", "T"),
                 ("short_search", "T", "tuned", "T"), ("short_search", "S", "recalibrated", "S"),
                 ("long_tune", "T", "tuned", "T"), ("search", "T", "tuned_short", "T"),
                 ("random_start_unrestricted", "S", "random_start", "S")]  # fmt: skip
        for arm, kind, other, other_kind in pairs:
            first, second = kept.get((target, arm), {}), kept.get((target, other), {})
            gaps = [
                100 * (first[seed][f"{kind}_test"] - second[seed][f"{other_kind}_test"])
                for seed in first if seed in second
            ]  # fmt: skip
            if gaps:
                spread = f" ± {statistics.stdev(gaps):.2f}" if len(gaps) > 1 else ""
                yield f"* {target}: {arm} ({kind}) − {other}: {statistics.fmean(gaps):+.2f}{spread} ({len(gaps)} seeds)"
        for start in ("random_start", "random_start_unrestricted"):
            yield from _speed(target, kept, start)
            yield from _overlap(target, kept, start)
    yield from _restriction(kept)


def _accuracies(cells: Mapping[int, dict], key: str) -> str:
    values = [100 * row[key] for row in cells.values() if key in row]
    return f"{statistics.fmean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})" if values else "–"


def _speed(target: str, kept: Mapping[tuple[str, str], Mapping[int, dict]], start: str) -> Iterator[str]:
    """Yields after how many epochs the search from magnitude is as good as that from a random mask at its end."""
    for seed, row in kept.get((target, "search"), {}).items():
        other = kept.get((target, start), {}).get(seed)
        if other is None:
            continue
        goal = [log["metric"] for log in other["epochs"] if log["phase"] == "search"][-1]
        curve = [log["metric"] for log in row["epochs"] if log["phase"] == "search"]
        reached = next((epoch for epoch, value in enumerate(curve, 1) if value >= goal), None)
        before = "already before the search" if row["val_at_start"] >= goal else f"after {reached or 'none'} of them"
        yield (
            f"* {target}, seed {seed}, {start}: from a random mask {100 * goal:.2f} % (validation) at the end of "
            f"{len(curve)} epochs; from magnitude {before} ({100 * row['val_at_start']:.2f} % at the start, "
            f"{100 * curve[0]:.2f} % after the first)"
        )


def _restriction(kept: Mapping[tuple[str, str], Mapping[int, dict]]) -> Iterator[str]:
    """Yields loss and swaps of every epoch of the search, with and without the restriction."""
    rows = [
        (target, arm, seed, row)
        for (target, arm), cells in kept.items()
        if arm in ("search", "unrestricted") and (target, "unrestricted") in kept
        for seed, row in cells.items()
    ]
    if rows:
        yield "\nThe restriction on (search) and off (unrestricted), epoch by epoch:\n"
        yield "| target | arm | seed | training loss | swaps made | requests, summed over steps |"
        yield "|---|---|---|---|---|---|"
    for target, arm, seed, row in rows:
        losses = [f"{log['loss']:.3f}" for log in row["epochs"] if log["phase"] == "search"]
        made = [f"{note['swaps_made']:,.0f}" for note in row["notes"]]
        asked = [f"{note['swaps_requested']:,.0f}" for note in row["notes"]]
        yield f"| {target} | {arm} | {seed} | {' '.join(losses)} | {' '.join(made)} | {' '.join(asked)} |"


def _overlap(target: str, kept: Mapping[tuple[str, str], Mapping[int, dict]], start: str) -> Iterator[str]:
    """Yields the mean overlap of masks searched from a random one, beside another draw and the mask they began with.

    A search from magnitude overlaps with magnitude because it began there: that says nothing.
    """
    rows = [row["overlap"] for row in kept.get((target, start), {}).values() if "overlap" in row]
    if rows:
        layers = [layer for row in rows for layer in row.values()]
        means = {kind: statistics.fmean(layer[kind] for layer in layers) for kind in layers[0]}
        wins = {
            name: sum(layer["magnitude"] > max(layer[kind] for kind in others) for layer in layers)
            for name, others in (("SNIP and the draw", ("snip", "random")), ("its own start", ("start",)))
        }
        yield (
            f"* {target}: the mask of {start} overlaps (IoU, mean over layers) with magnitude "
            f"{means['magnitude']:.3f}, SNIP {means['snip']:.3f}, another draw {means['random']:.3f} (chance "
            f"{means['chance']:.3f}), the mask that it began with {means['start']:.3f}; magnitude is more similar than "
            f"{' than '.join(f'{name} in {count} of {len(layers)} layers,' for name, count in wins.items())[:-1]}"
        )


def read_rows(path: Path) -> Iterator[dict]:
    """Yields the finished cells."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


class Told(Watcher):
    """Prints one line per epoch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def epoch(self, log: EpochLog) -> None:
        """Prints it."""
        print(
            self.name,
            log.phase,
            log.epoch,
            f"{log.loss:.4f}",
            log.metric,
            f"{log.seconds:.0f}s",
            file=sys.stderr,
            flush=True,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", choices=sorted(PLANS), default="weights")
    parser.add_argument("--data", default="cifar10:cifar10", help="cifar10:ROOT, or folder:ROOT for ImageNet")
    parser.add_argument("--weights", help="of the dense network")
    parser.add_argument("--only", help="only cells whose key holds this text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8, help="processes that read images of folder:ROOT")
    parser.add_argument("--work", help="folder for checkpoints within a cell")
    parser.add_argument("--cost", type=int, default=0, metavar="STEPS", help="time the mask update over so many steps")
    parser.add_argument("--summary", action="store_true", help="write the tables")
    parser.add_argument("--results", default=str(HERE / "results"))
    return parser


if __name__ == "__main__":
    main()
