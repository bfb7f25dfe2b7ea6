"""Constants that removed channels carry: measured where they are read, and put into the bias of the reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nni_prune_ext.adapters.nni_masks import LayerMasks
from nni_prune_ext.adapters.nni_speedup_channels import TRANSPOSED, ReaderInputs, Reading, masked_activations
from nni_prune_ext.adapters.nni_speedup_errors import ConstantError
from nni_prune_ext.graph.channel_groups import root_name
from nni_prune_ext.graph.model_copy import copy_model, named_tensors
from nni_prune_ext.graph.randomised import difference, outputs
from nni_prune_ext.graph.rewrites import apply_rewrites
from nni_prune_ext.graph.state import unchanged_globals
from nni_prune_ext.inputs import ExampleInputs, cast_floats, random_like
from nni_prune_ext.surgery import Removal

_INPUTS = 3
_EXACT = 1e-9
"""Largest relative error that counts as exact, in float64."""
_REMEDY = (
    "Mask the shifts too: of batch norms behind masked convolutions with nni_prune_ext.utils.align_batchnorm, of "
    "masked batch norms by the same mask for weight and bias. Or drop constants."
)


def masked_copy(model: nn.Module, masks: LayerMasks) -> nn.Module:
    """Returns a copy whose masked weights are zero; kept tensors are the copy's own."""
    copy = copy_model(model)
    with torch.no_grad():
        tensors = dict(named_tensors(copy))
        for name, mask in masks.tensors.items():
            tensors[name].mul_(mask.to(tensors[name]))
    return copy


def absorb_constants(
    model: nn.Module, masks: LayerMasks, removal: Removal, example_inputs: ExampleInputs
) -> tuple[str, ...]:
    """Adds what the removed channels carried to the biases of a compact model, and shows that this is exact.

    Args:
        model: the model that the masks are for, with its own weights.
        removal: the compact model with masked weights; it gets the biases.

    Returns:
        the layers whose bias took something over.

    Raises:
        ConstantError: a removed channel is not constant for one of its readers, or the result differs from the masked
            model; the reader and the remedy are named.
    """
    masked = masked_copy(model, masks).double().eval()
    generator = torch.Generator().manual_seed(0)
    inputs = cast_floats(example_inputs, torch.float64)
    tried = [inputs, *(random_like(inputs, generator) for _ in range(_INPUTS))]
    readings = _Readings(_lost_columns(removal, masks))
    with unchanged_globals(), torch.no_grad():
        if removal.plan.rewrites:
            masked = apply_rewrites(masked, removal.plan.rewrites, inputs)
        expected = []
        for given in tried:
            with masked_activations(masked, masks), ReaderInputs(masked, readings.note):
                expected.append(outputs(masked, given, torch.float64))
        shifts = readings.shifts(masked)
        compact = copy_model(removal.model).double().eval()
        _add(compact, removal, shifts)
        error = max(difference(outputs(compact, given, torch.float64), dense) for given, dense in zip(tried, expected))
    if not error <= _EXACT:
        raise ConstantError(
            f"With constants absorbed, the compact and the masked model still differ by {error:.1e} (relative), "
            f"allowed {_EXACT:.0e}: masks of inputs and outputs that stay, or a norm over channels, cannot be put into "
            f"biases. {_REMEDY}"
        )
    _add(removal.model, removal, shifts)
    return tuple(root_name(name) for name in shifts)


def _lost_columns(removal: Removal, masks: LayerMasks) -> dict[Reading, Tensor]:
    """Returns reader → ``(W,)`` bool over its columns, ``True`` where removed and not masked itself."""
    lost = {}
    for group in removal.groups:
        for member in group.members:
            kept = removal.kept.get(member.tensor, {}).get(member.dim)
            if not member.reads or kept is None:
                continue
            columns = torch.ones(removal.groups.shapes[member.tensor][member.dim], dtype=torch.bool)
            columns[kept.cpu()] = False
            silent = masks.silent(member.tensor, member.dim)
            if silent is not None:
                columns[torch.from_numpy(silent)] = False
            if columns.any():
                lost[member.tensor, member.dim] = columns
    return lost


@dataclass
class _Readings:
    """What the readers of the masked model see of the removed channels."""

    lost: Mapping[Reading, Tensor]
    values: dict[Reading, Tensor] = field(default_factory=dict)
    """Reader → ``(groups, W)`` float64, zero where nothing was removed."""

    def note(self, reading: Reading, x: Tensor, call: Mapping[str, object]) -> None:
        """Notes one call of a reader.

        Args:
            x: what it reads, channels first.

        Raises:
            ConstantError: a removed channel is not one constant, or no bias can stand for it.
        """
        lost, weight = self.lost.get(reading), reading[0]
        if lost is None:
            return
        flat = x.reshape(-1, len(lost), x[0].numel())  # partners in the groups of a grouped convolution come first
        found = torch.where(lost.to(x.device), flat[:, :, 0], 0)
        value = self.values.setdefault(reading, found)
        bound = _EXACT * max(float(flat.abs().max()), 1e-30)
        gap = (flat - value[:, :, None]).abs().amax((0, 2))
        if float(gap[lost].max()) > bound:
            raise ConstantError(
                f"A masked channel ({int((gap * lost.to(gap)).argmax())}) that '{root_name(weight)}' reads differs "
                f"over positions or inputs by {float(gap[lost].max()):.1e}, expected one constant. {_REMEDY}"
            )
        if float(value.abs().max()) <= bound:
            return
        if call["call"] in ("channel_select", *TRANSPOSED) or not _unpadded(call["padding"]):
            raise ConstantError(
                f"'{root_name(weight)}' pads its input with zeros or spreads it, and reads a masked channel "
                f"({int(value.abs().amax(0).argmax())}) that still carries {float(value.abs().max()):.1e}, expected "
                f"zero there: no bias can stand for it at the borders. {_REMEDY}"
            )

    def shifts(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns reader → what its outputs owe to the removed channels, ``(outputs,)`` float64; zeros are left out."""
        weights = dict(named_tensors(model))
        result = {}
        for (name, _), value in self.values.items():
            if bool(value.any()):
                kernel = weights[name].flatten(2).sum(2) if weights[name].dim() > 2 else weights[name]
                per_group = kernel.view(len(value), -1, value.shape[1])
                result[name] = (per_group * value[:, None]).sum(2).reshape(-1)
        return result


def _unpadded(padding: object) -> bool:
    if isinstance(padding, (tuple, list)):
        return not any(padding)
    return padding in (0, "valid")


def _add(model: nn.Module, removal: Removal, shifts: Mapping[str, Tensor]) -> None:
    """Adds to the biases of a compact model, in its own precision; a layer without one gets one."""
    compact = dict(named_tensors(model))
    for name, shift in shifts.items():
        weight = compact[name]
        kept = removal.kept.get(name, {}).get(0)
        owners = [m for m in model.modules() if getattr(m, "weight", None) is weight and "bias" in m._parameters]
        if not owners:
            raise ConstantError(
                f"'{name}' reads constants of removed channels, but is not the weight of a layer that may have a bias. "
                f"{_REMEDY}"
            )
        alive = shift if kept is None else shift[kept.to(shift.device)]
        for bias in {id(owner._parameters["bias"]): owner._parameters["bias"] for owner in owners}.values():
            if bias is not None:
                bias.data.add_(alive.to(bias))
        for owner in owners:
            if owner._parameters["bias"] is None:
                owner._parameters["bias"] = nn.Parameter(alive.to(weight), requires_grad=weight.requires_grad)
