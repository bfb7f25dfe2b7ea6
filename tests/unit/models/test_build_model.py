"""Specifications become models, and mistakes in them become sentences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import pytest
import torch

from nni_prune_ext.errors import ConfigError, ModelError, WeightsError
from nni_prune_ext.models.loading import build_model, save_weights

FACTORIES = """
from torch import nn

def sized(num_classes=10, in_channels=3):
    return nn.Conv2d(in_channels, num_classes, 1)

def fixed():
    return nn.Linear(2, 3)

def not_a_model():
    return "a string"

def needs_classes(num_classes):
    return nn.Linear(2, num_classes)

def needs_depth(depth, num_classes=10):
    return nn.Linear(depth, num_classes)

def fails(num_classes=10):
    raise KeyError("block")
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "factories_of_a_test.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "factories_of_a_test"


def test_the_prefix_cifar_is_optional() -> None:
    torch.manual_seed(0)
    plain = build_model("resnet20")
    torch.manual_seed(0)

    prefixed = build_model("cifar:resnet20")

    assert torch.equal(plain.get_parameter("conv1.weight"), prefixed.get_parameter("conv1.weight"))


def test_listing_the_built_in_names_does_not_import_torch() -> None:
    code = "import sys; import nni_prune_ext.models.builtin as b; print(len(b.builtin_names()), 'torch' in sys.modules)"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "9 False" == result.stdout.strip()


def test_a_torchvision_model_is_built_with_the_number_of_classes_asked_for() -> None:
    model = build_model("torchvision:squeezenet1_1", num_classes=5)

    assert 5 == model.get_parameter("classifier.1.bias").numel()


def test_a_timm_model_is_built_with_the_classes_and_channels_asked_for() -> None:
    pytest.importorskip("timm")

    model = build_model("timm:resnet10t", num_classes=5, in_channels=1)

    assert 5 == model.get_parameter("fc.bias").numel()
    assert 1 == model.get_parameter("conv1.0.weight").shape[1]


def test_a_factory_gets_the_options_that_it_has_parameters_for(factories: str) -> None:
    model = build_model(f"{factories}:sized", num_classes=5, in_channels=2)

    assert (5, 2, 1, 1) == tuple(model.get_parameter("weight").shape)


def test_a_factory_without_parameters_is_called_without_options(factories: str) -> None:
    model = build_model(f"{factories}:fixed", num_classes=5)

    assert (3, 2) == tuple(model.get_parameter("weight").shape)


@pytest.mark.parametrize("kind", [str, Path])
def test_weights_are_loaded_into_the_model(kind: type[str] | type[Path], tmp_path: Path) -> None:
    place = kind(tmp_path / "weights.safetensors")
    saved = build_model("resnet20")
    save_weights(saved, place)

    model = build_model("resnet20", weights=place)

    assert torch.equal(saved.get_parameter("linear.weight"), model.get_parameter("linear.weight"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet57", "Did you mean 'resnet56'"),
        ("resnet18", "Did you mean 'torchvision:resnet18'"),
        ("torchvision:resnet19", "Did you mean 'resnet18'"),
        ("torchvison:resnet18", "Did you mean 'torchvision'"),
        ("no_such_module_at_all:build", "No module named 'no_such_module_at_all'"),
        ("math:no_such_name", "no attribute 'no_such_name'"),
        ("math:pi", "is a float"),
        (":", "Expected module.path:factory"),
    ],
)
def test_a_specification_that_names_nothing_is_refused_with_a_hint(spec: str, words: str) -> None:
    with pytest.raises(ModelError, match="Expected|expected") as caught:
        build_model(spec)

    assert words in str(caught.value)


def test_an_unknown_timm_name_is_refused_with_a_hint() -> None:
    pytest.importorskip("timm")

    with pytest.raises(ModelError, match="Did you mean"):
        build_model("timm:resnet17")


def test_a_factory_that_returns_something_else_is_refused(factories: str) -> None:
    with pytest.raises(ModelError, match="returned a str, expected a torch.nn.Module"):
        build_model(f"{factories}:not_a_model")


def test_torchvision_models_refuse_other_than_three_channels() -> None:
    with pytest.raises(ModelError, match="1 input channels, expected 3"):
        build_model("torchvision:resnet18", in_channels=1)


@pytest.mark.parametrize("option", ["num_classes", "in_channels"])
def test_sizes_below_one_are_refused(option: str) -> None:
    sizes = {"num_classes": 10, "in_channels": 3, option: 0}

    with pytest.raises(ModelError, match=f"{option} is 0, expected at least 1"):
        build_model("resnet20", num_classes=sizes["num_classes"], in_channels=sizes["in_channels"])


def test_published_and_own_weights_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most one source of weights"):
        build_model("torchvision:resnet18", weights=tmp_path / "weights.pt", pretrained=True)


def test_a_built_in_model_has_no_published_weights() -> None:
    with pytest.raises(WeightsError, match="No published weights are known for 'resnet20'"):
        build_model("resnet20", pretrained=True)


def test_published_weights_of_torchvision_are_loaded_by_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    published = build_model("torchvision:squeezenet1_1").state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: published)

    model = build_model("torchvision:squeezenet1_1", pretrained=True)

    assert torch.equal(published["classifier.1.weight"], model.get_parameter("classifier.1.weight"))


def test_a_download_without_network_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> NoReturn:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)

    with pytest.raises(WeightsError, match=r"no network.*Download the file elsewhere"):
        build_model("torchvision:squeezenet1_1", pretrained=True)


def test_published_weights_with_another_number_of_classes_are_refused() -> None:
    with pytest.raises(WeightsError, match="expected value 1000 but got 7"):
        build_model("torchvision:squeezenet1_1", num_classes=7, pretrained=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needs_classes", "missing a required argument: 'num_classes'.*--num-classes"),
        ("needs_depth", "missing a required argument: 'depth'"),
        ("fails", "failed on .*KeyError: 'block'"),
    ],
)
def test_a_factory_that_cannot_be_called_or_raises_is_named_with_the_cause(
    factories: str, name: str, message: str
) -> None:
    with pytest.raises(ModelError, match=f"'{factories}:{name}'.*{message}") as caught:
        build_model(f"{factories}:{name}")

    assert caught.value.__cause__ is not None


def test_a_factory_that_needs_the_number_of_classes_gets_it(factories: str) -> None:
    assert 7 == build_model(f"{factories}:needs_classes", num_classes=7).get_parameter("bias").numel()
