"""Methods follow the model to its device."""

from __future__ import annotations

import pytest
import torch

from nni_prune_ext.methods.baselines import L1
from nni_prune_ext.pipeline import prune
from nni_prune_ext.registry import load_plugin, plugins
from nni_prune_ext.testing.method_bench import LIMITS, TARGETS, Bench


@pytest.mark.gpu
@pytest.mark.parametrize("name", plugins("pruners"))
def test_a_model_on_the_gpu_is_pruned_there(name: str) -> None:
    bench = Bench.of(L1, {})
    model = bench.model.cuda()
    batches = [(images.cuda(), labels.cuda()) for images, labels in bench.batches]

    result = prune(model, bench.example.cuda(), method=name, target=TARGETS, limits=LIMITS, train_batches=batches,
                   options=load_plugin("pruners", name).demo_options, recover_epochs=1)  # fmt: skip

    assert {"cuda"} == {tensor.device.type for tensor in result.model.state_dict().values()}
    assert all(a.met for a in result.achieved)
    assert torch.isfinite(result.model(batches[0][0])).all()
