"""Against independent answers: NNI's own speedup where it runs, and the masked model where semantics promise it."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from nni.compression.pruning import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LinearPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
)
from nni.compression.speedup import ModelSpeedup as NnisSpeedup
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import get_model
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from nni_prune_ext.inputs import call_model, cast_floats, tensors_in
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.speedup import ConstantError, ModelSpeedup
from nni_prune_ext.testing.toy_models import ZOO
from nni_prune_ext.utils import align_batchnorm, auto_set_dependency_group_ids

QUICK = ["resnet18", "mobilenet_v2", "mobilenet_v3_small"]
SLOW = ["resnet50", "vgg16_bn", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "deeplab"]
MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "exclude_op_names": ["classifier.4"]}]
Masks = dict[str, dict[str, Tensor]]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model whose batch norms shift and scale at random, as those of trained models do, and an input."""
    torch.manual_seed(0)
    if name == "deeplab":
        model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    elif name == "googlenet":
        model = get_model(name, weights=None, num_classes=10, aux_logits=False, init_weights=False)
    elif name == "inception_v3":
        model = get_model(name, weights=None, num_classes=10, init_weights=False)
        model.AuxLogits, model.aux_logits = None, False
    else:
        model = get_model(name, weights=None, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    pixels = 96 if name == "inception_v3" else 64
    return model.eval(), torch.randn(2, 3, pixels, pixels)


def first(output: object) -> Tensor:
    return output["out"] if isinstance(output, dict) else output


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def ours(model: nn.Module, x: Tensor, masks: object, **options: object) -> nn.Module:
    return ModelSpeedup(copy.deepcopy(model), x, masks, logger=logging.getLogger("quiet"), **options).speedup_model()


def nnis(model: nn.Module, x: Tensor, masks: Masks) -> nn.Module:
    """NNI's speedup by way of torch.fx, as its documented call does not run; it changes masks and modes."""
    model = copy.deepcopy(model)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            NnisSpeedup(model, x, copy.deepcopy(masks), graph_module=torch.fx.symbolic_trace(model)).speedup_model()
        finally:
            logging.disable(logging.NOTSET)
    return model.eval()


def simulate(pruner: object, *steps: object) -> Masks:
    _, masks = pruner.compress(*steps)
    pruner.unwrap_model()
    return masks


def evaluator(model: nn.Module, x: Tensor) -> TorchEvaluator:
    target = torch.arange(len(x))

    def train(model, optimizers, step, schedulers=None, max_steps=None, max_epochs=None):
        for _ in range(max_steps):
            optimizers.zero_grad()
            step((x, target), model).backward()
            optimizers.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=1e-3)
    return TorchEvaluator(train, optimizer, lambda batch, net: functional.cross_entropy(net(batch[0]), batch[1]))


