"""Our ratio policies in torch-pruning: the ratio of every layer is set anew before each step of a pruner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from nni_prune_ext.adapters.torch_pruning_groups import HostGroup, check_host, tensor_names, writing_items
from nni_prune_ext.allocation.ratio_scaling import scaled_ratios
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.graph.model_copy import named_tensors
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.schedules import RatioPolicy, build_ratio_policy, informed_ratio_policy, needs_data
from nni_prune_ext.scoring.weight_norms import slice_rows
from nni_prune_ext.training import Batches, LossFunction, cross_entropy
from nni_prune_ext.training.method_run import MethodRun


def adapt_ratios(
    pruner: tp.pruner.BasePruner,
    policy: str = "psap_ratio",
    *,
    batches: Batches | None = None,
    example_inputs: ExampleInputs | None = None,
    loss: LossFunction = cross_entropy,
) -> dict[str, float]:
    """Divides the next step of a torch-pruning pruner among its groups of layers by a registered ratio policy.

    Call it before every ``pruner.step()``. How much is removed in all stays what the pruner's schedule says; how much
    of each group follows from the network as it is now, also where the policy looks at data. What is gone already, and
    ``max_pruning_ratio``, bound the ratios. torch-pruning rounds the channels of each group up.

    Args:
        pruner: ours or torch-pruning's own, made with ``pruning_ratio_dict={model: ratio}`` so that layers have ratios
            of their own.
        policy: registered name.
        batches: training data, for a policy that needs them (``firing_signature``).
        example_inputs: the same.
        loss: the user's loss of the model on a batch.

    Returns:
        first layer of each group → its ratio after the step, of the channels it had at first. Empty where all steps
        were made.

    Raises:
        UnknownPluginError: no such scheduler.
        PluginError: it is no ratio policy.
        ConfigError: the pruner ranks layers together, a layer has no ratio of its own, there is nothing to prune, or
            data are missing.
        TargetError: the bounds do not allow what the schedule asks for.

    Example:
        >>> import torch, torchvision
        >>> from nni_prune_ext.torch_pruning import CertifiedPruner, L2Importance, adapt_ratios
        >>> model, x = torchvision.models.resnet18(), torch.randn(1, 3, 64, 64)
        >>> pruner = CertifiedPruner(
        ...     model, x, L2Importance(model, x), pruning_ratio_dict={model: 0.3}, iterative_steps=2,
        ...     ignored_layers=[model.fc],
        ... )
        >>> ratios = adapt_ratios(pruner, "psap_ratio")
        >>> report = pruner.step()
    """
    check_host()
    rule = build_ratio_policy(policy)
    if needs_data(policy) and (batches is None or example_inputs is None):
        missing = "batches" if batches is None else "example_inputs"
        raise ConfigError(
            f"The ratio policy '{policy}' looks at data, but {missing} were not given, expected training batches and "
            "an example input. Pass batches= and example_inputs=."
        )
    if pruner.global_pruning:
        raise ConfigError(
            "The pruner has global_pruning=True, expected False: it ranks the channels of all layers together, so that "
            "no layer has a ratio. Make it without global_pruning."
        )
    step = pruner.current_step + 1
    if step > pruner.iterative_steps:
        return {}
    names, tensors = tensor_names(pruner.model), dict(named_tensors(pruner.model))
    weights: dict[str, list[Tensor]] = {}
    layers: dict[str, list[nn.Module]] = {}
    first: dict[str, int] = {}
    previous: dict[str, float] = {}
    tensor_of: dict[str, str] = {}
    for group in pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    ):
        written = [(tensor, dim, at) for _, (tensor, dim), at in writing_items(group, names)]
        if not written:
            continue
        name, root = written[0][0].removesuffix(".weight"), group[0].dep.target.module
        weights[name] = [slice_rows(tensors[tensor].detach(), dim)[at] for tensor, dim, at in written]
        layers[name] = list(_writers(pruner, group))
        tensor_of[name] = written[0][0]
        first[name] = pruner.layer_init_out_ch[root]
        previous[name] = 1 - pruner.DG.get_out_channels(root) / first[name]
    _check(pruner, layers)
    if batches is not None and example_inputs is not None:
        rule = _informed(policy, MethodRun(pruner.model, batches, loss, example_inputs=example_inputs), tensor_of)
    relative = rule(weights, previous, step / pruner.iterative_steps)
    due = {name: pruner.pruning_ratio_dict[own[0]][step] for name, own in layers.items()}
    share = sum(first[name] * ratio for name, ratio in due.items()) / sum(first.values())
    caps = {name: max(float(pruner.max_pruning_ratio), gone) for name, gone in previous.items()}
    least = sum(first[name] * gone for name, gone in previous.items()) / sum(first.values())
    ratios = scaled_ratios(relative, first, caps, max(share, least), floors=previous)
    for name, own in layers.items():
        for layer in own:
            pruner.pruning_ratio_dict[layer][step] = ratios[name]
    return ratios


def _informed(policy: str, run: MethodRun, tensor_of: dict[str, str]) -> RatioPolicy:
    """Returns a policy that has looked at data, by the names of the host's groups.

    Args:
        tensor_of: host's group → a tensor that writes it.
    """
    run.groups = trace_channel_groups(run.model, run.example_inputs)
    seen: dict[str, float] = {}
    rule = informed_ratio_policy(policy, run, seen)
    ours = {member.tensor: group.name for group in run.groups for member in group.by_role(Role.WRITER)}
    seen.update({name: seen.get(ours.get(tensor, ""), 0.0) for name, tensor in tensor_of.items()})
    return rule


def _writers(pruner: Any, group: HostGroup) -> Iterator[nn.Module]:  # the host has no types
    """Yields every layer of a group whose outputs it cuts."""
    for dep, _ in group:
        for module, handler in ((dep.source.module, dep.trigger), (dep.target.module, dep.handler)):
            if pruner.DG.is_out_channel_pruning_fn(handler) and module in pruner.pruning_ratio_dict:
                yield module


def _check(pruner: Any, layers: dict[str, list[nn.Module]]) -> None:
    if not layers:
        raise ConfigError(
            f"torch-pruning has no group to prune in this {type(pruner.model).__name__}, expected one at least. Ignore "
            "fewer layers."
        )
    without = [name for name, own in layers.items() if not own]
    if without:
        raise ConfigError(
            f"The layer '{without[0]}' has no ratio of its own in the pruner ({len(without)} such groups), expected "
            "one for all. Make the pruner with pruning_ratio_dict={model: ratio}."
        )
