"""Helpers for config lists: layers that hang together get one id, batch norms follow their convolutions."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from nni.compression.base.config import select_modules_by_config, trans_legacy_config_list
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import auto_set_denpendency_group_ids as nnis
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp
from torchvision.models import densenet121, get_model, resnet18, shufflenet_v2_x1_0

from nni_prune_ext import speedup, utils
from nni_prune_ext.errors import ConfigError, ConfigListError
from nni_prune_ext.utils import align_batchnorm, auto_set_denpendency_group_ids, auto_set_dependency_group_ids

X = torch.randn(1, 3, 64, 64)
CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def sharing(config: list[dict[str, object]]) -> set[frozenset[str]]:
    ids: dict[object, set[str]] = {}
    for entry in config:
        if "dependency_group_id" in entry:
            ids.setdefault(entry["dependency_group_id"], set()).update(entry["op_names"])
    return {frozenset(names) for names in ids.values()}


def test_the_layers_of_a_residual_stage_share_an_id() -> None:
    found = sharing(auto_set_dependency_group_ids(resnet18(), CONFIG, X))

    assert {
        frozenset({"conv1", "layer1.0.conv2", "layer1.1.conv2"}),
        frozenset({"layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"}),
        frozenset({"layer3.0.conv2", "layer3.0.downsample.0", "layer3.1.conv2"}),
        frozenset({"layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv2"}),
    } == found


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "googlenet"])
def test_the_same_layers_share_ids_as_by_nnis_helper_for_graphs(name: str) -> None:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = get_model(name, weights=None, **options).eval()
    graph = torch.fx.symbolic_trace(model)
    ShapeProp(graph).propagate(X)

    expected = sharing(nnis(graph, CONFIG))

    assert expected == sharing(auto_set_dependency_group_ids(model, CONFIG, X))


def test_every_selected_layer_gets_an_entry_with_its_settings_and_the_given_list_stays() -> None:
    config = [{"op_types": ["Conv2d"], "exclude_op_names": ["conv1"], "sparse_ratio": 0.5}, {"op_names": ["fc"]}]
    before = [dict(entry) for entry in config]

    found = auto_set_dependency_group_ids(resnet18(), config, X)

    assert before == config
    assert 20 == len(found)
    assert ["layer1.0.conv1"] == found[0]["op_names"]
    assert 0.5 == found[0]["sparse_ratio"]
    assert {"op_names": ["fc"]} == found[-1]


def test_nnis_spelling_is_the_same_function_and_no_tensorboard_is_needed() -> None:
    assert auto_set_denpendency_group_ids is auto_set_dependency_group_ids
    assert "tensorboard" not in sys.modules


def test_ids_make_nnis_pruner_mask_coupled_layers_alike() -> None:
    model = resnet18()
    pruner = L1NormPruner(model, auto_set_dependency_group_ids(model, CONFIG, X))

    _, masks = pruner.compress()

    alive = [masks[name]["weight"].flatten(1).any(1) for name in ("conv1", "layer1.0.conv2", "layer1.1.conv2")]
    assert torch.equal(alive[0], alive[1])
    assert torch.equal(alive[0], alive[2])
    assert 32 == int(alive[0].sum())


def test_depthwise_convolutions_share_the_id_of_the_layer_before_them() -> None:
    model = shufflenet_v2_x1_0().eval()

    found = sharing(auto_set_dependency_group_ids(model, CONFIG, X))

    assert any({"stage2.1.branch2.0", "stage2.1.branch2.3"} <= names for names in found)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def test_layers_around_a_grouped_convolution_are_ranked_in_blocks() -> None:
    found = {entry["op_names"][0]: entry for entry in auto_set_dependency_group_ids(Grouped(), CONFIG, X)}

    assert (4, 4) == (found["a"]["internal_metric_block"], found["b"]["internal_metric_block"])
    assert found["a"]["dependency_group_id"] != found["b"]["dependency_group_id"]
    assert {"op_names": ["c"], "sparse_ratio": 0.5} == found["c"]


class Gate(nn.Module):
    """A squeeze-and-excitation block whose gate is made of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 1), nn.Linear(8, 4), nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
        return self.last((x * gate[:, :, None, None]).mean((2, 3)))


