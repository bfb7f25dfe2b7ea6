"""Checkpoints: complete or absent under real failures, checked by hash, bounded in number, refused by another job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext import checkpoints as module
from nni_prune_ext.checkpoints import Checkpoints, differences, fingerprint
from nni_prune_ext.errors import CheckpointError, OutputError

VALUES, TENSORS = "state.json", "tensors.safetensors"


def state(number: int) -> tuple[dict[str, object], dict[str, Tensor]]:
    return {"epoch": number}, {"weight": torch.full((3, 2), float(number))}


def saved(folder: Path, numbers: int, **options: object) -> Checkpoints:
    """Returns checkpoints of so many saves."""
    checkpoints = Checkpoints(folder, {"job": 1}, **options)
    for number in range(1, numbers + 1):
        checkpoints.save(*state(number))
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


# -- what is kept ----------------------------------------------------------------------------------------------


def test_nothing_saved_is_nothing_found_and_makes_no_folder(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", {}).latest() is None
    assert [] == names(tmp_path)


def test_the_newest_state_comes_back_and_only_as_many_as_asked_for_stay(tmp_path: Path) -> None:
    found = saved(tmp_path / "a", 5, keep=2).latest()

    assert found is not None
    assert (5, {"epoch": 5}) == (found.number, found.values)
    assert torch.equal(torch.full((3, 2), 5.0), found.tensors["weight"])
    assert ["000004", "000005", "identity.json"] == names(tmp_path / "a")


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_at_least_one_checkpoint_stays(keep: int, tmp_path: Path) -> None:
    saved(tmp_path, 4, keep=keep)

    assert max(keep, 1) == sum(name.isdecimal() for name in names(tmp_path))


def test_tensors_of_every_kind_come_back_in_order_with_type_shape_and_bits(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).view(3, 4)
    kinds = [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool,
    ]  # fmt: skip
    tensors = {f"z{len(kinds) - k}": (base - 3).to(kind) for k, kind in enumerate(kinds)}
    tensors |= {
        "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "odd": torch.tensor([float("nan"), -0.0]),
        "whole": base, "part of whole": base[1:], "transposed": base.t(), "expanded": torch.ones(1, 3).expand(2, 3),
        "trained": nn.Parameter(base.clone()), "a": base,
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }  # fmt: skip

    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save({}, tensors)
    found = checkpoints.latest()

    assert found is not None
    assert list(tensors) == list(found.tensors)
    for name, tensor in tensors.items():
        assert tensor.dtype == found.tensors[name].dtype, name
        assert tensor.shape == found.tensors[name].shape, name
        assert bits(tensor) == bits(found.tensors[name]), name
    found.tensors["whole"].zero_()
    assert 4.0 == float(found.tensors["part of whole"][0, 0])  # nothing is shared after reading


def test_values_come_back_as_json_has_them(tmp_path: Path) -> None:
    values = {"text": 'ä€ "quoted"\n', "deep": {"list": [1, 2.5, None, True], "least": -float("inf")}, "n": 2**60}

    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(values, {})
    found = checkpoints.latest()

    assert found is not None
    assert values == found.values


def test_files_are_json_and_safetensors_and_hold_no_pickle(tmp_path: Path) -> None:
    saved(tmp_path, 2).stage("inner").save(*state(1))

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".json", ".safetensors"} == {path.suffix for path in files}
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".json":
            json.loads(data)
        else:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            assert {"weight"} == header.keys() - {"__metadata__"}


def test_stages_have_folders_of_their_own(tmp_path: Path) -> None:
    job = saved(tmp_path / "job", 1)
    job.stage("method").save(*state(7))

    method, recovery = job.stage("method").latest(), job.stage("recovery").latest()

    assert method is not None
    assert {"epoch": 7} == method.values
    assert recovery is None


# -- failures while writing ------------------------------------------------------------------------------------

FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.errors import OutputError

folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder, {"job": 1})
checkpoints.save({"epoch": 1}, {"weight": torch.ones(3)})
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for size, values in [(1 << 18, {"epoch": 2}), (2, {"epoch": 2, "text": "x" * (1 << 18)})]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        checkpoints.save(values, {"weight": torch.ones(size)})
        print("saved")
    except OutputError as error:
        print("refused" if "Make space, then resume" in str(error) else error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(sorted(path.name for path in folder.iterdir()), Checkpoints(folder, {"job": 1}).latest().values)
checkpoints.save({"epoch": 2}, {"weight": torch.ones(1 << 18)})
print(sorted(path.name for path in folder.iterdir()), checkpoints.latest().values)
"""


@pytest.mark.skipif(os.name != "posix", reason="file size limits are a POSIX feature")
def test_a_file_system_that_refuses_to_grow_leaves_the_checkpoint_before_and_no_draft(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )

    before = "['000001', 'identity.json'] {'epoch': 1}"
    after = "['000001', '000002', 'identity.json'] {'epoch': 2}"
    assert ["refused", before, "refused", before, after] == done.stdout.splitlines(), done.stderr


