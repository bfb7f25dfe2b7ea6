"""What NNI accepts in silence is a ValueError that names the entry; what NNI refuses stays NNI's error."""

from __future__ import annotations

from typing import Any

import pytest
from nni_bench import config, network
from schema import SchemaError

from nni_prune_ext.errors import ConfigListError
from nni_prune_ext.pruning import L1NormPruner

WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "ratio above 1": (config(1.5), "1.5"),
    "ratio below 0": (config(-0.1), "-0.1"),
    "ratio in target settings": (
        [{"op_names": ["conv1"], "target_settings": {"weight": {"sparse_ratio": 2.0}}}],
        "'weight' of 'conv1' (entry 0)",
    ),
    "unknown type": ([{"op_types": ["Conv2D"], "sparse_ratio": 0.5}], "did you mean 'Conv2d'"),
    "unknown name": ([{"op_names": ["conv9"], "sparse_ratio": 0.5}], "conv9"),
    "unknown excluded name": (
        [{"op_types": ["Conv2d"], "exclude_op_names": ["convl"], "sparse_ratio": 0.5}],
        "exclude_op_names",
    ),
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


def test_a_model_that_is_still_wrapped_is_refused_by_name() -> None:
    model = network()
    L1NormPruner(model, config())

    with pytest.raises(ConfigListError, match=r"'conv1' is still wrapped.*unwrap_model"):
        L1NormPruner(model, config())
