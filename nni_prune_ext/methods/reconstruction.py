"""Reconstruction: rounds of pruning in which a network must also keep what an image can be rebuilt from.

Li et al., "Reconstruction Task Finds Universal Winning Tickets", 2022, https://arxiv.org/abs/2202.11484. A decoder
learns to rebuild the image from the feature maps of the frozen, trained network (section 3.2). Then, round by round,
the network is trained on the task loss and the reconstruction loss together (eq. 11), with the decoder frozen; the
smallest weights go; and all others are rewound to where they were before (algorithm 1). What comes out is a mask, or a
compact architecture, on the *first* weights: a ticket, to be trained on another task.

Single weights (a ``sparsity`` target), as published: one ranking of all convolutions but the first by the magnitude of
the trained weights; a fifth of what is left goes in every round, so that ``sparsity = 1 − 0.8^rounds`` is the published
schedule exactly, and other targets are approached in the same proportions. Masked weights stay zero in training.

Channels (``macs``, ``params``, ``memory``, ``ratio`` targets) are ours: the same rounds over channel groups, ranked by
the effect of a gate on the joint loss, or by the root mean square of all trained weights that hold a channel: the
published rule, which fails under MACs. Channels are really removed in every round, and the decoder keeps reading the
shrinking network: the channels that are left stand at their old places, zeros elsewhere. Tickets of channels
are far harsher than those of single weights at the same share.

Departures from the paper: the layers of the decoder (see ``reconstruction_decoder``); the reconstruction error is the
mean over all pixels, not their sum, which at a weight of 10 would drown the task loss; learning rate and its course are
those of the training settings, anew in each round (published: constant, 3e-4); after the last round statistics of norms
are measured anew wherever ``prune`` has data, as for every method; frozen norms and the classifier are rewound with
everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.graph.channel_groups import ChannelGroup
from nni_prune_ext.graph.feature_maps import ChannelSources, FeatureMap, channel_sources, feature_maps
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.mask_updates import best
from nni_prune_ext.methods.base import Batch, JsonState, MethodContext, MethodSpec, Outcome, Phase, PruningMethod
from nni_prune_ext.methods.feature_reading import FeatureReading
from nni_prune_ext.methods.reconstruction_decoder import Decoder
from nni_prune_ext.methods.reconstruction_options import ReconstructionOptions
from nni_prune_ext.methods.trained_decoder import (
    TrainedDecoder,
    check_place,
    comparison_picture,
    decoder_of,
    reconstruction_error,
)
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.scoring.gradient_statistics import gate_gradients
from nni_prune_ext.scoring.group_reduction import WEIGHT_ROLES
from nni_prune_ext.scoring.weight_norms import slice_rows
from nni_prune_ext.surgery import Removal

_DECODER = "decoder"
_DENSE = "Training images, and what the trained decoder makes of the dense network's feature maps"
_TRAINED = "Training images, and what it makes of them at the end of the last round, where it stood still in training"
_MILESTONES = (0.2, 0.6)
"""Shares of the decoder's epochs after which its learning rate falls to a tenth: epochs 10 and 30 of 50."""


