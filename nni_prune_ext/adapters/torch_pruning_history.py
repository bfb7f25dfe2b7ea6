"""Our plans as torch-pruning's pruning history, and back.

A plan is one cut in the coordinates of the original model. A history is a list of cuts, ``[layer, is_out, indices]``,
each in the coordinates that the cuts before it have left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nni_prune_ext.errors import PlanError
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, GroupMember, Indices
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.plan import Channels, PruningPlan, plan_from_channels, removed_channels

HistoryEntry = Sequence[object]
"""``[layer, is_out, indices]``: what torch-pruning records per cut."""
_Place = tuple[str, int]


def plan_to_history(plan: PruningPlan, groups: ChannelGroups) -> list[list[object]]:
    """Returns a plan as the history that ``DependencyGraph.load_pruning_history`` replays on a fresh model.

    Raises:
        PlanError: the plan is of another model, rewrites shortcuts, or cuts something that is no layer.
    """
    removed_channels(plan, groups)
    if plan.rewrites and plan.num_removed:
        raise PlanError(
            f"The plan rewrites the shortcut '{plan.rewrites[0]}' first, expected a plan without rewrites: "
            "torch-pruning has no step for that. Keep the plan (PruningPlan.save) and carry it out with "
            "remove_channels."
        )
    cut = _CutSoFar(groups)
    history: list[list[object]] = []
    for group in groups:
        for root, (positions, channels) in group.roots.items():
            going = np.isin(positions, plan.removed.get(root, ()))
            if not going.any():
                continue
            member = next((m for m in group.by_role(Role.WRITER) if m.tensor == f"{root}.weight"), None)
            if member is None:
                raise PlanError(
                    f"The plan cuts '{root}', which is a bare parameter, expected a layer: torch-pruning's history "
                    "names layers only. Keep the plan (PruningPlan.save) and carry it out with remove_channels."
                )
            history.append([root, True, cut.present(member, positions[going]).tolist()])
            cut.remove(group, channels[going])
    return history


def plan_from_history(groups: ChannelGroups, history: Sequence[HistoryEntry]) -> PruningPlan:
    """Returns the one plan that does what a torch-pruning history did, in the coordinates of the model before it.

    ``group.prune(idxs=…)`` of torch-pruning 1.6 records two entries for one cut, the second over all channels that the
    layer had; such a second entry was never carried out and is left out.

    Args:
        groups: the groups of the model as it was before the first entry.

    Raises:
        PlanError: an entry names no layer with channels, cuts protected or missing channels, or tears tied ones.
    """
    cut = _CutSoFar(groups)
    gone: dict[str, Channels] = {group.name: np.zeros(group.num_channels, dtype=np.bool_) for group in groups}
    before: tuple[object, object, int] | None = None
    for entry in history:
        layer, is_out, indices = _parsed(entry)
        if before == (layer, is_out, len(indices)) and indices == list(range(len(indices))):
            before = None
            continue
        place = _place_of(groups, layer, is_out)
        before = (layer, is_out, len(cut.left(place)))
        positions = cut.original(place, layer, indices)
        for group, channels in _channels_at(groups, place, layer, positions):
            gone[group.name][channels] = True
            cut.remove(group, channels)
    return plan_from_channels(groups, {name: channels for name, channels in gone.items() if channels.any()})


class _CutSoFar:
    """Which positions of every dimension are left, in original coordinates."""

    def __init__(self, groups: ChannelGroups) -> None:
        self.groups = groups
        self._gone: dict[_Place, Indices] = {}

    def left(self, place: _Place) -> Indices:
        """Returns the original positions that are left."""
        everyone = np.arange(self.groups.shapes[place[0]][place[1]])
        return np.setdiff1d(everyone, self._gone.get(place, np.empty(0, np.int64)))

    def present(self, member: GroupMember, positions: Indices) -> Indices:
        """Returns where original positions stand now, ascending."""
        now: Indices = np.searchsorted(self.left((member.tensor, member.dim)), np.sort(positions)).astype(np.int64)
        return now

    def original(self, place: _Place, layer: str, indices: list[int]) -> Indices:
        """Returns which original positions present indices are."""
        left = self.left(place)
        bad = [index for index in indices if not 0 <= index < len(left)]
        if bad:
            raise PlanError(
                f"The history cuts channel {bad[0]} of '{layer}', expected 0 to {len(left) - 1}: the entries before "
                f"leave {len(left)}. Use the history of this model, from its first entry on."
            )
        return left[np.asarray(sorted(set(indices)), dtype=np.int64)]

    def remove(self, group: ChannelGroup, channels: Indices) -> None:
        """Notes that channels of a group are gone from all its members."""
        for member in group.members:
            lost = member.index[np.isin(member.channel, channels)]
            place = (member.tensor, member.dim)
            self._gone[place] = np.union1d(self._gone.get(place, np.empty(0, np.int64)), lost)


def _parsed(entry: HistoryEntry) -> tuple[str, bool, list[int]]:
    if len(entry) != 3 or not isinstance(entry[0], str) or not isinstance(entry[2], Sequence):
        raise PlanError(
            f"The history has an entry {entry!r}, expected [layer, is_out, indices]. Pass what pruning_history() "
            "returns."
        )
    return entry[0], bool(entry[1]), [int(index) for index in entry[2]]


def _place_of(groups: ChannelGroups, layer: str, is_out: bool) -> _Place:
    """Returns the weight and dimension whose channels an entry counts."""
    roles = (Role.WRITER, Role.DEPTHWISE) if is_out else (Role.CONSUMER, Role.DEPTHWISE)
    for group in groups:
        for member in group.members:
            if member.tensor == f"{layer}.weight" and member.role in roles:
                return member.tensor, member.dim
    reasons = {protected.root: protected.reason for protected in groups.protected}
    seen = f"is protected: {reasons[layer]}" if layer in reasons else "is no layer with prunable channels on that side"
    raise PlanError(
        f"The history cuts {'output' if is_out else 'input'} channels of '{layer}', which {seen}. Expected one of the "
        "layers that `nni-prune-ext plan` lists; replay this history with torch-pruning itself."
    )


def _channels_at(
    groups: ChannelGroups, place: _Place, layer: str, positions: Indices
) -> list[tuple[ChannelGroup, Indices]]:
    found: list[tuple[ChannelGroup, Indices]] = []
    covered = 0
    for group, member in groups.holding(*place):
        hit = np.isin(member.index, positions)
        channels = np.unique(member.channel[hit])
        covered += int(hit.sum())
        torn = np.isin(member.channel, channels) & ~hit
        if torn.any():
            raise PlanError(
                f"The history cuts channels of '{layer}' but keeps channel {int(member.index[torn][0])}, which is "
                "tied to one of them, expected both or neither. Replay this history with torch-pruning itself."
            )
        if channels.size:
            found.append((group, channels))
    if covered < len(positions):
        raise PlanError(
            f"The history cuts {len(positions) - covered} channels of '{layer}' that must stay, expected prunable ones "
            "only. `nni-prune-ext plan` says why they must; replay this history with torch-pruning itself."
        )
    return found