def test_a_convolution_and_a_linear_layer_that_hang_together_get_one_mask() -> None:
    model = Gate()
    config = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["last"], "sparse_ratio": 0.5}]
    pruner = L1NormPruner(model, auto_set_dependency_group_ids(model, config, X))

    _, masks = pruner.compress()

    assert torch.equal(masks["conv"]["weight"].flatten(1).any(1), masks["up"]["weight"].any(1))
    assert torch.equal(masks["up"]["weight"].any(1), masks["up"]["bias"].bool())
    assert 4 == int(masks["up"]["bias"].sum())


def test_different_goals_for_layers_that_hang_together_are_refused_with_both_names() -> None:
    config = [
        {"op_names": ["conv1"], "sparse_ratio": 0.25},
        {"op_names": ["layer1.0.conv2"], "sparse_ratio": 0.5},
    ]

    with pytest.raises(ConfigListError, match=r"'conv1' and 'layer1.0.conv2'.*sparse_ratio 0.25 and sparse_ratio 0.5"):
        auto_set_dependency_group_ids(resnet18(), config, X)


@pytest.mark.parametrize(
    "goals", [{"sparse_threshold": 0.5}, {"target_settings": {"weight": {"sparse_threshold": 0.5}}}]
)
def test_layers_with_thresholds_get_no_ids_as_nni_ranks_only_by_ratios(
    goals: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    config = [{"op_names": ["conv1"], **goals}, {"op_names": ["layer1.0.conv2"], "sparse_threshold": 0.9}]
    model = resnet18()

    with caplog.at_level(logging.WARNING):
        found = auto_set_dependency_group_ids(model, config, X)

    assert config == found
    assert "conv1, layer1.0.conv2" in caplog.text
    L1NormPruner(model, found).compress()


def test_layers_with_thresholds_before_a_grouped_convolution_get_no_blocks() -> None:
    config = [{"op_names": ["a"], "sparse_threshold": 0.5}]

    assert config == auto_set_dependency_group_ids(Grouped(), config, X)


def test_a_ratio_and_a_threshold_for_layers_that_hang_together_are_refused_with_both_values() -> None:
    config = [
        {"op_names": ["conv1"], "sparse_ratio": 0.25},
        {"op_names": ["layer1.0.conv2"], "sparse_threshold": 0.5},
    ]

    with pytest.raises(ConfigListError, match=r"sparse_ratio 0.25 and sparse_threshold 0.5"):
        auto_set_dependency_group_ids(resnet18(), config, X)


class Parallel(nn.Module):
    """Both convolutions are called before their norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.na, self.nb, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.head((self.na(a).relu() + self.nb(b).relu()).mean((2, 3)))


def sources(config: list[dict[str, object]]) -> dict[str, str]:
    return {
        entry["op_names"][0]: entry["target_settings"]["weight"]["align"]["module_name"]
        for entry in config
        if "align" in entry.get("target_settings", {}).get("weight", {})
    }


def test_batch_norms_are_aligned_to_the_convolution_whose_output_they_take_in_whatever_order_they_are_called() -> None:
    assert {"na": "a", "nb": "b"} == sources(align_batchnorm(Parallel(), CONFIG, X))


def test_a_batch_norm_behind_a_convolution_that_is_not_pruned_is_not_aligned_to_the_one_beside_it() -> None:
    assert {"na": "a"} == sources(align_batchnorm(Parallel(), [{"op_names": ["a"], "sparse_ratio": 0.5}], X))


class BeforeActivation(nn.Module):
    """A norm over a sum of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.a(x) + self.b(x)).relu().mean((2, 3)))


