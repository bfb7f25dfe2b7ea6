"""Which ONNX flavour of a gated network is fastest here: every one is written, checked and measured side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from nni_prune_ext.deployment import runtime
from nni_prune_ext.errors import ConfigError, ExportError, NniPruneExtError, OutputError, ParityError
from nni_prune_ext.evaluation import LatencyReport, measure_latency
from nni_prune_ext.export.onnx_gated import GatedExport, export_gated
from nni_prune_ext.export.onnx_static import export_onnx, publish, temporary_folder_beside
from nni_prune_ext.export.parity import FAIL
from nni_prune_ext.gates import GatedNetwork
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.runtimes.base import RunnableModel

FEWEST_IMAGES = 8
FLAVOURS: Mapping[str, Mapping[str, str]] = {
    "mask": {"flavour": "mask"},
    "compact": {"flavour": "compact"},
    "compact, all layers": {"flavour": "compact", "gathered": "all"},
}
"""Name of a row → what is asked of the export."""
STATIC_CORE = "static core"
"""The network under the gates, with all that is left always running: another function, and the time to beat."""


@dataclass(frozen=True)
class FastestFlavour:
    """The flavour that was chosen, and the evidence.

    Attributes:
        export: the written file.
        name: of the chosen flavour: ``mask``, ``compact`` or ``compact, all layers``.
        latency: all flavours and references, measured side by side; the first row is the reference of the ratios.
        refused: flavour → why it was not considered: it could not be written, or is mask with a fixed batch.
        verdict: in words, also whether no flavour beats the references.
    """

    export: GatedExport
    name: str
    latency: LatencyReport
    refused: Mapping[str, str]
    verdict: str


def export_fastest(
    network: GatedNetwork,
    example_inputs: ExampleInputs,
    path: Path,
    images: Tensor,
    *,
    references: Mapping[str, Path] | None = None,
    fold: bool = False,
    opset: int = 18,
    properties: Mapping[str, str] | None = None,
    fail: float = FAIL,
    rounds: int = 30,
    min_seconds: float = 2.0,
) -> FastestFlavour:
    """Writes the fastest flavour that computes what the gated network computes, by measurement on this machine's CPU.

    One image at a time, one thread, interleaved. The static core is measured, too, and what else is given.

    Args:
        path: where the chosen file goes.
        images: real images ``(N, C, H, W)``, eight at least, 64 or more for the comparison with PyTorch.
        references: name → ONNX file to beat, such as the dense network; the first one is what ratios refer to.
        fold: layers that do not gain lose their gates in the flavour ``compact``: that is another function.
        opset: ONNX operator set.
        properties: further metadata for the file.
        fail: largest relative difference to PyTorch that passes where masks agree.
        rounds: fewest rounds of the measurement.
        min_seconds: shortest time for all rounds together.

    Raises:
        ConfigError: too few images.
        ParityError: no flavour computes what PyTorch computes.
        ExportError, OutputError: see ``export_gated``.
    """
    if len(images) < FEWEST_IMAGES:
        raise ConfigError(
            f"The fastest flavour is to be measured on {len(images)} images, expected {FEWEST_IMAGES} or more: the "
            "work of a gated network depends on the image. Pass more images."
        )
    taken = sorted({STATIC_CORE, *FLAVOURS} & set(references or {}))
    if taken:
        raise ConfigError(
            f"A reference is called '{taken[0]}', as one of the rows is. Expected another name. Rename it."
        )
    if path.is_dir():
        raise OutputError(f"'{path}' is a folder, expected the name of a file. Choose another path.")
    with temporary_folder_beside(path) as folder:
        write = partial(
            export_gated, network, example_inputs, images=images, properties=properties, opset=opset, fail=fail
        )
        made, refused = _flavours(write, folder, fold=fold)
        core = folder / "core.onnx"
        export_onnx(network.model, example_inputs, core, opset=opset, fail=fail)
        files = {**(references or {}), STATIC_CORE: core, **{name: own.path for name, own in made.items()}}
        entries = {name: (runtime("onnxruntime-cpu"), RunnableModel(onnx_path=file)) for name, file in files.items()}
        singles = [[np.ascontiguousarray(image[None].cpu().numpy())] for image in images]
        latency = measure_latency(entries, singles, rounds=rounds, min_seconds=min_seconds, threads=1)
        ratios = {row.name: row.ratio for row in latency.rows}
        best = min(made, key=ratios.__getitem__)
        made[best].path.replace(folder / path.name)
        publish(folder, path)
    verdict = _verdict(best, ratios, made, latency.error_bar)
    return FastestFlavour(replace(made[best], path=path), best, latency, refused, verdict)


def _flavours(
    write: Callable[..., GatedExport], folder: Path, *, fold: bool
) -> tuple[dict[str, GatedExport], dict[str, str]]:
    """Writes every flavour; returns the files, and why others were refused.

    Raises:
        NniPruneExtError: none could be written.
    """
    made: dict[str, GatedExport] = {}
    errors: dict[str, NniPruneExtError] = {}
    for number, (name, options) in enumerate(FLAVOURS.items()):
        folds = {"fold": True} if fold and name == "compact" else {}
        try:
            written = write(folder / f"{number}.onnx", **options, **folds)
        except (ConfigError, ExportError, ParityError) as error:
            errors[name] = error
            continue
        if written.flavour == "compact" and not written.gathered:
            errors[name] = _nothing_gathered(written)
            continue
        made[name] = written
    if not made:
        raise next(iter(errors.values()))
    return made, {name: str(error) for name, error in errors.items()}


def _nothing_gathered(written: GatedExport) -> ExportError:
    """Says why a compact file that gathers nothing is no candidate: it is the flavour mask for one image at a time."""
    layer, reason = next(iter(written.masked.items()))
    return ExportError(
        f"No gated layer would compute its open filters only ('{layer}': {reason}), expected one at least: the file "
        "would be that of the flavour mask, for one image at a time. Take the flavour mask, which runs any batch."
    )


def _verdict(best: str, ratios: Mapping[str, float], made: Mapping[str, GatedExport], error_bar: float) -> str:
    """Says which flavour is fastest, and which references it does not beat beyond the error of the measurement."""
    beaten = [name for name in ratios if name not in made and ratios[best] < ratios[name] * (1 - error_bar)]
    unbeaten = [name for name in ratios if name not in made and name not in beaten]
    said = f"The fastest flavour is '{best}', × {ratios[best]:.2f} of the first reference."
    if unbeaten:
        said += f" No flavour beats {' or '.join(f'{name} (× {ratios[name]:.2f})' for name in unbeaten)}."
    return said
