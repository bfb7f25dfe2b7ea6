"""New heads: detectors that run and learn, of the network's own maps, and classifiers of other classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD

import nni_prune_ext as npe
from nni_prune_ext.errors import ConfigError, ModelError
from nni_prune_ext.transfer.comparison import detection_loss
from nni_prune_ext.transfer.heads import last_linear

SIZE = (64, 96)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = npe.build_model("mobilenet_v2", num_classes=5, in_channels=3)
    return npe.prune(model.eval(), torch.zeros(1, 3, *SIZE), method="l1", target="params=0.3").model.eval()


def batch(count: int = 2) -> tuple[Tensor, list[dict[str, Tensor]]]:
    images = torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40], [50, 20, 90, 60]]), "labels": torch.tensor([1, 2])}
    return images, [target] * count


@pytest.mark.parametrize(("head", "kind"), [("retinanet", RetinaNet), ("faster_rcnn", FasterRCNN), ("ssdlite", SSD)])
def test_a_detector_reads_the_pruned_network_trains_it_and_finds_boxes(head: str, kind: type[nn.Module]) -> None:
    model = network()

    made = npe.detector(model, SIZE, 2, head=head, pyramid_channels=16)  # type: ignore[arg-type]

    assert isinstance(made, kind)
    loss = detection_loss(made.train(), batch())
    loss.backward()
    body = {name: own for name, own in made.named_parameters() if name.startswith("backbone.body.")}
    own = dict(model.named_parameters())
    assert body
    for name, parameter in body.items():
        assert torch.equal(own[name.removeprefix("backbone.body.")], parameter), "the network's weights"
        assert parameter.grad is not None, name
    with torch.no_grad():
        (found, _) = made.eval()(list(batch()[0].unbind()))
    assert {"boxes", "labels", "scores"} == set(found)
    assert found["boxes"].shape[1] == 4


def test_the_boxes_of_ssdlite_have_their_centres_all_over_the_image() -> None:
    made = npe.detector(network(), SIZE, 2, head="ssdlite")
    images, _ = batch()
    inside, _ = made.transform(list(images.unbind()))
    features = list(made.backbone(inside.tensors).values())

    (boxes, _) = made.anchor_generator(inside, features)

    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    (down, across) = SIZE
    assert across - 8 < float(centres[:, 0].max()) < across
    assert down - 8 < float(centres[:, 1].max()) < down
    assert tuple(inside.tensors.shape[2:]) == SIZE


def test_a_detector_scales_nothing_and_normalises_as_the_network_was_trained() -> None:
    made = npe.detector(network(), SIZE, 2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), pyramid_channels=16)
    images, _ = batch()

    inside, _ = made.transform(list(images.unbind()))

    expected = (images - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    assert torch.allclose(expected, inside.tensors[:, :, : SIZE[0], : SIZE[1]], atol=1e-6)
    assert inside.image_sizes == [SIZE, SIZE]


def test_anchors_follow_the_strides_of_the_feature_maps() -> None:
    model = npe.build_model("resnet20", num_classes=5, in_channels=3).eval()  # strides 1, 2 and 4

    retina = npe.detector(model, SIZE, 2, maps=2, pyramid_channels=8)
    faster = npe.detector(model, SIZE, 2, maps=2, pyramid_channels=8, head="faster_rcnn")

    assert ((8, 10.08, 12.7), (16, 20.16, 25.4), (32, 40.32, 50.8)) == retina.anchor_generator.sizes
    assert ((16,), (32,), (64,)) == faster.rpn.anchor_generator.sizes


def test_a_classifier_has_the_network_and_a_new_last_layer() -> None:
    model = network()

    made = npe.classifier(model, SIZE, 7)

    assert (2, 7) == tuple(made(batch()[0]).shape)
    name = last_linear(model, SIZE)
    before, after = model.state_dict(), made.state_dict()
    changed = {k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])}
    assert {f"{name}.weight", f"{name}.bias"} == changed
    assert 5 == model.get_submodule(name).out_features, "the network is not changed"


def test_the_last_linear_layer_is_the_one_that_runs_last() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 3)
            self.inner = nn.Linear(3, 6)

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = self.out(self.inner(images.mean((2, 3))))
            return result

    assert "out" == last_linear(Turned(), SIZE)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 96, 4), nn.Unflatten(1, (2, 2))),
    ],
)
def test_a_network_that_ends_otherwise_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="does not end in a linear layer"):
        npe.classifier(model, SIZE, 7)


def test_a_network_that_does_not_run_on_the_images_is_refused() -> None:
    with pytest.raises(ModelError, match="does not run on the example inputs"):
        npe.classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), SIZE, 7)


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="head is 'yolo'"):
        npe.detector(network(), SIZE, 2, head="yolo")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_classes 0"):
        npe.detector(network(), SIZE, 0)
