"""The names of the built-in models and where their factories live; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

BUILTIN_FACTORIES: Mapping[str, str] = MappingProxyType(
    {
        "resnet20": "nni_prune_ext.models.cifar_resnet:resnet20",
        "resnet32": "nni_prune_ext.models.cifar_resnet:resnet32",
        "resnet44": "nni_prune_ext.models.cifar_resnet:resnet44",
        "resnet56": "nni_prune_ext.models.cifar_resnet:resnet56",
        "resnet110": "nni_prune_ext.models.cifar_resnet:resnet110",
        "vgg16_bn": "nni_prune_ext.models.cifar_vgg:vgg16_bn",
        "vgg19_bn": "nni_prune_ext.models.cifar_vgg:vgg19_bn",
        "mobilenet_v1": "nni_prune_ext.models.cifar_mobilenet:mobilenet_v1",
        "mobilenet_v2": "nni_prune_ext.models.cifar_mobilenet:mobilenet_v2",
    }
)


def builtin_names() -> list[str]:
    """Return the names of the built-in models, from small families to large ones."""
    return list(BUILTIN_FACTORIES)
