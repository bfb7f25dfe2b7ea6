"""Batches are complete, normalised, varied as told, and repeatable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nni_prune_ext.data.batches import BatchLoader
from nni_prune_ext.data.image_arrays import Augment, ImageArrays
from nni_prune_ext.errors import ConfigError


def numbered(count: int) -> ImageArrays:
    """Images whose single pixel value and label are their own index."""
    indices = torch.arange(count)
    return ImageArrays(indices.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone(), indices)


def noise(count: int, side: int) -> ImageArrays:
    """Random images without black pixels, so that black means padding."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(1, 256, (count, 2, side, side), generator=generator, dtype=torch.uint8)
    return ImageArrays(images, torch.arange(count))


def labels_of(loader: BatchLoader) -> list[int]:
    return [int(label) for _, labels in loader for label in labels]


def images_of(loader: BatchLoader) -> Tensor:
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_the_last_batch_is_smaller_or_left_out(drop_last: bool, sizes: list[int]) -> None:
    loader = BatchLoader(numbered(10), 4, drop_last=drop_last)

    assert sizes == [len(labels) for _, labels in loader]
    assert len(sizes) == len(loader)


def test_shuffling_shows_every_image_once_with_its_label() -> None:
    loader = BatchLoader(numbered(50), 8, shuffle=True, seed=1)

    labels = labels_of(loader)

    assert list(range(50)) == sorted(labels)
    assert list(range(50)) != labels
    assert labels == (images_of(loader)[:, 0, 0, 0] * 255).round().int().tolist()


def test_pixels_are_normalised_per_channel() -> None:
    images = torch.tensor([[[[255]], [[51]]]], dtype=torch.uint8)
    loader = BatchLoader(ImageArrays(images, torch.tensor([0])), 1, mean=(0.5, 0.1), std=(0.25, 0.5))

    batch = images_of(loader)

    assert torch.float32 == batch.dtype
    assert pytest.approx([2.0, 0.2]) == batch.flatten().tolist()


@pytest.mark.parametrize("augment", ["none", "shift", "crop_flip"])
def test_one_seed_and_epoch_give_the_same_batches_again(augment: Augment) -> None:
    first, second = (BatchLoader(noise(20, 16), 6, shuffle=True, seed=7, augment=augment) for _ in range(2))
    first.set_epoch(3)
    second.set_epoch(3)

    assert torch.equal(images_of(first), images_of(second))
    assert torch.equal(images_of(first), images_of(first))


def test_epochs_and_seeds_change_the_order() -> None:
    loader, other_seed = (BatchLoader(numbered(50), 50, shuffle=True, seed=seed) for seed in (0, 1))
    first = labels_of(loader)

    loader.set_epoch(1)

    assert first != labels_of(loader)
    assert first != labels_of(other_seed)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()

    labels_of(BatchLoader(noise(9, 8), 2, shuffle=True, augment="crop_flip"))

    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("augment", "mirrors"), [("shift", (False,)), ("crop_flip", (False, True))])
def test_every_varied_image_is_a_shifted_copy_of_its_own(augment: Augment, mirrors: tuple[bool, ...]) -> None:
    arrays, reach = noise(60, 16), 2
    padded = torch.nn.functional.pad(arrays.images, (reach,) * 4).float() / 255

    varied = images_of(BatchLoader(arrays, 60, augment=augment))

    seen = set()
    for index in range(60):
        matches = {
            (mirror, row, column)
            for mirror in mirrors
            for row in range(2 * reach + 1)
            for column in range(2 * reach + 1)
            if torch.equal(mirrored(padded[index, :, row : row + 16, column : column + 16], mirror), varied[index])
        }
        assert 1 == len(matches)
        seen |= matches
    assert set(mirrors) == {mirror for mirror, _, _ in seen}
    assert {0, 1, 2, 3, 4} == {row for _, row, _ in seen} == {column for _, _, column in seen}
    assert len(seen) > 5 * len(mirrors), "rows and columns move independently"


def mirrored(image: Tensor, mirror: bool) -> Tensor:
    return image.flip(2) if mirror else image


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size is 0, expected at least 1"):
        BatchLoader(numbered(3), 0)
