"""Reasons for being slow, from profiles with exact times: the right layers, and silence below the error bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from made_networks import chain, conv, profile

from nni_prune_ext.doctor.findings import Finding, find_reasons
from nni_prune_ext.doctor.layer_times import LayerRow, ProfiledNetwork, layer_rows
from nni_prune_ext.doctor.network import Network
from nni_prune_ext.errors import ModelError
from nni_prune_ext.runtimes.onnxruntime_profile import read_profile

WIDE = [32, 64, 64]
FC = ("fc/Gemm", "Gemm", 0.01, 0)
DENSE = [conv(0, 0.2), conv(1, 1.0), conv(2, 2.0), FC]
SHAPE = [(1, 3, 8, 8)]


def joined(
    path: Path, widths: Sequence[int], nodes: Sequence[tuple[str, str, float, int]], **options
) -> ProfiledNetwork:
    kinds = {key: options.pop(key) for key in ("depthwise",) if key in options}
    network = Network.load(chain(path, widths, **kinds), SHAPE)
    return ProfiledNetwork(network, read_profile(profile(nodes, **options)))


def reasons(
    folder: Path, widths: Sequence[int], nodes: Sequence[tuple[str, str, float, int]], *, dense=DENSE, wide=WIDE,
    floor_ms: float | None = None, **options,
) -> dict[str, Finding]:  # fmt: skip
    dense_options = {key: value for key, value in options.items() if key != "provider"}
    before = joined(folder / "dense.onnx", wide, dense, **dense_options)
    after = joined(folder / "pruned.onnx", widths, nodes, **options)
    found = find_reasons(before, after, layer_rows(before, after), floor_ms)
    return {finding.kind: finding for finding in found}


def test_layers_that_read_odd_widths_are_named_with_what_they_lost(tmp_path: Path) -> None:
    nodes = [conv(0, 0.15), conv(1, 0.9, blocked=False), conv(2, 1.5, blocked=False), FC]

    found = reasons(tmp_path, [17, 33, 5], nodes)

    layout = found["layout"]
    macs_before, macs_after = [32 * 64, 64 * 64], [17 * 33, 33 * 5]
    expected = [after_ms - ms * after / before
                for ms, after_ms, before, after in zip([1.0, 2.0], [0.9, 1.5], macs_before, macs_after)]  # fmt: skip
    assert ("conv2", "conv1") == layout.layers
    assert sum(expected) == pytest.approx(layout.time.ms)
    assert "'conv2' (33 input channels are no multiple of 4, 2.000 → 1.500 ms)" in layout.sentence
    assert "'conv1' (17 input channels" in layout.sentence


def test_an_aligned_plan_with_the_speed_of_its_macs_has_no_findings(tmp_path: Path) -> None:
    nodes = [conv(0, 0.1), conv(1, 0.25), conv(2, 0.5), FC]

    assert {} == reasons(tmp_path, [16, 32, 32], nodes)


def test_a_depthwise_layer_needs_a_multiple_of_four_and_few_input_channels_need_none(tmp_path: Path) -> None:
    dense = [conv(0, 0.2), conv(1, 0.2), conv(2, 0.2), FC]
    nodes = [conv(0, 0.4, blocked=False), conv(1, 0.3, blocked=False), conv(2, 0.4, blocked=False), FC]

    found = reasons(tmp_path, [6, 6, 30], nodes, dense=dense, wide=[32, 32, 64], depthwise=(1,))

    assert ("conv1",) == found["layout"].layers, "3 and 6 input channels are fewer than 16"
    assert "6 channels are no multiple of 4" in found["layout"].sentence


def test_what_is_below_the_error_bar_is_not_told(tmp_path: Path) -> None:
    nodes = [conv(0, 0.15), conv(1, 0.9, blocked=False), conv(2, 1.5, blocked=False), FC,
             ("ReorderOutput_1", "ReorderOutput", 0.3, 0)]  # fmt: skip

    assert {"layout", "reorders"} == set(reasons(tmp_path, [17, 33, 5], nodes))
    assert {} == reasons(tmp_path, [17, 33, 5], nodes, noise=2.0)
    assert {"reorders"} == set(reasons(tmp_path, [17, 33, 5], [conv(0, 0.1), conv(1, 0.26, blocked=False),
                                                               conv(2, 0.05, blocked=False), *nodes[3:]]))  # fmt: skip


def test_channels_that_only_exist_as_padding_are_told(tmp_path: Path) -> None:
    nodes = [conv(0, 0.1, channels=16), conv(1, 0.5, channels=32), conv(2, 0.5, channels=32), FC]

    found = reasons(tmp_path, [16, 20, 32], nodes)

    assert ("conv1",) == found["padding"].layers
    assert "'conv1' (20 channels run as 32, 1.000 → 0.500 ms)" in found["padding"].sentence
    assert {"padding", "slow"} >= set(found)


def test_reorders_are_counted_and_timed_against_those_before(tmp_path: Path) -> None:
    dense = [*DENSE, ("ReorderOutput", "ReorderOutput", 0.1, 0)]
    nodes = [conv(0, 0.1), conv(1, 0.25), conv(2, 0.5), FC, ("ReorderOutput", "ReorderOutput", 0.1, 0),
             ("ReorderInput_1", "ReorderInput", 0.3, 0), ("ReorderInput_2", "ReorderInput", 0.2, 0)]  # fmt: skip

    found = reasons(tmp_path, [16, 32, 32], nodes, dense=dense)

    assert ["reorders"] == list(found)
    assert 0.5 == pytest.approx(found["reorders"].time.ms)
    assert "3 reorders between plain and blocked layout, before the cut 1: 0.600 ms" in found["reorders"].sentence


@pytest.mark.parametrize(
    ("op", "in_dense", "told"),
    [
        ("Identity", False, True),
        ("BatchNormalization", False, True),
        ("BatchNormalization", True, True),
        ("Cast", False, True),
        ("Relu", False, True),
        ("Relu", True, False),
        ("Add", True, False),
        ("MaxPool", False, False),
    ],
)
def test_nodes_that_should_be_fused_or_gone_are_told(op: str, in_dense: bool, told: bool, tmp_path: Path) -> None:
    extra = ("block/" + op, op, 0.2, 0)
    nodes = [conv(0, 0.1), conv(1, 0.25), conv(2, 0.5), FC, extra]

    found = reasons(tmp_path, [16, 32, 32], nodes, dense=[*DENSE, extra] if in_dense else DENSE)

    assert (["fusion"] if told else []) == list(found)
    if told:
        assert (
            f"1 {op} node of 0.200 ms, for example 'block/{op}'; before the cut {int(in_dense)}"
            in found["fusion"].sentence
        )


def test_a_norm_that_became_a_convolution_of_the_blocked_layout_is_told_as_a_norm(tmp_path: Path) -> None:
    nodes = read_profile(profile([conv(0, 0.1), ("normed_bn_nchwc", "Conv", 0.2, 16), FC]))
    network = Network.load(chain(tmp_path / "a.onnx", [16], norm_after_relu=True), SHAPE)

    assert ["BatchNormalization"] == list(ProfiledNetwork(network, nodes).others)


def test_a_layer_far_from_the_best_of_its_kind_is_slow_and_one_at_the_floor_is_small(tmp_path: Path) -> None:
    fc = ("fc/Gemm", "Gemm", 0.005, 0)
    nodes = [conv(0, 0.02), conv(1, 0.9), conv(2, 0.3), fc]

    slow = reasons(tmp_path, [16, 32, 32], nodes)
    small = reasons(tmp_path, [16, 32, 32], nodes, floor_ms=0.31)

    assert {"slow": ("conv1",)} == {kind: finding.layers for kind, finding in slow.items()}
    assert {"small": ("conv1",)} == {kind: finding.layers for kind, finding in small.items()}
    assert "0.25 of the MACs" in slow["slow"].sentence


def test_copies_are_told_on_a_gpu_and_times_of_launching_are_not_compared(tmp_path: Path) -> None:
    nodes = [conv(0, 0.15), conv(1, 0.9, blocked=False), conv(2, 1.5, blocked=False), FC,
             ("Memcpy", "MemcpyToHost", 0.2, 0), ("Memcpy_1", "MemcpyFromHost", 0.1, 0)]  # fmt: skip

    found = reasons(tmp_path, [17, 33, 5], nodes, provider="CUDAExecutionProvider")

    assert ["copies"] == list(found)
    assert 0.3 == pytest.approx(found["copies"].time.ms)
    assert "2 copies between device and host" in found["copies"].sentence


def rows(folder: Path, before: Sequence[int], after: Sequence[int]) -> tuple[LayerRow, ...]:
    nodes = [conv(index, 1.0) for index in range(max(len(before), len(after)))] + [FC]
    return layer_rows(joined(folder / "a.onnx", before, nodes), joined(folder / "b.onnx", after, nodes))


def test_files_that_are_not_one_network_before_and_after_a_cut_are_refused(tmp_path: Path) -> None:
    assert ["conv0", "conv1", "fc"] == [row.name for row in rows(tmp_path, [8, 8], [8, 4])]
    with pytest.raises(ModelError, match=r"'conv1' reads 4 and writes 8 .*Swap them"):
        rows(tmp_path, [8, 4, 4], [4, 8, 4])


def test_files_without_a_common_layer_are_refused(tmp_path: Path) -> None:
    before = joined(tmp_path / "a.onnx", [8], [conv(0, 1.0), FC])
    text = chain(tmp_path / "b.onnx", [8]).read_bytes().replace(b"conv0", b"other").replace(b"fc.", b"fd.")
    (tmp_path / "b.onnx").write_bytes(text)
    nodes = read_profile(profile([("other/Conv", "Conv", 1.0, 0), ("fc/Gemm", "Gemm", 1.0, 0)]))
    after = ProfiledNetwork(Network.load(tmp_path / "b.onnx", SHAPE), nodes)

    with pytest.raises(ModelError, match=r"no layer in common \(conv0, fc … and other, fd …\)"):
        layer_rows(before, after)


def test_a_time_is_a_sum_of_medians_with_the_larger_of_both_errors(tmp_path: Path) -> None:
    network = Network.load(chain(tmp_path / "a.onnx", [8]), SHAPE)
    nodes = read_profile(profile([conv(0, 1.0), FC], noise=0.5), skip=0)

    loose = ProfiledNetwork(network, nodes).total()
    exact = ProfiledNetwork(network, read_profile(profile([conv(0, 1.0), FC])), 0.1).total()

    assert (1.01, 1.0) == (pytest.approx(loose.ms), pytest.approx(loose.error_ms)), "odd runs take 0.5 ms more in each"
    assert (1.01, 0.101) == (pytest.approx(exact.ms), pytest.approx(exact.error_ms))
