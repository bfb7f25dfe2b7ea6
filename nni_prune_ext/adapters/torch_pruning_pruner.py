"""torch-pruning's pruner with our surgery: it selects the channels, we cut them, certified, and say what was done.

torch-pruning's own cut misplaces layer-norm weights, drops memory formats and loses optimizers; none of its slicing
code runs here. Its selection (scopes, ratios, schedules) is used as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch_pruning as tp
from torch import Tensor, nn
from torch.optim import Optimizer

from nni_prune_ext.adapters.torch_pruning_checks import check_arguments
from nni_prune_ext.adapters.torch_pruning_groups import (
    FollowedGroups,
    HostGroup,
    as_before,
    check_host,
    positional,
    tensor_names,
    writing_items,
)
from nni_prune_ext.adapters.torch_pruning_history import HistoryEntry, plan_from_history, plan_to_history
from nni_prune_ext.adapters.torch_pruning_importance import MethodImportance
from nni_prune_ext.adapters.torch_pruning_report import LayerChange, StepReport
from nni_prune_ext.certificate import remove_channels
from nni_prune_ext.errors import ConfigError, PlanError, TraceError
from nni_prune_ext.graph.channel_groups import ChannelGroups, root_name
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.plan import Channels, PruningPlan, plan_from_masks
from nni_prune_ext.surgery import Removal, remap_optimizer, take_over

_GRAPH_ARGUMENTS = ("forward_fn", "output_transform", "customized_pruners")
_HOST_FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
)


class CertifiedPruner(tp.pruner.BasePruner):  # type: ignore[misc]  # the host has no types
    """A ``torch_pruning`` pruner whose every step is certified, and reported.

    Takes the keyword arguments of ``tp.pruner.BasePruner`` with their meanings. The model is changed in place and its
    modules stay the objects they are; parameters are new objects.

    Attributes:
        optimizer: follows every cut, state included, where one is set.
    """

    current_step: int
    iterative_steps: int
    ignored_params: list[nn.Parameter]
    ignored_layers: list[nn.Module]

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        importance: Callable[[HostGroup], Tensor | None],
        *,
        optimizer: Optimizer | None = None,
        seed: int = 0,
        **arguments: Any,  # those of tp.pruner.BasePruner, which has no types
    ) -> None:
        """Builds torch-pruning's graph; the model's mode, gradients and ``requires_grad`` stay as they are.

        Args:
            example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            importance: any torch-pruning importance, ours or not.
            optimizer: over parameters of the model; follows every cut.
            seed: of the certificate's probes.

        Raises:
            ConfigError: an argument that torch-pruning would ignore or misread, or another version of it.
            TraceError: torch-pruning cannot build its graph of the model.
        """
        check_host()
        arguments = check_arguments(model, arguments)
        self.optimizer = optimizer
        self.seed = seed
        self._followed = FollowedGroups(model, example_inputs, seed=seed)
        if isinstance(importance, MethodImportance) and importance.model is model:
            self._followed = importance.followed  # one trace for both
        self._inputs = example_inputs
        self._graph_arguments = {key: arguments[key] for key in _GRAPH_ARGUMENTS if key in arguments}
        self._unwrapped = _named(model, arguments.get("unwrapped_parameters"))
        self._asked: dict[str, bool] = {}
        self._misplaced: dict[str, str] = {}
        self._history: list[list[object]] | None = []
        with _host_at_work(model):
            super().__init__(model, self._host_inputs(), importance, **arguments)

    def step(self, interactive: bool = False) -> StepReport:
        """Lets torch-pruning select channels, cuts them in place, and returns what was done.

        Raises:
            ConfigError: ``interactive`` was asked for.
            CertificateError: the cut would not be exact; model and step count are as before.
        """
        if interactive:
            raise ConfigError(
                "CertifiedPruner.step was called with interactive=True, expected False: its groups would be cut one by "
                "one, without a certificate. Use tp.pruner.BasePruner for that, or read the report of step()."
            )
        before = self.current_step
        try:
            groups = self._open_groups()
            masks, requested = self._selection()
            plan = plan_from_masks(groups, masks)
            widths = {layer: len(keep) for layer, keep in masks.items()}
            params = _num_params(self.model)
            removal = self._carry_out(plan, groups) if plan.num_removed else None
        except BaseException:
            self.current_step = before
            raise
        tensors = dict(named_tensors(self.model))
        layers = tuple(
            LayerChange(layer, widths[layer], requested[layer], tensors[f"{layer}.weight"].shape[self._dim(layer)])
            for layer in masks
        )
        return StepReport(
            self.current_step, layers, self._skipped(layers, groups), params, _num_params(self.model), removal
        )

    def estimate_importance(self, group: HostGroup) -> Tensor | None:
        """Scores a group, and notes for the report that torch-pruning asked for it."""
        scores: Tensor | None = super().estimate_importance(group)
        for _, (tensor, _), _ in writing_items(group, tensor_names(self.model)):
            self._asked[root_name(tensor)] = scores is not None
        return scores

    def pruning_history(self) -> list[list[object]]:
        """Returns all cuts so far, as torch-pruning records them.

        Raises:
            PlanError: a cut has rewritten a shortcut, for which torch-pruning has no record.
        """
        if self._history is None:
            raise PlanError(
                f"The cuts of this {type(self.model).__name__} cannot be written as torch-pruning's history, expected "
                "cuts of layers only: a shortcut was rewritten, or a bare parameter cut. Keep the plans instead: "
                "report.removal.plan of every step, joined by then()."
            )
        return list(self._history)

    def load_pruning_history(self, pruning_history: Sequence[HistoryEntry]) -> None:
        """Carries out a history as one certified cut.

        Raises:
            PlanError: the history is not of this model.
            CertificateError: the cut would not be exact; the model is as before.
        """
        groups = self._followed.current()
        plan = plan_from_history(groups, pruning_history)
        if plan.num_removed:
            self._carry_out(plan, groups)

    def manual_prune_width(self, layer: nn.Module, pruning_fn: object, pruning_ratios_or_idxs: object) -> None:
        """Refuses: torch-pruning keeps the share that it is asked to remove.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"manual_prune_width was called with {pruning_ratios_or_idxs!r}: torch-pruning 1.6 removes one minus the "
            "ratio given, and without a certificate. Expected a plan: make one with nni_prune_ext.plan_from_masks and "
            "carry it out with remove_channels, or set pruning_ratio_dict."
        )

    def _selection(self) -> tuple[dict[str, Channels], dict[str, int]]:
        """Returns layer → keep mask over its output channels, and how many of them are not kept."""
        self._asked, self._misplaced = {}, {}
        names = tensor_names(self.model)
        tensors = dict(named_tensors(self.model))
        masks: dict[str, Channels] = {}
        for group in super().step(interactive=True):
            cuts = [(tensor, tensors[tensor].shape[dim], at) for _, (tensor, dim), at in writing_items(group, names)]
            beyond = [root_name(tensor) for tensor, width, at in cuts if at.size and at.max() >= width]
            for tensor, width, positions in cuts:
                if beyond:
                    self._misplaced[root_name(tensor)] = beyond[0]
                else:
                    masks.setdefault(root_name(tensor), np.ones(width, dtype=np.bool_))[positions] = False
        return masks, {layer: int((~keep).sum()) for layer, keep in masks.items()}

    def _open_groups(self) -> ChannelGroups:
        """Returns the groups without those that hold an ignored parameter."""
        groups = self._followed.current()
        names = tensor_names(self.model)
        ignored = {names[id(parameter)] for parameter in self.ignored_params if id(parameter) in names}
        held = {g.name: sorted(ignored & {m.tensor for m in g.members}) for g in groups}
        return groups.protecting(
            {name: f"'{tensors[0]}' of this group is in ignored_layers" for name, tensors in held.items() if tensors}
        )

    def _carry_out(self, plan: PruningPlan, groups: ChannelGroups) -> Removal:
        """Cuts the model in place and makes torch-pruning's graph, history and parameter lists follow."""
        removal = remove_channels(self.model, plan, self._inputs, groups=groups, seed=self.seed)
        self._history = self._continued_history(plan, groups)
        names = tensor_names(self.model)
        ignored = [names[id(parameter)] for parameter in self.ignored_params]
        if self.optimizer is not None:
            remap_optimizer(self.optimizer, self.model, removal)
        take_over(self.model, removal.model)
        parameters = dict(self.model.named_parameters())
        self.ignored_params = [parameters[name] for name in ignored]
        with _host_at_work(self.model):
            self.DG = tp.DependencyGraph().build_dependency(
                self.model,
                example_inputs=self._host_inputs(),
                unwrapped_parameters=[(parameters[name], dim) for name, dim in self._unwrapped] or None,
                ignored_params=self.ignored_params,
                verbose=False,
                **self._graph_arguments,
            )
        self.DG.pruning_history().extend(self._history or ())
        self._refresh_channel_groups()
        return replace(removal, model=self.model)

    def _continued_history(self, plan: PruningPlan, groups: ChannelGroups) -> list[list[object]] | None:
        """Returns all cuts so far, ``None`` once one of them cannot be written as torch-pruning's history."""
        try:
            return None if self._history is None else [*self._history, *plan_to_history(plan, groups)]
        except PlanError:
            return None

    def _refresh_channel_groups(self) -> None:
        """Reads the numbers of convolution and norm groups again; those of attention heads stay the user's."""
        for module in self.model.modules():
            host = self.DG.get_pruner_of_module(module)
            if module in self.out_channel_groups and module not in self.num_heads:
                self.out_channel_groups[module] = host.get_out_channel_groups(module)
            if module in self.in_channel_groups and module not in self.num_heads:
                self.in_channel_groups[module] = host.get_in_channel_groups(module)

    def _host_inputs(self) -> object:
        return self._inputs if "forward_fn" in self._graph_arguments else positional(self._inputs)

    def _dim(self, layer: str) -> int:
        module = self.model.get_submodule(layer)
        if isinstance(module, nn.Embedding):
            return 1
        return int(getattr(module, "transposed", False) and module.groups == 1)

    def _skipped(self, layers: Sequence[LayerChange], groups: ChannelGroups) -> dict[str, str]:
        """Returns layer → why it lost no channel, or fewer than torch-pruning selected."""
        protected = {entry.root: entry.reason for entry in groups.protected}
        result = {
            change.layer: protected.get(
                change.layer,
                f"{change.requested - change.removed} selected channels are tied to others that torch-pruning keeps, "
                "or the last of a layer",
            )
            for change in layers
            if change.removed < change.requested
        }
        selected = {change.layer for change in layers}
        for name, module in self.model.named_modules():
            if name not in selected and isinstance(module, tuple(self.root_module_types)):
                result[name] = self._why_not(name, module, protected)
        return result

    def _why_not(self, name: str, module: object, protected: Mapping[str, str]) -> str:
        if self.current_step > self.iterative_steps:
            return f"all {self.iterative_steps} steps were made before"
        if module in self.ignored_layers:
            return "is in ignored_layers"
        if name in self._misplaced:
            return f"torch-pruning's indices lie outside '{self._misplaced[name]}', which is coupled to it"
        if name not in self._asked:
            return (
                "torch-pruning asked for no score: a layer coupled to it is in ignored_layers, is at "
                "max_pruning_ratio or its last channel, or is attention without a root"
            )
        if not self._asked[name]:
            own = getattr(self.importance, "skipped", {})
            return protected.get(name) or str(own.get(name, "the importance gave no scores"))
        return "torch-pruning selected none of its channels: the ratio of this step is reached, or all would have gone"


def _named(model: nn.Module, unwrapped: Sequence[tuple[nn.Parameter, int]] | None) -> list[tuple[str, int]]:
    names = tensor_names(model)
    result = []
    for parameter, dim in unwrapped or ():
        if id(parameter) not in names:
            raise ConfigError(
                f"unwrapped_parameters holds a parameter of shape {tuple(parameter.shape)} that is not of "
                f"{type(model).__name__}, expected its own. Take it from model.named_parameters()."
            )
        result.append((names[id(parameter)], dim))
    return result


def _num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _host_at_work(model: nn.Module) -> Iterator[None]:
    """Lets torch-pruning trace the model: with gradients everywhere, and nothing of it left behind."""
    with as_before(model):
        model.requires_grad_(True)
        try:
            yield
        except _HOST_FAILURES as error:
            raise TraceError(
                f"torch-pruning cannot build its graph of {type(model).__name__}: {type(error).__name__}: {error}. "
                "Expected a model that its tracer understands. Prune it with nni_prune_ext.prune, which has its own."
            ) from error
