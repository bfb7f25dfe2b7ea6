"""Data sources by name: what they hold, and what the user reads when a name is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nni_prune_ext.data import Loaders
from nni_prune_ext.data.sources import DataSource, ImageArrays, open_data, open_source
from nni_prune_ext.errors import ConfigError, DataError

FACTORIES = """
import torch
from nni_prune_ext.data import DataSource, ImageArrays, Loaders

def arrays(count):
    return ImageArrays(torch.full((count, 1, 4, 4), 9, dtype=torch.uint8), torch.arange(count) % 2)

def own():
    return DataSource("own", arrays(8), arrays(4), arrays(6), ("a", "b"), (1, 4, 4), (0.5,), (0.5,))

def not_a_source():
    return 3

def broken():
    raise OSError("disk 7 is gone")

def loaders():
    batches = [{"image": torch.zeros(2, 1, 4, 4)}]
    return Loaders(batches, batches, batches, torch.zeros(1, 1, 4, 4))
"""


class FakeCIFAR10:
    """Stands in for torchvision's class, whose files are checked by MD5 sums and cannot be made here."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        count = 100 if train else 20
        self.data = np.arange(count, dtype=np.uint8).repeat(32 * 32 * 3).reshape(count, 32, 32, 3)
        self.targets = [index % 10 for index in range(count)]


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "data_factories_of_a_test.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "data_factories_of_a_test"


def test_digits_are_divided_sixty_fifteen_twenty_five() -> None:
    source = open_data("digits")

    assert [1078, 270, 449] == [len(arrays) for arrays in source.splits().values()]
    assert (1, 16, 16) == source.input_shape
    assert 10 == source.num_classes
    assert "shift" == source.augment


def test_digits_hold_every_image_of_scikit_learn_once() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    expected = sorted((int(label), image.round().tolist()) for label, image in zip(digits.target, digits.images))

    splits = open_data("digits", image_size=8).splits().values()

    found = [
        (int(label), (image[0].double() * 16 / 255).round().tolist())
        for arrays in splits
        for label, image in zip(arrays.labels, arrays.images)
    ]
    assert expected == sorted(found)


def test_digits_are_the_same_for_every_seed() -> None:
    first, second = open_data("digits", seed=0), open_data("digits", seed=5)

    assert torch.equal(first.test.images, second.test.images)


def test_the_training_pixels_of_digits_have_the_stated_mean_and_std() -> None:
    source = open_data("digits")

    pixels = source.train.images.float() / 255

    assert pytest.approx(float(pixels.mean()), abs=1e-3) == source.mean[0]
    assert pytest.approx(float(pixels.std()), abs=1e-3) == source.std[0]


def test_cifar10_batches_are_read_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR10)
    (tmp_path / "cifar-10-batches-py").mkdir()

    source = open_data(f"cifar10:{tmp_path}")

    assert [90, 10, 20] == [len(arrays) for arrays in source.splits().values()]
    assert list(range(20)) == source.test.images[:, 2, 31, 0].tolist()
    assert [1] * 10 == source.val.labels.bincount().tolist()
    assert "crop_flip" == source.augment


def test_incomplete_cifar10_batches_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()

    with pytest.raises(DataError, match="Expected the complete folder cifar-10-batches-py"):
        open_data(f"cifar10:{tmp_path}")


def test_cifar10_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither cifar-10-batches-py nor the folders train and test"):
        open_data(f"cifar10:{tmp_path}")


def test_a_factory_gives_its_own_source(factories: str) -> None:
    source = open_data(f"{factories}:own")

    assert "own" == source.name
    assert 8 == len(source.train)


def test_size_limit_and_normalisation_apply_to_a_factory_too(factories: str) -> None:
    source = open_data(f"{factories}:own", image_size=6, limit=4, mean=(0.1,), std=[0.2])

    assert (1, 6, 6) == source.input_shape
    assert [4, 4, 4] == [len(arrays) for arrays in source.splits().values()]
    assert [2, 2] == source.train.labels.bincount().tolist()
    assert ((0.1,), (0.2,)) == (source.mean, source.std)
    assert {9} == set(source.train.images.flatten().tolist())


def test_a_factory_that_returns_something_else_is_refused(factories: str) -> None:
    with pytest.raises(DataError, match="returned a int, expected a DataSource"):
        open_data(f"{factories}:not_a_source")


def test_a_factory_that_raises_is_named_with_what_it_raised(factories: str) -> None:
    with pytest.raises(DataError, match=rf"'{factories}:broken' raised OSError: disk 7 is gone") as caught:
        open_data(f"{factories}:broken")

    assert isinstance(caught.value.__cause__, OSError)


def test_a_factory_may_return_loaders_which_are_taken_as_they_are(factories: str) -> None:
    assert isinstance(open_source(f"{factories}:loaders"), Loaders)
    with pytest.raises(DataError, match="returned Loaders, expected a DataSource"):
        open_data(f"{factories}:loaders")
    with pytest.raises(DataError, match="limit_images has no effect"):
        open_source(f"{factories}:loaders", limit=3)


def test_loaders_that_are_read_once_or_without_a_tensor_are_refused() -> None:
    with pytest.raises(DataError, match="The val loader is a list_iterator, expected an iterable that gives"):
        Loaders([], iter([]), [], torch.zeros(1))
    with pytest.raises(DataError, match="a list without a tensor"):
        Loaders([], [], [], [])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("digit", "Did you mean 'digits'"),
        ("imagefoldr:/somewhere", "Did you mean 'imagefolder'"),
        ("digits:8", "Expected module.path:factory"),
        ("imagefolder", "expected imagefolder:FOLDER"),
        ("cifar10:", "expected cifar10:FOLDER"),
        ("", "Expected digits, cifar10:ROOT"),
    ],
)
def test_a_specification_that_names_nothing_is_refused_with_a_hint(spec: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        open_data(spec)

    assert words in str(caught.value)


@pytest.mark.parametrize("option", ["image_size", "limit"])
def test_an_option_below_one_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is 0, expected at least 1"):
        open_data("digits", image_size=0 if option == "image_size" else None, limit=0 if option == "limit" else None)


@pytest.mark.parametrize(("mean", "std"), [((0.5, 0.5), None), (None, (0.0,)), ((), None)])
def test_a_normalisation_that_does_not_fit_is_refused(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> None:
    with pytest.raises(DataError, match="expected 1 numbers each, std above 0"):
        open_data("digits", mean=mean, std=std)


def test_image_arrays_of_another_type_are_refused() -> None:
    with pytest.raises(DataError, match="expected uint8"):
        ImageArrays(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("count", "label", "side", "words"),
    [
        (0, 0, 4, "is empty"),
        (2, 2, 4, "labels .* range from 2 to 2, expected 0 to 1"),
        (2, 0, 5, r"\(1, 5, 5\), expected the input shape \(1, 4, 4\)"),
    ],
)
def test_a_source_whose_parts_do_not_fit_is_refused(count: int, label: int, side: int, words: str) -> None:
    good = ImageArrays(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    bad = ImageArrays(torch.zeros(count, 1, side, side, dtype=torch.uint8), torch.full((count,), label))

    with pytest.raises(DataError, match=words):
        DataSource("toy", good, good, bad, ("a", "b"), (1, 4, 4), (0.5,), (0.5,))
