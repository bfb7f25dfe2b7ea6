"""A gated network with its masks fixed, against the ordinary network that is made of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.vgg import make_layers

from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import CertificateError, ConfigError
from nni_prune_ext.gates import fixed_masks as module
from nni_prune_ext.gates.fixed_masks import SubNetworks, closed_rows, fixed_masks
from nni_prune_ext.gates.gated_network import GatedNetwork
from nni_prune_ext.gates.placement import chosen_places, new_gates
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.models.loading import build_model

EXAMPLE = torch.zeros(1, 3, 16, 16, dtype=torch.float64)


def small_resnet(block: type[nn.Module]) -> nn.Module:
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5)


class Odd(nn.Module):
    """Norms without weights, over groups, with tied weights, and a convolution that is read around its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise((3, 8, 8, 12, 12, 12, 8)))
        self.plain, self.grouped, self.around = nn.BatchNorm2d(8, affine=False), nn.GroupNorm(2, 8), nn.BatchNorm2d(12)
        self.first, self.second = nn.BatchNorm2d(12), nn.BatchNorm2d(12)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.plain(self.convs[0](x)))
        x = functional.hardswish(self.grouped(self.convs[1](x)))
        raw = self.convs[2](x)
        x = functional.relu(self.around(raw)) + raw
        x = functional.relu(self.first(self.convs[3](x)))
        x = functional.relu(self.second(self.convs[4](x)))
        return self.head(functional.relu(self.convs[5](x)).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "vgg": lambda: nn.Sequential(
        make_layers([8, 8, "M", 12, "M", 16], batch_norm=True), nn.Flatten(), nn.Linear(16 * 16, 5)
    ),
    "resnet, padded shortcuts": lambda: build_model("resnet20", num_classes=5),
    "resnet, basic blocks": lambda: small_resnet(torchvision.models.resnet.BasicBlock),
    "resnet, bottlenecks": lambda: small_resnet(torchvision.models.resnet.Bottleneck),
    "mobilenet": lambda: torchvision.models.MobileNetV2(5, 0.5, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 12, num_classes=5),
    "odd norms": Odd,
}


def gated(make: Callable[[], nn.Module]) -> GatedNetwork:
    torch.manual_seed(0)
    model = make().double()
    for own in model.modules():
        if isinstance(own, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(own.running_mean, 0, 0.3)
            nn.init.uniform_(own.running_var, 0.5, 1.5)
        if isinstance(own, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)) and own.weight is not None:
            nn.init.uniform_(own.weight, 0.5, 1.5)
            nn.init.normal_(own.bias, 0, 0.3)
    return GatedNetwork(model, new_gates(chosen_places(trace_gate_flow(model, EXAMPLE)))).double().eval()


def random_masks(network: GatedNetwork, seed: int, rate: float = 0.4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for place in network.gates.places:
        masks[place.layer] = torch.rand(place.channels, generator=generator) < rate
        masks[place.layer][int(torch.randint(place.channels, (), generator=generator))] = True
    return masks


def forced(network: GatedNetwork, opened: dict[str, Tensor]) -> GatedNetwork:
    """Returns the gated network whose heads say these masks for every image."""
    made = copy.deepcopy(network)
    for place, head in zip(made.gates.places, made.gates.all_heads()):
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(opened[place.layer].double() * 2 - 1)
    return made


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(7)).double()


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("net", NETS)
def test_a_sub_network_computes_what_the_gated_network_computes_with_these_masks(net: str) -> None:
    network = gated(NETS[net])
    made = SubNetworks(network, EXAMPLE)
    dense = count_costs(network.model, EXAMPLE).macs

    for seed in range(2):
        opened = random_masks(network, seed)
        sub = made.of(opened, images(2))

        with torch.no_grad():
            expected, found, ungated = forced(network, opened)(images()), sub(images()), network.model(images())
        assert apart(expected, found) < 1e-12
        assert apart(expected, ungated) > 1e-3, "the masks say something"
        assert count_costs(sub, EXAMPLE).macs < dense
        assert not [own for own in sub.modules() if own._forward_hooks or own._forward_pre_hooks]


