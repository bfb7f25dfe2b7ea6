"""Ratio policies around torch-pruning's pruners: who loses how much is decided anew before every step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError, PluginError, TargetError, UnknownPluginError
from nni_prune_ext.gates import firing_signature
from nni_prune_ext.scoring.weight_sparsity import weight_sparsity
from nni_prune_ext.torch_pruning import CertifiedPruner, L2Importance, adapt_ratios

WIDTH = 20


class Chain(nn.Module):
    """Three groups of equal width, in front of a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.third = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = torch.relu(layer(x))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def made_sparse(layer: nn.Conv2d, share: float) -> None:
    """Sets a share of the weights of every filter to zero."""
    with torch.no_grad():
        rows = layer.weight.flatten(1)
        rows[:, : round(share * rows.shape[1])] = 0


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Chain:
    torch.manual_seed(0)
    return Chain()


def certified(model: Chain, x: Tensor, **more: object) -> CertifiedPruner:
    return CertifiedPruner(model, x, L2Importance(model, x), **{**arguments(model), **more})


def plain(model: Chain, x: Tensor, **more: object) -> tp.pruner.BasePruner:
    importance = tp.importance.MagnitudeImportance(p=2)
    return tp.pruner.BasePruner(model, (x,), importance=importance, **{**arguments(model), **more})


def arguments(model: Chain) -> dict[str, object]:
    return {"pruning_ratio_dict": {model: 0.5}, "iterative_steps": 2, "ignored_layers": [model.head]}


def widths(model: Chain) -> list[int]:
    return [layer.out_channels for layer in (model.first, model.second, model.third)]


@pytest.mark.parametrize("pruner_of", [certified, plain])
def test_sparse_layers_lose_more_and_all_lose_what_was_due(
    pruner_of: Callable[..., tp.pruner.BasePruner], model: Chain, x: Tensor
) -> None:
    made_sparse(model.second, 0.3)
    made_sparse(model.third, 0.6)
    rows = {name: [layer.weight.flatten(1)] for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    sparsity = weight_sparsity(rows)
    pruner = pruner_of(model, x)

    ratios = adapt_ratios(pruner)
    pruner.step()

    assert {"first", "second", "third"} == set(ratios)
    assert 0.25 == pytest.approx(sum(ratios.values()) / 3)
    assert sparsity["third"] / sparsity["second"] == pytest.approx(ratios["third"] / ratios["second"])
    lost = [WIDTH - width for width in widths(model)]
    assert lost == sorted(lost)
    assert lost[0] < lost[2]
    asked = [ratios[name] * WIDTH for name in ("first", "second", "third")]
    assert all(due <= own < due + 1 for own, due in zip(lost, asked))


def test_ratios_follow_weights_that_change_between_steps_and_nothing_comes_back(model: Chain, x: Tensor) -> None:
    made_sparse(model.third, 0.6)
    pruner = certified(model, x)
    before = adapt_ratios(pruner)
    pruner.step()
    made_sparse(model.first, 0.95)

    after = adapt_ratios(pruner)
    pruner.step()

    assert before["first"] < before["third"]
    assert after["first"] > after["third"]
    assert all(after[name] >= before[name] for name in before)
    assert 0.5 == pytest.approx(sum(after.values()) / 3)
    assert {} == adapt_ratios(pruner), "all steps were made"


def test_asked_twice_before_a_step_it_answers_the_same(model: Chain, x: Tensor) -> None:
    pruner = certified(model, x)

    assert adapt_ratios(pruner) == pytest.approx(adapt_ratios(pruner))


def test_uniform_policy_prunes_as_without_it(model: Chain, x: Tensor) -> None:
    pruner = certified(model, x)

    ratios = adapt_ratios(pruner, "uniform_ratio")

    assert [0.25] * 3 == pytest.approx(list(ratios.values()))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.zeros(8, dtype=torch.int64)) for _ in range(3)]


def cooled(layer: nn.Conv2d, count: int) -> None:
    """Makes some filters so small that no image needs them."""
    with torch.no_grad():
        layer.weight[:count] *= 1e-6
        layer.bias[:count] *= 1e-6


@pytest.mark.parametrize("pruner_of", [certified, plain])
def test_a_policy_that_looks_at_data_removes_in_proportion_to_what_images_do_not_need(
    pruner_of: Callable[..., tp.pruner.BasePruner], model: Chain, x: Tensor
) -> None:
    cooled(model.second, 8)
    pruner = pruner_of(model, x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    ratios = adapt_ratios(pruner, "firing_signature", batches=batches(), example_inputs=x)

    signature = firing_signature(model, x, batches())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert signature["second"] > 0.35
    assert 0.25 == pytest.approx(sum(ratios.values()) / 3)
    for name in ("first", "third"):
        assert signature[name] / signature["second"] == pytest.approx(ratios[name] / ratios["second"])
    assert ratios["second"] > ratios["first"]


def test_a_policy_that_looks_at_data_looks_at_the_network_as_it_is_at_each_step(model: Chain, x: Tensor) -> None:
    pruner = certified(model, x)
    before = adapt_ratios(pruner, "firing_signature", batches=batches(), example_inputs=x)
    pruner.step()
    cooled(model.third, model.third.out_channels - 2)

    after = adapt_ratios(pruner, "firing_signature", batches=batches(), example_inputs=x)

    assert before["third"] < 0.4
    assert after["third"] == max(after.values()) > 0.6


@pytest.mark.parametrize("missing", ["batches", "example_inputs"])
def test_a_policy_that_looks_at_data_is_refused_without(missing: str, model: Chain, x: Tensor) -> None:
    given = {"batches": batches(), "example_inputs": x}
    del given[missing]

    with pytest.raises(ConfigError, match=f"'firing_signature' looks at data, but {missing} were not given"):
        adapt_ratios(certified(model, x), "firing_signature", **given)


def test_largest_ratio_is_kept(model: Chain, x: Tensor) -> None:
    made_sparse(model.third, 0.9)
    pruner = certified(model, x, max_pruning_ratio=0.6, iterative_steps=1)

    ratios = adapt_ratios(pruner)

    assert 0.6 == pytest.approx(ratios["third"])
    assert 0.5 == pytest.approx(sum(ratios.values()) / 3)


def test_what_cannot_work_is_refused(model: Chain, x: Tensor) -> None:
    with pytest.raises(ConfigError, match="global_pruning=True, expected False"):
        adapt_ratios(certified(model, x, global_pruning=True))
    with pytest.raises(ConfigError, match="'third' has no ratio of its own .* Make the pruner with pruning_ratio_dict"):
        adapt_ratios(certified(model, x, pruning_ratio_dict=None))
    with pytest.raises(ConfigError, match="no group to prune in this Chain"):
        adapt_ratios(certified(model, x, ignored_layers=list(model.children())))
    with pytest.raises(PluginError, match="'agp' is a schedule, expected a ratio policy"):
        adapt_ratios(certified(model, x), "agp")
    with pytest.raises(UnknownPluginError, match="psap_ratio"):
        adapt_ratios(certified(model, x), "psap_ratios")
    with pytest.raises(TargetError, match="cannot be reached"):
        adapt_ratios(certified(model, x, max_pruning_ratio=0.1))
