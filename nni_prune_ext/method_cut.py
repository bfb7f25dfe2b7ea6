"""What a method cuts out of a model: once, or again until its network takes the latency that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nni_prune_ext.certificate import Certificate, certify_plan, remove_channels
from nni_prune_ext.errors import CertificateError, PluginError
from nni_prune_ext.graph.channel_groups import ChannelGroups
from nni_prune_ext.latency import LatencyAim, LatencyEvidence
from nni_prune_ext.methods.base import MethodSpec, Outcome, PruningMethod
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.surgery import Removal, slice_state
from nni_prune_ext.training import MethodRun, drive


@dataclass(frozen=True)
class MethodCut:
    """A method that has run, and the network without its channels.

    Attributes:
        run: of the method; the last cut is carried out.
        outcome: what the method handed over, its weight masks cut to fit the network.
        removal: the last cut.
        composed: the method had cut before.
    """

    run: MethodRun
    outcome: Outcome
    removal: Removal
    composed: bool

    @property
    def plan(self) -> PruningPlan:
        """All removed channels in the coordinates of the original model."""
        return self.run.applied or self.outcome.plan

    @property
    def network(self) -> nn.Module:
        """The network as it was right after the cut."""
        return self.removal.model

    def certificate(self, model: nn.Module, groups: ChannelGroups) -> Certificate | None:
        """Returns the proof for the whole plan; several cuts are proved anew, as one.

        Args:
            model: the original one.
            groups: its own.

        Raises:
            CertificateError: the cuts together are not exact.
        """
        if not self.composed or not self.plan.num_removed:
            return self.removal.certificate
        found = certify_plan(model, self.plan, self.run.example_inputs, groups=groups, seed=self.run.seed)
        if not found.exact:
            raise CertificateError(f"The composed plan is not exact: {found.flaw()}. Please report this model.")
        return found


def cut_by_method(spec: MethodSpec, method: PruningMethod, run: MethodRun) -> MethodCut:
    """Runs a method and cuts what it leaves to be cut.

    Raises:
        PluginError: the method hands over masks that are none.
    """
    outcome = drive(method, run)
    composed = run.applied is not None
    if outcome.weight_masks is not None:
        _check_masks(spec, outcome.weight_masks, run.model)
    if outcome.plan.num_removed:
        removal = run.apply(outcome.plan)
        run.leave()
    else:
        removal = remove_channels(run.model, outcome.plan, run.example_inputs, groups=run.groups, seed=run.seed)
    if outcome.weight_masks is not None:
        outcome = replace(outcome, weight_masks=slice_state(outcome.weight_masks, removal.kept))
    return MethodCut(run, outcome, removal, composed)


def cut_to_latency(name: str, cut: Callable[[], MethodCut], aim: LatencyAim) -> tuple[MethodCut, LatencyEvidence]:
    """Lets a method that needs no training cut until its network takes the latency asked for, as nearly as it can.

    Args:
        name: of the method.
        cut: runs the method on a copy of the dense model, with the predictor that the aim has by then.
        aim: is left with the predictor that led to the network returned.

    Returns:
        the cut whose network came nearest, and its last measurement.
    """
    judged: list[tuple[MethodCut, LatencyEvidence]] = []
    while len(judged) < 2:
        made = cut()
        if aim.missed_by(name, made.plan, made.network):
            continue
        judged.append((made, aim.final(made.network, trained=False)))
        if len(judged) == 1 and not aim.should_correct(judged[0][1], made.network):
            break
    made, evidence = min(judged, key=lambda one: one[1].distance)
    aim.use(made.run.latency)
    return made, evidence


def _check_masks(spec: MethodSpec, masks: Mapping[str, Tensor], model: nn.Module) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, mask in masks.items():
        if mask.dtype is not torch.bool or tuple(mask.shape) != shapes.get(name):
            raise PluginError(
                f"The method '{spec.name}' hands over a mask '{name}' of {mask.dtype}, shape {tuple(mask.shape)}, "
                f"expected torch.bool and the shape of that parameter, {shapes.get(name)}. Report this to its author."
            )
