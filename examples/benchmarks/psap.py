"""PSAP (re-derived from the abstract) beside what it is made of: one shot, AGP, soft pruning, and its own parts.

Every arm starts from the same weights (or from none), sees the same images for the same number of epochs, meets the
same target, and is measured at its last epoch after its statistics of norms were measured anew: nothing is selected.
The learning rate falls along one cosine; only in ``agp``, which cuts hard after each of the epochs in which the soft
methods prune, it stays at its peak until the last cut and falls along a cosine from there. ``one_shot`` cuts before the
first epoch. Both rank all groups together by L2; ``uniform_soft`` and ``uniform_zeroise`` (in the manner of ASFP) prune
every group alike. The dense network is trained as long. Finished cells are kept in a file of JSON lines, unfinished
ones in checkpoints (``--work``), so that the script can be stopped and started again. ``--cost`` times training with
PSAP beside training without; ``--summary`` writes the tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

import nni_prune_ext as npe
from nni_prune_ext.checkpoints import Checkpoints, fingerprint
from nni_prune_ext.evaluation import environment
from nni_prune_ext.text_files import write_text
from nni_prune_ext.training import Batches, EpochLog, TrainingSettings, Watcher, fit

HERE = Path(__file__).resolve().parent
UNIFORM: Mapping[str, object] = {"ratio_policy": "uniform_ratio", "protect": "none"}
ARMS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "one_shot": ("l2", {}),
    "agp": ("l2", {"schedule": "agp"}),
    "uniform_zeroise": ("psap", {**UNIFORM, "mode": "zeroise"}),
    "uniform_soft": ("psap", UNIFORM),
    "psap": ("psap", {}),
}
"""Arm → method and options; the arm ``dense`` prunes nothing."""
GRID: Mapping[str, tuple[str, Mapping[str, object]]] = {
    **{
        f"{ratios}+{protect}": ("psap", {"ratio_policy": policy, "protect": protect})
        for ratios, policy in (("uniform", "uniform_ratio"), ("wsr", None))
        for protect in ("none", "random", "literal", "gate")
    },
    "wsr+gate, straight_through": ("psap", {"mode": "straight_through"}),
}
"""Ratios + protection, and the third mode."""


@dataclass(frozen=True)
class Cell:
    """One run: what is asked for, how, and with which seed."""

    target: str
    arm: str
    seed: int

    @property
    def key(self) -> str:
        """Returns what a finished cell is known by."""
        return f"{self.target} {self.arm} {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A table: a network, how long it is trained, and its cells."""

    model: str
    epochs: int
    cells: tuple[Cell, ...]
    limit: int | None = None
    pretrained: bool = True
    learning_rate: float = 0.02


def crossed(targets: list[str], arms: list[str], seeds: int) -> tuple[Cell, ...]:
    """Returns all cells, seed by seed."""
    return tuple(Cell(t, a, s) for s in range(seeds) for t in targets for a in arms)


PRUNED = list(ARMS)
HARD = ["one_shot", "agp", "uniform_soft", "psap"]
PLANS: Mapping[str, Plan] = {
    "pretrained": Plan(
        "resnet20", 8,
        (
            *crossed(["none"], ["dense"], 2),
            *crossed(["macs=0.5"], PRUNED, 2),
            *crossed(["macs=0.15"], HARD, 2),
        ), limit=8_000,
    ),
    "scratch": Plan(
        "resnet20", 10, (*crossed(["none"], ["dense"], 2), *crossed(["macs=0.5"], HARD[2:], 2)), limit=8_000,
        pretrained=False, learning_rate=0.1,
    ),
    "grid": Plan("resnet20", 5, crossed(["macs=0.5"], list(GRID), 2), limit=5_000),
    "pretrained-full": Plan(
        "resnet56", 40, (*crossed(["none"], ["dense"], 2), *crossed(["macs=0.5", "macs=0.15"], PRUNED, 2)),
    ),
    "scratch-full": Plan(
        "resnet20", 200, (*crossed(["none"], ["dense"], 2), *crossed(["macs=0.5"], PRUNED, 2)), pretrained=False,
        learning_rate=0.1,
    ),
}  # fmt: skip