def test_a_stream_keeps_closed_rows_as_zeros_and_a_branch_loses_them() -> None:
    network = gated(NETS["resnet, basic blocks"])
    opened = {place.layer: torch.ones(place.channels, dtype=torch.bool) for place in network.gates.places}
    opened["layer1.0.conv1"][:10] = False
    opened["layer1.0.conv2"][:10] = False

    sub = SubNetworks(network, EXAMPLE).of(opened)

    block = sub.get_submodule("layer1.0")
    assert (54, 64) == (block.conv1.out_channels, block.conv2.out_channels), "the stem writes into the stream, too"
    assert [0.0] * 20 == [*block.bn2.weight[:10].tolist(), *block.bn2.bias[:10].tolist()]


@pytest.mark.parametrize(("multiple", "expected"), [(1, 54), (4, 56), (16, 64), (100, 64)])
def test_widths_keep_a_multiple_at_no_loss(multiple: int, expected: int) -> None:
    network = gated(NETS["resnet, basic blocks"])
    opened = {place.layer: torch.ones(place.channels, dtype=torch.bool) for place in network.gates.places}
    opened["layer1.0.conv1"][7:17] = False

    sub = SubNetworks(network, EXAMPLE, multiple=multiple).of(opened)

    assert expected == sub.get_submodule("layer1.0.conv1").out_channels
    with torch.no_grad():
        assert apart(forced(network, opened)(images()), sub(images())) < 1e-12


def test_a_multiple_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="The multiple is 0, expected 1 or more"):
        SubNetworks(gated(Odd), EXAMPLE, multiple=0)


def test_what_a_depthwise_layer_makes_of_zeros_stays_and_what_it_closes_goes() -> None:
    network = gated(NETS["mobilenet"])
    opened = {place.layer: torch.ones(place.channels, dtype=torch.bool) for place in network.gates.places}
    assert {"features.2.conv.0.0", "features.2.conv.1.0"} < opened.keys()
    opened["features.2.conv.0.0"][:5] = False  # the norm behind the depthwise layer shifts these zeros
    opened["features.2.conv.1.0"][5:9] = False

    sub = SubNetworks(network, EXAMPLE).of(opened, images())

    before = network.model.get_submodule("features.2.conv.1.0").out_channels
    assert before - 4 == sub.get_submodule("features.2.conv.1.0").out_channels
    assert before - 4 == sub.get_submodule("features.2.conv.0.0").out_channels


def test_channels_that_a_norm_over_channels_counts_stay() -> None:
    network = gated(Odd)
    opened = {place.layer: torch.ones(place.channels, dtype=torch.bool) for place in network.gates.places}
    opened["convs.1"][:3] = False

    sub = SubNetworks(network, EXAMPLE).of(opened, images())

    assert 8 == sub.get_submodule("convs.1").out_channels


def test_a_network_and_its_sub_network_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = gated(NETS["resnet, basic blocks"])
    made = SubNetworks(network, EXAMPLE)
    open_for_all = {place.layer: torch.ones(place.channels, dtype=torch.bool) for place in network.gates.places}
    monkeypatch.setattr(module, "closed_rows", lambda own, opened: closed_rows(own, open_for_all))

    with pytest.raises(CertificateError, match="The sub-network computes something else"):
        made.of(random_masks(network, 0), images())


def test_the_network_is_left_as_it_was() -> None:
    network = gated(NETS["odd norms"]).train()
    before = {name: own.clone() for name, own in network.state_dict().items()}
    output = network.model(images()).clone()
    network.load_state_dict(before)

    with fixed_masks(network, random_masks(network, 0)):
        assert not torch.equal(output, network.model(images()))
    SubNetworks(network, EXAMPLE).of(random_masks(network, 1))

    assert all(torch.equal(own, network.state_dict()[name]) for name, own in before.items())
    assert all(own.training for own in network.modules())
    assert not [own for own in network.modules() if own._forward_hooks]


@pytest.mark.parametrize("wrong", ["missing", "short", "closed", "numbers"])
def test_masks_that_do_not_fit_are_refused(wrong: str) -> None:
    network = gated(Odd)
    opened = random_masks(network, 0)
    own = opened.pop("convs.2")
    changed = {"short": own[1:], "closed": torch.zeros_like(own), "numbers": own.float()}
    if wrong in changed:
        opened["convs.2"] = changed[wrong]

    with pytest.raises(ConfigError, match=r"The mask of the gated layer 'convs\.2' is .* expected 12 bools"):
        SubNetworks(network, EXAMPLE).of(opened)