WRITER = """
import sys
from pathlib import Path
import torch
from nni_prune_ext.checkpoints import Checkpoints

checkpoints, number = Checkpoints(Path(sys.argv[1]), {}), 0
while True:
    number += 1
    checkpoints.save({"epoch": number}, {str(k): torch.full((1 << 17,), float(number)) for k in range(8)})
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / str(k))]) for k in range(2)]
    try:
        for k, writer in enumerate(writers):
            limit = time.monotonic() + 60
            while not list((tmp_path / str(k)).glob("00000[3-9]")) and time.monotonic() < limit:
                time.sleep(0.003)
            time.sleep(0.011 * k)
            writer.kill()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()

    for k in range(2):
        told: list[str] = []
        found = Checkpoints(tmp_path / str(k), {}, tell=told.append).latest()
        assert found is not None
        assert [] == told
        assert {float(found.values["epoch"])} == {float(v) for t in found.tensors.values() for v in (t.min(), t.max())}


def test_drafts_of_killed_writers_are_ignored_and_replaced(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    draft = tmp_path / ".unfinished-000002"
    draft.mkdir()
    (draft / TENSORS).write_bytes(b"half")
    (draft / ".state.json.77.tmp").write_text("{")

    found = checkpoints.latest()
    checkpoints.save(*state(2))

    assert found is not None
    assert 1 == found.number
    assert ["000001", "000002", "identity.json"] == names(tmp_path)
    assert [VALUES, TENSORS] == names(tmp_path / "000002")


@pytest.mark.parametrize("step", ["save_file", "write_text", "rename"])
def test_a_write_that_fails_at_any_step_leaves_what_was_there(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 2)

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    owner = {"save_file": module.safetensors.torch, "write_text": module, "rename": Path}[step]
    monkeypatch.setattr(owner, step, fails)
    with pytest.raises(OutputError, match=r"Checkpoint 3 cannot be written .*No space left.*resume"):
        checkpoints.save(*state(3))
    monkeypatch.undo()

    found = checkpoints.latest()
    assert found is not None
    assert 2 == found.number
    assert ["000001", "000002", "identity.json"] == names(tmp_path)


def test_an_interruption_while_writing_passes_through_and_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(*state(2))

    found = checkpoints.latest()
    assert found is not None
    assert 1 == found.number


def test_a_place_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="Checkpoint 1 cannot be written"):
        Checkpoints(tmp_path / "file" / "inner", {}).save(*state(1))


# -- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VALUES, TENSORS])
@pytest.mark.parametrize("damage", ["flipped bits", "truncated", "emptied", "missing", "random", "swapped"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_read(name: str, damage: str, tmp_path: Path) -> None:
    told: list[str] = []
    checkpoints = saved(tmp_path, 2, tell=told.append)
    path = tmp_path / "000002" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({
            "truncated": data[:-2], "emptied": b"", "random": os.urandom(len(data)), "flipped bits": data,
            "swapped": (tmp_path / "000001" / name).read_bytes(),
        }[damage])  # fmt: skip
    if damage == "flipped bits":
        flip(path, len(data) // 2)

    found = checkpoints.latest()

    if damage == "swapped" and name == VALUES:  # a whole text, but of other tensors
        assert "does not have the hash" in told[0]
    assert found is not None
    assert (1, {"epoch": 1}) == (found.number, found.values)
    assert torch.equal(torch.full((3, 2), 1.0), found.tensors["weight"])
    assert 1 == len(told)
    assert "checkpoint 2" in told[0]
    assert "damaged" in told[0]


def test_no_single_flipped_bit_goes_unseen(tmp_path: Path) -> None:
    told: list[str] = []
    checkpoints, flips = saved(tmp_path, 2, tell=told.append), 0
    for name in (VALUES, TENSORS):
        path = tmp_path / "000002" / name
        whole = path.read_bytes()
        for place in range(0, len(whole), 2):
            flip(path, place, place % 8)
            found = checkpoints.latest()
            assert found is not None
            assert 1 == found.number, f"byte {place} of {name}"
            path.write_bytes(whole)
            flips += 1

    assert flips == len(told) > 100


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2, keep=2, tell=lambda text: None)
    flip(tmp_path / "000002" / TENSORS, -1)
    checkpoints.latest()
    checkpoints.save(*state(3))
    flip(tmp_path / "000003" / TENSORS, -1)

    found = checkpoints.latest()

    assert found is not None
    assert 1 == found.number


def test_all_damaged_is_an_error_every_time_not_a_fresh_start(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2, tell=lambda text: None)
    for number in ("000001", "000002"):
        flip(tmp_path / number / VALUES, 40)

    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"All 2 checkpoints in .* are damaged.*Delete the folder"):
            checkpoints.latest()


def test_damage_is_logged_where_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = saved(tmp_path, 2)
    flip(tmp_path / "000002" / TENSORS, -1)

    checkpoints.latest()

    assert "checkpoint 2" in caplog.text


def test_a_checkpoint_of_a_newer_format_is_not_read(tmp_path: Path) -> None:
    told: list[str] = []
    checkpoints = saved(tmp_path, 2, tell=told.append)
    path = tmp_path / "000002" / VALUES
    path.write_text(path.read_text().replace('"format": 1', '"format": 2', 1))

    found = checkpoints.latest()

    assert found is not None
    assert 1 == found.number
    assert "format is 2, expected 1" in told[0]


# -- identity --------------------------------------------------------------------------------------------------


def test_another_job_is_refused_with_key_old_and_new_value(tmp_path: Path) -> None:
    job = {"method": "l1", "training": {"learning_rate": 0.1, "milestones": [0.5]}, "seed": 0, "gone": 1}
    Checkpoints(tmp_path, job).save({}, {})

    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path, {"method": "l2", "training": {"learning_rate": 0.2, "milestones": [0.7]}, "seed": 0})

    message = str(caught.value)
    for text in (
        "method was 'l1', is 'l2'",
        "training.learning_rate was 0.1, is 0.2",
        "training.milestones was [0.5], is [0.7]",
        "gone was 1, is None",
        "belong to another job",
        "start anew in another folder",
    ):
        assert text in message
    assert "seed" not in message


def test_the_same_job_is_let_in_also_when_its_values_are_tuples(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {"milestones": (0.5, 0.75)}).save(*state(1))

    assert Checkpoints(tmp_path, {"milestones": [0.5, 0.75]}).latest() is not None


def test_a_stage_is_refused_by_what_it_depends_on_too(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {"seed": 0}).stage("train", {"epochs": 3}).save(*state(1))

    with pytest.raises(CheckpointError, match="epochs was 3, is 4"):
        Checkpoints(tmp_path, {"seed": 0}).stage("train", {"epochs": 4})
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        Checkpoints(tmp_path, {"seed": 1}).stage("train", {"epochs": 3})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "job": 3}', "\x00\xff"])
def test_an_unreadable_identity_is_an_error_that_says_what_to_do(text: str, tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "identity.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"cannot be read .*Delete the folder"):
        Checkpoints(tmp_path, {"job": 1})


def test_an_identity_of_a_newer_format_asks_for_the_newer_package(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "identity.json").write_text('{"format": 2, "job": {}}')

    with pytest.raises(CheckpointError, match="format 2, expected 1"):
        Checkpoints(tmp_path, {"job": 1})


def test_differences_of_long_values_can_be_told_apart() -> None:
    long = [f"layer{k}" for k in range(20)]

    (text,) = differences({"exclude": [*long, "a"]}, {"exclude": [*long, "b"]})

    old, new = text.removeprefix("exclude was ").split(", is ", 1)
    assert old != new
    assert len(text) < 200


# -- fingerprint -----------------------------------------------------------------------------------------------


def test_a_fingerprint_sees_every_name_shape_type_and_value() -> None:
    class Holder(nn.Module):
        def __init__(self, **tensors: Tensor) -> None:
            super().__init__()
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor, persistent=False)

    variants = [
        Holder(a=torch.zeros(2, 3)), Holder(b=torch.zeros(2, 3)), Holder(a=torch.zeros(3, 2)),
        Holder(a=torch.zeros(6)), Holder(a=torch.zeros(2, 3, dtype=torch.int32)), Holder(a=-torch.zeros(2, 3)),
        Holder(a=torch.zeros(2, 3, dtype=torch.bfloat16)), Holder(a=torch.tensor(True)), Holder(a=torch.tensor(0.0)),
        Holder(a=torch.zeros(0)), Holder(a=torch.zeros(2, 3), b=torch.zeros(0)), Holder(),
    ]  # fmt: skip

    assert len(variants) == len({fingerprint(holder) for holder in variants})
    assert fingerprint(Holder(a=torch.ones(3, 2).t())) == fingerprint(Holder(a=torch.ones(2, 3)))


def test_checkpoints_that_do_not_say_whose_they_are_are_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "run", {"job": "a"}).save({}, {"x": torch.zeros(1)})
    (tmp_path / "run" / "identity.json").unlink()

    with pytest.raises(CheckpointError, match=r"no identity\.json"):
        Checkpoints(tmp_path / "run", {"job": "b"})


def test_a_claimed_folder_belongs_to_one_job_before_anything_is_saved(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "run", {"job": "a"}).claim()

    with pytest.raises(CheckpointError, match="job was 'a', is 'b'"):
        Checkpoints(tmp_path / "run", {"job": "b"})
