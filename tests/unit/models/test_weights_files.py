"""Weights files load completely or not at all, and never run code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import OutputError, WeightsError
from nni_prune_ext.models.weights import load_weights, save_weights


def small_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file(state, path)


def write_plain(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def write_legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_nested(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"state_dict": state, "epoch": 3}, path)


def write_nested_as_model(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": state}, path)


def write_prefixed(state: dict[str, Tensor], path: Path) -> None:
    torch.save({f"module.{name}": value for name, value in state.items()}, path)


def write_without_counters(state: dict[str, Tensor], path: Path) -> None:
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, path)


@pytest.mark.parametrize(
    "write",
    [
        write_safetensors,
        write_plain,
        write_legacy,
        write_nested,
        write_nested_as_model,
        write_prefixed,
        write_without_counters,
    ],
)
def test_every_usual_form_of_a_weights_file_is_loaded(
    write: Callable[[dict[str, Tensor], Path], None], tmp_path: Path
) -> None:
    source, target = small_model(0), small_model(1)
    write(source.state_dict(), tmp_path / "weights.bin")

    load_weights(target, tmp_path / "weights.bin")

    assert same(snapshot(source), snapshot(target))


def test_saved_weights_come_back_the_same(tmp_path: Path) -> None:
    source, target = small_model(0), small_model(1)

    save_weights(source, tmp_path / "weights.safetensors")
    load_weights(target, tmp_path / "weights.safetensors")

    assert same(snapshot(source), snapshot(target))
    assert ["weights.safetensors"] == os.listdir(tmp_path)


def test_tied_weights_are_saved_under_both_names(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight

    save_weights(tied, tmp_path / "weights.safetensors")

    assert {"0.weight", "0.bias", "1.weight", "1.bias"} == set(
        safetensors.torch.load_file(tmp_path / "weights.safetensors")
    )


def test_a_failed_save_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"old")

    def disk_full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)

    with pytest.raises(OutputError, match="No space left on device"):
        save_weights(small_model(0), tmp_path / "weights.safetensors")
    assert ["weights.safetensors"] == os.listdir(tmp_path)
    assert b"old" == (tmp_path / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("place", ["no/such/folder/weights.safetensors", "a_file/weights.safetensors"])
def test_a_place_that_cannot_be_written_to_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")

    with pytest.raises(OutputError, match="existing, writable folder"):
        save_weights(small_model(0), tmp_path / place)


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("with_torch", [True, False], ids=["in a torch file", "in a bare pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(with_torch: bool, tmp_path: Path) -> None:
    trace, path = tmp_path / "the_code_ran", tmp_path / "weights.pt"
    if with_torch:
        torch.save({"weight": Harmful(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Harmful(trace), protocol=2))

    with pytest.raises(WeightsError, match="Python code, which is never executed"):
        load_weights(small_model(0), path)

    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut off", b"\x80\x02"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_refused_by_name(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)

    with pytest.raises(WeightsError, match="weights") as caught:
        load_weights(small_model(0), path)

    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_was_cut_off_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    write = write_safetensors if suffix == ".safetensors" else write_plain
    write(small_model(0).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(WeightsError):
        load_weights(small_model(0), path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="There is no weights file at"):
        load_weights(small_model(0), tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, torch.zeros(2)])
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")

    with pytest.raises(WeightsError, match="expected a state dict"):
        load_weights(small_model(0), tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"3.bias": torch.zeros(5)}, r"'3.bias' is \(5,\), expected \(2,\)"),
        ({"4.bias": torch.zeros(5)}, r"1 are not of this model \(4.bias\)"),
    ],
)
def test_weights_of_another_model_change_nothing(change: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    model = small_model(0)
    before = snapshot(model)
    torch.save({**small_model(1).state_dict(), **change}, tmp_path / "weights.pt")

    with pytest.raises(WeightsError, match=words):
        load_weights(model, tmp_path / "weights.pt")

    assert same(before, snapshot(model))


def test_weights_with_a_missing_tensor_change_nothing(tmp_path: Path) -> None:
    model = small_model(0)
    before = snapshot(model)
    state = small_model(1).state_dict()
    del state["3.weight"]
    torch.save(state, tmp_path / "weights.pt")

    with pytest.raises(WeightsError, match=r"1 tensors are missing \(3.weight\)"):
        load_weights(model, tmp_path / "weights.pt")

    assert same(before, snapshot(model))
