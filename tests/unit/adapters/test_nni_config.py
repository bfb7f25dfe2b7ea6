"""What NNI accepts in silence is a ValueError that names the entry; what NNI refuses stays NNI's error."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import nni
import nni.compression.pruning as nni_pruning
import pytest
import torch
from nni.compression import TorchEvaluator
from nni_bench import config, evaluator, network, shares, step
from schema import SchemaError
from torch import nn

from nni_prune_ext.errors import ConfigListError
from nni_prune_ext.pruning import L1NormPruner, LevelPruner, MovementPruner, SlimPruner

WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "ratio above 1": (config(1.5), "1.5"),
    "ratio below 0": (config(-0.1), "-0.1"),
    "ratio in target settings": (
        [{"op_names": ["conv1"], "target_settings": {"weight": {"sparse_ratio": 2.0}}}],
        "'weight' of 'conv1' (entry 0)",
    ),
    "unknown type": ([{"op_types": ["Conv2D"], "sparse_ratio": 0.5}], "did you mean 'Conv2d'"),
    "unknown name": ([{"op_names": ["conv9"], "sparse_ratio": 0.5}], "conv9"),
    "pattern without match": ([{"op_names_re": ["layer.*"], "sparse_ratio": 0.5}], "layer"),
    "everything excluded": (
        [{"op_types": ["Conv2d"], "exclude_op_types": ["Conv2d"], "sparse_ratio": 0.5}],
        "selects no module",
    ),
    "min above max": (config(0.5, min_sparse_ratio=0.8, max_sparse_ratio=0.3), "0.8"),
    "module twice": ([*config(0.5), {"op_names": ["conv1"], "sparse_ratio": 0.2}], "entry 0 as well"),
    "no ratio": ([{"op_names": ["conv1"]}], "neither sparse_ratio"),
    "type that NNI cannot prune": ([{"op_names": ["conv1", ""], "sparse_ratio": 0.5}], "a Residual"),
    "output to prune by itself": (
        [
            {
                "op_names": ["conv1"],
                "target_names": ["_output_"],
                "target_settings": {"_output_": {"sparse_ratio": 0.5, "granularity": "per_channel"}},
            }
        ],
        "'_output_0' of 'conv1'",
    ),
    "target without settings": (
        [{"op_names": ["conv1"], "target_names": ["_output_"], "sparse_ratio": 0.5}],
        "_output_",
    ),
    "alignment with nothing": (
        [
            {
                "op_names": ["bn1"],
                "target_names": ["weight"],
                "target_settings": {
                    "weight": {"align": {"module_name": "conv1", "target_name": "weight", "dims": [0]}}
                },
            }
        ],
        "no entry prunes",
    ),
    "unequal ratios in a dependency group": (
        [
            {"op_names": ["conv2"], "sparse_ratio": 0.5, "dependency_group_id": "a"},
            {"op_names": ["conv3"], "sparse_ratio": 0.25, "dependency_group_id": "a"},
        ],
        "dependency_group_id",
    ),
    "threshold in a dependency group": (
        [{"op_names": ["conv1"], "sparse_threshold": 0.5, "dependency_group_id": 1}],
        "'weight' of 'conv1' (entry 0) has the dependency_group_id 1 and a sparse_threshold, which cannot be shared",
    ),
    "threshold in a global group": (
        [{"op_names": ["conv1"], "sparse_threshold": 0.5, "global_group_id": "g"}],
        "the global_group_id 'g' and a sparse_threshold",
    ),
    "dependency group of two widths": (
        [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5, "dependency_group_id": 1, "granularity": "out_channel"}],
        "'weight' of 'conv2' (entry 0) is masked in 16 × 1 × 1 × 1 parts, but 'weight' of 'conv1' (entry 0), of the "
        "same dependency_group_id 1, in 8 × 1 × 1 × 1",
    ),
    "dependency group of two granularities": (
        [
            {"op_names": ["conv2"], "sparse_ratio": 0.5, "dependency_group_id": 1},
            {"op_names": ["fc2"], "sparse_ratio": 0.5, "granularity": "in_channel", "dependency_group_id": 1},
        ],
        "1 × 32 parts",
    ),
    "dependency group that its blocks do not divide": (
        [{"op_names": ["conv2"], "sparse_ratio": 0.5, "dependency_group_id": 1, "internal_metric_block": 5}],
        "internal_metric_block",
    ),
    "no regular expression": (
        [{"op_names_re": ["("], "sparse_ratio": 0.5}],
        "'(' in op_names_re of entry 0 is no regular expression (missing )",
    ),
    "no regular expression to exclude": (
        [{"op_types": ["Conv2d"], "exclude_op_names_re": ["*conv"], "sparse_ratio": 0.5}],
        "'*conv' in exclude_op_names_re of entry 0 is no regular expression",
    ),
    "second dimension of a batch norm": (
        [{"op_names": ["bn1"], "sparse_ratio": 0.5, "granularity": "in_channel"}],
        "granularity 'in_channel' of 'weight' of 'bn1' (entry 0), of shape 8, does not fit",
    ),
    "blocks that do not divide the layer": (
        [{"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": [5, -1]}],
        "granularity [5, -1] of 'weight' of 'fc1' (entry 0), of shape 32 × 16, does not fit",
    ),
    "channels of an output for a weight": (
        [{"op_names": ["fc1"], "sparse_ratio": 0.5, "granularity": "per_channel"}],
        "granularity 'per_channel' of 'weight' of 'fc1'",
    ),
    "target that the layer does not have": (
        [{"op_names": ["fc1"], "target_names": ["scale"], "target_settings": {"scale": {"sparse_ratio": 0.5}}}],
        "'scale' of 'fc1' (entry 0) is no parameter of this Linear, expected one of 'weight', 'bias'",
    ),
    "batch norm aligned with a layer of another width": (
        [
            {"op_names": ["conv2"], "sparse_ratio": 0.5},
            {
                "op_names": ["bn1"],
                "target_names": ["weight"],
                "target_settings": {
                    "weight": {"align": {"module_name": "conv2", "target_name": "weight", "dims": [0]}}
                },
            },
        ],
        "'weight' of 'bn1' (entry 1), of shape 8, cannot take the mask of 'weight' of 'conv2' (entry 0), which has 16",
    ),
    "legacy exclusion of a name that is not there": (
        [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["conv9"], "exclude": True}],
        "conv9",
    ),
    "not a list": ({"op_types": ["Conv2d"], "sparse_ratio": 0.5}, "expected a list"),  # type: ignore[dict-item]
    "empty": ([], "expected a list of at least one dict"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_named_and_nothing_is_wrapped(case: str) -> None:
    model, (config_list, named) = network(), WRONG[case]

    with pytest.raises(ConfigListError) as caught:
        L1NormPruner(model, config_list)

    assert isinstance(caught.value, ValueError)
    assert named in str(caught.value)
    assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())


@pytest.mark.parametrize(
    "entry", [{"op_types": ["Conv2d"], "sparse_ratio": 1}, {"sparse_ratio": 0.5}, {"op_types": ["Conv2d"], "x": 1}]
)
def test_what_nni_refuses_stays_the_error_of_nni(entry: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        L1NormPruner(network(), [entry])


def test_the_keys_of_nni_2_are_still_translated() -> None:
    _, masks = L1NormPruner(network(), [{"op_types": ["Conv2d"], "sparsity": 0.5}]).compress()

    assert {"conv1", "conv2", "conv3"} == set(masks)


def test_an_exclusion_of_nni_2_selects_nothing_by_itself() -> None:
    _, masks = L1NormPruner(
        network(), [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["conv1"], "exclude": True}]
    ).compress()

    assert {"conv2", "conv3"} == set(masks)


def test_a_model_that_is_still_wrapped_is_refused_by_name() -> None:
    model = network()
    L1NormPruner(model, config())

    with pytest.raises(ConfigListError, match=r"'conv1' is still wrapped.*unwrap_model"):
        L1NormPruner(model, config())


@pytest.mark.parametrize("outputs", [12, 8])
@pytest.mark.parametrize("granularity", ["out_channel", "in_channel"])
@pytest.mark.parametrize("pruner", [L1NormPruner, LevelPruner])
def test_the_bias_of_a_transposed_convolution_follows_its_outputs(pruner: Any, granularity: str, outputs: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(8, outputs, 3), nn.ReLU(), nn.Conv2d(outputs, 4, 1))
    entry = {"op_types": ["ConvTranspose2d"], "sparse_ratio": 0.5, "granularity": granularity}

    _, masks = pruner(model, [entry]).compress()

    assert {"0": 0.5} == shares(masks)
    assert torch.equal((masks["0"]["weight"] != 0).any(dim=(0, 2, 3)).float(), masks["0"]["bias"])


SMALL: dict[str, Callable[[nn.Module, list[dict[str, Any]]], Any]] = {
    "level": lambda model, entries: LevelPruner(model, entries),
    "slim": lambda model, entries: SlimPruner(model, entries, evaluator(model), 2),
    "movement": lambda model, entries: MovementPruner(model, entries, evaluator(model), 1, 4),
}


def taken(cls: type) -> list[tuple[str, object]]:
    return [(name, parameter.default) for name, parameter in inspect.signature(cls).parameters.items()]


class TestPrunersOfNni:
    @pytest.mark.parametrize("case", WRONG)
    @pytest.mark.parametrize("name", SMALL)
    def test_name_a_wrong_entry_and_wrap_nothing(self, name: str, case: str) -> None:
        model, (config_list, named) = network(), WRONG[case]

        with pytest.raises(ConfigListError) as caught:
            SMALL[name](model, config_list)

        assert named in str(caught.value)
        assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())

    def test_stay_pruners_of_nni_with_their_arguments(self) -> None:
        for own, theirs in (
            (LevelPruner, nni_pruning.LevelPruner),
            (SlimPruner, nni_pruning.SlimPruner),
            (MovementPruner, nni_pruning.MovementPruner),
        ):
            assert issubclass(own, theirs)
            assert own.__name__ == theirs.__name__
            assert taken(own) == taken(theirs)

    @pytest.mark.parametrize(
        ("name", "entry"),
        [
            ("slim", {"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}),
            ("movement", {"op_types": ["Linear"], "exclude_op_names": ["fc2"], "sparse_ratio": 0.5}),
            ("movement", {"op_types": ["Linear"], "exclude_op_names": ["fc2"], "sparse_threshold": 0.5}),
            ("level", {"op_types": ["Conv2d"], "sparse_ratio": 0.5}),
        ],
    )
    def test_prune_what_is_right(self, name: str, entry: dict[str, Any]) -> None:
        pruner = SMALL[name](network(), [entry])

        _, masks = pruner.compress(*((4, None) if name == "movement" else ()))

        if "sparse_ratio" in entry:
            assert all(share == pytest.approx(0.5, abs=0.02) for share in shares(masks).values())
        assert masks

    @pytest.mark.parametrize("name", SMALL)
    def test_give_the_parameters_of_the_users_optimizer_back(self, name: str) -> None:
        model = network()
        before = dict(model.named_parameters())
        pruner = SMALL[name](model, [{"op_types": ["Conv2d", "BatchNorm2d"], "sparse_ratio": 0.5}])
        pruner.compress(*((4, None) if name == "movement" else ()))

        pruner.unwrap_model()

        assert all(parameter is before[name] for name, parameter in model.named_parameters())

    @pytest.mark.parametrize("name", ["slim", "movement"])
    def test_let_the_evaluator_go_when_training_raises(self, name: str) -> None:
        model = network()

        def broken(*arguments: Any) -> None:
            raise RuntimeError("the user's error")

        given = TorchEvaluator(broken, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1), step)
        cls: Any = {"slim": SlimPruner, "movement": MovementPruner}[name]
        pruner = cls(model, config(0.75), given, *((2,) if name == "slim" else (1, 4)))

        with pytest.raises(RuntimeError, match="the user's error"):
            pruner.compress(*((4, None) if name == "movement" else ()))

        assert given.model is None
        assert pruner._target_spaces["conv1"]["weight"].sparse_ratio == 0.75

    def test_leave_nothing_wrapped_when_another_argument_is_wrong(self) -> None:
        model = network()

        with pytest.raises(AssertionError):
            MovementPruner(model, config(), evaluator(model), 4, 1)

        assert not any(hasattr(module, "_nni_wrapper") for module in model.modules())

    def test_leave_the_compressor_that_they_were_made_from_as_it_was(self) -> None:
        model = network()
        first = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], evaluator(model))

        with pytest.raises(ConfigListError):
            LevelPruner.from_compressor(first, config(1.5))

        assert first._is_wrapped
        assert hasattr(model.conv1, "_nni_wrapper")


@pytest.mark.parametrize(
    ("excluded", "said"),
    [
        (
            {"exclude_op_names": ["convl"]},
            "names 'convl' in exclude_op_names, which Residual does not have; did you mean",
        ),
        (
            {"exclude_op_types": ["Linaer"]},
            "names 'Linaer' in exclude_op_types, which Residual does not have; did you mean 'Linear'",
        ),
        ({"exclude_op_names_re": ["layer.*"]}, "'layer.*' in exclude_op_names_re of entry 0 matches no module"),
    ],
)
def test_what_is_excluded_but_not_there_is_told(
    excluded: dict[str, list[str]], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    L1NormPruner(network(), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, **excluded}])

    assert said in caplog.text


def test_a_kind_of_layer_that_the_model_lacks_is_no_slip(caplog: pytest.LogCaptureFixture) -> None:
    entry = {"op_types": ["Conv2d", "ConvTranspose2d"], "exclude_op_types": ["Embedding"], "sparse_ratio": 0.5}

    _, masks = L1NormPruner(network(), [entry]).compress()

    assert {"conv1", "conv2", "conv3"} == set(masks)
    assert not caplog.records