PRUNERS: dict[str, Callable[[nn.Module, list, TorchEvaluator], Masks]] = {
    "l1": lambda model, config, _: simulate(L1NormPruner(model, config)),
    "l2": lambda model, config, _: simulate(L2NormPruner(model, config)),
    "fpgm": lambda model, config, _: simulate(FPGMPruner(model, config)),
    "taylor": lambda model, config, run: simulate(TaylorPruner(model, config, run, training_steps=2)),
    "linear": lambda model, config, run: simulate(
        LinearPruner(TaylorPruner(model, config, run, training_steps=1), interval_steps=1, total_times=2), 2, None
    ),
    "agp": lambda model, config, run: simulate(
        AGPPruner(TaylorPruner(model, config, run, training_steps=1), interval_steps=1, total_times=2), 2, None
    ),
    "movement": lambda model, config, run: simulate(MovementPruner(model, config, run, 1, 3), 4, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_compact_model_is_nnis_bit_for_bit_where_coupled_layers_share_masks(name: str) -> None:
    model, x = build(name)
    masks = simulate(L1NormPruner(model, auto_set_dependency_group_ids(model, CONFIG, x)))

    compact, reference = ours(model, x, masks), nnis(model, x, masks)

    assert params(reference) == params(compact) < params(model)
    assert torch.equal(first(reference(x)), first(compact(x)))


@pytest.mark.parametrize("pruner", PRUNERS)
def test_masks_of_every_pruner_of_channels_give_nnis_model(pruner: str) -> None:
    model, x = build("resnet18")
    config = auto_set_dependency_group_ids(model, CONFIG, x)
    masks = PRUNERS[pruner](model.train(), config, evaluator(model, x))
    model.eval()

    compact, reference = ours(model, x, masks), nnis(model, x, masks)

    assert 2801450 == params(compact) == params(reference)
    assert torch.equal(reference(x), compact(x))


def test_masks_that_disagree_in_coupled_layers_give_nnis_model_of_a_residual_network() -> None:
    model, x = build("resnet18")
    masks = simulate(L1NormPruner(model, CONFIG))

    compact, reference = ours(model, x, masks), nnis(model, x, masks)

    assert 4961980 == params(reference) == params(compact)
    assert torch.equal(reference(x), compact(x))


def test_masks_of_slim_shrink_the_model_though_nni_removes_nothing_for_them() -> None:
    model, x = build("resnet18")
    config = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
    masks = simulate(SlimPruner(model, config, evaluator(model, x), training_steps=2))

    compact, reference = ours(model.eval(), x, masks), nnis(model, x, masks)

    assert params(reference) == params(model)
    assert params(compact) < 0.6 * params(model)
    assert torch.isfinite(compact(x)).all()


def test_the_class_convolution_of_a_segmentation_model_stays_even_if_masked() -> None:
    model, x = build("deeplab")
    masks = simulate(L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]))

    compact = ours(model, x, masks)

    assert 5 == first(compact(x)).shape[1]


# -- the masked model --------------------------------------------------------------------------------------------


def simulated(model: nn.Module, config: list, x: Tensor) -> tuple[Masks, Tensor]:
    pruner = L1NormPruner(model, config)
    _, masks = pruner.compress()
    with torch.no_grad():
        output = first(model(x))
    pruner.unwrap_model()
    return masks, output


def error(model: nn.Module, x: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        return float((first(model(x)) - expected).abs().max() / expected.abs().max())


ALIGNED = [name for name in [*QUICK, *SLOW] if name != "densenet121"]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ALIGNED])
def test_with_aligned_batch_norms_the_masked_model_equals_the_compact_one(name: str) -> None:
    model, x = build(name)
    model, x = model.double(), x.double()
    config = align_batchnorm(model, auto_set_dependency_group_ids(model, CONFIG, x), x)

    masks, expected = simulated(model, config, x)

    assert error(ours(model, x, masks), x, expected) < 1e-12


