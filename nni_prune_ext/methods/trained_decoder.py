"""The result of the reconstruction method's first stage as a file, and its error as the loss of any other method."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.checkpoints import fingerprint
from nni_prune_ext.errors import ArtefactError, ConfigError, OutputError
from nni_prune_ext.graph.feature_maps import FeatureMap, channel_sources
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.methods.base import Batch
from nni_prune_ext.methods.feature_reading import FeatureReading
from nni_prune_ext.methods.reconstruction_decoder import Decoder
from nni_prune_ext.surgery import Kept

_FORMAT = "nni_prune_ext decoder 1"


class _Map(BaseModel):
    """A feature map, as a file says."""

    module: str
    channels: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)


class _Settings(BaseModel):
    """What a decoder was built with, as a file says."""

    hints: int = Field(ge=0)
    hint_share: float = Field(ge=0, le=1)
    hint_stride: int = Field(ge=1)
    blocks: int = Field(ge=0)


class _Facts(BaseModel):
    """The header of a file."""

    maps: tuple[_Map, ...] = Field(min_length=2)
    settings: _Settings
    encoder: str


@dataclass(frozen=True, eq=False)
class TrainedDecoder:
    """A decoder, the feature maps that it reads, and the fingerprint of the network that it was trained on."""

    decoder: Decoder
    maps: tuple[FeatureMap, ...]
    encoder: str

    @classmethod
    def of(cls, decoder: Decoder, maps: tuple[FeatureMap, ...], model: nn.Module) -> TrainedDecoder:
        """Returns the decoder of a network."""
        return cls(decoder, maps, fingerprint(model))

    def save(self, path: Path) -> None:
        """Writes it as safetensors; the file appears complete or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        facts = {
            "maps": [asdict(own) for own in self.maps],
            "settings": self.decoder.settings,
            "encoder": self.encoder,
        }
        tensors = {name: own.detach().cpu().clone().contiguous() for name, own in self.decoder.state_dict().items()}
        content = safetensors.torch.save(tensors, {"format": _FORMAT, "decoder": json.dumps(facts)})
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        except OSError as error:
            raise OutputError(
                f"The decoder cannot be written to '{path}' ({error.strerror or error}), expected a file name in an "
                f"existing, writable folder with {len(content):,} bytes free. Choose another place."
            ) from error
        finally:
            with suppress(OSError):  # already moved, or never made
                unfinished.unlink()

    @classmethod
    def load(cls, path: Path) -> TrainedDecoder:
        """Reads what ``save`` wrote.

        Raises:
            ArtefactError: there is no such file, or it is not one of ours.
        """
        try:
            with safe_open(path, framework="pt") as opened:
                header = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            if header.get("format") != _FORMAT:
                raise ValueError(f"its format is {header.get('format')!r}, expected {_FORMAT!r}")
            facts = _Facts.model_validate_json(header["decoder"])
            maps = tuple(FeatureMap(own.module, own.channels, own.height, own.width) for own in facts.maps)
            decoder = decoder_of(maps, facts.settings.model_dump())
            decoder.load_state_dict(tensors)
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise ArtefactError(
                f"The decoder '{path}' cannot be read ({error}). Expected a file that the reconstruction method wrote "
                "(option decoder_to). Train one, or mend the path."
            ) from error
        return cls(decoder, maps, facts.encoder)

    def check_encoder(self, model: nn.Module, place: str) -> None:
        """Refuses another network than the one that the decoder was trained on.

        Raises:
            ConfigError: a name, a shape or a value differs.
        """
        if fingerprint(model) != self.encoder:
            raise ConfigError(
                f"The decoder '{place}' was trained on another network or other weights than this "
                f"{type(model).__name__}, expected the same. Train a decoder for it (option decoder_to)."
            )


def check_place(path: Path) -> None:
    """Refuses, before anything is trained, a place where no decoder can be written or something else lies.

    Raises:
        OutputError: the folder is missing or not writable, or the file is not a decoder.
    """
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise OutputError(
            f"The decoder cannot be written to '{path}', expected a file name in an existing, writable folder. Choose "
            "another place."
        )
    if path.exists():
        try:
            TrainedDecoder.load(path)
        except ArtefactError as error:
            raise OutputError(
                f"'{path}' is not a decoder, expected a new file, or one of an earlier run, which is replaced. Choose "
                "another place."
            ) from error


