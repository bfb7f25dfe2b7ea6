"""The decoder of the reconstruction method: hints, sizes, and that it rebuilds images from what it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_prune_ext as npe
from nni_prune_ext.graph.feature_maps import ChannelSources, FeatureMap, feature_maps
from nni_prune_ext.methods.feature_reading import FeatureReading
from nni_prune_ext.methods.reconstruction_decoder import Decoder

MAPS = (
    FeatureMap("", 3, 64, 64),
    FeatureMap("stride 4", 12, 16, 16),
    FeatureMap("stride 8", 24, 8, 8),
    FeatureMap("stride 16", 40, 4, 4),
    FeatureMap("stride 32", 64, 2, 2),
)


def features(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {own.module: torch.randn(2, own.channels, *own.size, generator=generator) for own in MAPS[1:]}


def made(**options: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(MAPS, **options)  # type: ignore[arg-type]


class TestHints:
    def test_are_mixed_in_at_strides_8_and_16_only(self) -> None:
        decoder, found = made(), features()
        image = decoder(found)

        assert (2, 3, 64, 64) == image.shape
        assert ("stride 16", "stride 8") == decoder.hinted
        for name in found:
            changed = decoder({**found, name: torch.randn_like(found[name])})
            assert torch.equal(image, changed) == (name == "stride 4"), name

    def test_share_zero_hears_none_and_share_one_nothing_else(self) -> None:
        found, other = features(0), features(1)
        nothing, everything = made(hint_share=0.0), made(hint_share=1.0)

        assert torch.equal(nothing(found), nothing({**other, "stride 32": found["stride 32"]}))
        assert torch.equal(everything(found), everything({**found, "stride 32": other["stride 32"]}))

    def test_are_a_tenth_of_what_goes_on(self) -> None:
        decoder, found = made(hints=1), features()
        entering: list[Tensor] = []
        leaving: list[Tensor] = []
        decoder.stages[0].register_forward_hook(lambda _, args, output: leaving.append(output))
        decoder.stages[1].register_forward_pre_hook(lambda _, args: entering.append(args[0]))

        decoder(found)

        assert torch.allclose(0.9 * leaving[0] + 0.1 * found["stride 16"], entering[0])

    def test_there_may_be_fewer_or_more(self) -> None:
        assert () == made(hints=0).hinted
        assert ("stride 16",) == made(hint_stride=16).hinted
        assert ("stride 16", "stride 8", "stride 4") == made(hints=9, hint_stride=1).hinted


class TestSizes:
    @pytest.mark.parametrize(
        ("name", "size"),
        [("resnet20", (32, 32)), ("resnet20", (30, 45)), ("resnet20", (7, 8)), ("vgg16_bn", (33, 50)),
         ("mobilenet_v2", (30, 45))],
    )  # fmt: skip
    def test_of_any_network_and_image_fit(self, name: str, size: tuple[int, int]) -> None:
        model, image = npe.build_model(name, num_classes=3, in_channels=3), torch.randn(2, 3, *size)
        maps = feature_maps(model, lambda: model(image))
        found = noted(model, maps, image)

        assert image.shape == Decoder(maps)(found).shape

    def test_a_network_that_keeps_the_resolution_needs_no_stage(self) -> None:
        decoder = Decoder((FeatureMap("", 3, 8, 8), FeatureMap("code", 6, 8, 8)))

        assert 0 == len(decoder.stages)
        assert (1, 3, 8, 8) == decoder({"code": torch.randn(1, 6, 8, 8)}).shape


def noted(model: nn.Module, maps: Sequence[FeatureMap], image: Tensor) -> dict[str, Tensor]:
    reading = FeatureReading(maps, {own.module: ChannelSources({}, {}) for own in maps[1:]})
    taking_off = reading.attach(model)
    with torch.no_grad():
        model.eval()(image)
    for take_off in taking_off:
        take_off()
    return reading.take()[1]


def test_rebuilds_images_from_what_it_reads() -> None:
    data = npe.open_data("digits", image_size=16, limit=300)
    torch.manual_seed(0)
    model = npe.build_model("resnet20", num_classes=10, in_channels=1).eval()
    images = next(iter(npe.split_batches(data, "test", 128)))[0]
    maps = feature_maps(model, lambda: model(images[:1]))
    found = noted(model, maps, images)
    decoder = Decoder(maps)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        functional.mse_loss(decoder(found), images).backward()
        optimizer.step()

    def error(read: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return float(functional.mse_loss(decoder(read), images))

    variance = float(images.var(0, correction=0).mean())
    others = found[maps[-1].module].roll(1, 0)
    assert () == decoder.hinted
    assert error(found) < 0.5 * variance
    assert error({**found, maps[-1].module: others}) > 1.5 * error(found)


class TestTheory:
    """Theorem 3.1: pruning may change what is pooled far less than the feature map, but magnitude does not do that."""

    @pytest.mark.parametrize("criterion", ["sum", "magnitude"])
    def test_change_of_the_pooled_and_of_the_map(self, criterion: str) -> None:
        generator = torch.Generator().manual_seed(0)
        kernels = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
        images = torch.randn(8, 64, generator=generator, dtype=torch.float64)
        value = kernels.sum(1).abs() if criterion == "sum" else kernels.norm(dim=1)
        pooled, maps = [], []
        for share in (0.0125, 0.025, 0.05, 0.1):
            gone = value.argsort()[: int(share * len(value))]
            # a kernel's map is a circular convolution; its pool is the sum of the kernel times the mean of the image
            spectrum = torch.fft.rfft(images)
            lost = sum_of_squares(spectrum, kernels[gone]) / sum_of_squares(spectrum, kernels)
            lost_pooled = kernels[gone].sum(1).square().sum() / kernels.sum(1).square().sum()
            maps.append(math.sqrt(lost) / share**0.5)
            pooled.append(math.sqrt(lost_pooled) / share ** (1.5 if criterion == "sum" else 0.5))
        if criterion == "sum":
            assert max(pooled) / min(pooled) < 1.1, "the pooled changes with p^1.5"
            assert max(maps) / min(maps) < 1.1, "the map with p^0.5"
        else:
            assert all(p == pytest.approx(m, rel=0.1) for p, m in zip(pooled, maps)), "magnitude changes both alike"


def sum_of_squares(spectrum: Tensor, kernels: Tensor) -> float:
    """Returns the energy of the maps of all kernels over all images."""
    filters = torch.fft.rfft(functional.pad(kernels, (0, 61)))
    return float((filters.abs().square().sum(0) * spectrum.abs().square().sum(0)).sum())
