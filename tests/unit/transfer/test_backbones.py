"""A pruned network as a backbone: its own feature maps, exactly, without its head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import nni_prune_ext as npe
from nni_prune_ext import feature_backbone
from nni_prune_ext.errors import ConfigError, ModelError
from nni_prune_ext.graph.feature_maps import feature_maps

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = npe.build_model(name, num_classes=5, in_channels=3)
    return model.eval()


def pruned(name: str) -> nn.Module:
    return npe.prune(network(name), IMAGES[:1], method="l1", target="params=0.4").model.eval()


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn", "mobilenet_v2"])
def test_gives_the_feature_maps_of_the_pruned_network_and_drops_its_head(name: str) -> None:
    model = pruned(name)
    expected: dict[str, Tensor] = {}
    found = feature_maps(model, lambda: model(IMAGES))[-3:]
    handles = [
        model.get_submodule(own.module).register_forward_hook(
            lambda _, args, output, key=own.module: expected.update({key: output.clone()})
        )
        for own in found
    ]
    model(IMAGES)
    for handle in handles:
        handle.remove()

    backbone = feature_backbone(model, IMAGES[:1])

    features = backbone(IMAGES)
    assert ["0", "1", "2"] == list(features)
    for own, tensor in zip(found, features.values()):
        assert torch.equal(expected[own.module], tensor)
    assert backbone.out_channels == found[-1].channels
    classifier = {name for name, _ in model.named_parameters() if name.startswith(("linear", "classifier", "fc"))}
    assert classifier
    assert not classifier & {name.removeprefix("body.") for name, _ in backbone.named_parameters()}


def test_is_a_copy_in_the_mode_of_the_network() -> None:
    model = network("resnet20")
    backbone = feature_backbone(model, IMAGES[:1])
    before = backbone(IMAGES)["2"].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    assert torch.equal(before, backbone(IMAGES)["2"])
    assert not any(module.training for module in backbone.modules())
    assert feature_backbone(model.train(), IMAGES[:1]).training


def test_a_detector_trains_on_it_and_detects() -> None:
    backbone = feature_backbone(pruned("mobilenet_v2"), IMAGES[:1], maps=2, pyramid_channels=16)
    anchors = AnchorGenerator(sizes=((16,), (32,), (64,)), aspect_ratios=((1.0,),) * 3)
    detector = RetinaNet(backbone, num_classes=2, anchor_generator=anchors, min_size=64, max_size=64)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2

    losses = detector.train()(list(IMAGES), targets)
    sum(losses.values()).backward()  # type: ignore[union-attr,no-untyped-call]

    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert {"boxes", "labels", "scores"} == set(detector.eval()(list(IMAGES))[0])


def test_a_pyramid_has_the_width_asked_for_and_one_map_more() -> None:
    backbone = feature_backbone(pruned("resnet20"), IMAGES[:1], pyramid_channels=24)

    features = backbone(IMAGES)

    assert [(24, 64), (24, 32), (24, 16), (24, 8)] == [(own.shape[1], own.shape[2]) for own in features.values()]
    assert 24 == backbone.out_channels


def test_is_exported_with_all_its_outputs_and_nothing_else(tmp_path: Path) -> None:
    model = pruned("resnet20")
    backbone = feature_backbone(model, IMAGES[:1])

    written = npe.export_onnx(backbone, IMAGES, tmp_path / "backbone.onnx")

    assert written.parity is not None
    assert written.parity.max_rel < 1e-4
    assert sum(p.numel() for p in backbone.parameters()) < sum(p.numel() for p in model.parameters())


def test_maps_may_be_named() -> None:
    backbone = feature_backbone(network("resnet20"), IMAGES[:1], maps=["layer1", "layer3"])

    assert [16, 64] == [own.shape[1] for own in backbone(IMAGES).values()]


class Branching(nn.Module):
    """What torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.mean() if x.sum() > 0 else x.sum()


def test_what_cannot_be_is_refused() -> None:
    model = network("resnet20")

    with pytest.raises(ConfigError, match="9 feature maps were asked for, expected 1 to 3: CifarResNet has layer1"):
        feature_backbone(model, IMAGES[:1], maps=9)
    with pytest.raises(ConfigError, match="'layer4' is no module of CifarResNet .* Did you mean 'layer"):
        feature_backbone(model, IMAGES[:1], maps=["layer4"])
    with pytest.raises(ConfigError, match="pyramid_channels is 0, expected 1 or more"):
        feature_backbone(model, IMAGES[:1], pyramid_channels=0)
    with pytest.raises(ModelError, match="Branching cannot be cut at conv: .* torch.fx can trace"):
        feature_backbone(Branching(), IMAGES[:1], maps=1)


def test_of_torchvision_networks() -> None:
    for name in ("resnet18", "densenet121", "squeezenet1_1"):
        model = torchvision.models.get_model(name, weights=None).eval()
        assert 3 == len(feature_backbone(model, IMAGES[:1])(IMAGES)), name
