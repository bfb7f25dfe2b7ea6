"""The counter against hand counts, against PyTorch's FLOP counter, and against its own prediction for a cut."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nni_prune_ext.costs import count_costs
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.inputs import call_model
from nni_prune_ext.plan import plan_from_channels, spared
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.testing.toy_models import ZOO


def reference_macs(model: nn.Module, inputs: object) -> int:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call_model(model.eval(), inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("layer", "inputs", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 5, 5), 2 * 25 * 8 * 3 * 9),
        (nn.Conv2d(8, 8, 3, groups=8), torch.zeros(1, 8, 5, 5), 9 * 8 * 9),
        (nn.Conv2d(8, 4, 1, groups=2, stride=2), torch.zeros(1, 8, 4, 4), 4 * 4 * 4),
        (nn.ConvTranspose2d(3, 8, 2, stride=2), torch.zeros(1, 3, 5, 5), 25 * 3 * 8 * 4),
        (nn.Linear(6, 4), torch.zeros(2, 7, 6), 14 * 24),
        (nn.Conv1d(2, 3, 3), torch.zeros(1, 2, 6), 4 * 2 * 3 * 3),
        (nn.BatchNorm2d(3), torch.zeros(1, 3, 4, 4), 0),
    ],
)
def test_layers_cost_what_a_hand_count_says(layer: nn.Module, inputs: torch.Tensor, macs: int) -> None:
    costs = count_costs(layer, inputs)

    assert macs == costs.macs
    assert sum(p.numel() for p in layer.parameters()) == costs.params


def test_bytes_follow_the_dtypes_and_leave_counters_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1).half(), nn.BatchNorm2d(4))

    costs = count_costs(nn.Sequential(model[1]), torch.zeros(1, 4, 2, 2))

    assert 4 * 4 * 4 == costs.weight_bytes
    assert {"macs": 0, "params": 8, "memory": 64} == costs.as_dict()


@pytest.mark.parametrize("name", sorted(ZOO.keys() - {"lstm"}))
def test_the_zoo_costs_what_the_flop_counter_says(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name].build(), ZOO[name].example_inputs()

    assert reference_macs(model, inputs) == count_costs(model, inputs).macs


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext_tiny", "vit_b_32", "shufflenet_v2_x0_5"])
def test_torchvision_networks_cost_what_the_flop_counter_says(name: str) -> None:
    size = 224 if name.startswith("vit") else 64
    with torch.device("meta"):
        model, inputs = getattr(torchvision.models, name)(weights=None), torch.zeros(1, 3, size, size)

    assert reference_macs(model, inputs) == count_costs(model, inputs).macs


@pytest.mark.parametrize("name", sorted(ZOO.keys() - {"fused_attention"}))
def test_the_cost_predicted_from_cut_shapes_is_the_cost_counted(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name].build(), ZOO[name].example_inputs()
    groups, dense = trace_channel_groups(model, inputs), count_costs(model, inputs)
    removed = {}
    for group in groups:
        gone = torch.rand(group.num_channels).lt(0.5).numpy()
        removed[group.name] = spared(group, gone)

    removal = cut_channels(model, plan_from_channels(groups, removed), inputs, groups=groups)

    kept = {t: {dim: len(index) for dim, index in dims.items()} for t, dims in removal.kept.items()}
    shapes = {t: [kept.get(t, {}).get(d, n) for d, n in enumerate(shape)] for t, shape in groups.shapes.items()}
    counted = count_costs(removal.model, inputs)
    assert counted.macs == sum(c.positions * prod(shapes[c.name]) if c.weighted else c.macs for c in dense.layers)
    assert counted.params == sum(prod(shapes[n]) for n, _ in model.named_parameters())


class Function(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.function(*args)


@pytest.mark.parametrize(
    ("layer", "inputs", "macs"),
    [
        (nn.LSTM(3, 5), torch.zeros(7, 2, 3), 14 * 20 * (3 + 5)),
        (nn.GRU(3, 5, batch_first=True, bidirectional=True), torch.zeros(2, 7, 3), 2 * 14 * 15 * (3 + 5)),
        (nn.RNN(3, 5, num_layers=2), torch.zeros(7, 2, 3), 14 * 5 * (3 + 5 + 5 + 5)),
        (nn.LSTM(3, 5, proj_size=2), torch.zeros(7, 3), 7 * (20 * (3 + 2) + 2 * 5)),
        (nn.LSTMCell(3, 5), torch.zeros(2, 3), 2 * 20 * (3 + 5)),
        (nn.Bilinear(3, 4, 5), (torch.zeros(2, 6, 3), torch.zeros(2, 6, 4)), 12 * 3 * 4 * 5),
        (Function(lambda x: torch.einsum("...ij,...jk->...ik", x, x)), torch.zeros(2, 3, 4, 4), 6 * 64),
        (Function(lambda x: torch.einsum("b...c,cd->b...d", x, x[0])), torch.zeros(4, 4, 4), 4 * 64),
        (Function(lambda x: torch.addmm(input=x, mat1=x, mat2=x)), torch.zeros(4, 4), 64),
        (Function(lambda x: torch.matmul(input=x, other=x)), torch.zeros(4, 4), 64),
        (Function(lambda x: torch.mm(x, mat2=x)), torch.zeros(4, 4), 64),
        (Function(lambda x: torch.baddbmm(x, batch1=x, batch2=x)), torch.zeros(3, 4, 4), 3 * 64),
    ],
)
def test_recurrent_and_bilinear_layers_and_keywords_are_counted(layer: nn.Module, inputs: object, macs: int) -> None:
    costs = count_costs(layer, inputs)

    assert (macs, ()) == (costs.macs, costs.uncounted)


def test_products_that_are_not_counted_are_named() -> None:
    function = Function(lambda x: torch.tensordot(torch.einsum("ij,jk,kl->il", x, x, x), x, 1))

    costs = count_costs(function, torch.zeros(4, 4))

    assert (0, ("einsum", "tensordot")) == (costs.macs, costs.uncounted)
