"""NNI's ``ModelSpeedup``: masks in, a smaller model out, in place; channels are removed and certified by the core."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from nni_prune_ext.adapters.nni_masks import LayerMasks, layer_masks, read_masks
from nni_prune_ext.adapters.nni_speedup_channels import removable_channels
from nni_prune_ext.adapters.nni_speedup_constants import absorb_constants, masked_copy
from nni_prune_ext.adapters.nni_speedup_errors import ConstantError, EmptyLayerError, SpeedupError
from nni_prune_ext.adapters.nni_speedup_report import SpeedupReport, kept_masks, lost_outputs
from nni_prune_ext.adapters.nni_targets import inputs_of
from nni_prune_ext.certificate import remove_channels, verify_groups
from nni_prune_ext.errors import CertificateError
from nni_prune_ext.graph.channel_groups import ChannelGroups, root_name, trace_channel_groups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.plan import Channels, PruningPlan, plan_from_channels
from nni_prune_ext.surgery import Removal, take_over


class ModelSpeedup:
    """Removes the channels that NNI's masks silence; a drop-in for ``nni.compression.speedup.ModelSpeedup``.

    A channel goes if no reader of the masked model can tell it from a constant. Layers that are coupled lose a channel
    only together: where their masks do not agree it stays, with its weights, and the report says so. What reaches the
    model's output stays.

    Args:
        model: the plain model, unwrapped; changed in place by :meth:`speedup_model`.
        dummy_input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        masks_or_file: masks as ``pruner.compress`` returns them, or a file that ``torch.save`` wrote of them, which is
            read without running code. They are not changed.
        map_location: where tensors of the file are put, as in ``torch.load``.
        batch_dim: ignored; channels are followed by name, not by batch.
        batch_size: ignored, for the same reason.
        customized_mask_updaters: ignored; no operation needs a rule for masks here.
        customized_replacers: ignored; tensors are cut by name, not module by module.
        graph_module: ignored; the model itself is traced.
        garbage_collect_values: ignored.
        logger: takes what was done, at level INFO; ``None`` shows it on standard output.
        constants: what becomes of constants that removed channels still carry, such as the shift of a batch norm
            behind a masked convolution: ``"drop"`` them (NNI's semantics; a few steps of training make up for it), or
            ``"absorb"`` them into the bias of the layers that read them, so that the compact model computes exactly
            what the masked one does.

    Attributes:
        removal: what was cut, after :meth:`speedup_model`.
        report: what went, what stayed although it was masked, and the certificate, after :meth:`speedup_model`.

    Raises:
        SpeedupError: masks cannot be read, are those of another model, are fine-grained, or the model is wrapped; also
            a subclass of NNI's error of this name.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,  # whatever the model takes
        masks_or_file: Any,  # NNI has no type for masks
        map_location: Any = None,  # torch.load has none either
        batch_dim: int = 0,
        batch_size: int = 8,
        customized_mask_updaters: Sequence[object] | None = None,
        customized_replacers: Sequence[object] | None = None,
        graph_module: torch.fx.GraphModule | None = None,
        garbage_collect_values: bool = True,
        logger: logging.Logger | None = None,
        *,
        constants: Literal["drop", "absorb"] = "drop",
    ) -> None:
        if constants not in ("drop", "absorb"):
            raise SpeedupError(
                f"constants is {constants!r}, expected 'drop' (NNI's semantics) or 'absorb' (exactly the masked model)."
                " Leave it out to keep NNI's."
            )
        self.bound_model = model
        self.dummy_input = inputs_of(dummy_input)
        self.masks: LayerMasks = layer_masks(read_masks(masks_or_file, map_location), model)
        self.logger = logger
        self.constants = constants
        self.removal: Removal | None = None
        self.report: SpeedupReport | None = None

    def speedup_model(self) -> nn.Module:
        """Makes the model smaller, in place, and returns it; modes, devices and ``requires_grad`` stay.

        Parameters are new objects: make a new optimizer.

        Raises:
            SpeedupError: a layer would lose all its channels, constants cannot be absorbed, or it is the second call;
                the model is unchanged.
            NniPruneExtError: the model cannot be followed, or the removal is not exact; the model is unchanged.
        """
        if self.removal is not None:
            raise SpeedupError(
                f"This {type(self.bound_model).__name__} has already been sped up, expected one call. Its masks are "
                "used up: for more, prune the smaller model and make a new ModelSpeedup with the masks of that."
            )
        if self.constants == "absorb":
            _refuse_disputed(self.masks)
        model, before = self.bound_model, _count(self.bound_model)
        source = masked_copy(model, self.masks) if self.constants == "absorb" else model
        removal, gone = removal_of(source, self.masks, self.dummy_input, exact=self.constants == "absorb")
        absorbed: tuple[str, ...] = ()
        if self.constants == "absorb":
            absorbed = absorb_constants(model, self.masks, removal, self.dummy_input)
        kept = tuple(kept_masks(model, self.masks, removal.groups, gone))
        if removal.plan.num_removed or self.constants == "absorb":
            take_over(model, removal.model)
        self.removal = replace(removal, model=model)
        self.report = SpeedupReport(
            removed=lost_outputs(removal),
            kept=kept,
            fine_grained=self.masks.fine_grained,
            params=(before, _count(model)),
            constants=self.constants,
            absorbed=absorbed,
            certificate=removal.certificate,
            unreached=removal.groups.unreached,
        )
        self._show(self.report.text())
        return model

    def _show(self, text: str) -> None:
        if self.logger is not None:
            self.logger.info("%s", text)
        else:
            Console(soft_wrap=True).print(text, markup=False, highlight=False)