def test_in_training_mode_too_the_compact_model_computes_what_the_masked_one_does() -> None:
    model, x = build("resnet18")
    model, x = model.double(), x.double()
    pruner = L1NormPruner(model, align_batchnorm(model, auto_set_dependency_group_ids(model, CONFIG, x), x))
    _, masks = pruner.compress()
    expected = model.train()(x).detach()
    pruner.unwrap_model()

    compact = ours(model, x, masks)

    assert torch.allclose(expected, compact(x), rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_without_alignment_the_masked_model_is_another_function() -> None:
    model, x = build("resnet18")
    model, x = model.double(), x.double()

    masks, expected = simulated(model, auto_set_dependency_group_ids(model, CONFIG, x), x)

    assert error(ours(model, x, masks), x, expected) > 1e-2


@pytest.mark.parametrize("name", ["mobilenet_v2", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_absorbed_constants_make_the_compact_model_the_masked_one(name: str) -> None:
    model, x = build(name)
    model, x = model.double(), x.double()
    config = auto_set_dependency_group_ids(model, CONFIG, x)
    if name == "densenet121":  # its 3×3 convolutions pad, so their own batch norms must be aligned
        config = align_batchnorm(model, config, x)

    masks, expected = simulated(model, config, x)
    speedup = ModelSpeedup(model, x, masks, logger=logging.getLogger("quiet"), constants="absorb")

    assert error(speedup.speedup_model(), x, expected) < 1e-12
    assert speedup.report.absorbed


def test_constants_are_absorbed_in_the_precision_of_the_model() -> None:
    model, x = build("mobilenet_v2")
    masks, expected = simulated(model, auto_set_dependency_group_ids(model, CONFIG, x), x)

    compact = ours(model, x, masks, constants="absorb")

    assert error(compact, x, expected) < 1e-5
    assert {torch.float32} == {parameter.dtype for parameter in compact.parameters()}


def test_a_constant_behind_padding_is_refused_with_the_layer_and_the_remedy_and_the_model_stays() -> None:
    model, x = build("resnet18")
    masks = simulate(L1NormPruner(model, auto_set_dependency_group_ids(model, CONFIG, x)))
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(ConstantError, match=r"'layer\d.\d.conv\d' pads its input.*align_batchnorm"):
        ModelSpeedup(model, x, masks, constants="absorb").speedup_model()

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Readers(nn.Module):
    """A masked convolution with a shift, read by a grouped convolution without a bias and by a linear layer."""

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2, bias=False, padding=padding, padding_mode="replicate")
        self.last = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.last(torch.cat([self.grouped(x).mean((2, 3)), x.mean((2, 3))], 1))


@pytest.mark.parametrize("padding", [0, 1])
def test_constants_go_into_biases_of_grouped_and_linear_layers_and_a_bias_is_made(padding: int) -> None:
    torch.manual_seed(0)
    model, x = Readers(padding).double().eval(), torch.randn(2, 3, 6, 6).double()
    model.norm.bias.data.uniform_(0.5, 1)
    mask = torch.ones_like(model.conv.weight)
    mask[[1, 5]] = 0  # partners in the two groups
    masked = copy.deepcopy(model)
    masked.conv.weight.data.mul_(mask)
    expected = masked(x).detach()

    speedup = ModelSpeedup(model, x, {"conv": {"weight": mask}}, constants="absorb")
    speedup.speedup_model()

    assert ("grouped", "last") == speedup.report.absorbed
    assert 6 == model.conv.out_channels
    assert model.grouped.bias is not None
    assert error(model, x, expected) < 1e-12


def test_shortcuts_that_pad_channels_are_rewritten_and_the_masked_model_is_kept() -> None:
    torch.manual_seed(0)
    model, x = build_model("resnet20").eval().double(), torch.randn(2, 3, 16, 16).double()
    config = align_batchnorm(model, auto_set_dependency_group_ids(model, CONFIG, x), x)

    masks, expected = simulated(model, config, x)
    compact = ours(model, x, masks, constants="absorb")

    assert params(compact) < 0.4 * params(model)
    assert error(compact, x, expected) < 1e-12


@pytest.mark.parametrize("ids", [False, True])
def test_channels_of_a_stage_go_only_where_neither_its_layers_nor_its_padded_shortcut_carry_a_signal(ids: bool) -> None:
    model, x = build_model("resnet20").eval().double(), torch.randn(2, 3, 16, 16).double()
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    masks = simulate(L1NormPruner(model, auto_set_dependency_group_ids(model, config, x) if ids else config))
    speedup = ModelSpeedup(copy.deepcopy(model), x, masks, logger=logging.getLogger("quiet"))
    speedup.speedup_model()
    read: dict[str, list[Tensor]] = {}
    for seed in range(3):  # a ReLU that happens to be off must not count as a constant
        torch.manual_seed(seed)
        masked = copy.deepcopy(model)
        for name, layer in masked.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.bias.data.normal_()
            if isinstance(layer, nn.Conv2d):
                layer.weight.data.normal_(std=0.1).mul_(masks[name]["weight"])
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_pre_hook(
                    lambda _, args, name=name: read.setdefault(name, []).append(args[0].clone())
                )
        read.clear()
        for _ in range(3):
            masked(torch.randn_like(x))

        checked = 0
        for name, inputs in read.items():
            seen, kept = torch.cat(inputs), speedup.removal.kept.get(f"{name}.weight", {}).get(1)
            if kept is not None:
                gone = sorted(set(range(seen.shape[1])) - set(kept.tolist()))
                assert float((seen - seen[:1])[:, gone].abs().max()) < 1e-12
                checked += len(gone)
        assert checked > 150
    assert any("shortcut" in mask.reason for mask in speedup.report.kept)


NOT_IN_NNI = {"StandardisedConv", "NonDynamicallyQuantizableLinear"}
NOT_ABSORBED = {
    ("depthwise", "out_channel"): "pads its input",
    ("group_norm", "out_channel"): "differs over positions",
    ("group_norm", "in_channel"): "a norm over channels",
    ("layer_norm", "out_channel"): "differs over positions",
    ("layer_norm", "in_channel"): "a norm over channels",
    ("transposed_depthwise", "out_channel"): "pads its input with zeros or spreads it",
    ("patch_merging", "out_channel"): "differs over positions",
    ("channel_buffers", "out_channel"): "pads its input",
}
"""Norms over channels, and shifts that no batch norm makes, before padding."""


@pytest.mark.parametrize("granularity", ["out_channel", "in_channel"])
@pytest.mark.parametrize("name", ZOO)
def test_exact_semantics_over_the_zoo_give_the_simulated_model_or_are_refused(name: str, granularity: str) -> None:
    torch.manual_seed(0)
    model = ZOO[name].build().double().eval()
    x = cast_floats(ZOO[name].example_inputs(), torch.float64)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))}
    config = [{"op_types": sorted(kinds - NOT_IN_NNI), "sparse_ratio": 0.5}]
    if granularity == "in_channel":
        config[0] |= {"granularity": "in_channel", "target_names": ["weight"]}
    else:
        config[0]["op_types"] = sorted(kinds - NOT_IN_NNI - {"ConvTranspose2d"})  # NNI masks its bias by its inputs
        config = align_batchnorm(model, config, x)
    pruner = L1NormPruner(model, config)
    _, masks = pruner.compress()
    with torch.no_grad():
        expected = list(tensors_in(call_model(model, x)))
    pruner.unwrap_model()

    speedup = ModelSpeedup(model, x, masks, logger=logging.getLogger("quiet"), constants="absorb")
    refusal = NOT_ABSORBED.get((name, granularity))
    if refusal:
        with pytest.raises(ConstantError, match=refusal):
            speedup.speedup_model()
        return
    speedup.speedup_model()

    for want, got in zip(expected, tensors_in(call_model(model, x)), strict=True):
        assert torch.allclose(want.double(), got.double(), rtol=0, atol=1e-9 * float(want.abs().max()))


# -- trying out --------------------------------------------------------------------------------------------------


class OnePixel(nn.Module):
    """Two writers of the same channels, read behind a ReLU over a single pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 64), nn.Linear(5, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.a(x) + self.b(x)).relu())


@pytest.mark.parametrize("seed", range(5))
def test_a_channel_that_happens_to_be_switched_off_is_not_taken_for_a_constant(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = OnePixel().eval(), torch.randn(1, 5)
    mask = torch.ones_like(model.a.weight)
    mask[:40] = 0

    report = ModelSpeedup(model, x, {"a": {"weight": mask}}, logger=logging.getLogger("quiet"))
    report.speedup_model()

    assert 64 == model.a.out_features
    assert tuple(range(40)) == report.report.kept[0].channels
