"""The tables of the mask search's benchmark say what its rows say: overlaps, epochs, differences, what was not run."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "jackpots.py"
KINDS = ("magnitude", "snip", "random", "start")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("jackpots_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


# -- overlaps of masks -------------------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    """Returns W₂ W₁ x without biases."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 2.0], [3.0, 1.0]]))
        model[1].weight.copy_(torch.tensor([[4.0, -5.0], [-1.0, 6.0]]))
    return model


def overlaps(
    script: ModuleType, masks: dict[str, Tensor], first: dict[str, Tensor], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Returns what the benchmark says of masks of the two layers; the data are one image (1, 4) of class 0."""
    bench = SimpleNamespace(dense=two_layers(), device=torch.device("cpu"))
    train = [(torch.tensor([[1.0, 4.0]]), torch.tensor([0]))]
    found: dict[str, dict[str, float]] = script.Bench.overlaps(bench, masks, first, train, seed)
    return found


def test_overlaps_with_magnitude_snip_start_and_chance_are_those_by_hand(script: ModuleType) -> None:
    # Hidden: (12, 7). Logits: (13, 30), so the gradients of the logits are (-1, 1) up to 4e-8.
    # |gradient × weight| of W₁: [[5·1·4, 5·4·2], [11·1·3, 11·4·1]] = [[20, 40], [33, 44]];
    # of W₂: [[12·4, 7·5], [12·1, 7·6]] = [[48, 35], [12, 42]].
    masks = {
        "0.weight": torch.tensor([[True, False], [True, False]]),  # the two largest; SNIP keeps the other two
        "1.weight": torch.tensor([[True, False], [False, False]]),  # SNIP's one; the largest is another
    }
    first = {"0.weight": torch.tensor([[True, True], [False, False]]), "1.weight": masks["1.weight"].clone()}

    found = overlaps(script, masks, first)

    one, two = found["0.weight"], found["1.weight"]
    assert ["0.weight", "1.weight"] == list(found)
    assert {"magnitude": 1, "snip": 0, "start": 1 / 3, "density": 1 / 2, "chance": 1 / 3} == pytest.approx(
        {kind: value for kind, value in one.items() if kind != "random"}
    )
    assert {"magnitude": 0, "snip": 1, "start": 1, "density": 1 / 4, "chance": 1 / 7} == pytest.approx(
        {kind: value for kind, value in two.items() if kind != "random"}
    )


def test_the_draw_that_a_mask_is_compared_with_is_not_the_one_that_its_search_began_with(script: ModuleType) -> None:
    found = []

    for seed in range(200):
        draw = torch.rand((2, 2), generator=torch.Generator().manual_seed(seed))
        mask = {"0.weight": draw >= draw.flatten().sort().values[2]}
        found.append(overlaps(script, mask, mask, seed)["0.weight"]["random"])

    # Two of four: the same pair in one case of six, one in common (IoU 1/3) in four, none in one.
    assert [0, 1 / 3, 1] == pytest.approx(sorted(set(found)))
    assert 1 / 6 + 4 / 6 / 3 == pytest.approx(sum(found) / 200, abs=0.06)


def layers(*values: tuple[float, float, float, float]) -> dict[str, object]:
    """Returns a row with these overlaps of layers, in the order of ``KINDS``."""
    return {"overlap": {f"{n}": {**dict(zip(KINDS, own)), "chance": 0.05} for n, own in enumerate(values)}}


def test_magnitude_is_more_similar_than_others_only_where_it_is_strictly_above_all_of_them(script: ModuleType) -> None:
    rows = {
        0: layers((0.5, 0.2, 0.1, 0.5), (0.3, 0.3, 0.2, 0.3), (0.9, 0.1, 0.1, 0.1)),
        1: layers((0.4, 0.2, 0.4, 0.1), (0.4, 0.1, 0.15, 0.4)),
        2: {},
    }

    (line,) = script._overlap("sparsity=0.9", {("sparsity=0.9", "random_start"): rows}, "random_start")

    assert (
        "* sparsity=0.9: the mask of random_start overlaps (IoU, mean over layers) with magnitude 0.500, SNIP 0.180, "
        "another draw 0.190 (chance 0.050), the mask that it began with 0.280; magnitude is more similar than "
        "SNIP and the draw in 3 of 5 layers, than its own start in 2 of 5 layers"
    ) == line


def test_nothing_is_said_of_overlaps_that_were_not_measured(script: ModuleType) -> None:
    kept = {("macs=0.5", "random_start"): {0: {}}, ("sparsity=0.9", "search"): {0: layers((0.5, 0.2, 0.1, 0.5))}}

    assert [] == list(script._overlap("macs=0.5", kept, "random_start"))
    assert [] == list(script._overlap("sparsity=0.9", kept, "random_start"))


# -- epochs to equal accuracy ------------------------------------------------------------------------------------


def curve(start: float, *metrics: float) -> dict[str, object]:
    """Returns a row with this validation accuracy at the start and after every epoch of the search."""
    logs = [{"phase": "search", "metric": value} for value in metrics]
    return {"val_at_start": start, "epochs": [*logs, {"phase": "freeze", "metric": 0.99}]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (curve(0.1, 0.5, 0.7, 0.9), "after 2 of them (10.00 % at the start, 50.00 % after the first)"),
        (curve(0.1, 0.5, 0.6, 0.8), "after 3 of them (10.00 % at the start, 50.00 % after the first)"),
        (curve(0.1, 0.5, 0.6, 0.6), "after none of them (10.00 % at the start, 50.00 % after the first)"),
        (curve(0.1, 0.75, 0.6, 0.6), "after 1 of them (10.00 % at the start, 75.00 % after the first)"),
        (curve(0.7, 0.5, 0.6, 0.6), "already before the search (70.00 % at the start, 50.00 % after the first)"),
    ],
    ids=["equal", "above at the end", "never", "at once", "before"],
)
def test_the_epoch_at_which_a_search_from_magnitude_reaches_one_from_a_random_mask_is_said(
    script: ModuleType, row: dict[str, object], said: str
) -> None:
    kept = {("t", "search"): {3: row, 4: row}, ("t", "random_start"): {3: curve(0.05, 0.8, 0.6, 0.7)}}

    lines = list(script._speed("t", kept, "random_start"))

    assert [
        "* t, seed 3, random_start: from a random mask 70.00 % (validation) at the end of 3 epochs; from magnitude "
        f"{said}"
    ] == lines


# -- tables ------------------------------------------------------------------------------------------------------


def row(arm: str, seed: int, test: float, made: int = 0, target: str = "macs=0.5") -> dict[str, object]:
    return {
        "key": f"{target} {arm} {seed}", "target": target, "arm": arm, "seed": seed, "S_test": test,
        "facts": {"swaps_made": made}, "macs": 0.4996, "val_at_start": 0.5, "epochs": [], "notes": [],
    }  # fmt: skip


def test_a_table_holds_means_of_seeds_and_differences_at_the_same_seed_only(script: ModuleType) -> None:
    rows = [
        row("search", 0, 0.90, 10), row("search", 1, 0.94, 20), row("search", 2, 0.50, 30),
        row("recalibrated", 1, 0.91), row("recalibrated", 0, 0.89), row("recalibrated", 7, 0.10),
    ]  # fmt: skip

    lines = list(script.table(rows))

    assert "| macs=0.5 | search | 78.00 (90.00, 94.00, 50.00) | – | 20 | 0.500 | 0.000 |" in lines
    assert "| macs=0.5 | recalibrated | 63.33 (91.00, 89.00, 10.00) | – | 0 | 0.500 | 0.000 |" in lines
    # 90 − 89 and 94 − 91: mean 2, standard deviation √2.
    assert ["* macs=0.5: search (S) − recalibrated: +2.00 ± 1.41 (2 seeds)"] == [own for own in lines if own[0] == "*"]


def test_a_summary_names_plans_without_rows_as_not_run_and_counts_planned_cells_only(
    script: ModuleType, tmp_path: Path
) -> None:
    dense = {"target": "none", "arm": "dense", "S_test": 0.9, "T_test": 0.91}
    written = [{**dense, "key": f"none dense {seed}", "seed": seed} for seed in (0, 2, 9)]
    (tmp_path / "jackpots_dense.jsonl").write_text("".join(json.dumps(own) + "\n" for own in written))
    (tmp_path / "jackpots_channels.jsonl").write_text(json.dumps(row("search", 99, 0.9)) + "\n")

    text = "\n".join(script.summary(tmp_path))

    parts = {part.split(":")[0]: part for part in text.split("\n## ")[1:]}
    assert set(script.PLANS) == set(parts)
    assert {"dense"} == {name for name, part in parts.items() if "Not run" not in part}
    assert "2 of 3 cells" in parts["dense"]
    assert "| none | dense | 90.00 (90.00, 90.00) | 91.00 (91.00, 91.00) |" in parts["dense"]
    assert (
        f"Not run ({len(script.PLANS['channels'].cells)} cells): `jackpots.py --plan channels …`" in parts["channels"]
    )
    assert "share of a training step" not in text
