"""Which widths to round: chosen by gain, as few as do it, and written as limits for the next plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from made_networks import chain, conv, profile

from nni_prune_ext.allocation import LayerLimit, Limits
from nni_prune_ext.doctor.advice import Advice, Advised, Trials, advise, limits_for
from nni_prune_ext.doctor.layer_times import ProfiledNetwork, Time, layer_rows
from nni_prune_ext.doctor.network import Network
from nni_prune_ext.doctor.widths import WidthGroup
from nni_prune_ext.runtimes.onnxruntime_cpu import OnnxRuntimeCpu
from nni_prune_ext.runtimes.onnxruntime_profile import read_profile

SHAPE = [(1, 3, 8, 8)]


class Pretended:
    """Trials without a clock: a layer costs what its padded widths say, and ten times as much out of the layout."""

    def __init__(self, error_ms: float = 0.01, slow: Mapping[str, float] | None = None) -> None:
        self.error_ms, self.slow = error_ms, dict(slow or {})
        self.timed: list[str] = []

    def gains(self, pruned: Path, candidates: Mapping[str, onnx.ModelProto]) -> dict[str, Time]:
        self.timed += list(candidates)
        base = self.cost(onnx.load(str(pruned)))
        return {name: Time(base - self.cost(model), self.error_ms) for name, model in candidates.items()}

    def cost(self, model: onnx.ModelProto) -> float:
        shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
        total = 0.0
        for name, dims in shapes.items():
            if name.startswith("conv") and name.endswith(".weight"):
                layer, wide_out, wide_in = name.removesuffix(".weight"), dims[0], dims[1]
                factor = 10 if wide_in >= 16 and wide_in % 4 else 1
                total += self.slow.get(layer, 1.0) * factor * (-(-wide_out // 16)) * (-(-wide_in // 16)) / 10
        return total


def advice_for(
    folder: Path, widths: Sequence[int], trials: Pretended, multiple: int = 16
) -> tuple[tuple[Advice, ...], Limits | None]:
    return advised(folder, widths, trials, multiple)[:2]


def advised(folder: Path, widths: Sequence[int], trials: Pretended, multiple: int = 16) -> Advised:
    nodes = [*(conv(index, 1.0) for index in range(len(widths))), ("fc/Gemm", "Gemm", 0.1, 0)]
    network = Network.load(chain(folder / "a.onnx", widths), SHAPE)
    profiled = ProfiledNetwork(network, read_profile(profile(nodes)))
    return advise(network, layer_rows(profiled, profiled), trials, multiple=multiple)


def test_the_width_that_costs_most_comes_first_and_what_gains_nothing_is_left_out(tmp_path: Path) -> None:
    found, limits = advice_for(tmp_path, [17, 33, 20], Pretended(slow={"conv2": 2.0}))

    assert [("conv1", 33, 48), ("conv0", 17, 32)] == [(a.layer, a.width, a.to) for a in found]
    assert found[0].gain.ms > found[1].gain.ms > 0
    assert found[0].together.ms == pytest.approx(found[0].gain.ms)
    assert found[1].together.ms == pytest.approx(found[0].gain.ms + found[1].gain.ms)
    assert (32, 16) == (found[0].narrower[0], found[1].narrower[0])
    assert ("conv1", "conv2") == found[0].layers
    limit = LayerLimit(max_ratio=0.9, multiple=16)
    assert Limits(layers={"conv0": limit, "conv1": limit, "conv2": limit.model_copy(update={"multiple": 4})}) == limits


def test_a_multiple_by_chance_that_keeps_no_layout_is_left_out() -> None:
    odd, two, four = (WidthGroup(name, (name,), width) for name, width in (("a", 17), ("b", 34), ("c", 20)))

    layers = limits_for((odd,), (odd, two, four), 16).layers

    assert {"a": 16, "c": 4} == {name: limit.multiple for name, limit in layers.items()}


def test_what_adds_less_than_the_error_bar_is_left_out(tmp_path: Path) -> None:
    found, _ = advice_for(tmp_path, [17, 33, 20], Pretended(slow={"conv2": 2.0}, error_ms=6.0))

    assert ["conv1"] == [advice.layer for advice in found]


def test_an_aligned_network_gets_no_advice_and_is_not_timed(tmp_path: Path) -> None:
    trials = Pretended()

    nothing = ((), None, "every width that can be rounded is a multiple of 16 already")
    assert nothing == advised(tmp_path, [16, 32, 48], trials)
    assert [] == trials.timed


def test_gains_below_the_error_bar_give_no_advice(tmp_path: Path) -> None:
    nothing = ((), None, "no rounding gained more than the error bar of 100.000 ms")
    assert nothing == advised(tmp_path, [17, 33, 20], Pretended(error_ms=100.0))


def test_where_every_width_is_to_be_rounded_one_multiple_says_it(tmp_path: Path) -> None:
    found, limits = advice_for(tmp_path, [17, 33, 64], Pretended())

    assert 0 < found[0].gain.ms
    assert 2 == len(found)
    assert Limits(multiple=16) == limits


def test_other_multiples_are_tried_when_asked_for(tmp_path: Path) -> None:
    found, _ = advice_for(tmp_path, [17, 33, 20], Pretended(), multiple=4)

    assert {("conv0", 20), ("conv1", 36)} == {(a.layer, a.to) for a in found}


def test_gains_are_taken_within_each_batch_and_have_the_largest_error_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = iter([0.3, 0.1])

    def measured(entries: Mapping[str, object], inputs: object, **options: object) -> SimpleNamespace:
        rows = [SimpleNamespace(name=name, p50_ms=10.0, ratio=1.0 if not name else 0.8) for name in entries]
        return SimpleNamespace(rows=rows, error_bar=next(bars))

    monkeypatch.setattr("nni_prune_ext.doctor.advice.measure_latency", measured)
    network = Network.load(chain(tmp_path / "a.onnx", [8]), SHAPE)
    candidates = {f"n{index}": network.model for index in range(9)}

    gains = Trials(OnnxRuntimeCpu(), [], 20, 0.0, 1, 0).gains(network.path, candidates)

    assert list(candidates) == list(gains)
    assert {(2.0, 3.0)} == {(round(gain.ms, 9), gain.error_ms) for gain in gains.values()}


def test_advice_in_words_says_what_is_below_the_error_bar(tmp_path: Path) -> None:
    advice = Advice("a.b", ("a.b", "c"), 17, 32, Time(0.5, 0.1), (16, Time(-0.05, 0.1)), Time(-0.7, 0.1))

    assert (
        "Round 'a.b' up from 17 to 32 channels: −0.500 ms alone, down to 16 no difference above the error bar of "
        "0.100 ms; +0.700 ms with those above."
    ) == advice.sentence
    assert {"to": 16, "gain": {"ms": -0.05, "error_ms": 0.1}} == advice.to_dict()["narrower"]
