"""The three forms of the mask search, each on its own: single weights, N:M patterns, channels; and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from jackpot_bench import LIVELY, Spy
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.allocation import LayerLimit, Limits
from nni_prune_ext.costs import Costs, count_costs
from nni_prune_ext.errors import ConfigError, NniPruneExtError, TargetError
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.mask_updates import Pattern
from nni_prune_ext.methods.base import Batch, MethodContext
from nni_prune_ext.methods.lottery_jackpots import LOTTERY_JACKPOTS
from nni_prune_ext.models.loading import build_model
from nni_prune_ext.pipeline import PruneResult, prune
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.testing.method_bench import traces_on
from nni_prune_ext.testing.toy_blocks import Concat, Residual, conv, network
from nni_prune_ext.training import LossFunction, cross_entropy

Seen = Callable[[Spy, MethodContext, str], object]


def images(count: int = 3, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 3, size, size, generator=generator), torch.randint(4, (16,), generator=generator))
        for _ in range(count)
    ]


def searched(
    model: nn.Module, target: str | list[str], seen: Seen | None = None, limits: Limits | None = None,
    scope: str = "global", batches: list[Batch] | None = None, loss: LossFunction = cross_entropy, **options: object,
) -> PruneResult:  # fmt: skip
    """Runs the whole pipeline with a lively search and, by default, no tuning."""
    spec = LOTTERY_JACKPOTS if seen is None else replace(LOTTERY_JACKPOTS, build=partial(Spy, seen=seen))
    batches = batches or images()
    return prune(
        model, batches[0][0][:2], method=spec, target=target, options={**LIVELY, **options}, limits=limits,
        scope=scope, train_batches=batches, loss=loss,
    )  # fmt: skip


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def masks_of(result: PruneResult) -> Mapping[str, Tensor]:
    assert result.outcome.weight_masks is not None
    return result.outcome.weight_masks


def grouped() -> nn.Module:
    """Returns layers with 8, 6 and 3 input channels per filter, and a depthwise one."""
    return network(
        nn.Sequential(conv(8, 12), conv(12, 12, groups=2), conv(12, 12, groups=12), conv(12, 12, groups=4)), outputs=12
    )


# -- single weights ----------------------------------------------------------------------------------------------


def first_masks(scope: str, limits: Limits | None = None) -> tuple[nn.Module, Mapping[str, Tensor]]:
    model = seeded(grouped)
    for number, weight in enumerate(parameter for parameter in model.parameters() if parameter.dim() == 4):
        nn.init.normal_(weight, std=0.1 + 0.05 * number)
    return model, masks_of(searched(model, "sparsity=0.75", scope=scope, limits=limits, control="recalibrated"))


def test_rates_of_layers_come_from_one_magnitude_threshold_over_all_convolutions() -> None:
    model, masks = first_masks("global")

    weights = {n: p.detach().numpy() for n, p in model.named_parameters() if p.dim() == 4}
    everything = np.sort(np.concatenate([np.abs(w).ravel() for w in weights.values()]))
    threshold = everything[int(np.ceil(0.75 * len(everything)))]
    assert set(weights) == set(masks)
    for name, weight in weights.items():
        np.testing.assert_array_equal(np.abs(weight) >= threshold, masks[name].numpy(), err_msg=name)


def test_the_local_scope_masks_the_same_share_of_every_convolution_by_magnitude() -> None:
    model, masks = first_masks("local")

    for name, mask in masks.items():
        weight, kept = model.get_parameter(name).detach().abs(), int(mask.sum())
        assert 0.25 * mask.numel() == pytest.approx(kept, abs=1)
        assert float(weight[mask].min()) >= float(weight[~mask].max())


def test_excluded_layers_and_linear_layers_are_not_masked_and_stay_as_they_are() -> None:
    _, masks = first_masks("global", Limits(exclude=("1.0.*",)))

    assert ["0.0.weight", "1.1.0.weight", "1.2.0.weight", "1.3.0.weight", "2.0.weight"] == sorted(masks)


def test_the_classifier_is_untouched_by_the_search_in_both_forms() -> None:
    model = seeded(grouped)

    for target in ("sparsity=0.8", "macs=0.6"):
        result = searched(model, target)
        for part in ("weight", "bias"):
            dense, now = getattr(model[4], part), getattr(result.removed_only[4], part)
            if target == "macs=0.6" and part == "weight":
                (group,) = (g for g in result.groups if g.name == "2.0")
                kept = [c for c in range(group.num_channels) if c not in result.plan.removed.get("2.0", ())]
                dense = dense[:, kept]
            assert torch.equal(dense, now)


def test_what_was_searched_is_what_is_handed_over_and_what_onnx_runs(tmp_path: Path) -> None:
    model, x = seeded(grouped), torch.randn(64, 3, 8, 8)
    outputs: list[Tensor] = []

    def seen(spy: Spy, context: MethodContext, phase: str) -> None:
        if phase == "freeze":
            with torch.no_grad():
                outputs.append(context.model.eval()(x))
                context.model.train()

    result = searched(model, "sparsity=0.8", seen)

    file = export_onnx(result.removed_only, x[:2], tmp_path / "model.onnx", exporter="torchscript")
    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        cut = result.removed_only.eval()(x)
    torch.testing.assert_close(outputs[-1], cut, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut, torch.from_numpy(found), rtol=1e-4, atol=1e-5)
    assert 0.8 <= result.achieved[0].achieved < 0.81
    for name, mask in masks_of(result).items():
        expected = model.get_parameter(name).detach() * mask
        assert torch.equal(expected, result.removed_only.get_parameter(name))


def test_the_search_finds_a_mask_that_was_hidden_in_the_weights() -> None:
    # The targets are made with every second weight; a random start must be led there by the scores alone.
    model = nn.Sequential(seeded(lambda: nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(4 * 36, 2))
    hidden = torch.arange(4 * 27).reshape(4, 3, 3, 3) % 2 == 0
    with torch.no_grad():
        model[0].weight.copy_(torch.where(torch.rand_like(model[0].weight) < 0.5, 1.0, -1.0))

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        wanted = functional.conv2d(batch[0], model[0].weight * hidden, model[0].bias)
        return (net[0](batch[0]) - wanted).square().mean()

    result = prune(
        model, images()[0][0], method="lottery_jackpots", target="sparsity=0.5", train_batches=images(), loss=loss,
        options={"search_epochs": 20, "tune_epochs": 0, "initialisation": "random", "learning_rate": 0.02},
    )  # fmt: skip

    assert torch.equal(hidden, masks_of(result)["0.weight"])
    assert result.outcome.facts["share_of_first_mask_kept"] < 0.7


# -- N:M ---------------------------------------------------------------------------------------------------------


def follows(mask: Tensor, pattern: Pattern) -> bool:
    """Says whether every block of M consecutive input channels of every filter and tap keeps N, or all it has."""
    for block in mask.split(pattern.of, dim=1):
        if not bool((block.sum(1) == min(pattern.keep, block.shape[1])).all()):
            return False
    return True


@pytest.mark.parametrize("restriction", ["one", "fourth_power"])
@pytest.mark.parametrize(
    ("pattern", "target"), [("2:4", "sparsity=0.5"), ("1:4", "sparsity=0.75"), ("3:5", "sparsity=0.4")]
)
def test_a_pattern_holds_after_every_step_also_where_channels_are_no_multiple_of_it(
    pattern: str, target: str, restriction: str
) -> None:
    steps, moved = [], []

    def seen(spy: Spy, context: MethodContext, phase: str) -> None:
        steps.append({name: follows(mask, Pattern.parse(pattern)) for name, mask in spy.masks.items()})
        moved.append(sum(int((mask & ~spy._first_masks[name]).sum()) for name, mask in spy.masks.items()))

    result = searched(seeded(grouped), target, seen, pattern=pattern, restriction=restriction)

    # The first layer, the depthwise one and the one with three channels per filter stay dense; 6, 12 and 8 do not
    # all divide by 4, nor by 5.
    assert {"1.0.0.weight", "1.1.0.weight", "2.0.weight"} == set(masks_of(result))
    assert 12 == len(steps)
    assert all(all(step.values()) for step in steps)
    assert moved[-1] > 0


def test_a_pattern_leaves_out_the_first_layer_transposed_depthwise_and_narrow_ones() -> None:
    transposed = nn.ConvTranspose2d(8, 8, 2)
    depthwise, narrow, wide = (nn.Conv2d(8, 8, 3, padding=1, groups=groups) for groups in (8, 4, 2))
    kinds = [nn.Conv2d(4, 8, 3), depthwise, narrow, wide, transposed, nn.Conv2d(8, 8, 3)]
    model = nn.Sequential(*kinds, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    batches = [(torch.cat([x, x[:, :1]], 1), labels) for x, labels in images()]

    result = searched(model, "sparsity=0.5", pattern="2:4", batches=batches)

    assert ["3.weight", "5.weight"] == sorted(masks_of(result))
    for name, dense in model.named_parameters():
        now = result.removed_only.get_parameter(name)
        zeros = 0.5 if name in masks_of(result) else 0.0
        assert zeros == float((now == 0).float().mean()), name
        assert torch.equal(dense[now != 0], now[now != 0]), name


def test_the_first_mask_of_a_pattern_keeps_the_largest_of_every_block() -> None:
    model = seeded(grouped)

    masks = masks_of(searched(model, "sparsity=0.5", pattern="2:4", control="recalibrated"))

    weight, mask = model.get_parameter("1.0.0.weight").detach().abs(), masks["1.0.0.weight"]
    for block, kept in zip(weight.split(4, dim=1), mask.split(4, dim=1)):
        second = block.sort(dim=1, descending=True).values[:, 1:2]
        assert torch.equal(block >= second, kept)


def test_a_share_limits_how_many_blocks_change() -> None:
    swaps = {}
    for restriction in ("one", "fourth_power"):
        facts = searched(seeded(grouped), "sparsity=0.5", pattern="2:4", restriction=restriction).outcome.facts
        swaps[restriction] = (facts["swaps_requested"], facts["swaps_made"])

    assert swaps["one"][0] == swaps["one"][1]
    assert swaps["fourth_power"][0] > swaps["fourth_power"][1] > 0


# -- channels ----------------------------------------------------------------------------------------------------


class PartialResidual(nn.Module):
    """Half of the channels pass a branch and come back by addition, the other half only pass."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([functional.relu(first + self.branch(first)), second], 1)