class Reconstruction(PruningMethod):
    """Trains a decoder, then prunes in rounds on the joint loss; see the module's docstring.

    Attributes:
        decoder: rebuilds images; ``None`` where the reconstruction loss has no weight.
        reading: the feature maps of the network as it is now.
        masks: name of a weight → bool, ``True`` = kept; empty for channels.
        first: the weights that are rewound to.
    """

    def __init__(self, options: ReconstructionOptions) -> None:
        self.options = options
        self.decoder: Decoder | None = None
        self.reading: FeatureReading | None = None
        self.masks: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self._optimizer: Optimizer | None = None
        self._errors: list[Tensor] = []
        self._variances: list[Tensor] = []
        self._facts: dict[str, float] = {}
        self._pictures: dict[str, Tensor] = {}
        self._learning = False

    def phases(self) -> Sequence[Phase]:
        """Returns the decoder's training, and one phase per round."""
        own = self.options
        decoder = Phase(
            _DECODER,
            own.decoder_epochs if own.reconstruction_weight and own.decoder_from is None else 0,
            trainable=lambda _: False,
            optimizers=self._optimizers,
        )
        return [decoder, *(Phase(f"round {k}", own.round_epochs) for k in range(1, own.rounds + 1))]

    def start(self, context: MethodContext, phase: Phase) -> None:
        """Keeps the first weights; prunes before every round but the first."""
        if phase.name == _DECODER:
            self._begin(context)
        elif phase.name == "round 1":
            self._show(context, _DENSE)
        else:
            self._prune(context, int(phase.name.split()[1]) - 1)

    def attach(self, context: MethodContext, phase: Phase) -> None:
        """Reads feature maps; while the decoder learns, the network stands still, its statistics included."""
        self._learning = phase.name == _DECODER
        if self.decoder is None or self.reading is None or not phase.epochs:
            return
        self.decoder.requires_grad_(self._learning)
        for take_off in self.reading.attach(context.model):
            context.on_leave(take_off)
        if self._learning:
            context.model.eval()

    def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        """Returns the reconstruction error while the decoder learns, the joint loss afterwards."""
        if not self._learning:
            return self._joint_loss(context, batch)
        with torch.no_grad():
            context.task_loss(batch)
        return self._error()

    def after_step(self, context: MethodContext) -> None:
        """Keeps masked weights at zero."""
        self._enforce(context)

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        """Notes how well images were rebuilt; sets the decoder's learning rate."""
        if self._errors:
            stage = "decoder" if self._learning else "rounds"
            error, variance = (float(torch.stack(own).mean()) for own in (self._errors, self._variances))
            context.log({"reconstruction_error": error, "image_variance": variance})
            self._facts.setdefault(f"{stage}_error_first", error)
            self._facts |= {f"{stage}_error_last": error, "image_variance": variance}
        self._errors, self._variances = [], []
        if self._learning and self._optimizer is not None:
            passed = sum((epoch + 1) / phase.epochs >= milestone for milestone in _MILESTONES)
            for group in self._optimizer.param_groups:
                group["lr"] = self.options.decoder_learning_rate * 0.1**passed
            if epoch + 1 == phase.epochs and self.options.decoder_to is not None:
                assert self.decoder is not None
                assert self.reading is not None
                trained = TrainedDecoder.of(self.decoder, self.reading.maps, context.model)
                trained.save(Path(self.options.decoder_to))

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        """Lets the reading follow the cut."""
        if self.reading is not None:
            self.reading.follow(removal.kept)

    def finish(self, context: MethodContext) -> Outcome:
        """Prunes for the last time and hands over the ticket."""
        self._show(context, _TRAINED)
        self._prune(context, self.options.rounds)
        nothing = plan_from_channels(context.groups, {})
        return Outcome(nothing, weight_masks=dict(self.masks) or None, facts=self._facts, pictures=self._pictures)

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        """Returns first weights, masks, the decoder, and the channels that are left of the feature maps."""
        parts = {"first": self.first, "mask": self.masks, "picture": self._pictures}
        if self.decoder is not None and self.reading is not None:
            parts |= {"decoder": self.decoder.state_dict(), "reading": self.reading.state_dict()}
        tensors = {f"{part}/{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
        maps = () if self.reading is None else self.reading.maps
        shapes = {f"map/{own.module}": [float(own.channels), float(own.height), float(own.width)] for own in maps}
        layers: JsonState = {} if self.decoder is None else {"decoder": dict(self.decoder.settings)}
        return tensors, {"facts": dict(self._facts), **layers, **shapes}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        """Restores what ``state_dict`` returned."""
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in ("first", "mask", "picture", "decoder", "reading")}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.first, self.masks, self._pictures = parts["first"], parts["mask"], parts["picture"]
        self._facts = dict(cast("dict[str, float]", values["facts"]))
        maps = [
            FeatureMap(key.removeprefix("map/"), *(int(size) for size in cast("list[float]", shape)))
            for key, shape in values.items()
            if key.startswith("map/")
        ]
        if maps:
            self.reading = FeatureReading.restored(maps, parts["reading"])
            settings = cast("dict[str, float]", values["decoder"])
            self.decoder = decoder_of(maps, settings).to(next(iter(parts["decoder"].values())))
            self.decoder.load_state_dict(parts["decoder"])

    def _begin(self, context: MethodContext) -> None:
        """Keeps the first weights, and builds a decoder for the network's feature maps."""
        if context.unit == "weight" and not self._maskable(context):
            raise ConfigError(
                f"There is no weight to mask in {type(context.model).__name__}, expected convolutions behind the first "
                "one. Exclude fewer layers, or set keep_stem=False."
            )
        if context.unit == "channel" and not len(context.groups):
            raise ConfigError(
                f"There is no channel of {type(context.model).__name__} that may be removed, expected one group at "
                "least. Exclude fewer layers, or mask single weights (sparsity=0.9)."
            )
        self.first = {name: tensor.detach().clone() for name, tensor in context.model.state_dict().items()}
        if not self.options.reconstruction_weight:
            return
        if self.options.decoder_to is not None:
            check_place(Path(self.options.decoder_to))
        if self.options.decoder_from is not None:
            trained = TrainedDecoder.load(Path(self.options.decoder_from))
            trained.check_encoder(context.model, self.options.decoder_from)
            maps, self.decoder = trained.maps, trained.decoder
        else:
            maps = self._found_maps(context)
            self.decoder = self._built(maps)
        self.decoder.to(next(context.model.parameters()))
        sources = {own.module: ChannelSources({}, {}) for own in maps}
        if context.unit == "channel":
            sources |= channel_sources(context.model, context.example_inputs, maps)
        self.reading = FeatureReading(maps, sources)

    def _found_maps(self, context: MethodContext) -> tuple[FeatureMap, ...]:
        names = self.options.feature_maps
        given = None if names is None else [name.strip() for name in names.split(",")]
        batch = context.batches(1)[0]
        return feature_maps(context.model, lambda: context.task_loss(batch), given)

    def _built(self, maps: Sequence[FeatureMap]) -> Decoder:
        own = self.options
        return Decoder(
            maps, hints=own.hints, hint_share=own.hint_share, hint_stride=own.hint_stride, blocks=own.decoder_blocks
        )

    def _optimizers(self, context: MethodContext) -> list[Optimizer]:
        assert self.decoder is not None, "made in start, or loaded"
        own = self.options
        self._optimizer = AdamW(
            self.decoder.parameters(), lr=own.decoder_learning_rate, weight_decay=own.decoder_weight_decay
        )
        return [self._optimizer]

    def _joint_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        loss = context.task_loss(batch)
        return loss if self.decoder is None else loss + self.options.reconstruction_weight * self._error()

    def _error(self) -> Tensor:
        """Returns the mean squared error of the last forward pass's image, rebuilt from its feature maps."""
        assert self.decoder is not None
        assert self.reading is not None
        error, image, _ = reconstruction_error(self.decoder, self.reading)
        self._errors.append(error.detach())
        self._variances.append(image.var(0, correction=0).mean())
        return error

    def _show(self, context: MethodContext, caption: str) -> None:
        """Keeps a picture of a few training images and what the decoder makes of them now."""
        if self.decoder is None or self.reading is None:
            return
        batch = context.batches(1)[0]  # hosts get it by training
        taking_off = self.reading.attach(context.model)
        try:
            with untouched(context.model), torch.no_grad():
                context.task_loss(batch)
                _, image, rebuilt = reconstruction_error(self.decoder, self.reading)
        finally:
            for take_off in taking_off:
                take_off()
        if image.shape[1] in (1, 3):
            self._pictures[caption] = comparison_picture(image, rebuilt)

    def _prune(self, context: MethodContext, rounds: int) -> None:
        """Prunes as much as is due after so many rounds, by the trained weights; then rewinds all that is left."""
        fraction = self.options.share_gone(rounds)
        if context.unit == "weight":
            self._mask(context, fraction)
        else:
            plan = context.allocate(self._scores(context), fraction=fraction).plan
            if plan.num_removed:
                context.apply(plan)
        if self.options.rewind:
            context.rewind(self.first)
        self._enforce(context)

    def _maskable(self, context: MethodContext) -> list[str]:
        return list(context.maskable[1:] if self.options.keep_stem else context.maskable)

    def _mask(self, context: MethodContext, fraction: float) -> None:
        parameters = dict(context.model.named_parameters())
        magnitudes = {name: parameters[name].detach().abs() for name in self._maskable(context)}
        for name, mask in self.masks.items():  # what is gone stays gone, also beside a weight that is zero
            magnitudes[name] = magnitudes[name].masked_fill(~mask, -1.0)
        counts = context.masked_counts(magnitudes, fraction=fraction)
        self.masks = {name: best(own, own.numel() - counts[name]) for name, own in magnitudes.items()}

    def _enforce(self, context: MethodContext) -> None:
        if self.masks:
            with torch.no_grad():
                for name, parameter in context.model.named_parameters():
                    if name in self.masks:
                        parameter.mul_(self.masks[name])

    def _scores(self, context: MethodContext) -> dict[str, Tensor]:
        if self.options.criterion == "taylor":
            return self._gate_effects(context)
        tensors: dict[str, Tensor] = dict(context.model.named_parameters())
        return {group.name: root_mean_square(group, tensors) for group in context.groups}

    def _gate_effects(self, context: MethodContext) -> dict[str, Tensor]:
        """Returns the mean magnitude of the gradient of the joint loss by a gate on every channel."""
        tensors: dict[str, Tensor] = dict(context.model.named_parameters())
        required = {name: parameter.requires_grad for name, parameter in context.model.named_parameters()}
        totals = {group.name: torch.zeros(group.num_channels) for group in context.groups}
        taking_off = [] if self.reading is None else self.reading.attach(context.model)
        try:
            with untouched(context.model), torch.enable_grad():
                context.model.requires_grad_(True)
                for batch in context.batches(self.options.score_batches):
                    context.model.zero_grad(set_to_none=True)
                    self._joint_loss(context, batch).backward()  # type: ignore[no-untyped-call]
                    for group in context.groups:
                        totals[group.name] += gate_gradients(group, tensors).abs().cpu()
        finally:
            self._errors, self._variances = [], []
            context.model.zero_grad(set_to_none=True)
            for take_off in taking_off:
                take_off()
            for name, parameter in context.model.named_parameters():
                parameter.requires_grad_(required[name])
        return totals