@dataclass(frozen=True, eq=False)
class JointLoss:
    """A task loss plus the weighted error of rebuilding the image (eq. 11), for any method that looks at a loss.

    Li et al., "Reconstruction Task Finds Universal Winning Tickets", 2022, https://arxiv.org/abs/2202.11484. The
    decoder is frozen. Where channels are removed on the way, as in recovery, ``prune`` calls ``after_cut``.
    """

    task: Callable[[nn.Module, Batch], Tensor]
    weight: float
    decoder: Decoder
    reading: FeatureReading

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the joint loss of one forward pass, a scalar with a gradient.

        Raises:
            ConfigError: the task loss did not run the whole model on an image.
        """
        self.decoder.to(next(model.parameters()).device)
        with ExitStack() as stack:
            stack.callback(self.reading.forget)
            for take_off in self.reading.attach(model):
                stack.callback(take_off)
            loss = self.task(model, batch)
            return loss + self.weight * reconstruction_error(self.decoder, self.reading)[0]

    @property
    def identity(self) -> str:
        """Returns what distinguishes it from other losses: a run is not continued with another one."""
        task = getattr(self.task, "__qualname__", type(self.task).__qualname__)
        return f"JointLoss(task={task}, weight={self.weight:g}, decoder={fingerprint(self.decoder)})"

    def after_cut(self, kept: Kept) -> JointLoss:
        """Returns the loss of the network that is left after a cut."""
        reading = copy.deepcopy(self.reading)
        reading.follow(kept)
        return replace(self, reading=reading)


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def joint_loss(
    model: nn.Module,
    example_inputs: ExampleInputs,
    decoder: Path | str,
    *,
    task: Callable[[nn.Module, Batch], Tensor] = _cross_entropy,
    weight: float = 10.0,
) -> JointLoss:
    """Returns task loss + ``weight`` × reconstruction error, as the loss of any data-driven criterion or method.

    Args:
        model: the dense network that the decoder was trained on.
        decoder: file that the reconstruction method wrote (option ``decoder_to``).
        task: loss of a model on a batch; cross-entropy on ``(images, labels)`` unless given.
        weight: λ, at least 0.

    Raises:
        ArtefactError: the file cannot be read.
        ConfigError: the decoder is that of another network, or ``weight`` is out of range.

    Example:
        >>> # prune(model, x, method="taylor", loss=joint_loss(model, x, "decoder.safetensors"), train_batches=train)
    """
    if not 0 <= weight < float("inf"):
        raise ConfigError(f"weight is {weight}, expected a finite number of at least 0. The paper's is 10.")
    trained = TrainedDecoder.load(Path(decoder))
    trained.check_encoder(model, str(decoder))
    device = next(model.parameters()).device
    reading = FeatureReading(trained.maps, channel_sources(model, example_inputs, trained.maps))
    return JointLoss(task, weight, trained.decoder.requires_grad_(False).to(device), reading)


def decoder_of(maps: Sequence[FeatureMap], settings: Mapping[str, float]) -> Decoder:
    """Returns an untrained decoder with the ``settings`` of another one."""
    hints, stride, blocks = (int(settings[name]) for name in ("hints", "hint_stride", "blocks"))
    with torch.random.fork_rng(devices=[]):  # its weights are replaced
        return Decoder(maps, hints=hints, hint_share=settings["hint_share"], hint_stride=stride, blocks=blocks)


def reconstruction_error(decoder: Decoder, reading: FeatureReading) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the mean squared error of the last forward pass's image, the image, and the image rebuilt from its maps.

    Under autocast the decoder runs in bfloat16, as the network does; the error is computed in the decoder's own dtype.

    Raises:
        ConfigError: the loss did not run the whole model on an image of the size that the decoder was made for.
    """
    image, features = reading.take()
    expected = (reading.maps[0].channels, *reading.maps[0].size)
    if tuple(image.shape[1:]) != expected:
        raise ConfigError(
            f"The loss ran the model on images {tuple(image.shape[1:])}, expected {expected} as the decoder was "
            "trained on. Use images of this size, or train a decoder for the others."
        )
    exact = decoder.last.weight.dtype
    rebuilt = decoder({name: own.to(exact) for name, own in features.items()}).to(exact)
    image = image.to(exact)
    return (rebuilt - image).square().mean(), image, rebuilt


def comparison_picture(image: Tensor, rebuilt: Tensor, *, most: int = 8) -> Tensor:
    """Returns images above what was rebuilt of them, ``(C, 2 H, N W)`` uint8, each pair over the image's range.

    Args:
        image: ``(N, C, H, W)``, with 1 or 3 channels.
        most: so many of them at most.
    """
    pairs = torch.stack([image[:most].detach().float().cpu(), rebuilt[:most].detach().float().cpu()], 1)
    low, high = (own(pairs[:, 0].flatten(1), 1)[:, None, None, None, None] for own in (torch.amin, torch.amax))
    scaled = ((pairs - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(255).round().to(torch.uint8)
    count, _, channels, height, width = scaled.shape
    return scaled.permute(2, 1, 3, 0, 4).reshape(channels, 2 * height, count * width)
