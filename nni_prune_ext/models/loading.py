"""Build a model from a specification: a built-in name, torchvision, timm, or the user's own factory."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

from torch import nn

from nni_prune_ext.errors import ConfigError, ModelError, WeightsError
from nni_prune_ext.models.builtin import BUILTIN_FACTORIES, builtin_names
from nni_prune_ext.models.weights import load_weights, save_weights
from nni_prune_ext.specs import did_you_mean, import_factory

__all__ = ["build_model", "builtin_names", "load_weights", "save_weights"]

PREFIXES = ("torchvision", "timm", "cifar")
SPEC_FORMS = "a built-in name, torchvision:NAME, timm:NAME, or module.path:factory"
RGB_CHANNELS = 3
# What the download code of torchvision and timm raises: no network, no such file, a wrong checksum, other shapes.
DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError, ImportError)


def build_model(
    spec: str,
    *,
    num_classes: int | None = None,
    in_channels: int = RGB_CHANNELS,
    weights: str | Path | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """Build the model that a specification names, in training mode, on the CPU.

    Random initial weights come from torch's global generator: seed it for repeatable models.

    Args:
        spec: ``resnet56`` or another built-in name (``cifar:resnet56`` is the same), ``torchvision:NAME``,
            ``timm:NAME``, or ``module.path:factory``. A factory is called with `num_classes` and `in_channels` if it
            has parameters of these names, and without them otherwise.
        num_classes: Outputs of the classifier; None keeps the default of the model.
        in_channels: Channels of the input images.
        weights: A file to load, see `load_weights`.
        pretrained: Download the weights that torchvision or timm publish for this model.

    Raises:
        ModelError: if there is no such model, or it cannot have this number of classes or channels.
        WeightsError: if the weights cannot be loaded or downloaded.
        ConfigError: if both `weights` and `pretrained` are given.

    Example:
        >>> sum(parameter.numel() for parameter in build_model("resnet20").parameters())
        269722
    """
    if pretrained and weights is not None:
        raise ConfigError(
            f"Both pretrained=True and weights='{weights}' were given, expected at most one source of weights. "
            f"Leave one of them out."
        )
    _check_positive(num_classes, in_channels)
    prefix, colon, name = spec.partition(":")
    if prefix == "torchvision" and colon:
        model = _build_torchvision(name, num_classes, in_channels, pretrained)
    elif prefix == "timm" and colon:
        model = _build_timm(name, num_classes, in_channels, pretrained)
    else:
        _refuse_pretrained(spec, pretrained)
        model = _build_from_factory(_factory_spec(spec), num_classes, in_channels)
    if weights is not None:
        load_weights(model, weights)
    return model


def _check_positive(num_classes: int | None, in_channels: int) -> None:
    for option, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value is not None and value < 1:
            raise ModelError(f"{option} is {value}, expected at least 1. Give the number that the data set has.")


def _refuse_pretrained(spec: str, pretrained: bool) -> None:
    if pretrained:
        raise WeightsError(
            f"No published weights are known for '{spec}'. Expected torchvision:NAME or timm:NAME with "
            f"pretrained=True. Give a file with `weights` instead."
        )


def _factory_spec(spec: str) -> str:
    """Translate a built-in name into module:factory, and pass on what already is of this form."""
    name = spec.removeprefix("cifar:")
    if name in BUILTIN_FACTORIES:
        return BUILTIN_FACTORIES[name]
    if ":" in name:
        return name
    hint = did_you_mean(name, builtin_names())
    if name in _torchvision_names():
        hint = f" Did you mean 'torchvision:{name}'?"
    raise ModelError(
        f"There is no built-in model '{name}'. Expected {SPEC_FORMS}.{hint} Built in are {', '.join(builtin_names())}."
    )


def _build_from_factory(spec: str, num_classes: int | None, in_channels: int) -> nn.Module:
    factory = import_factory(spec, error=ModelError, prefixes=PREFIXES)
    options = {"in_channels": in_channels}
    if num_classes is not None:
        options["num_classes"] = num_classes
    given = {key: value for key, value in options.items() if _accepts(factory, key)}
    _check_arguments(factory, given, spec)
    try:
        model = factory(**given)
    except Exception as error:  # the user's own code may raise anything
        raise ModelError(
            f"The factory '{spec}' failed on {given}: {type(error).__name__}: {error}. Expected it to return a "
            f"torch.nn.Module. Mend it, or give other values with --num-classes and --input-shape."
        ) from error
    return _checked(model, spec)


def _check_arguments(factory: Callable[..., object], given: dict[str, int], spec: str) -> None:
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        advice = "Give the number of classes with --num-classes (num_classes=), or give all other arguments defaults."
        raise ModelError(
            f"The factory '{spec}' cannot be called with {given or 'no arguments'}: {error}. Expected a factory that "
            f"needs num_classes and in_channels only. {advice}"
        ) from error
    except ValueError:  # a callable of C code without a signature
        return


def _accepts(factory: Callable[..., object], parameter: str) -> bool:
    try:
        return parameter in inspect.signature(factory).parameters
    except ValueError:  # a callable of C code without a signature
        return False


def _checked(model: object, spec: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The factory '{spec}' returned a {type(model).__name__}, expected a torch.nn.Module. Return the model."
        )
    return model


def _torchvision_names() -> list[str]:
    names: list[str] = importlib.import_module("torchvision.models").list_models()
    return names


def _build_torchvision(name: str, num_classes: int | None, in_channels: int, pretrained: bool) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    if name not in _torchvision_names():
        raise ModelError(
            f"torchvision has no model '{name}'. Expected a name of torchvision.models.list_models()."
            f"{did_you_mean(name, _torchvision_names())}"
        )
    if in_channels != RGB_CHANNELS:
        raise ModelError(
            f"torchvision:{name} was asked for {in_channels} input channels, expected {RGB_CHANNELS}: torchvision's "
            f"models take RGB only. Use timm:NAME or a factory of your own."
        )
    builder = models.get_model_builder(name)
    options: dict[str, object] = {"weights": "DEFAULT" if pretrained else None}
    if _accepts(builder, "weights_backbone"):
        options["weights_backbone"] = None  # detection models would download a backbone unasked
    if num_classes is not None:
        options["num_classes"] = num_classes
    return _checked(_with_download(lambda: builder(**options), f"torchvision:{name}", pretrained), name)


def _build_timm(name: str, num_classes: int | None, in_channels: int, pretrained: bool) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ModelError(
            f"'timm:{name}' needs the package timm, which cannot be imported ({error}). Expected timm to be installed. "
            f"Run: pip install timm"
        ) from error
    if not timm.is_model(name):
        raise ModelError(
            f"timm has no model '{name}'. Expected a name of timm.list_models(), with or without a .tag."
            f"{did_you_mean(name, timm.list_models())}"
        )
    options = {"pretrained": pretrained, "in_chans": in_channels}
    if num_classes is not None:
        options["num_classes"] = num_classes
    return _checked(_with_download(lambda: timm.create_model(name, **options), f"timm:{name}", pretrained), name)


def _with_download(build: Callable[[], object], spec: str, pretrained: bool) -> object:
    """Call a builder of torchvision or timm; name what it could not do in one sentence."""
    try:
        return build()
    except DOWNLOAD_ERRORS as error:
        if pretrained:
            raise WeightsError(
                f"The published weights of '{spec}' cannot be loaded ({type(error).__name__}: {error}). Expected a "
                f"network connection or a filled cache, and the number of classes of the weights. Download the file "
                f"elsewhere and give it with `weights`, or leave the number of classes out."
            ) from error
        raise ModelError(
            f"'{spec}' cannot be built ({type(error).__name__}: {error}). Expected a model that takes this number of "
            f"classes and input channels. Leave them out, or write a factory of your own."
        ) from error
