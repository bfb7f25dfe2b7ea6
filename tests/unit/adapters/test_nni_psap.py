"""PSAP (re-derived from the abstract) in NNI and torch-pruning: only the class is swapped, up to ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from nni.compression.pruning import L1NormPruner as NniL1NormPruner
from nni_bench import IMAGE, LAYERS, batches, channels, config, evaluator, network, shares

from nni_prune_ext.certificate import certify_plan
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.pruning import L1NormPruner, PSAPPruner, PSAPRatioPruner, UniformRatioPruner, pruner_for
from nni_prune_ext.speedup import ModelSpeedup
from nni_prune_ext.torch_pruning import PSAPImportance, importance_for


@pytest.mark.parametrize("mode", ["gate", "zeroise"])
def test_the_pruner_trains_prunes_and_leaves_masks_that_the_speedup_removes(mode: str, tmp_path: Path) -> None:
    model = network()
    pruner = PSAPPruner(model, config(0.5), evaluator(model), epochs=4, mode=mode, probe_batches=1)

    _, masks = pruner.compress()
    pruner.unwrap_model()
    plan = pruner.plan()

    total = sum(share * network().get_submodule(layer).weight.shape[0] for layer, share in shares(masks).items())
    asked = 0.5 * sum(network().get_submodule(layer).weight.shape[0] for layer in LAYERS)
    assert asked == pytest.approx(total, abs=16)
    assert channels(masks["conv2"]["weight"]) == channels(masks["conv3"]["weight"])
    assert certify_plan(network(), plan, IMAGE, groups=pruner.channels.groups).exact
    ModelSpeedup(model, IMAGE, masks).speedup_model()
    assert sum(p.numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in network().parameters())
    exported = export_onnx(model, IMAGE, tmp_path / "smaller.onnx", given_inputs=[batches()[0][0]])
    assert exported.parity is not None
    assert exported.parity.max_rel < 1e-4


@pytest.mark.parametrize("inner", [L1NormPruner, NniL1NormPruner])
def test_the_ratios_go_around_any_pruner_and_divide_its_total_by_sparsity(inner: type) -> None:
    found = {}
    for scheduler in (PSAPRatioPruner, UniformRatioPruner):
        model = network()
        with torch.no_grad():
            model.fc1.weight *= (torch.rand(model.fc1.weight.shape) > 0.5).float()
        given = evaluator(model, dummy_input=IMAGE)
        pruner = scheduler(inner(model, [{"op_names": ["conv1", "fc1"], "sparse_ratio": 0.4}], given), 2, 2)
        _, masks = pruner.compress(6, None)
        found[scheduler] = shares(masks)

    assert found[UniformRatioPruner]["fc1"] == pytest.approx(found[UniformRatioPruner]["conv1"], abs=0.1)
    assert found[PSAPRatioPruner]["fc1"] > found[PSAPRatioPruner]["conv1"] + 0.2


def test_both_are_named_as_people_write_them() -> None:
    assert "PSAPPruner" == PSAPPruner.__name__
    assert PSAPPruner is pruner_for("psap")
    assert "PSAPRatioPruner" == PSAPRatioPruner.__name__
    for own in (PSAPPruner, PSAPRatioPruner):
        assert "re-derived from the abstract" in (own.__doc__ or "")


def test_in_torch_pruning_what_it_removes_from_a_copy_goes_first() -> None:
    model = network()
    importance = PSAPImportance(
        model, IMAGE, batches=batches(), pruning_ratio=0.5, options={"epochs": 2, "probe_batches": 1},
        ignored_layers=[model.fc2],
    )  # fmt: skip
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    pruner = tp.pruner.BasePruner(
        model, (IMAGE,), importance=importance, pruning_ratio=0.5, ignored_layers=[model.fc2], in_channel_groups={},
        out_channel_groups={}, num_heads={},
    )  # fmt: skip

    pruner.step()

    assert PSAPImportance is importance_for("psap")
    assert (4, 8, 16) == (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features)
    for row in model.conv1.weight:
        assert any(torch.equal(row, own) for own in before["conv1.weight"]), "the weights of the copy stay there"
