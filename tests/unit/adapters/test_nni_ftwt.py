"""FTWT in NNI and torch-pruning: only the class is swapped, up to ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from nni_bench import IMAGE, LAYERS, batches, config, evaluator, network, shares

from nni_prune_ext.certificate import certify_plan
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.gates import GatedNetwork
from nni_prune_ext.pruning import FTWTPruner, FTWTRatioPruner, L1NormPruner, pruner_for
from nni_prune_ext.speedup import ModelSpeedup
from nni_prune_ext.torch_pruning import FTWTImportance, importance_for

SHORT = {"epochs": 2, "core_epochs": 1, "calibration_batches": 1}


@pytest.mark.parametrize("head_epochs", [0, 1])
def test_the_pruner_trains_gates_and_leaves_masks_that_the_speedup_removes(head_epochs: int, tmp_path: Path) -> None:
    model = network()
    pruner = FTWTPruner(model, config(0.5), evaluator(model), head_epochs=head_epochs, **SHORT)

    _, masks = pruner.compress()
    pruner.unwrap_model()

    assert isinstance(pruner.gated_model, GatedNetwork)
    assert torch.isfinite(pruner.gated_model(IMAGE)).all()
    assert {"predicted_macs_share", "expected_macs_share"} < set(pruner.outcome.facts)
    assert certify_plan(network(), pruner.plan(), IMAGE, groups=pruner.channels.groups).exact
    total = sum(share * network().get_submodule(layer).weight.shape[0] for layer, share in shares(masks).items())
    assert 0.5 * sum(network().get_submodule(layer).weight.shape[0] for layer in LAYERS) == pytest.approx(total, abs=16)
    ModelSpeedup(model, IMAGE, masks).speedup_model()
    exported = export_onnx(model, IMAGE, tmp_path / "smaller.onnx", given_inputs=[batches()[0][0]])
    assert exported.parity is not None
    assert exported.parity.max_rel < 1e-4


def test_in_torch_pruning_what_fires_least_in_a_copy_goes_first() -> None:
    model = network()
    importance = FTWTImportance(
        model, IMAGE, batches=batches(), pruning_ratio=0.5, options=SHORT, ignored_layers=[model.fc2]
    )
    pruner = tp.pruner.BasePruner(
        model, (IMAGE,), importance=importance, pruning_ratio=0.5, ignored_layers=[model.fc2], in_channel_groups={},
        out_channel_groups={}, num_heads={},
    )  # fmt: skip

    pruner.step()

    assert FTWTImportance is importance_for("ftwt")
    assert FTWTPruner is pruner_for("ftwt")
    assert (4, 8, 16) == (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features)


def test_its_ratios_around_l1_prune_layers_held_by_few_filters_more() -> None:
    model = network()
    with torch.no_grad():
        model.conv2.weight[4:] *= 0.01  # a quarter of the filters holds nearly everything
    given = evaluator(model, dummy_input=IMAGE)
    scheduler = FTWTRatioPruner(L1NormPruner(model, config(0.5), given), 1, 1)

    _, masks = scheduler.compress(2, None)

    own = shares(masks)
    assert own["conv2"] > own["conv1"]