def root_mean_square(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns the root mean square of all weights that hold a channel, ``(num_channels,)``; no layer is normalised."""
    total, count = torch.zeros(group.num_channels), torch.zeros(group.num_channels)
    for member in group.by_role(*WEIGHT_ROLES):
        tensor = tensors.get(member.tensor)
        if tensor is None or not tensor.is_floating_point():
            continue  # the selection of a rewritten shortcut holds no weights
        rows = slice_rows(tensor.detach(), member.dim)
        index, channel = torch.from_numpy(member.index), torch.from_numpy(member.channel)
        total.index_add_(0, channel, rows.float().square().sum(1).cpu()[index])
        count.index_add_(0, channel, torch.full((len(index),), float(rows.shape[1])))
    return (total / count.clamp(min=1)).sqrt()


RECONSTRUCTION = MethodSpec(
    "reconstruction",
    "rounds of pruning and rewinding on the task loss and the error of rebuilding the image: tickets to transfer",
    "https://arxiv.org/abs/2202.11484",
    ReconstructionOptions,
    Reconstruction,
    needs_data=True,
    own_optimizers=True,
    changes_structure=True,
    products=frozenset({"plan", "weight_masks"}),
    demo_options={"decoder_epochs": 1, "rounds": 2, "round_epochs": 1, "score_batches": 2},
)
