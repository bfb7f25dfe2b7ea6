"""NNI's masks become smaller models: which channels go, what stays and why, and what is left alone."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nni.compression.speedup as theirs
import pytest
import torch
from nni.compression.pruning import L1NormPruner, LevelPruner
from nni.compression.speedup import error_code
from torch import Tensor, nn

from nni_prune_ext.errors import NniPruneExtError
from nni_prune_ext.speedup import (
    EmptyLayerError,
    FineGrainedMaskError,
    MaskFileError,
    ModelSpeedup,
    ShapeMisMatchError,
    SpeedupError,
    WrappedModelError,
)
from nni_prune_ext.testing.toy_models import ZOO

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A stem, one block with a shortcut, a head: what residual networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second, self.second_norm = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        inner = self.first_norm(self.first(x)).relu()
        return self.head((x + self.second_norm(self.second(inner))).relu().mean((2, 3)))


def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name and tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return model.eval()


def rows(tensor: Tensor, masked: range) -> Tensor:
    """A mask as NNI makes them: the full shape, zero in whole output channels."""
    mask = torch.ones_like(tensor)
    mask[list(masked)] = 0
    return mask


def columns(tensor: Tensor, masked: range) -> Tensor:
    mask = torch.ones_like(tensor)
    mask[:, list(masked)] = 0
    return mask


def widths(model: nn.Module) -> dict[str, int]:
    return {name: m.weight.shape[0] for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def speedup(model: nn.Module, masks: object, x: object = X, **options: object) -> ModelSpeedup:
    result = ModelSpeedup(model, x, masks, logger=logging.getLogger("quiet"), **options)
    result.speedup_model()
    return result


# -- what goes ---------------------------------------------------------------------------------------------------


def test_a_masked_inner_layer_loses_its_channels_and_the_layers_after_it_their_columns() -> None:
    model = residual()

    speedup(model, {"first": {"weight": rows(model.first.weight, range(5)), "bias": rows(model.first.bias, range(5))}})

    assert {"stem": 8, "first": 7, "second": 8, "head": 5} == widths(model)
    assert (8, 7, 3, 3) == model.second.weight.shape
    assert 7 == model.first_norm.num_features


def test_the_weights_that_stay_are_the_models_own() -> None:
    model, original = residual(), residual()

    speedup(model, {"first": {"weight": rows(original.first.weight, range(5))}})

    assert torch.equal(original.first.weight[5:], model.first.weight)
    assert torch.equal(original.second.weight[:, 5:], model.second.weight)


def test_coupled_layers_lose_only_the_channels_on_which_all_their_masks_agree() -> None:
    model = residual()
    masks = {
        "stem": {"weight": rows(model.stem.weight, range(0, 4))},
        "second": {"weight": rows(model.second.weight, range(2, 6))},
    }

    report = speedup(model, masks).report

    assert {"stem": 6, "first": 12, "second": 6, "head": 5} == widths(model)
    assert {"stem": (2, 3), "second": (2, 3)} == dict(report.removed)
    kept = {mask.tensor: mask for mask in report.kept}
    assert (0, 1) == kept["stem.weight"].channels
    assert "tied to second" in kept["stem.weight"].reason
    assert (4, 5) == kept["second.weight"].channels


def test_channels_that_reach_the_output_stay_and_are_reported() -> None:
    model = residual()
    masks = {
        "first": {"weight": rows(model.first.weight, range(5))},
        "head": {"weight": rows(model.head.weight, range(3)), "bias": rows(model.head.bias, range(3))},
    }

    report = speedup(model, masks).report

    assert 5 == model.head.out_features
    assert [("head.weight", (0, 1, 2))] == [(mask.tensor, mask.channels) for mask in report.kept]
    assert "output" in report.kept[0].reason


def test_masks_of_input_channels_remove_what_nobody_reads_any_more() -> None:
    model = residual()

    speedup(model, {"second": {"weight": columns(model.second.weight, range(5))}})

    assert 7 == model.first.out_channels
    assert 7 == model.second.in_channels


def test_a_channel_that_one_of_two_readers_still_reads_stays() -> None:
    model = residual()

    report = speedup(model, {"first": {"weight": columns(model.first.weight, range(5))}}).report

    assert {"stem": 8, "first": 12, "second": 8, "head": 5} == widths(model)
    assert ["first.weight"] == [mask.tensor for mask in report.kept]
    assert report.certificate is None


def test_a_masked_scale_of_a_norm_removes_the_channel_though_its_shift_stays() -> None:
    model = residual()
    masks = {"first_norm": {"weight": rows(model.first_norm.weight, range(5)), "bias": torch.ones(12)}}

    speedup(model, masks)

    assert 7 == model.first.out_channels


def test_masked_scales_of_norms_that_meet_in_a_sum_must_agree() -> None:
    model = residual()
    masks = {
        "stem_norm": {"weight": rows(model.stem_norm.weight, range(0, 4))},
        "second_norm": {"weight": rows(model.second_norm.weight, range(2, 6))},
    }

    report = speedup(model, masks).report

    assert {"stem": (2, 3), "second": (2, 3)} == dict(report.removed)
    assert ["stem_norm.weight", "second_norm.weight"] == [mask.tensor for mask in report.kept]


def test_masks_of_outputs_that_stay_are_reported() -> None:
    model = residual()
    mask = torch.ones(1, 5)
    mask[:, :2] = 0
    coupled = torch.ones(1, 8, 1, 1)
    coupled[:, 3:5] = 0

    report = speedup(model, {"head": {"_output_0": mask}, "stem": {"_output_0": coupled}}).report

    assert [("head._output_0", (0, 1)), ("stem._output_0", (3, 4))] == [(k.tensor, k.channels) for k in report.kept]
    assert "output" in report.kept[0].reason
    assert "tied to second" in report.kept[1].reason


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Results(OrderedDict):
    """A dict with attributes, as models of transformers return."""

    @property
    def right(self) -> Tensor:
        return self["right"]


class Containers(nn.Module):
    """A block that returns two tensors in a container of some kind."""

    def __init__(self, container: Callable[..., object]) -> None:
        super().__init__()
        self.conv, self.container = nn.Conv2d(3, 8, 3), container

    def forward(self, x: Tensor) -> object:
        x = self.conv(x)
        return self.container(left=x, right=x.relu())


@pytest.mark.parametrize(("container", "target"), [(Pair, "_output_1"), (Results, "_output_right")])
def test_outputs_in_named_tuples_and_subclasses_of_dict_are_masked_and_stay_what_they_are(
    container: Callable[..., object], target: str
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Containers(container), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x).right)

    torch.manual_seed(0)
    model = Model().eval()
    mask = torch.ones(1, 8, 1, 1)
    mask[:, :4] = 0

    speedup(model, {"block": {target: mask}})

    assert (4, 4) == (model.block.conv.out_channels, model.head.in_channels)


@pytest.mark.parametrize("layer", ["stem", "stem_norm"])
def test_masks_of_outputs_in_full_shape_that_stay_are_reported(layer: str) -> None:
    model = residual()
    mask = torch.ones(2, 8, 16, 16)
    mask[:, 3:5] = 0

    report = speedup(model, {layer: {"_output_0": mask}}).report

    assert [(f"{layer}._output_0", (3, 4))] == [(k.tensor, k.channels) for k in report.kept]


class Fork(nn.Module):
    """Channels with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return self.left(x), self.right(x)


