"""The built-in networks have the published sizes, names and shortcuts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nni_prune_ext.models.builtin import builtin_names
from nni_prune_ext.models.cifar_resnet import BasicBlock, PadShortcut
from nni_prune_ext.models.loading import build_model

# ResNets: table 6 of the paper and akamaster/pytorch_resnet_cifar10. The others: layer by layer on paper.
PARAMS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "vgg16_bn": 14_728_266 - 4_224,  # kuangliu/pytorch-cifar, less the biases before batch norms
    "vgg19_bn": 20_040_522 - 5_504,
    "mobilenet_v1": 3_217_226,
    "mobilenet_v2": 2_296_922,
}
MEGA_MACS = {
    "resnet20": 40.6,
    "resnet32": 68.9,
    "resnet44": 97.2,
    "resnet56": 125.5,
    "resnet110": 252.9,
    "vgg16_bn": 313.2,
    "vgg19_bn": 398.1,
    "mobilenet_v1": 46.4,
    "mobilenet_v2": 91.2,
}


@pytest.mark.parametrize("name", builtin_names())
def test_a_network_has_the_published_number_of_params(name: str) -> None:
    model = build_model(name)

    params = sum(parameter.numel() for parameter in model.parameters())

    assert PARAMS[name] == params


@pytest.mark.parametrize("name", builtin_names())
def test_a_network_has_the_macs_that_its_docstring_states(name: str) -> None:
    model = build_model(name).eval()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))

    assert MEGA_MACS[name] == round(counter.get_total_flops() / 2e6, 1)


@pytest.mark.parametrize("name", builtin_names())
def test_a_network_maps_images_of_any_channels_to_one_logit_per_class(name: str) -> None:
    model = build_model(name, num_classes=7, in_channels=1).eval()

    with torch.no_grad():
        logits = model(torch.zeros(2, 1, 32, 32))

    assert (2, 7) == tuple(logits.shape)


def test_the_names_in_a_resnet_state_dict_are_those_of_published_weights() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = ["conv1.weight", *(f"bn1.{part}" for part in norm)]
    for stage in (1, 2, 3):
        for block in range(3):
            for layer in (1, 2):
                expected.append(f"layer{stage}.{block}.conv{layer}.weight")
                expected += [f"layer{stage}.{block}.bn{layer}.{part}" for part in norm]
    expected += ["linear.weight", "linear.bias"]

    names = list(build_model("resnet20").state_dict())

    assert expected == names


def test_the_pad_shortcut_equals_slicing_and_padding_by_hand(seeded_images: Tensor) -> None:
    expected = torch.zeros(2, 10, 3, 4)
    for channel in range(4):
        for row in range(3):
            for column in range(4):
                expected[:, 3 + channel, row, column] = seeded_images[:, channel, 2 * row, 2 * column]

    shortcut = PadShortcut(stride=2, pad=3)(seeded_images)

    assert torch.equal(expected, shortcut)


def test_a_block_adds_its_input_before_the_last_relu(seeded_images: Tensor) -> None:
    block = BasicBlock(4, 4).eval()
    torch.nn.init.zeros_(block.bn2.weight)

    output = block(seeded_images)

    assert torch.equal(seeded_images.clamp(min=0), output)


@pytest.fixture
def seeded_images() -> Tensor:
    return torch.randn(2, 4, 6, 7, generator=torch.Generator().manual_seed(0))
