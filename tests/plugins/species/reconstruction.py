"""A scorer with its own loss and a decoder, which learns on frozen features first, then jointly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.methods.base import Batch, JsonState, MethodContext, MethodSpec, Outcome, Phase, PruningMethod
from nni_prune_ext.scoring.gradient_statistics import gate_gradients


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    decoder_epochs: int = 1
    joint_epochs: int = 1
    weight: float = 0.5


class Reconstruction(PruningMethod):
    """Scores channels by the gradient of task loss plus reconstruction loss."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.decoder = nn.Module()  # made in the first phase
        self.scores: dict[str, Tensor] = {}
        self._images = self._features = torch.empty(0)
        self._weights = (0.0, 1.0)

    def phases(self) -> list[Phase]:
        frozen = Phase("decoder", self.options.decoder_epochs, trainable=lambda _: False, optimizers=self._optimizers)
        return [frozen, Phase("joint", self.options.joint_epochs, optimizers=self._optimizers)]

    def start(self, context: MethodContext, phase: Phase) -> None:
        if phase.name == "decoder":
            self.decoder = nn.Conv2d(context.groups.groups[-1].num_channels, 3, 1)
            self.scores = {group.name: torch.zeros(group.num_channels) for group in context.groups}

    def attach(self, context: MethodContext, phase: Phase) -> None:
        deepest = context.model.get_submodule(context.groups.groups[-1].name)
        if phase.name == "decoder":
            context.model.eval()  # frozen means frozen statistics too
        self._weights = (0.0, 1.0) if phase.name == "decoder" else (1.0, self.options.weight)
        context.on_leave(context.model.register_forward_pre_hook(self._keep_images).remove)
        context.on_leave(deepest.register_forward_hook(self._keep_features).remove)

    def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        task = context.task_loss(batch)
        decoded = functional.interpolate(self.decoder(self._features), self._images.shape[2:])
        return self._weights[0] * task + self._weights[1] * functional.mse_loss(decoded, self._images)

    def after_backward(self, context: MethodContext) -> None:
        if self._weights[0]:
            tensors = dict(context.model.named_parameters())
            for group in context.groups:
                self.scores[group.name] += gate_gradients(group, tensors).abs()

    def finish(self, context: MethodContext) -> Outcome:
        return Outcome(
            context.allocate(self.scores).plan, facts={"decoder_norm": float(self.decoder.weight.detach().norm())}
        )

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        decoder = {f"decoder.{name}": tensor for name, tensor in self.decoder.state_dict().items()}
        return {**decoder, **{f"scores.{name}": tensor for name, tensor in self.scores.items()}}, {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        self.decoder = nn.Conv2d(tensors["decoder.weight"].shape[1], 3, 1)
        prefix = "decoder."
        self.decoder.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.scores = {k.removeprefix("scores."): v for k, v in tensors.items() if k.startswith("scores.")}

    def _optimizers(self, context: MethodContext) -> Sequence[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.decoder.parameters(), lr=1e-2)]

    def _keep_images(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._images = args[0]

    def _keep_features(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._features = output


RECONSTRUCTION = MethodSpec(
    "toy_reconstruction",
    "what the decoder misses stays",
    "none",
    Options,
    Reconstruction,
    needs_data=True,
    own_optimizers=True,
)
