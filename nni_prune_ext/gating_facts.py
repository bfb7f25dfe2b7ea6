"""What a report says about the gates of a network: measured on a set of images, and how its ONNX files came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from torch import nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.export.onnx_gated import GatedExport
from nni_prune_ext.gates import GatedNetwork, MeasuredGating, measure_gating
from nni_prune_ext.inputs import tensors_in
from nni_prune_ext.report.gate_facts import (
    GatedFileFacts,
    GateLayerFacts,
    GateMacsFacts,
    GatingFacts,
    MaskAgreementFacts,
)
from nni_prune_ext.training import Batches


class GatingRecord:
    """Collects what is known about the gates of one network or several, while their files are written.

    Attributes:
        batches: of ``(images, labels)``, to measure on; ``None`` takes what the methods calibrated on.
    """

    def __init__(self, dense: nn.Module, batches: Batches | None) -> None:
        """Takes the network that shares of MACs refer to, and the test images."""
        self.batches = batches
        self._dense = dense
        self._networks: dict[str, GatedNetwork] = {}
        self._measured: dict[str, MeasuredGating | None] = {}
        self._exports: dict[str, dict[str, GatedExport]] = {}
        self._failed: dict[str, dict[str, str]] = {}

    def measured(self, name: str, network: GatedNetwork, calibrated: MeasuredGating | None) -> MeasuredGating | None:
        """Returns what a network costs and how its filters fire, which is measured at the first call.

        Args:
            name: the row of the network without its gates.
            calibrated: what its method measured, for want of test images.
        """
        if name not in self._measured:
            self._networks[name] = network
            self._measured[name] = _named(calibrated) if self.batches is None else self._on(self.batches, network)
        return self._measured[name]

    def written(self, name: str, row: str, export: GatedExport) -> None:
        """Notes the ONNX file of a row."""
        self._exports.setdefault(name, {})[row] = export

    def failed(self, name: str, row: str, reason: str) -> None:
        """Notes why a row is missing."""
        self._failed.setdefault(name, {})[row] = reason

    def facts(self) -> tuple[GatingFacts, ...]:
        """Returns everything that was noted, one entry per network."""
        return tuple(
            _facts(name, network, self._measured[name], self._exports.get(name, {}), self._failed.get(name, {}))
            for name, network in self._networks.items()
        )

    def _on(self, batches: Batches, network: GatedNetwork) -> MeasuredGating:
        example = next(tensors_in(next(iter(batches))))[:1]
        return measure_gating(network, example, batches, dense=count_costs(self._dense, example).macs)


def _named(calibrated: MeasuredGating | None) -> MeasuredGating | None:
    """Returns what a method measured under a name that says where."""
    if calibrated is None:
        return None
    expected, firing = calibrated
    return replace(expected, data=f"{expected.data} that the method calibrated on"), firing


def _facts(
    name: str,
    network: GatedNetwork,
    measured: MeasuredGating | None,
    exports: Mapping[str, GatedExport],
    failed: Mapping[str, str],
) -> GatingFacts:
    files = tuple(_file(row, export) for row, export in exports.items())
    if measured is None:
        return GatingFacts(network=name, files=files, failed=dict(failed))
    expected, _ = measured
    return GatingFacts(
        network=name,
        data=expected.data,
        images=expected.images,
        layers=_layers(network, measured, exports),
        macs=GateMacsFacts.model_validate(asdict(expected)),
        files=files,
        failed=dict(failed),
    )


def _layers(
    network: GatedNetwork, measured: MeasuredGating, exports: Mapping[str, GatedExport]
) -> tuple[GateLayerFacts, ...]:
    bounds = {layer: rate for export in exports.values() for layer, rate in export.break_even.items()}
    return tuple(
        GateLayerFacts(
            layer=layer,
            filters=len(own.rate),
            units=network.gates.head(layer).num_units,
            never=own.never,
            always=own.always,
            varying=own.varying,
            rate=float(own.rate.mean()),
            entropy_bits=own.entropy,
            break_even=bounds.get(layer),
        )
        for layer, own in measured[1].items()
    )


def _file(name: str, export: GatedExport) -> GatedFileFacts:
    return GatedFileFacts(
        name=name,
        flavour=export.flavour,
        gathered=export.gathered,
        masked=dict(export.masked),
        folded=export.folded,
        limits=export.limits,
        agreement=MaskAgreementFacts.model_validate(export.parity.to_dict()) if export.parity else None,
    )
