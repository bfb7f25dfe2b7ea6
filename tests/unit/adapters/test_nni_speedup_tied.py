"""One tensor, several layers, each with masks of its own: only what all of them mask is gone."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.speedup import ConstantError, FineGrainedMaskError, ModelSpeedup
from nni_prune_ext.testing.toy_models import ZOO

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Tied(nn.Module):
    """Two convolutions with one weight, each with its own reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(3, 8, 1, bias=False)
        self.b.weight = self.a.weight
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).relu()) + self.head(self.b(x.flip(1)).relu())


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().double().eval()


def rows(tensor: Tensor, *masked: int) -> Tensor:
    mask = torch.ones_like(tensor)
    mask[list(masked)] = 0
    return mask


def masked_output(model: Tied, a: Tensor, b: Tensor) -> Tensor:
    """What NNI's simulation computes: every layer multiplies the shared weight by its own mask."""
    left = functional.conv2d(X, model.a.weight * a).relu()
    return (model.head(left) + model.head(functional.conv2d(X.flip(1), model.a.weight * b).relu())).detach()


def speedup(model: nn.Module, masks: object, x: object = X, **options: object) -> ModelSpeedup:
    result = ModelSpeedup(model, x, masks, logger=logging.getLogger("quiet"), **options)
    result.speedup_model()
    return result


def test_a_layer_without_a_mask_vetoes_the_mask_of_a_layer_with_the_same_weight() -> None:
    model = tied()

    report = speedup(model, {"a": {"weight": rows(model.a.weight, 0, 1, 2)}}).report

    assert 8 == model.a.out_channels
    assert [("a.weight", (0, 1, 2))] == [(kept.tensor, kept.channels) for kept in report.kept]
    assert "weight of 'b' too" in report.kept[0].reason
    assert report.certificate is None


def test_only_the_channels_that_all_layers_with_one_weight_mask_go_and_the_rest_is_reported() -> None:
    model = tied()
    a, b = rows(model.a.weight, 0, 1, 2), rows(model.a.weight, 2, 6)
    both = rows(model.a.weight, 2)
    expected = masked_output(model, both, both)

    report = speedup(model, {"a": {"weight": a}, "b": {"weight": b}}).report

    assert 7 == model.a.out_channels
    assert torch.allclose(expected, model(X), rtol=0, atol=1e-12)
    assert [("a.weight", (0, 1)), ("b.weight", (6,))] == [(kept.tensor, kept.channels) for kept in report.kept]


@pytest.mark.parametrize("constants", ["drop", "absorb"])
def test_layers_with_one_weight_that_agree_lose_their_channels_exactly(constants: str) -> None:
    model = tied()
    mask = rows(model.a.weight, 1, 4)
    expected = masked_output(model, mask, mask)

    speedup(model, {"a": {"weight": mask}, "b": {"weight": mask.clone()}}, constants=constants)

    assert 6 == model.a.out_channels
    assert model.a.weight is model.b.weight
    assert torch.allclose(expected, model(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("other", [None, (2, 6)])
def test_exact_semantics_refuse_layers_that_disagree_about_one_weight_and_name_them(other: tuple[int] | None) -> None:
    model = tied()
    masks = {"a": {"weight": rows(model.a.weight, 0, 1)}}
    if other:
        masks["b"] = {"weight": rows(model.a.weight, *other)}
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(ConstantError, match=r"'a\.weight'.*of 'a', 'b'.*masked differently.*same mask"):
        speedup(model, masks, constants="absorb")

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_constants_go_into_the_biases_of_all_layers_that_read_them_by_one_weight(bias: bool) -> None:
    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1, bias=bias)
            self.right.weight = self.left.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.left(x).relu() - self.right(x).tanh()

    torch.manual_seed(0)
    model = Readers().double().eval()
    mask = rows(model.conv.weight, 1, 4)
    masked = copy.deepcopy(model)
    masked.conv.weight.data.mul_(mask)

    speedup(model, {"conv": {"weight": mask}}, constants="absorb")

    assert 6 == model.left.in_channels
    assert torch.allclose(masked(X), model(X), rtol=0, atol=1e-12)


def test_a_weight_that_reads_in_two_directions_keeps_exact_semantics() -> None:
    torch.manual_seed(0)
    model, x = ZOO["tied_autoencoder"].build().double().eval(), X
    mask = torch.ones_like(model.code.weight)
    mask[:, :3] = 0
    masked = copy.deepcopy(model)
    masked.code.weight.data.mul_(mask)
    expected = masked(x).detach()

    speedup(model, {"code": {"weight": mask}}, x, constants="absorb")

    assert (8, 3, 3, 3) == model.code.weight.shape
    assert torch.allclose(expected, model(x), rtol=0, atol=1e-12)


def test_masked_columns_of_a_head_leave_the_embedding_that_shares_its_weight_alone() -> None:
    torch.manual_seed(0)
    model, x = ZOO["tied_embedding"].build().eval(), ZOO["tied_embedding"].example_inputs()
    mask = torch.ones_like(model.head.weight)
    mask[:, :4] = 0

    report = speedup(model, {"head": {"weight": mask}}, x).report

    assert (11, 8) == model.table.weight.shape
    assert ["head.weight"] == [kept.tensor for kept in report.kept]


class Aliased(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.alias = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alias(x).relu())


@pytest.mark.parametrize("name", ["conv", "alias"])
def test_a_layer_known_under_two_names_is_one_layer(name: str) -> None:
    torch.manual_seed(0)
    model = Aliased().double().eval()

    speedup(model, {name: {"weight": rows(model.conv.weight, 0, 1)}}, constants="absorb")

    assert 6 == model.conv.out_channels


def test_fine_grained_masks_of_one_of_the_layers_are_refused_too() -> None:
    model = tied()

    with pytest.raises(FineGrainedMaskError, match=r"'a\.weight'"):
        speedup(model, {"a": {"weight": (torch.rand_like(model.a.weight) > 0.5).double()}})