def _refuse_disputed(masks: LayerMasks) -> None:
    for tensor, users in masks.disputed.items():
        names = ", ".join(f"'{name}'" for name in users)
        raise ConstantError(
            f"'{tensor}' is the weight of {names} and masked differently by them, but one tensor cannot be all of "
            "these. Give all layers that share it the same mask, mask none of them, or drop constants: then only what "
            "all of them mask goes."
        )


def removal_of(
    model: nn.Module, masks: LayerMasks, example_inputs: ExampleInputs, *, exact: bool = False
) -> tuple[Removal, dict[str, Channels]]:
    """Returns the certified removal of all channels that masks remove, and these per group; the model is not changed.

    Groups that cannot be removed exactly are searched for only if the whole is not exact.

    Args:
        exact: shifts count as signals (see ``removable_channels``).
    """
    groups = trace_channel_groups(model, example_inputs)
    try:
        return _removal(model, masks, example_inputs, groups, exact)
    except CertificateError:
        return _removal(model, masks, example_inputs, verify_groups(model, example_inputs, groups), exact)


def _removal(
    model: nn.Module, masks: LayerMasks, example_inputs: ExampleInputs, groups: ChannelGroups, exact: bool
) -> tuple[Removal, dict[str, Channels]]:
    gone = removable_channels(model, masks, example_inputs, groups, heed_shifts=exact)
    return remove_channels(model, _plan(groups, gone), example_inputs, groups=groups), gone


def _plan(groups: ChannelGroups, gone: dict[str, Channels]) -> PruningPlan:
    for group in groups:
        for member in group.by_role(Role.WRITER, Role.DEPTHWISE):
            if gone[group.name][member.channel].all():
                raise EmptyLayerError(
                    f"'{root_name(member.tensor)}' would lose all of its {len(member.index)} channels (group "
                    f"'{group.name}'), expected at least one to stay. Lower its sparse_ratio, or set "
                    "max_sparse_ratio below 1; under a global_group_id the layer's own cap counts."
                )
    return plan_from_channels(groups, {name: channels for name, channels in gone.items() if channels.any()})


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
