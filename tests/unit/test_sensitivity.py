"""Sensitivities: each group is cut alone, by its scores; what limits are drawn; what is kept when a call is cut off."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.allocation import Limits
from nni_prune_ext.errors import CheckpointError, ConfigError
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.pipeline import prune
from nni_prune_ext.pruning import L1NormPruner
from nni_prune_ext.sensitivity import (
    Latency,
    Sensitivity,
    SensitivityPoint,
    latency_on,
    measure_sensitivity,
    runtime_latency,
    write_sensitivity,
)
from nni_prune_ext.surgery import silence_channels
from nni_prune_ext.testing.method_bench import BenchNet
from nni_prune_ext.training import Batches


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(3)
    return BenchNet().eval()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def width(model: nn.Module) -> float:
    """A metric that only the group ``inside`` moves: 1 with all of its 16 channels, less by the square of what went."""
    assert isinstance(model, BenchNet)
    return 1.0 - (1 - model.inside[0].out_channels / 16) ** 2


def measured(network: nn.Module, image: Tensor, **changes: object) -> Sensitivity:
    return measure_sensitivity(network, image, changes.pop("evaluate", width), **changes)


def of(*drops: tuple[float, float]) -> Sensitivity:
    points = tuple(SensitivityPoint("a", ratio, 0.9 - drop, 0.5) for ratio, drop in drops)
    return Sensitivity(0.9, {"a": 8}, {"a": ("a", "b")}, points, "l1")


def test_every_group_is_cut_alone_at_every_ratio(network: nn.Module, image: Tensor) -> None:
    seen: list[dict[str, int]] = []

    def look(model: nn.Module) -> float:
        seen.append({name: own.out_channels for name, own in model.named_modules() if isinstance(own, nn.Conv2d)})
        return 0.5

    found = measured(network, image, evaluate=look, ratios=(0.25, 0.5))
    dense, *cut = seen
    assert [(p.group, p.ratio) for p in found.points] == [(g, r) for g in found.channels for r in (0.25, 0.5)]
    for point, widths in zip(found.points, cut, strict=True):
        changed = {name for name in dense if widths[name] != dense[name]}
        assert changed == set(found.layers[point.group])
        assert {widths[name] / dense[name] for name in changed} == {1 - point.ratio}


def test_the_least_important_channels_go(network: nn.Module, image: Tensor) -> None:
    outputs: list[Tensor] = []
    measured(network, image, evaluate=lambda m: outputs.append(m(image)) or 0.0, ratios=(0.5,))
    groups = trace_channel_groups(network, image)
    for group, output in zip(groups, outputs[1:], strict=True):
        alone = Limits(max_ratio=0.9, exclude=tuple(g.name for g in groups if g is not group))
        plan = prune(network, image, target=f"ratio={group.num_channels / 2 / groups.num_channels}", limits=alone).plan
        assert set(plan.removed) <= set(group.roots)
        torch.testing.assert_close(output, silence_channels(network, plan, image)(image))


def test_scores_of_the_method_decide(network: nn.Module, image: Tensor) -> None:
    def outputs(method: str, seed: int = 0) -> list[float]:
        found = measured(
            network, image, evaluate=lambda m: m(image).sum().item(), method=method, ratios=(0.5,), seed=seed
        )
        return [point.metric for point in found.points]

    assert outputs("random", 1) == outputs("random", 1) != outputs("random", 2)
    assert outputs("l1") != outputs("random", 1)


def test_drops_and_costs_are_those_of_the_cut_network(network: nn.Module, image: Tensor) -> None:
    found = measured(network, image)
    inside = next(name for name, layers in found.layers.items() if "inside.0" in layers)
    assert [found.drop(p) for p in found.of(inside)] == pytest.approx([0.0625, 0.25, 0.5625])
    shares = [p.macs_share for p in found.of(inside)]
    assert 1 > shares[0] > shares[1] > shares[2] > 0
    assert {found.drop(p) for p in found.points if p.group != inside} == {0.0}


def test_the_model_is_left_as_it_was(network: nn.Module, image: Tensor) -> None:
    before = copy.deepcopy(network.state_dict())
    measured(network, image, method="taylor", batches=_batches(image))
    assert all(torch.equal(own, before[name]) for name, own in network.state_dict().items())
    assert not network.training
    assert all(p.grad is None for p in network.parameters())


def test_batch_norms_are_measured_anew_where_asked(network: nn.Module, image: Tensor) -> None:
    def statistics(model: nn.Module) -> float:
        return float(sum(own.running_mean.abs().sum() for own in model.modules() if isinstance(own, nn.BatchNorm2d)))

    plain = measured(network, image, evaluate=statistics, ratios=(0.5,))
    anew = measured(network, image, evaluate=statistics, ratios=(0.5,), recalibration=_batches(image))
    assert plain.dense == anew.dense
    assert all(a.metric != b.metric for a, b in zip(plain.points, anew.points, strict=True))


def test_limits_count(network: nn.Module, image: Tensor) -> None:
    found = measured(network, image, limits=Limits(exclude=("inside.*",), max_ratio=0.5, multiple=4), ratios=(0.3, 0.9))
    inside = next(name for name, layers in found.layers.items() if "inside.0" in layers)
    assert not found.of(inside)
    for group, channels in found.channels.items():
        kept = [round(channels * (1 - point.ratio)) for point in found.of(group)]
        assert all(own % 4 == 0 and own >= channels / 2 for own in kept), group


def test_ratios_that_come_to_the_same_cut_are_measured_once(network: nn.Module, image: Tensor) -> None:
    calls: list[nn.Module] = []
    found = measured(network, image, evaluate=lambda m: calls.append(m) or 1.0, ratios=(0.5, 0.501, 0.51))
    assert len(calls) == 1 + len(found.channels)


@pytest.mark.parametrize(
    ("max_drop", "expected"), [(0.0, 0.0), (0.005, 0.125), (0.01, 0.25), (0.02, 0.375), (0.03, 0.5), (1.0, 0.5)]
)
def test_the_largest_ratio_lies_where_the_drop_is_reached(max_drop: float, expected: float) -> None:
    found = of((0.25, 0.01), (0.5, 0.03))
    assert found.largest_ratios(max_drop)["a"] == pytest.approx(expected)
    assert found.limits(max_drop).layers["a"].max_ratio == pytest.approx(expected)


def test_a_drop_that_heals_later_still_counts() -> None:
    assert of((0.25, 0.05), (0.5, 0.0)).largest_ratios(0.02)["a"] == pytest.approx(0.1)


def test_a_rise_lets_more_go_but_not_beyond_what_was_measured() -> None:
    assert of((0.25, -0.02), (0.5, 0.02)).largest_ratios(0.0)["a"] == pytest.approx(0.375)
    assert of((0.25, -0.02)).largest_ratios(0.5)["a"] == 0.25


def test_a_metric_that_is_no_number_is_a_drop() -> None:
    assert of((0.25, 0.0), (0.5, math.nan)).largest_ratios(0.5)["a"] == 0.25


def test_limits_are_those_of_the_group_in_the_next_plan(network: nn.Module, image: Tensor) -> None:
    found = measured(network, image)
    limits = found.limits(0.1)  # inside: 0.25 + 0.25 * (0.1 - 0.0625) / (0.25 - 0.0625) = 0.3
    result = prune(network, image, target="macs=0.45", limits=limits)
    inside = next(name for name, layers in found.layers.items() if "inside.0" in layers)
    assert limits.layers["inside.0"].max_ratio == pytest.approx(0.3)
    assert 0 < len(result.plan.removed.get(inside, ())) <= 0.3 * 16


def test_nni_takes_the_config_list(network: nn.Module, image: Tensor) -> None:
    found = measured(network, image)
    config = found.nni_config(0.1)
    model = copy.deepcopy(network)
    pruner = L1NormPruner(model, config)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    closed = {name: 1 - float(own["weight"].float().mean()) for name, own in masks.items()}
    assert closed["inside.0"] == pytest.approx(4 / 16)  # 0.3 of 16 channels, rounded down
    shared = [name for name, layers in found.layers.items() if len(layers) > 1]
    for layers in (found.layers[name] for name in shared):
        assert len({tuple(masks[own]["weight"].flatten(1).any(1).tolist()) for own in layers}) == 1


def test_an_interrupted_call_goes_on_where_it_was(network: nn.Module, image: Tensor, tmp_path: Path) -> None:
    file, whole, calls = tmp_path / "s.json", measured(network, image), 0

    def breaks(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return width(model)

    with pytest.raises(KeyboardInterrupt):
        measured(network, image, evaluate=breaks, file=file)
    calls = 10
    assert measured(network, image, evaluate=breaks, file=file) == whole
    assert calls == 10 + len(whole.points) + 1 - 3
    calls = 100
    assert measured(network, image, evaluate=breaks, file=file) == whole
    assert calls == 100
    more = measured(network, image, ratios=(0.1, 0.25), file=file)
    assert {p.ratio for p in more.points} != {p.ratio for p in whole.points}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "l2"},
        {"seed": 1},
        {"recalibration": [(torch.zeros(1, 3, 8, 8), torch.zeros(1))]},
        {"latency": Latency("here", width)},
        {"data": "others"},
        {"metric_name": "f1"},
        {"limits": Limits(multiple=2)},
    ],
)
def test_a_file_of_another_job_is_refused(
    network: nn.Module, image: Tensor, tmp_path: Path, changes: dict[str, object]
) -> None:
    file = tmp_path / "s.json"
    measured(network, image, file=file, ratios=(0.5,))
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match="another job"):
        measured(network, image, file=file, ratios=(0.5,), **changes)
    assert file.read_bytes() == before


def test_a_file_of_another_model_is_refused(network: nn.Module, image: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    measured(network, image, file=file, ratios=(0.5,))
    other = copy.deepcopy(network)
    torch.nn.init.zeros_(other.head.weight)
    with pytest.raises(CheckpointError, match="model was"):
        measured(other, image, file=file, ratios=(0.5,))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"job": {}, "dense": 1, "points": [{"group": 1}]}', "\x00"])
def test_a_damaged_file_is_refused_and_kept(network: nn.Module, image: Tensor, tmp_path: Path, content: str) -> None:
    file = tmp_path / "s.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match="Delete it"):
        measured(network, image, file=file)
    assert file.read_text() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": ()}, "no ratio"),
        ({"ratios": (0.5, 1.0)}, "ratio 1 is out of range"),
        ({"ratios": (0.0,)}, "ratio 0 is out of range"),
        ({"method": "psap"}, "has no scores.*l1"),
        ({"method": "taylor"}, "needs training data"),
        ({"limits": Limits(exclude=("nothing",))}, "matches no layer"),
    ],
)
def test_bad_input_is_refused(network: nn.Module, image: Tensor, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measured(network, image, **changes)


@pytest.mark.parametrize("drop", [-0.1, math.nan, math.inf])
def test_a_drop_out_of_range_is_refused_before_anything_is_written(tmp_path: Path, drop: float) -> None:
    with pytest.raises(ConfigError, match="largest drop"):
        write_sensitivity(tmp_path, of((0.5, 0.1)), max_drop=drop)
    assert not list(tmp_path.iterdir())


def test_files_say_what_was_measured(tmp_path: Path) -> None:
    found = of((0.25, 0.01), (0.5, 0.03))
    write_sensitivity(tmp_path, found, max_drop=0.02)
    assert Limits.model_validate_json((tmp_path / "limits.json").read_text()) == found.limits(0.02)
    assert json.loads((tmp_path / "limits.json").read_text()).keys() == {"layers"}  # all else stays open
    config = json.loads((tmp_path / "nni_config.json").read_text())
    assert config == [{"op_names": ["a", "b"], "sparse_ratio": 0.375, "dependency_group_id": "group_0"}]
    page = (tmp_path / "sensitivity.html").read_text()
    for text in ("−1.0", "−3.0", "87.00 %", "37.50 %", "<svg"):
        assert text in page, text


def test_cells_of_a_heat_map_do_not_overlap_and_hold_no_text_where_they_are_narrow(tmp_path: Path) -> None:
    write_sensitivity(tmp_path, of(*((0.05 * k, 0.01 * k) for k in range(1, 10))), max_drop=0.02)
    page = (tmp_path / "sensitivity.html").read_text()
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert "−1.0" not in svg


def test_latency_is_a_multiple_of_the_dense_networks(
    network: nn.Module, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runtime_latency.measure_latency
    names: list[list[str]] = []

    def noted(entries: dict[str, object], *args: object, **kwargs: object) -> object:
        names.append(list(entries))
        return real(entries, *args, **kwargs)

    monkeypatch.setattr(runtime_latency, "measure_latency", noted)
    limits = Limits(exclude=("stem.*", "whole.*"))
    with latency_on("onnxruntime-cpu", network, image, rounds=2) as latency:
        found = measured(network, image, latency=latency, ratios=(0.5,), limits=limits)
    assert names == [["dense", "cut"]]
    assert [point.latency_ratio > 0 for point in found.points if point.latency_ratio is not None] == [True]


def _batches(image: Tensor) -> Batches:
    return [(image, torch.tensor([0, 1]))]