OVERLAPPING: dict[str, Callable[[], nn.Module]] = {
    "partial residual": lambda: network(PartialResidual()),
    "sum of a concatenation": lambda: network(
        nn.Sequential(Residual(Concat(conv(8, 2), conv(8, 6, 1)), conv(8, 8)), conv(8, 8))
    ),
    "dense concatenation": lambda: network(
        nn.Sequential(Concat(nn.Identity(), conv(8, 6)), Concat(nn.Identity(), conv(14, 6))), outputs=20
    ),
}


@pytest.mark.parametrize("build", OVERLAPPING.values(), ids=OVERLAPPING)
@pytest.mark.parametrize("initialisation", ["magnitude", "random"])
def test_the_cost_of_the_plan_is_the_same_at_every_step_where_writers_hold_parts_of_a_group(
    build: Callable[[], nn.Module], initialisation: str
) -> None:
    model, x = seeded(build), images()[0][0][:2]
    costs: dict[str, Costs] = {}

    def seen(spy: Spy, context: MethodContext, phase: str) -> None:
        for masks in (spy._first_masks, spy.masks):
            plan = plan_from_channels(context.groups, {name: (~mask).numpy() for name, mask in masks.items()})
            if str(plan) not in costs:
                costs[str(plan)] = count_costs(cut_channels(model, plan, x, groups=context.groups).model, x)

    asked = {"target": "macs=0.7", "scope": "local", "limits": Limits(exclude=("2.0",))}
    lively = {"restriction": "one", "search_epochs": 8, "exploration": 0.0}
    result = searched(model, seen=seen, **asked, initialisation=initialisation, **lively)

    assert len(costs) > 1
    unsearched = searched(model, **asked, control="recalibrated")
    assert {result.costs} == {unsearched.costs} == set(costs.values())
    assert result.costs.macs <= 0.7 * result.dense.macs


