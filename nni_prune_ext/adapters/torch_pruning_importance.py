"""Our criteria as torch-pruning importances: scores of our channel groups, asked for by torch-pruning's groups."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nni_prune_ext.adapters.torch_pruning_groups import (
    ChannelNumbers,
    FollowedGroups,
    HostGroup,
    as_before,
    check_host,
    tensor_names,
)
from nni_prune_ext.errors import ConfigError, ModelError, PluginError
from nni_prune_ext.graph.channel_groups import ChannelGroups
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.pipeline import method_options, method_spec
from nni_prune_ext.registry import plugins
from nni_prune_ext.training import Batches, LossFunction, cross_entropy
from nni_prune_ext.training.method_run import MethodRun, seeded


class MethodImportance(tp.importance.Importance):  # type: ignore[misc]  # the host has no types
    """Scores torch-pruning's groups with a registered pruning method.

    Works with any ``torch_pruning`` pruner, as ``importance=``. All groups are scored at once whenever weights or
    shapes have changed since the last call. Groups whose channels must stay have no score, now and later; ``skipped``
    says why.

    Attributes:
        method: registered name of the method.
        skipped: root layer → why its group has no score.
        followed: the channel groups of the model as it is now.
    """

    method: ClassVar[str] = ""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        batches: Batches | None = None,
        loss: LossFunction = cross_entropy,
        seed: int = 0,
        options: dict[str, object] | None = None,
    ) -> None:
        """Takes the model that the pruner will cut; nothing is traced or scored yet.

        Args:
            batches: training data, needed by data-driven methods.
            loss: the user's loss of the model on a batch.
            seed: of everything random.
            options: configuration of the method. What concerns its own cuts only (``steps``, ``schedule``) plays no
                part here: torch-pruning decides when and how much.

        Raises:
            ConfigError: options out of range, data missing, or another version of torch-pruning.
            PluginError: the method is no criterion.
        """
        check_host()
        self.spec = self._usable(self.method)
        self.options = method_options(self.spec, options)
        if self.spec.needs_data and batches is None:
            raise ConfigError(
                f"{type(self).__name__} was given no data, expected training batches: the method '{self.spec.name}' "
                "computes a loss on them. Pass batches=."
            )
        self.model = model
        self.example_inputs = example_inputs
        self.batches = batches
        self.loss = loss
        self.seed = seed
        self.skipped: dict[str, str] = {}
        self.followed = FollowedGroups(model, example_inputs, seed=seed)
        self._state: object = None
        self._scores = torch.zeros(0)
        self._numbers = ChannelNumbers({}, {})
        self._names: dict[int, str] = {}

    def __call__(self, group: HostGroup) -> Tensor | None:
        """Returns one score per index of the group's first item, higher = keep.

        Returns:
            ``(len(group[0].idxs),)`` float32 on the CPU, or ``None`` where the channels must stay.

        Raises:
            ModelError: the group is of another model.
            PluginError: the method's scores have a wrong shape or are no numbers.
        """
        root = self._root(group)
        if root in self.skipped:
            return None
        self._refresh()
        behind = self._numbers.behind(group, self._names)
        if behind is None:
            self.skipped[root] = self._reason(root)
            return None
        return torch.stack([self._scores[torch.from_numpy(channels)].mean() for channels in behind])

    @staticmethod
    def _usable(name: str) -> MethodSpec:
        return scoring_method(name)

    def _root(self, group: HostGroup) -> str:
        module: object = group[0].dep.target.module
        layers: dict[str, nn.Module] = dict(self.model.named_modules())
        for name, own in layers.items():
            if own is module:
                return name
        raise ModelError(
            f"{type(self).__name__} was asked for a group of {type(module).__name__}, which is no layer of its "
            f"model, a {type(self.model).__name__}. Make the importance from the very model that the pruner gets."
        )

    def _refresh(self) -> None:
        state = _state_of(self.model)
        if state == self._state:
            return
        groups = self.followed.current()
        self._scores = self._score(groups)
        self._numbers = ChannelNumbers.of(groups)
        self._names = tensor_names(self.model)
        self._state = state

    def _score(self, groups: ChannelGroups) -> Tensor:
        """Returns the scores of all channels of all groups in a row."""
        if self.spec.scores is None or not len(groups):
            return torch.zeros(0)
        run = MethodRun(
            model=self.model,
            batches_=() if self.batches is None else self.batches,
            loss=self.loss,
            groups=groups,
            example_inputs=self.example_inputs,
            seed=self.seed,
        )
        with as_before(self.model), seeded(self.model, self.seed):
            scores = self.spec.scores(run, self.options)
        return torch.cat([_checked(self.spec, scores.get(g.name), g.name, g.num_channels) for g in groups])

    def _reason(self, root: str) -> str:
        for protected in self.followed.current().protected:
            if protected.root == root:
                return protected.reason
        return "some of its channels must stay, or torch-pruning's indices do not fit its layers"


class L1Importance(MethodImportance):
    """Scores channels by the mean magnitude of the weights that hold them."""

    method = "l1"


class L2Importance(MethodImportance):
    """Scores channels by the root mean square of the weights that hold them."""

    method = "l2"


class FPGMImportance(MethodImportance):
    """Scores channels by their distance to the geometric median of their layer's filters."""

    method = "fpgm"


class RandomImportance(MethodImportance):
    """Scores channels by a seeded draw: the baseline that every criterion must beat."""

    method = "random"


class TaylorImportance(MethodImportance):
    """Scores channels by their first-order effect on the loss over a few batches."""

    method = "taylor"


def scoring_method(name: str) -> MethodSpec:
    """Returns a registered method that is a criterion.

    Raises:
        UnknownPluginError: no such method.
        PluginError: it has no scores; those that have are named.
    """
    spec = method_spec(name)
    if spec.scores is None:
        others = [other for other in plugins("pruners") if method_spec(other).scores is not None]
        raise PluginError(
            f"The method '{name}' has no scores, expected one that is a criterion: it decides in another way "
            f"(training, gates, search). Use one of {', '.join(others)} here, and '{name}' through importance_for or "
            "nni_prune_ext.prune."
        )
    return spec


def _checked(spec: MethodSpec, scores: Tensor | None, group: str, num_channels: int) -> Tensor:
    shape = None if scores is None else tuple(scores.shape)
    if scores is None or shape != (num_channels,) or bool(torch.isnan(scores).any()):
        seen = f"shape {shape}" if shape != (num_channels,) else "NaN"
        raise PluginError(
            f"The scores of method '{spec.name}' for group '{group}' have {seen}, expected ({num_channels},) "
            "numbers, one per channel. Report this to its author; see docs/how-to/write_a_method.md."
        )
    return scores.detach().float().cpu()


def _state_of(model: nn.Module) -> object:
    """Returns what changes with any weight: identities, versions and sums (``.data`` leaves versions as they are)."""
    tensors = [tensor.detach() for _, tensor in named_tensors(model)]
    versions = tuple((id(tensor), tensor._version) for _, tensor in named_tensors(model))
    sums = torch.stack([tensor.sum().to("cpu", torch.float64) for tensor in tensors]) if tensors else torch.zeros(0)
    return versions, tuple(sums.tolist()), tuple(tuple(tensor.shape) for tensor in tensors)