def main() -> None:
    """Runs the cells of a plan that the results file does not hold, or one of the other jobs."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    results = Path(options.results)
    if options.summary:
        write_text(results / "psap.md", "\n".join(summary(results)) + "\n")
        print((results / "psap.md").read_text())
    elif options.cost:
        write_text(results / "psap_cost.json", json.dumps(cost(options), indent=1) + "\n")
    else:
        run_plan(options, results / f"psap_{options.plan.replace('-', '_')}.jsonl")


def run_plan(options: argparse.Namespace, out: Path) -> None:
    """Runs the cells that are missing, one after the other."""
    plan = PLANS[options.plan]
    done = {row["key"] for row in read_rows(out)}
    bench = None
    for cell in plan.cells:
        others = options.seed is not None and options.seed != cell.seed
        if cell.key in done or others or (options.only and options.only not in cell.key):
            continue
        bench = bench or Bench(plan, options)
        row = {"key": cell.key, **asdict(cell), **bench.run(cell), "plan": options.plan, "date": str(date.today()),
               "environment": environment()}  # fmt: skip
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(cell.key, {k: row.get(k) for k in ("after_cut", "test", "macs", "seconds")}, flush=True)


class Bench:
    """The network, the data, and how a cell is run."""

    def __init__(self, plan: Plan, options: argparse.Namespace) -> None:
        self.plan, self.options = plan, options
        normalisation = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        self.data = npe.open_data(options.data, limit=plan.limit, **normalisation)
        whole = npe.open_data(options.data, **normalisation)  # a limit is one of test images, too
        self.test = npe.split_batches(whole, "test", 500, device=options.device)
        self.settings = TrainingSettings(
            learning_rate=plan.learning_rate, precision="bf16", channels_last=True, select_best=False
        )

    def run(self, cell: Cell) -> dict:
        """Returns test accuracy right after the method and at the end, the epochs, and what the method noted."""
        began, epochs = time.perf_counter(), self.plan.epochs
        dense = self._dense(cell.seed)
        example = torch.zeros(1, *self.data.input_shape, device=self.options.device)
        train = npe.split_batches(self.data, "train", 128, seed=cell.seed, device=self.options.device)
        folder = None if self.options.work is None else self._checkpoints(cell, dense)
        if cell.arm == "dense":
            logs = self._fit(dense, train, epochs, cell, folder)
            return {"test": self._tested(dense, train), "macs": 1.0, "epochs": [vars(log) for log in logs],
                    **since(began)}  # fmt: skip
        method, chosen = {**ARMS, **GRID}[cell.arm]
        soft = round(0.8 * epochs)
        settings, before, after, first = self.settings, 0, 0, []
        if method == "psap":
            chosen = {"epochs": epochs, **chosen}
        elif cell.arm == "agp":  # a cut after each of the first epochs, at the peak rate until the last one
            settings, before, after = settings.model_copy(update={"schedule": "constant"}), 1, epochs - soft
            chosen = {"steps": soft, "epochs_per_step": 1, **chosen}
            first = self._fit(dense, train, before, cell, folder and folder.stage("first"), settings)
        else:
            after = epochs
        result = npe.prune(
            dense, example, method=method, target=cell.target, options=chosen, train_batches=train,
            settings=settings, checkpoints=folder, seed=cell.seed, watcher=Told(cell.key),
            limits=npe.Limits(multiple=1),
        )  # fmt: skip
        after_cut = self._tested(result.model, train)
        last = self._fit(result.model, train, after, cell, folder and folder.stage("last")) if after else []
        logs = [*first, *result.logs, *last]
        assert len(logs) == epochs, "all arms train as long"
        notes = [dict(note) for note in result.notes]
        return {
            "after_cut": after_cut if after else None,
            "test": self._tested(result.model, train),
            "macs": result.costs.macs / result.dense.macs,
            "params": result.costs.params / result.dense.params,
            "certified": bool(result.certificate and result.certificate.exact),
            "facts": dict(result.outcome.facts),
            "epochs": [vars(log) for log in logs],
            "notes": notes,
            **since(began),
        }

    def _fit(
        self, model: torch.nn.Module, train: Batches, epochs: int, cell: Cell, folder: Checkpoints | None,
        settings: TrainingSettings | None = None,
    ) -> list[EpochLog]:  # fmt: skip
        return fit(model, train, epochs=epochs, settings=settings or self.settings, seed=cell.seed, checkpoints=folder,
                   watcher=Told(cell.key))  # fmt: skip

    def _tested(self, model: torch.nn.Module, train: Batches) -> float:
        """Returns test accuracy with statistics of norms measured anew, in a copy."""
        measured = copy.deepcopy(model)
        npe.recalibrate_batchnorm(measured, train)
        return npe.accuracy(measured, self.test)

    def _dense(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        weights = Path(self.options.weights) if self.plan.pretrained else None
        model = npe.build_model(self.plan.model, num_classes=self.data.num_classes, in_channels=3, weights=weights)
        return model.to(self.options.device)

    def _checkpoints(self, cell: Cell, model: torch.nn.Module) -> Checkpoints:
        folder = Path(self.options.work) / self.options.plan / cell.key.replace(" ", "_").replace("=", "-")
        job = {"cell": cell.key, "epochs": self.plan.epochs, "data": self.options.data, "limit": self.plan.limit}
        return Checkpoints(folder, {**job, "weights": fingerprint(model)})


def cost(options: argparse.Namespace) -> dict:
    """Times one epoch of PSAP, probes and pruning step included, beside one of plain training, in turn.

    CPU time of the process; ResNet-20, ``--cost`` batches of 128 made images per epoch. The probes take a fixed number
    of batches per epoch, so their share is that of a whole epoch of CIFAR-10 (391 batches) only at ``--cost 391``. What
    is done per parameter does not depend on the size of the images, so images smaller than 32 pixels overstate it.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (128, 3, options.size, options.size)
    data = [
        (torch.randn(shape, generator=generator), torch.randint(0, 10, shape[:1], generator=generator))
        for _ in range(options.cost)
    ]
    settings = TrainingSettings(learning_rate=0.01, precision="bf16", channels_last=True, select_best=False)
    model, example = npe.build_model("resnet20", num_classes=10, in_channels=3), data[0][0][:1]
    groups = npe.trace_channel_groups(model, example)
    times: dict[str, list[float]] = {"plain": [], "gate": []}
    for _ in range(options.rounds):
        for arm, found in times.items():
            clock = Clock()
            if arm == "plain":
                fit(npe.build_model("resnet20", num_classes=10, in_channels=3), data, epochs=3, settings=settings,
                    watcher=clock)  # fmt: skip
            else:
                npe.prune(
                    model, example, method="psap", target="macs=0.5", train_batches=data, settings=settings,
                    options={"epochs": 3, "soft_share": 1.0, "protect": arm}, groups=groups, watcher=clock,
                )  # fmt: skip
            found.append(clock.between[0])
    medians = {arm: statistics.median(found) for arm, found in times.items()}
    ratios = {arm: [a / b for a, b in zip(found, times["plain"])] for arm, found in times.items() if arm != "plain"}
    return {
        "network": "resnet20", "image_size": options.size, "batch": 128, "batches_per_epoch": options.cost,
        "rounds": options.rounds,
        "cpu_s_per_epoch": medians, "ratio_to_plain": {arm: statistics.median(found) for arm, found in ratios.items()},
        "ratios": ratios, "environment": environment(), "date": str(date.today()), "threads": options.threads,
    }  # fmt: skip