def test_a_batch_norm_over_a_sum_is_aligned_only_if_all_parts_share_one_mask(caplog: pytest.LogCaptureFixture) -> None:
    model = BeforeActivation()

    with caplog.at_level(logging.WARNING):
        apart = align_batchnorm(model, CONFIG, X)
    together = align_batchnorm(model, auto_set_dependency_group_ids(model, CONFIG, X), X)

    assert {} == sources(apart)
    assert "norm" in caplog.text
    assert ["norm"] == list(sources(together))


def test_a_batch_norm_over_a_sum_with_a_part_that_is_not_pruned_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = align_batchnorm(BeforeActivation(), [{"op_names": ["a"], "sparse_ratio": 0.5}], X)

    assert {} == sources(found)
    assert "norm" in caplog.text


def test_batch_norms_are_aligned_to_the_convolution_right_before_them() -> None:
    found = align_batchnorm(resnet18(), CONFIG, X)

    sources = {entry["op_names"][0]: entry["target_settings"]["weight"]["align"]["module_name"] for entry in found[1:]}
    assert CONFIG[0] == found[0]
    assert 20 == len(sources)
    assert ("conv1", "layer2.0.downsample.0", "layer2.1.conv2") == (
        sources["bn1"],
        sources["layer2.0.downsample.1"],
        sources["layer2.1.bn2"],
    )
    assert all(set(entry["target_names"]) == {"weight", "bias"} for entry in found[1:])


def test_batch_norms_over_a_concatenation_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        align_batchnorm(densenet121(), CONFIG, X)

    assert "58 batch norms" in caplog.text
    assert "features.denseblock1.denselayer2.norm1" in caplog.text


def test_batch_norms_that_the_list_selects_itself_get_no_second_entry() -> None:
    config = [*CONFIG, {"op_names": ["bn1"], "sparse_ratio": 0.5}]

    found = align_batchnorm(resnet18(), config, X)

    assert 1 == sum("bn1" in entry.get("op_names", []) for entry in found)


def test_nni_still_has_the_helpers_we_use() -> None:
    modules, settings, _ = select_modules_by_config(resnet18(), {"op_names": ["conv1"], "sparse_ratio": 0.5})

    assert (["conv1"], {"sparse_ratio": 0.5}) == (list(modules), settings)
    assert [{"op_names": ["conv1"]}] == trans_legacy_config_list([{"op_names": ["conv1"]}])
    assert all(hasattr(utils, name) for name in utils.__all__)


def test_the_name_of_nnis_speedup_takes_a_graph_with_shapes_or_an_example_input() -> None:
    model = resnet18(weights=None).eval()
    graph, example = torch.fx.symbolic_trace(model), torch.zeros(1, 3, 64, 64)
    ShapeProp(graph).propagate(example)
    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]

    found = speedup.auto_set_denpendency_group_ids(graph, config_list)
    by_example = speedup.auto_set_denpendency_group_ids(model, config_list, example)

    def sets(entries: list[dict[str, object]]) -> set[frozenset[str]]:
        ids: dict[object, set[str]] = {}
        for entry in entries:
            if "dependency_group_id" in entry:
                ids.setdefault(entry["dependency_group_id"], set()).update(entry["op_names"])  # type: ignore[arg-type]
        return {frozenset(names) for names in ids.values()}

    assert sets(found) == sets(by_example)
    assert 4 == len(sets(found))
    with pytest.raises(ConfigError, match="knows no shapes"):
        speedup.auto_set_denpendency_group_ids(model, config_list)


@pytest.mark.parametrize("wrong", [[{"op_types": ["Conv9d"], "sparse_ratio": 0.5}], {"op_types": ["Conv2d"]}, []])
def test_a_wrong_config_list_is_refused_by_the_helpers_too(wrong: object) -> None:
    model = resnet18(weights=None)

    with pytest.raises(ConfigListError):
        utils.auto_set_dependency_group_ids(model, wrong, torch.zeros(1, 3, 64, 64))  # type: ignore[arg-type]
