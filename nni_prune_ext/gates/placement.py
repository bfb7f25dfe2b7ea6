"""Which layers of a network are gated, and with which units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from nni_prune_ext.costs import count_costs
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.gates.expected_macs import MacCounter
from nni_prune_ext.gates.gated_network import Gates
from nni_prune_ext.gates.heads import GateHead, Pool
from nni_prune_ext.graph.gate_places import GateFlow, GatePlace
from nni_prune_ext.inputs import ExampleInputs, tensors_in


def chosen_places(flow: GateFlow, patterns: Sequence[str] | None = None, *, model: str = "model") -> list[GatePlace]:
    """Returns the places to gate: the usual ones, or all whose layer matches a pattern (``fnmatch``).

    Raises:
        ConfigError: there is none, or a pattern matches no place.
    """
    if patterns is None:
        found = list(flow.usual)
    else:
        for pattern in patterns:
            if not any(fnmatchcase(place.layer, pattern) for place in flow.places):
                known = ", ".join(place.layer for place in flow.places[:5]) or "none"
                raise ConfigError(
                    f"No convolution matches '{pattern}', expected the name of a layer or a pattern. Places for gates "
                    f"in {model}: {known}{', …' if len(flow.places) > 5 else ''}. Correct the name."
                )
        found = [own for own in flow.places if any(fnmatchcase(own.layer, pattern) for pattern in patterns)]
    if not found:
        reasons = {own.unsuitable for own in flow.places}
        why = f" (of {len(flow.places)} convolutions: {'; '.join(sorted(reasons)[:3])})" if flow.places else ""
        raise ConfigError(
            f"There is no usual place for a gate in {model}{why}, expected a convolution whose activation keeps zeros. "
            "Name the layers to gate, or use another method."
        )
    return found


def new_gates(
    places: Sequence[GatePlace],
    *,
    pool: Pool = "max",
    detached: bool = True,
    softmax: bool = True,
    units: Mapping[str, Tensor] | None = None,
) -> Gates:
    """Returns fresh gates that begin open for every image.

    Args:
        units: layer → the unit of every filter; single filters where nothing is said.
    """
    given = units or {}
    heads = [
        GateHead(
            own.inputs,
            given.get(own.layer, torch.arange(own.channels)),
            pool=pool,
            detached=detached,
            softmax=softmax,
        )
        for own in places
    ]
    return Gates(places, heads)


def mac_counter(
    model: nn.Module, example_inputs: ExampleInputs, flow: GateFlow, gates: Gates, *, dense: int | None = None
) -> MacCounter:
    """Returns a counter for a network with gates.

    Args:
        dense: MACs per image that shares refer to; those of this network by default.
    """
    images = next((tensor.shape[0] for tensor in tensors_in(example_inputs) if tensor.dim()), 1)
    macs = count_costs(model, example_inputs).macs // images
    other = macs - sum(layer.macs for layer in flow.layers)
    heads = sum(head.macs for head in gates.all_heads())
    return MacCounter(flow, dense=macs if dense is None else dense, other=max(other, 0), heads=heads)
