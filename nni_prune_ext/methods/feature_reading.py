"""Feature maps of an encoder while it is trained and cut, for networks of fixed width that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.graph.channel_groups import Indices
from nni_prune_ext.graph.feature_maps import ChannelSources, FeatureMap, images_in
from nni_prune_ext.surgery import Kept


class FeatureReading:
    """Notes the image and the feature maps of the last forward pass, every channel at its place in the dense network.

    A decoder of fixed width then reads a compact encoder as it would read the dense one with the channels silenced.

    Attributes:
        maps: the image and the feature maps that are read.
        alive: (tensor, dimension) of a weight that writes them → the indices of the dense network that are left.
    """

    def __init__(self, maps: Sequence[FeatureMap], sources: Mapping[str, ChannelSources]) -> None:
        """Takes the image, the feature maps, and by module the weights that write their channels."""
        self.maps = tuple(maps)
        self.sources = {own.module: sources[own.module] for own in self.maps[1:]}
        self.alive = {
            place: torch.arange(size) for source in self.sources.values() for place, size in source.sizes.items()
        }
        self._image: Tensor | None = None
        self._seen: dict[str, Tensor] = {}

    @classmethod
    def restored(cls, maps: Sequence[FeatureMap], tensors: Mapping[str, Tensor]) -> FeatureReading:
        """Returns what ``state_dict`` was taken from, on the same feature maps."""
        pieces: dict[str, dict[tuple[str, int], tuple[Indices, Indices]]] = {own.module: {} for own in maps[1:]}
        alive: dict[tuple[str, int], Tensor] = {}
        for key, tensor in tensors.items():
            kind, number, dim, name = key.split("/", 3)
            if kind == "source":
                positions, index = tensor.cpu().numpy()
                pieces[maps[int(number)].module][name, int(dim)] = positions, index
            else:
                alive[name, int(dim)] = tensor.cpu()
        sources = {module: ChannelSources(own, dict.fromkeys(own, 0)) for module, own in pieces.items()}
        reading = cls(maps, sources)
        reading.alive = alive
        return reading

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the weights that write the feature maps, and what is left of them, as int64 tensors."""
        result = {f"alive/0/{dim}/{name}": left for (name, dim), left in self.alive.items()}
        for number, own in enumerate(self.maps[1:], start=1):
            for (name, dim), piece in self.sources[own.module].pieces.items():
                result[f"source/{number}/{dim}/{name}"] = torch.from_numpy(np.stack(piece).astype(np.int64))
        return result

    def attach(self, model: nn.Module) -> list[Callable[[], None]]:
        """Puts hooks on a model; returns what takes them off."""
        self._image, self._seen = None, {}
        taking_off = [model.register_forward_pre_hook(self._note_image, with_kwargs=True).remove]
        for own in self.maps[1:]:

            def note(module: nn.Module, args: object, output: Tensor, name: str = own.module) -> None:
                self._seen[name] = output

            taking_off.append(model.get_submodule(own.module).register_forward_hook(note).remove)
        return taking_off

    def follow(self, kept: Kept) -> None:
        """Is told about a cut."""
        for (tensor, dim), before in self.alive.items():
            own = kept.get(tensor, {}).get(dim)
            if own is not None:
                self.alive[tensor, dim] = before[own.cpu()]

    def take(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns image and feature maps of the last forward pass, by module, ``(N, C, h, w)`` as in the dense network.

        Raises:
            ConfigError: the model did not run, or not the whole of it.
        """
        missing = [own.module for own in self.maps[1:] if own.module not in self._seen]
        if self._image is None or missing:
            what = f"'{missing[0]}'" if missing else "the model"
            raise ConfigError(
                f"The loss did not run {what} on an image, expected one forward pass of the whole model per batch: the "
                "image is rebuilt from its feature maps. Let the loss call model(images), or name other feature maps."
            )
        image, seen = self._image, self._seen
        self._image, self._seen = None, {}
        return image, {own.module: self._spread(own, seen[own.module]) for own in self.maps[1:]}

    def forget(self) -> None:
        """Drops what the last forward pass left."""
        self._image, self._seen = None, {}

    def left(self, own: FeatureMap) -> Tensor:
        """Returns the places in the dense network of the channels that a feature map still has, ``(K,)``."""
        stays = np.ones(own.channels, dtype=bool)
        for place, (positions, index) in self.sources[own.module].pieces.items():
            stays[positions] = np.isin(index, self.alive[place].numpy())
        return torch.from_numpy(np.flatnonzero(stays))

    def _spread(self, own: FeatureMap, features: Tensor) -> Tensor:
        if features.shape[1] == own.channels:
            return features
        left = self.left(own)
        if len(left) != features.shape[1]:
            raise ConfigError(
                f"'{own.module}' has {features.shape[1]} channels, expected {len(left)} of the dense network's "
                f"{own.channels}: the network was cut where nobody told the reconstruction loss. Take what "
                "loss.after_cut(removal.kept) returns for the compact network."
            )
        wide = features.new_zeros(features.shape[0], own.channels, *features.shape[2:])
        return wide.index_copy(1, left.to(features.device), features)

    def _note_image(self, module: nn.Module, args: tuple[object, ...], keywords: dict[str, object]) -> None:
        self._image = next(iter(images_in((args, keywords))), None)