class Clock(Watcher):
    """Notes the CPU time between the ends of epochs: that of the second one, and of the pruning step at its end."""

    def __init__(self) -> None:
        self.between: list[float] = []
        self._last: float | None = None

    def epoch(self, log: EpochLog) -> None:
        """Notes one epoch."""
        now = time.process_time()
        if self._last is not None:
            self.between.append(now - self._last)
        self._last = now


class Told(Watcher):
    """Prints one line per epoch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def epoch(self, log: EpochLog) -> None:
        """Prints an epoch."""
        print(f"  {self.name} {log.phase} {log.epoch + 1}: loss {log.loss:.3f}, {log.seconds:.0f} s", flush=True)


def since(began: float) -> dict:
    """Returns the seconds that a cell took."""
    return {"seconds": round(time.perf_counter() - began, 1)}


def summary(results: Path) -> Iterator[str]:
    """Yields the tables of all plans; plans without a cell are named as not run."""
    yield "# PSAP (re-derived from the abstract) beside its controls"
    for name, plan in PLANS.items():
        planned = {cell.key for cell in plan.cells}
        rows = [row for row in read_rows(results / f"psap_{name.replace('-', '_')}.jsonl") if row["key"] in planned]
        images = f"{plan.limit:,} training images" if plan.limit else "all training images"
        start = "pretrained" if plan.pretrained else "from scratch"
        yield f"\n## {name}: {plan.model} {start}, {plan.epochs} epochs, {images}\n"
        if not rows:
            yield f"Not run ({len(plan.cells)} cells): `psap.py --plan {name} …`"
            continue
        yield f"{len(rows)} of {len(plan.cells)} cells. Test accuracy in % at the last epoch, mean (each seed).\n"
        yield from table(rows)
    path = results / "psap_cost.json"
    if path.exists():
        found = json.loads(path.read_text())
        size = found["image_size"]
        yield f"\n## Cost of an epoch ({found['network']}, {found['batches_per_epoch']} batches of {found['batch']})\n"
        yield f"Images of {size} × {size} pixels, medians of {found['rounds']} rounds, arms in turn.\n"
        yield "CPU time of one epoch with a pruning step, as a multiple of one of plain training, median:\n"
        for arm, ratio in found["ratio_to_plain"].items():
            yield f"* protection `{arm}`: {ratio:.3f}"


def table(rows: list[dict]) -> Iterator[str]:
    """Yields one line per target and arm."""
    yield "| target | arm | test | MACs | parameters | protected | revived |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    kept: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        kept.setdefault((row["target"], row["arm"]), []).append(row)
    for (target, arm), cells in kept.items():
        scores = [100 * cell["test"] for cell in cells]
        facts = [_counted(cells, key) for key in ("protected", "revived")]
        yield (
            f"| {target} | {arm} | {statistics.fmean(scores):.2f} ({', '.join(f'{s:.2f}' for s in scores)}) | "
            f"{statistics.fmean(cell['macs'] for cell in cells):.3f} | "
            f"{statistics.fmean(cell.get('params', 1) for cell in cells):.3f} | {facts[0]} | {facts[1]} |"
        )


def _counted(cells: list[dict], key: str) -> str:
    """Returns how many channels a step protected or revived, in all, and how many of those were left at the end."""
    found = [cell.get("facts", {}) for cell in cells]
    if not all(key in own for own in found):
        return "–"
    left = [own[f"{key}_and_left"] for own in found if f"{key}_and_left" in own]
    text = f"{statistics.fmean(own[key] for own in found):.0f}"
    return f"{text} ({statistics.fmean(left):.0f} left)" if len(left) == len(found) else text


def read_rows(path: Path) -> list[dict]:
    """Returns the finished cells of a file, none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=list(PLANS), default="pretrained")
    parser.add_argument("--data", default="cifar10:.", help="cifar10:ROOT")
    parser.add_argument("--weights", help="safetensors or state dict of the dense network")
    parser.add_argument("--only", help="run the cells whose key contains this")
    parser.add_argument("--seed", type=int, help="run the cells of this seed")
    parser.add_argument("--work", help="folder for checkpoints within a cell")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", default=str(HERE / "results"))
    parser.add_argument("--cost", type=int, metavar="BATCHES", help="time epochs of so many batches instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images of --cost")
    parser.add_argument("--summary", action="store_true", help="write results/psap.md")
    return parser


if __name__ == "__main__":
    main()
