"""The pruning plan: which output channels of which layers go, counted in the ORIGINAL model.

A plan is data. It survives a process, composes with a later plan (``first.then(second)``), and refuses a model whose
channels hang together differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nni_prune_ext.errors import PlanError
from nni_prune_ext.graph.channel_groups import ChannelGroup, ChannelGroups, GroupMember, root_name
from nni_prune_ext.graph.label_book import Role
from nni_prune_ext.text_files import write_text

FORMAT = 1
Channels = NDArray[np.bool_]


class PruningPlan(BaseModel):
    """Removed output channels per root, in original coordinates; immutable.

    Attributes:
        removed: root → ascending output channels that go; roots that lose nothing are absent.
        widths: root → number of output channels in the original model, for every prunable root.
        fingerprint: hash of the traced role map (``ChannelGroups.fingerprint``).
        rewrites: shortcuts that are exactly rewritten first.
        format: version of this format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    removed: dict[str, tuple[int, ...]]
    widths: dict[str, int]
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    rewrites: tuple[str, ...] = ()
    format: int = FORMAT

    @model_validator(mode="after")
    def _check(self) -> PruningPlan:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this version reads format {FORMAT}")
        for root, channels in self.removed.items():
            width = self.widths.get(root)
            if width is None:
                raise ValueError(f"'{root}' loses channels but has no width")
            if list(channels) != sorted(set(channels)) or not channels:
                raise ValueError(f"the channels of '{root}' are not ascending and unique")
            if channels[0] < 0 or channels[-1] >= width:
                raise ValueError(f"channels {channels[0]} to {channels[-1]} of '{root}' are outside its width {width}")
            if len(channels) == width:
                raise ValueError(f"all {width} channels of '{root}' go, at least one must stay")
        return self

    @property
    def num_removed(self) -> int:
        """Counts the removed output channels over all roots."""
        return sum(len(channels) for channels in self.removed.values())

    def then(self, later: PruningPlan) -> PruningPlan:
        """Composes with a plan that was made for the model that this plan leaves.

        Returns:
            one plan in this plan's coordinates.

        Raises:
            PlanError: the later plan's widths are not those that this plan leaves.
        """
        removed = dict(self.removed)
        for root, width in later.widths.items():
            gone = set(self.removed.get(root, ()))
            kept = [c for c in range(self.widths.get(root, 0)) if c not in gone]
            if len(kept) != width:
                raise PlanError(
                    f"The plans do not follow each other: '{root}' has {width} channels in the later plan, expected "
                    f"the {len(kept)} that the first one leaves. Make the later plan from the model that the first "
                    "one produced."
                )
            if root in later.removed:
                removed[root] = tuple(sorted(gone | {kept[c] for c in later.removed[root]}))
        rewrites = tuple(dict.fromkeys(self.rewrites + later.rewrites))
        return self.model_copy(update={"removed": removed, "rewrites": rewrites})

    def to_json(self) -> str:
        """Returns the plan as JSON, the same text for the same plan."""
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str, *, source: str = "the text given") -> PruningPlan:
        """Reads a plan.

        Raises:
            PlanError: it is not JSON, not a plan, or of another format; ``source`` is named.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "plan"
            raise PlanError(
                f"{source} is not a usable pruning plan: {where}: {first['msg']}. Expected the JSON that "
                "`nni-prune-ext plan --save` or PruningPlan.save writes; make a new one."
            ) from error

    def save(self, path: Path) -> None:
        """Writes the plan as JSON, atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> PruningPlan:
        """Reads a plan from a file.

        Raises:
            PlanError: there is no such file or it is no plan.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), source=f"'{path}'")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"Cannot read a pruning plan from '{path}': {error}. Give the path of a plan.json."
            ) from error


def plan_from_channels(groups: ChannelGroups, removed: Mapping[str, object]) -> PruningPlan:
    """Makes a plan from the channels (group coordinates) that go.

    Args:
        removed: group name → channel numbers, or a bool array ``(num_channels,)`` with ``True`` for those that go.

    Raises:
        TraceError: a name is not that of a prunable group.
        PlanError: a channel is outside its group, or a group would lose all channels.
    """
    result: dict[str, tuple[int, ...]] = {}
    for name, channels in removed.items():
        group = groups[name]
        gone = _as_mask(group, channels)
        for member in _emptied(group, gone):
            raise PlanError(
                f"The plan removes all {len(member.index)} channels of '{root_name(member.tensor)}' (group '{name}'), "
                "expected at least one to stay. Keep more channels of this group."
            )
        for root, (positions, numbers) in group.roots.items():
            lost = positions[gone[numbers]]
            if lost.size:
                result[root] = tuple(int(c) for c in sorted(lost))
    return PruningPlan(
        removed=result, widths=root_widths(groups), fingerprint=groups.fingerprint, rewrites=groups.rewrites
    )


def spared(group: ChannelGroup, gone: Channels) -> Channels:
    """Returns ``gone`` without the first channel of every layer of the group that would be left without any."""
    result: Channels = gone.copy()
    for member in sorted(_emptied(group, gone), key=lambda m: len(np.unique(m.channel))):
        if result[member.channel].all():
            result[member.channel[0]] = False
    return result


def removed_channels(plan: PruningPlan, groups: ChannelGroups) -> dict[str, Channels]:
    """Returns group name → ``(num_channels,)`` bool, ``True`` for the channels that the plan removes.

    Raises:
        PlanError: the plan was made for another model, or removes a channel without those it is tied to.
    """
    if plan.fingerprint != groups.fingerprint:
        raise PlanError(
            f"The plan was made for another model: its fingerprint is {plan.fingerprint[:12]}…, expected "
            f"{groups.fingerprint[:12]}…, that of this model. Use the model and the "
            "example inputs that the plan was made with."
        )
    result: dict[str, Channels] = {}
    seen: set[str] = set()
    for group in groups:
        gone = np.zeros(group.num_channels, dtype=np.bool_)
        for root, (positions, numbers) in group.roots.items():
            lost = np.isin(positions, plan.removed.get(root, ()))
            seen.add(root)
            gone[numbers[lost]] = True
            torn = ~lost & gone[numbers]
            if torn.any():
                first = int(np.flatnonzero(torn)[0])
                partner = int(positions[lost & (numbers == numbers[first])][0])
                raise PlanError(
                    f"The plan removes channel {partner} of '{root}' but keeps {int(positions[first])}, expected "
                    "both or neither: they are tied, as they stand in equal places of a split or of a grouped "
                    "convolution. Plan by groups (plan_from_channels)."
                )
        result[group.name] = gone
    unknown = sorted(set(plan.removed) - seen)
    if unknown:
        raise PlanError(
            f"The plan removes channels of '{unknown[0]}', which is protected here, expected one of the {len(seen)} "
            "layers that may be pruned. Plan with the same protected layers, or pass the groups that the plan was made "
            "with."
        )
    return result


def plan_to_masks(plan: PruningPlan) -> dict[str, Channels]:
    """Returns root → ``(width,)`` bool, ``True`` for the output channels that stay."""
    masks = {root: np.ones(width, dtype=np.bool_) for root, width in plan.widths.items()}
    for root, channels in plan.removed.items():
        masks[root][list(channels)] = False
    return masks


def plan_from_masks(groups: ChannelGroups, masks: Mapping[str, Channels]) -> PruningPlan:
    """Makes a plan from keep masks over the output channels of any writing layers.

    A channel that several layers write goes only if every mask that covers it agrees (NNI's rule); a channel that no
    mask covers stays, and so do all channels of protected layers. Every layer keeps at least one channel.

    Args:
        masks: layer name → ``(width,)``, 0 for the channels that should go.

    Raises:
        PlanError: a mask is for no layer of the model or has not the layer's width.
    """
    for name in masks:
        if name not in groups.shapes and f"{name}.weight" not in groups.shapes:
            raise PlanError(
                f"There is a mask for '{name}', expected the name of a layer with a weight. Name layers as "
                "model.named_modules() does, before any wrapping."
            )
    removed: dict[str, Channels] = {}
    for group in groups:
        votes = np.zeros(group.num_channels, dtype=np.int64)
        vetoes = np.zeros(group.num_channels, dtype=np.int64)
        for member in group.by_role(Role.WRITER, Role.DEPTHWISE):
            given = masks.get(root_name(member.tensor))
            if given is None:
                continue
            keep, width = np.asarray(given, dtype=np.bool_), groups.shapes[member.tensor][member.dim]
            if keep.shape != (width,):
                raise PlanError(
                    f"The mask for '{root_name(member.tensor)}' has shape {keep.shape}, expected ({width},): one value "
                    "per output channel. Reduce masks of weights to output channels first."
                )
            np.add.at(votes, member.channel, ~keep[member.index])
            np.add.at(vetoes, member.channel, keep[member.index])
        gone = spared(group, (votes > 0) & (vetoes == 0))
        if gone.any():
            removed[group.name] = gone
    return plan_from_channels(groups, removed)


def root_widths(groups: ChannelGroups) -> dict[str, int]:
    """Returns the original number of output channels of every prunable root."""
    widths: dict[str, int] = {}
    for group in groups:
        for member in group.by_role(Role.WRITER):
            name = root_name(member.tensor)
            if name in group.roots:
                widths.setdefault(name, groups.shapes[member.tensor][member.dim])
    return widths


def _emptied(group: ChannelGroup, gone: Channels) -> list[GroupMember]:
    return [m for m in group.by_role(Role.WRITER, Role.DEPTHWISE) if gone[m.channel].all()]


def _as_mask(group: ChannelGroup, channels: object) -> Channels:
    array = np.asarray(channels)
    if array.dtype == np.bool_:
        if array.shape != (group.num_channels,):
            raise PlanError(
                f"The mask for group '{group.name}' has shape {array.shape}, expected ({group.num_channels},). "
                "Give one value per channel of the group."
            )
        return array
    gone = np.zeros(group.num_channels, dtype=np.bool_)
    numbers = array.astype(np.int64).reshape(-1)
    bad = numbers[(numbers < 0) | (numbers >= group.num_channels)]
    if bad.size:
        raise PlanError(
            f"Channel {int(bad[0])} is outside group '{group.name}', which has {group.num_channels}. Count from 0."
        )
    gone[numbers] = True
    return gone