def test_one_reader_may_be_masked_in_its_weight_and_the_other_in_its_input() -> None:
    torch.manual_seed(0)
    model = Fork().eval()
    mask = torch.ones(1, 8, 1, 1)
    mask[:, 2:5] = 0

    speedup(model, {"left": {"weight": columns(model.left.weight, range(4))}, "right": {"_input_0": mask}})

    assert (6, 6, 6) == (model.conv.out_channels, model.left.in_channels, model.right.in_channels)


@pytest.mark.parametrize(
    "place",
    [("first", "_output_0"), ("first_norm", "_output_0"), ("second", "_input_0")],
)
def test_masks_of_outputs_and_inputs_remove_the_channels_they_silence(place: tuple[str, str]) -> None:
    model = residual()
    mask = torch.ones(1, 12, 1, 1)
    mask[:, :5] = 0

    speedup(model, {place[0]: {place[1]: mask}})

    assert 7 == model.first.out_channels


def test_a_chain_with_a_depthwise_convolution_loses_the_channel_that_either_layer_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()

    speedup(
        model, {"1": {"weight": rows(model[1].weight, range(3))}, "0": {"weight": rows(model[0].weight, range(2, 4))}}
    )

    assert (4, 4, 4) == (model[0].out_channels, model[1].groups, model[3].in_channels)