def test_a_share_limits_how_many_channels_of_a_wide_group_change() -> None:
    made = {}
    for restriction in ("one", "fourth_power"):
        options = {"restriction": restriction, "search_epochs": 5, "exploration": 0.0}
        result = searched(seeded(lambda: network(conv(64, 64), inputs=64, outputs=64)), "macs=0.5", **options)
        made[restriction] = [(note["swaps_requested"], note["swaps_made"]) for note in result.notes]

    assert all(requested == executed for requested, executed in made["one"])
    assert made["one"][0] == made["fourth_power"][0]
    assert sum(executed for _, executed in made["fourth_power"][2:]) < 0.6 * sum(
        requested for requested, _ in made["fourth_power"][2:]
    )


def test_the_channels_that_were_closed_at_the_end_are_the_ones_removed_and_the_network_is_the_gated_one() -> None:
    model, x = seeded(lambda: build_model("resnet20", num_classes=4)), torch.randn(8, 3, 16, 16)
    masks: list[dict[str, Tensor]] = []
    outputs: list[Tensor] = []

    def seen(spy: Spy, context: MethodContext, phase: str) -> None:
        masks.append({name: mask.clone() for name, mask in spy.masks.items()})
        if phase == "freeze":
            with torch.no_grad():
                outputs.append(context.model.eval()(x))
                context.model.train()

    result = searched(model, "macs=0.5", seen, batches=images(size=16))

    expected = plan_from_channels(result.groups, {name: (~mask).numpy() for name, mask in masks[-1].items()})
    assert expected == result.plan
    assert result.certificate is not None
    assert result.certificate.exact
    with torch.no_grad():
        found = result.removed_only.eval()(x)
    torch.testing.assert_close(outputs[-1], found, rtol=1e-4, atol=1e-5)
    assert [] == traces_on(result.removed_only)


