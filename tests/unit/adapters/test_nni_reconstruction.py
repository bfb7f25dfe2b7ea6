"""Reconstruction in NNI and torch-pruning: only the class is swapped, up to ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from nni.compression.pruning import L1NormPruner as NniL1NormPruner
from nni_bench import IMAGE, LAYERS, batches, config, evaluator, network, shares

from nni_prune_ext.certificate import certify_plan
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.pruning import L1NormPruner, ReconstructionPruner, RewindingPruner, pruner_for
from nni_prune_ext.speedup import ModelSpeedup
from nni_prune_ext.torch_pruning import ReconstructionImportance, importance_for

SHORT = {"decoder_epochs": 1, "rounds": 2, "round_epochs": 1, "score_batches": 1}


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_the_pruner_leaves_first_weights_and_masks_that_the_speedup_removes(criterion: str, tmp_path: Path) -> None:
    model = network()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruner = ReconstructionPruner(model, config(0.5), evaluator(model), criterion=criterion, **SHORT)

    _, masks = pruner.compress()
    pruner.unwrap_model()

    assert {"decoder_error_last", "rounds_error_last"} < set(pruner.outcome.facts)
    assert certify_plan(network(), pruner.plan(), IMAGE, groups=pruner.channels.groups).exact
    assert all(torch.equal(first[name], tensor) for name, tensor in model.state_dict().items()), "rewound"
    total = sum(share * network().get_submodule(layer).weight.shape[0] for layer, share in shares(masks).items())
    assert 0.5 * sum(network().get_submodule(layer).weight.shape[0] for layer in LAYERS) == pytest.approx(total, abs=16)
    ModelSpeedup(model, IMAGE, masks).speedup_model()
    exported = export_onnx(model, IMAGE, tmp_path / "smaller.onnx", given_inputs=[batches()[0][0]])
    assert exported.parity is not None
    assert exported.parity.max_rel < 1e-4


def test_single_weights_are_masked_at_the_ratio_of_their_layer() -> None:
    model = network()
    entries = [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.6, "granularity": [1, 1, 1, 1]}]
    pruner = ReconstructionPruner(model, entries, evaluator(model), keep_stem=False, **SHORT)

    _, masks = pruner.compress()

    for layer in ("conv1", "conv2"):
        own = masks[layer]["weight"]
        assert own.numel() * 0.4 - 1 <= float(own.sum()) <= own.numel() * 0.4


def test_in_torch_pruning_what_it_removes_from_a_copy_goes_first() -> None:
    model = network()
    importance = ReconstructionImportance(
        model, IMAGE, batches=batches(), pruning_ratio=0.5, options=SHORT, ignored_layers=[model.fc2]
    )
    pruner = tp.pruner.BasePruner(
        model, (IMAGE,), importance=importance, pruning_ratio=0.5, ignored_layers=[model.fc2], in_channel_groups={},
        out_channel_groups={}, num_heads={},
    )  # fmt: skip

    pruner.step()

    assert ReconstructionImportance is importance_for("reconstruction")
    assert ReconstructionPruner is pruner_for("reconstruction")
    assert (4, 8, 16) == (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features)


@pytest.mark.parametrize("inner", [L1NormPruner, NniL1NormPruner])
def test_rounds_of_any_pruner_end_on_the_first_weights(inner: type) -> None:
    model = network()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = evaluator(model, dummy_input=IMAGE)
    moved: list[bool] = []
    scheduler = RewindingPruner(inner(model, [{"op_names": ["conv1", "fc1"], "sparse_ratio": 0.5}], given), 2, 3)
    generate = scheduler.bound_pruner._generate_sparsity

    def watched(metrics: object) -> object:
        weights = dict(scheduler.bound_model.named_parameters())
        moved.append(not torch.equal(first["fc2.weight"], weights["fc2.weight"].detach()))
        return generate(metrics)

    scheduler.bound_pruner._generate_sparsity = watched
    scheduler._give_back = lambda: None  # which would take the watch off
    _, masks = scheduler.compress(6, None)
    scheduler.unwrap_model()

    assert [True] * 3 == moved, "every round has trained"
    assert all(torch.equal(first[name], tensor) for name, tensor in model.state_dict().items())
    assert {"conv1": 0.5, "fc1": 0.5} == pytest.approx(shares(masks))


def test_training_after_the_last_round_starts_from_the_first_weights() -> None:
    model = network()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = evaluator(model, dummy_input=IMAGE)
    scheduler = RewindingPruner(L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], given), 2, 2)

    scheduler.compress(5, None)
    scheduler.unwrap_model()

    assert not torch.equal(first["fc2.weight"], model.fc2.weight)
    assert 1 == int(model.bn1.num_batches_tracked), "one step since then"
