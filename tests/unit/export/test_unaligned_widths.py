"""Convolutions that miss ONNX Runtime's blocked layout are named, and only these: ONNX Runtime itself is asked."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import onnx
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from torch import nn

from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.export.unaligned_widths import unaligned_convolutions, unaligned_sentence


def is_blocked(conv: nn.Conv2d, folder: Path) -> bool:
    """Exports one convolution and says whether ONNX Runtime runs it in the blocked layout."""
    file, optimised = folder / "conv.onnx", folder / "optimised.onnx"
    export_onnx(conv, torch.zeros(1, conv.in_channels, 8, 8), file, exporter="torchscript", check=False)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimised)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return any(node.domain == "com.microsoft.nchwc" for node in onnx.load(str(optimised)).graph.node)


def test_the_rule_is_that_of_the_runtime(tmp_path: Path) -> None:
    if not is_blocked(nn.Conv2d(32, 32, 3), tmp_path):
        pytest.skip("this processor has no blocked layout")
    ordinary = [nn.Conv2d(width, 32, 3) for width in (3, 6, 15, 16, 17, 18, 20, 30, 32)]
    depthwise = [nn.Conv2d(width, width, 3, groups=width) for width in (6, 16, 18, 20)]

    for conv in (*ordinary, *depthwise):
        assert is_blocked(conv, tmp_path) == (not unaligned_convolutions(conv)), conv


class Shortcut(nn.Module):
    """A frozen convolution that is exported as something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(18, 18, 1)

    def for_export(self) -> nn.Module:
        return nn.Identity()


def test_layers_are_named_once_with_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    widths = (3, 18, 19, 21, 22, 20)
    layers = [nn.Conv2d(before, after, 1) for before, after in itertools.pairwise(widths)]
    model = nn.Sequential(*layers, nn.Conv2d(20, 4, 1), nn.Flatten(), nn.Linear(256, 6))
    expected = {"1": 18, "2": 19, "3": 21, "4": 22}

    with caplog.at_level(logging.WARNING):
        made = export_onnx(model, torch.zeros(1, 3, 8, 8), tmp_path / "model.onnx", exporter="torchscript")

    assert expected == made.unaligned
    assert [unaligned_sentence(expected)] == caplog.messages
    assert "4 convolutions read" in caplog.text
    assert "(1: 18, 2: 19, 3: 21, …)" in caplog.text
    assert "Limits(multiple=16)" in caplog.text


def test_aligned_networks_and_rewritten_shortcuts_are_left_in_peace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 20, 1), nn.Conv2d(20, 18, 1), nn.Flatten(), nn.Linear(18, 5))

    with caplog.at_level(logging.WARNING):
        made = export_onnx(model, torch.zeros(1, 3, 1, 1), tmp_path / "model.onnx", exporter="torchscript")

    assert {} == made.unaligned
    assert {} == unaligned_convolutions(nn.Sequential(Shortcut()))
    assert [] == caplog.messages
    assert "" == unaligned_sentence({})
