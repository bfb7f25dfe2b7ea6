"""What ``report.json`` says about a network whose filters are switched per input: the key ``gating``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Facts(BaseModel):
    """Immutable; keys that a later version adds are let pass."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class GateLayerFacts(_Facts):
    """How the filters of one gated layer fired.

    Attributes:
        layer: its name.
        filters: how many there are.
        units: what opens and closes together: as many as filters, or fewer where blocks are switched.
        never: filters that ran for no image.
        always: filters that ran for every image.
        varying: all others.
        rate: share of the filters that run, mean over the images, 0–1.
        entropy_bits: mean over the filters of the entropy of being open, 0–1.
        break_even: firing rate below which computing the open filters only is faster; ``None`` if that cannot be done.
    """

    layer: str
    filters: int = Field(ge=0)
    units: int = Field(ge=0)
    never: int = Field(ge=0)
    always: int = Field(ge=0)
    varying: int = Field(ge=0)
    rate: float
    entropy_bits: float
    break_even: float | None = None


class GateMacsFacts(_Facts):
    """MACs per image; see ``nni_prune_ext.gates.ExpectedMacs``.

    Attributes:
        dense: of the dense network, without heads.
        mean: what an image needs, heads included.
        spread: standard deviation over the images.
        smallest: of any image.
        largest: of any image.
        heads: of all heads, part of ``mean``.
        official: mean by the counting of the paper's code, for comparison with its tables only.
    """

    dense: float
    mean: float
    spread: float
    smallest: float
    largest: float
    heads: float
    official: float


class MaskAgreementFacts(_Facts):
    """A gated ONNX file beside PyTorch; see ``nni_prune_ext.export.gated_parity.GatedParity``."""

    images: int
    bits: int
    agreement: float
    compared: int
    max_rel: float
    fail: float


class GatedFileFacts(_Facts):
    """One ONNX file of a gated network.

    Attributes:
        name: of its row.
        flavour: how its gates work.
        gathered: layers that compute their open filters only.
        masked: layers that compute everything and multiply, each with the reason.
        folded: layers that are no longer gated.
        limits: what the flavour cannot do.
        agreement: the comparison with PyTorch; ``None`` if there were no images for it.
    """

    name: str
    flavour: str
    gathered: tuple[str, ...] = ()
    masked: dict[str, str] = {}
    folded: tuple[str, ...] = ()
    limits: str = ""
    agreement: MaskAgreementFacts | None = None


class GatingFacts(_Facts):
    """Everything about the gates of one network.

    Attributes:
        network: the row of the network without its gates.
        data: the images that firing and MACs were measured on; ``None`` if they were not.
        images: how many.
        layers: all gated layers in forward order.
        files: the ONNX files that were written.
        failed: name of a row that is missing → why its file could not be written.
    """

    network: str
    data: str | None = None
    images: int | None = None
    layers: tuple[GateLayerFacts, ...] = ()
    macs: GateMacsFacts | None = None
    files: tuple[GatedFileFacts, ...] = ()
    failed: dict[str, str] = {}

    @property
    def gathered(self) -> frozenset[str]:
        """Returns the layers that some file gathers."""
        return frozenset(layer for file in self.files for layer in file.gathered)