class Branches(nn.Module):
    """Channels read directly and behind a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.left, self.right = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        return self.left(x), self.right(self.depthwise(x))


def test_a_masked_depthwise_convolution_does_not_silence_what_is_read_before_it() -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    masks = {"depthwise": {"weight": rows(model.depthwise.weight, range(4))}}

    stays = speedup(copy.deepcopy(model), masks)
    goes = speedup(model, {**masks, "left": {"weight": columns(model.left.weight, range(3))}})

    assert 8 == stays.bound_model.stem.out_channels
    assert ["depthwise.weight"] == [mask.tensor for mask in stays.report.kept]
    assert 5 == goes.bound_model.stem.out_channels


class Gated(nn.Module):
    """Channels with a shift, multiplied by a gate that is not masked."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.gate = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(3, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.last((self.norm(self.conv(x)) * gate).mean((2, 3)))


def test_a_shift_does_not_carry_the_signal_of_a_gate() -> None:
    torch.manual_seed(0)
    model = Gated().eval()

    speedup(model, {"norm": {"weight": rows(model.norm.weight, range(3))}})

    assert (5, 5) == (model.conv.out_channels, model.gate.out_features)


def test_with_exact_semantics_a_shift_carries_the_signal_of_a_gate_and_the_channel_stays() -> None:
    torch.manual_seed(0)
    model = Gated().double().eval()
    model.norm.bias.data.normal_()
    masked = copy.deepcopy(model)
    masked.norm.weight.data[:3] = 0

    report = speedup(
        model, {"norm": {"weight": rows(model.norm.weight, range(3))}}, X.double(), constants="absorb"
    ).report

    assert ("norm.weight", (0, 1, 2)) == (report.kept[0].tensor, report.kept[0].channels)
    assert torch.allclose(masked(X.double()), model(X.double()), rtol=0, atol=1e-12)


def test_transposed_convolutions_are_masked_by_what_they_read_in_dimension_0_and_write_in_dimension_1() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2), nn.Conv2d(6, 2, 1)).eval()

    speedup(model, {"1": {"weight": rows(model[1].weight, range(3)) * columns(model[1].weight, range(2))}})

    assert (5, 5, 4, 4) == (
        model[0].out_channels,
        model[1].in_channels,
        model[1].out_channels,
        model[2].in_channels,
    )


def test_embeddings_lose_the_columns_that_are_masked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 3)).eval()

    speedup(model, {"0": {"weight": columns(model[0].weight, range(3))}}, torch.tensor([[1, 2, 3]]))

    assert (10, 5) == model[0].weight.shape
    assert 5 == model[1].in_features