def test_the_search_finds_channels_that_were_hidden() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 1), nn.Flatten(),
                                         nn.Linear(12 * 36, 4)))  # fmt: skip
    hidden = torch.arange(12) % 2 == 0

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        features = model[:2](batch[0]) * hidden.reshape(-1, 1, 1)
        return (net[:3](batch[0]) - model[2](features)).square().mean() + 0 * net(batch[0]).sum()

    result = searched(
        model, "ratio=0.25", limits=Limits(max_ratio=0.5, exclude=("2",)), batches=images(), search_epochs=20,
        initialisation="random", learning_rate=0.01, gap=0.01, loss=loss,
    )  # fmt: skip

    assert {"0": tuple((~hidden).nonzero()[:, 0].tolist())} == result.plan.removed


# -- what is refused ---------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))  # fmt: skip


REFUSED: dict[str, tuple[Callable[[], nn.Module], str | list[str], dict[str, object], type[NniPruneExtError], str]] = {
    "unreadable pattern": (plain, "sparsity=0.5", {"pattern": "4:2"}, ConfigError, "'pattern'.*N:M with 0 < N < M"),
    "pattern and channels": (plain, "macs=0.5", {"pattern": "2:4"}, ConfigError, "about single weights.*sparsity=0.5"),
    "pattern and another sparsity": (
        plain, "sparsity=0.75", {"pattern": "2:4"}, ConfigError, "masks 50.0% of the weights, but 75.* asked",
    ),
    "nothing that a pattern fits": (
        plain, "sparsity=0.5", {"pattern": "8:16"}, ConfigError, "no weight to mask in Sequential .pattern: 8:16",
    ),
    "no convolution": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)),
        "sparsity=0.5", {}, ConfigError, "no weight to mask in Sequential .pattern: None",
    ),
    "no channel that may go": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()),
        "macs=1", {}, ConfigError, "There is no channel of Sequential that may be removed",
    ),
    "two kinds of targets": (plain, ["sparsity=0.5", "macs=0.5"], {}, TargetError, "sparsity=0.5, macs=0.5 cannot be"),
    "gates behind norms that are not there": (plain, "macs=0.5", {"gate": "norms"}, ConfigError, "No norm follows"),
    "an unknown option": (plain, "macs=0.5", {"rho": 1}, ConfigError, "'rho'"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "target", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_refused_with_what_to_do(
    build: Callable[[], nn.Module], target: str | list[str], options: dict[str, object],
    error: type[NniPruneExtError], message: str,
) -> None:  # fmt: skip
    model = build()

    with pytest.raises(error, match=message):
        searched(model, target, **options)
    assert [] == traces_on(model)


def test_a_sparsity_that_limits_do_not_allow_is_refused() -> None:
    with pytest.raises(TargetError, match="A sparsity of 0.9 cannot be reached"):
        searched(plain(), "sparsity=0.9", limits=Limits(layers={"*": LayerLimit(max_ratio=0.5)}))