def test_what_cannot_be_removed_exactly_stays_with_the_reason_and_the_rest_goes() -> None:
    torch.manual_seed(0)
    model, x = ZOO["fused_attention"].build(), ZOO["fused_attention"].example_inputs()
    masks = {
        name: {"weight": rows(module.weight, range(module.weight.shape[0] // 2))}
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }

    report = speedup(model, masks, x).report

    assert {"1.hidden.0": 8, "2.0": 4} == {name: len(gone) for name, gone in report.removed.items()}
    kept = {mask.tensor: mask.reason for mask in report.kept}
    assert "after the cut the forward pass fails" in kept["0.0.weight"]
    assert "tied to protected" in kept["1.attention.project.weight"]
    assert report.certificate.exact


# -- how masks come ----------------------------------------------------------------------------------------------


def first_masks(model: Residual) -> defaultdict[str, dict[str, Tensor | None]]:
    masks: defaultdict[str, dict[str, Tensor | None]] = defaultdict(dict)
    masks["first"] = {"weight": rows(model.first.weight, range(5)), "bias": rows(model.first.bias, range(5))}
    masks["stem"] = {"weight": torch.ones_like(model.stem.weight), "bias": None}
    return masks


@pytest.mark.parametrize("plain", [False, True])
def test_masks_come_from_a_file_as_nni_writes_it(tmp_path: Path, plain: bool) -> None:
    model = residual()
    masks = first_masks(model)
    torch.save(dict(masks) if plain else masks, tmp_path / "masks.pth")

    speedup(model, str(tmp_path / "masks.pth"))

    assert 7 == model.first.out_channels


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "it_ran",))

    torch.save({"first": {"weight": Evil()}}, tmp_path / "masks.pth")

    with pytest.raises(MaskFileError, match=r"something else than tensors.*run code"):
        ModelSpeedup(residual(), X, tmp_path / "masks.pth")
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("parallel_masks", [True, False])
def test_the_prefix_of_a_parallel_wrapper_is_taken_off_or_put_on(parallel_masks: bool) -> None:
    model = residual()
    masks = first_masks(model)
    if parallel_masks:
        masks = {f"module.{name}": targets for name, targets in masks.items()}

    speedup(model if parallel_masks else nn.DataParallel(model), masks)

    assert 7 == model.first.out_channels


@pytest.mark.parametrize("inputs", [X, (X,), [X], {"x": X}])
def test_inputs_come_in_all_forms_that_nni_takes(inputs: object) -> None:
    model = residual()

    speedup(model, first_masks(model), inputs)

    assert 7 == model.first.out_channels


def test_nnis_positional_arguments_are_taken() -> None:
    model = residual()

    result = ModelSpeedup(model, X, first_masks(model), "cpu", 0, 8, [], [], None, True, None).speedup_model()

    assert result is model
    assert 7 == model.first.out_channels


# -- what is left alone ------------------------------------------------------------------------------------------


def test_the_callers_masks_stay_as_they_are() -> None:
    model = residual()
    masks = first_masks(model)
    before = copy.deepcopy(masks)

    speedup(model, masks)

    assert before.keys() == masks.keys()
    assert all(torch.equal(before[n][t], m) for n in masks for t, m in masks[n].items() if m is not None)
    assert all(set(before[name]) == set(masks[name]) for name in masks)


def test_the_object_its_modes_frozen_weights_and_dtype_stay() -> None:
    model = residual().double()
    model.train()
    model.first_norm.eval()
    model.first.weight.requires_grad_(False)
    first = model.first

    same = ModelSpeedup(model, X.double(), first_masks(model), logger=logging.getLogger("quiet")).speedup_model()

    assert same is model
    assert first is model.first
    assert not model.first.weight.requires_grad
    assert model.second.weight.requires_grad
    assert torch.float64 == model.first.weight.dtype
    assert model.training
    assert model.second_norm.training
    assert not model.first_norm.training


def test_modes_reach_the_layers_of_a_model_that_nni_has_unwrapped() -> None:
    model = residual()
    pruner = L1NormPruner(model, [{"op_types": ["Conv2d", "BatchNorm2d"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    pruner.unwrap_model()

    speedup(model, {"first": masks["first"]})
    before = model.first_norm.running_mean.clone()
    model.train()
    model(X)

    assert "forward" in vars(model.first_norm)  # NNI leaves a bound method behind
    assert model.first_norm.forward.__self__ is model.first_norm
    assert not torch.equal(before, model.first_norm.running_mean)


def test_a_refusal_leaves_the_model_unchanged() -> None:
    model = residual()
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(EmptyLayerError):
        speedup(model, {"first": {"weight": torch.zeros_like(model.first.weight)}})

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_second_speedup_says_that_there_was_a_first() -> None:
    model = residual()
    result = speedup(model, first_masks(model))

    with pytest.raises(SpeedupError, match=r"already been sped up.*new ModelSpeedup"):
        result.speedup_model()

    assert 7 == model.first.out_channels


# -- what is said ------------------------------------------------------------------------------------------------


def test_the_certificate_is_shown_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    model = residual()

    ModelSpeedup(model, X, first_masks(model)).speedup_model()

    shown = capsys.readouterr().out
    assert "5 output channels removed from 1 layers" in shown
    assert "Certificate: removed equals silenced" in shown


def test_a_logger_takes_the_text_instead(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model = residual()

    with caplog.at_level(logging.INFO, logger="mine"):
        ModelSpeedup(model, X, first_masks(model), logger=logging.getLogger("mine")).speedup_model()

    assert "Certificate" in caplog.text
    assert "" == capsys.readouterr().out


def test_the_removal_and_its_certificate_can_be_read_afterwards() -> None:
    model = residual()

    result = speedup(model, first_masks(model))

    assert result.removal is not None
    assert result.removal.model is model
    assert result.removal.certificate is not None
    assert result.removal.certificate.exact
    assert 5 * (8 * 9 + 1 + 2 + 8 * 9) == result.report.params[0] - result.report.params[1]


# -- bad input ---------------------------------------------------------------------------------------------------


def test_a_layer_that_would_lose_everything_is_named() -> None:
    model = residual()

    with pytest.raises(error_code.EmptyLayerError, match=r"'first' would lose all of its 12 channels"):
        speedup(model, {"first": {"weight": torch.zeros_like(model.first.weight)}})


def test_a_wrapped_model_is_refused_with_the_way_out() -> None:
    model = residual()
    pruner = L1NormPruner(model, [{"op_names": ["first"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()

    with pytest.raises(WrappedModelError, match=r"'first' is still wrapped.*unwrap_model"):
        ModelSpeedup(model, X, masks)


def test_fine_grained_masks_are_refused_with_the_layers_and_the_remedy() -> None:
    model = residual()
    pruner = LevelPruner(model, [{"op_names": ["first", "second"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    pruner.unwrap_model()

    with pytest.raises(FineGrainedMaskError, match=r"(first|second)\.weight.*out_channel"):
        ModelSpeedup(model, X, masks)


def test_fine_grained_masks_beside_others_are_named_and_left() -> None:
    model = residual()
    masks = first_masks(model)
    masks["second"] = {"weight": (torch.rand_like(model.second.weight) > 0.5).float()}

    result = speedup(model, masks)

    assert ("second.weight",) == result.report.fine_grained
    assert 7 == model.first.out_channels


BAD = [
    ({"strange": {"weight": torch.ones(3)}}, ShapeMisMatchError, "strange"),
    ({"first": {"weight": torch.ones(4, 8, 3, 3)}}, ShapeMisMatchError, r"\(4, 8, 3, 3\), expected \(12, 8, 3, 3\)"),
    ({"first": {"wait": torch.ones(3)}}, ShapeMisMatchError, "'wait' of 'first'"),
    ({"first": {"weight": [1, 0]}}, ShapeMisMatchError, "list, expected a tensor"),
    ({"first": {"weight": None}}, MaskFileError, "no mask at all"),
    ({}, MaskFileError, "no mask at all"),
    (None, MaskFileError, "NoneType, expected masks"),
    ({"first": torch.ones(3)}, MaskFileError, "expected masks"),
    ("no_such_file.pth", MaskFileError, "There is no file 'no_such_file.pth'"),
]


@pytest.mark.parametrize(("masks", "error", "message"), BAD)
def test_bad_masks_are_refused_by_an_error_of_nnis_family_and_of_ours(
    masks: object, error: type[SpeedupError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        ModelSpeedup(residual(), X, masks)

    assert isinstance(caught.value, error_code.SpeedupError)
    assert isinstance(caught.value, NniPruneExtError)


@pytest.mark.parametrize(
    ("normed", "remedy"),
    [(nn.utils.parametrizations.weight_norm, "remove_parametrizations"), (nn.utils.weight_norm, "remove_weight_norm")],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_masks_of_a_weight_that_is_computed_are_refused_with_what_to_do_first(
    normed: Callable[[nn.Module], nn.Module], remedy: str
) -> None:
    model = residual()
    mask = rows(model.first.weight, range(5))
    normed(model.first)

    with pytest.raises(SpeedupError, match=rf"'weight' of 'first' is computed .*{remedy}"):
        ModelSpeedup(model, X, {"first": {"weight": mask}})


def test_a_dummy_input_of_another_kind_is_refused() -> None:
    model = residual()

    with pytest.raises(NniPruneExtError, match=r"dummy_input is a str, expected a tensor"):
        ModelSpeedup(model, "picture", first_masks(model))


def test_an_unknown_semantics_is_refused() -> None:
    model = residual()

    with pytest.raises(SpeedupError, match=r"'keep', expected 'drop'"):
        ModelSpeedup(model, X, first_masks(model), constants="keep")


# -- what of NNI we rely on --------------------------------------------------------------------------------------


def test_nni_still_has_the_names_we_use() -> None:
    model = residual()
    L1NormPruner(model, [{"op_names": ["first"], "sparse_ratio": 0.5}])

    assert "_nni_wrapper" in model.first._modules
    assert issubclass(SpeedupError, error_code.SpeedupError)
    assert hasattr(theirs, "ModelSpeedup")


@pytest.mark.parametrize("content", [b"hello", b"", b"PK\x03\x04 no archive", bytes(range(256))])
def test_a_file_that_is_no_torch_file_is_refused_as_one(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "junk.pth"
    path.write_bytes(content)

    with pytest.raises(MaskFileError, match="junk.pth"):
        ModelSpeedup(nn.Conv2d(1, 2, 1), torch.zeros(1, 1, 2, 2), path)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(SpeedupError, match="expected an nn.Module"):
        ModelSpeedup(None, torch.zeros(1, 1, 2, 2), {"a": {"weight": torch.ones(1)}})  # type: ignore[arg-type]
