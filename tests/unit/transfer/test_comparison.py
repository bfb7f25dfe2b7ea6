"""Transfers: alike for all, measured on the test split, continued, refused where they would mix."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import nni_prune_ext as npe
from nni_prune_ext.data.detection import DetectionImages, DetectionSource, ImageBoxes
from nni_prune_ext.data.image_arrays import DataSource, ImageArrays
from nni_prune_ext.errors import ConfigError, OutputError
from nni_prune_ext.training import TrainingSettings, Watcher
from nni_prune_ext.transfer.page import comparison_rows, write_page

SIZE = 16
QUICK = TrainingSettings(optimizer="adamw", learning_rate=3e-3, select_best=False)


class Net(nn.Module):
    """Three resolutions and a linear head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.last(self.down(self.stem(images))).mean((2, 3)))
        return logits


def net(width: int = 8) -> nn.Module:
    torch.manual_seed(width)
    return Net(width).eval()


def colours(count: int, offset: int = 0) -> ImageArrays:
    """Red, green or blue images with noise: the class is the colour."""
    generator = torch.Generator().manual_seed(offset)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 100, (count, 3, SIZE, SIZE), generator=generator)
    images[torch.arange(count), labels] += 100
    return ImageArrays(images.to(torch.uint8), labels)


def classes() -> DataSource:
    return DataSource(
        "colours", colours(48), colours(12, 1), colours(12, 2), ("red", "green", "blue"), (3, SIZE, SIZE),
        (0.5,) * 3, (0.5,) * 3,
    )  # fmt: skip


def squares(count: int, seed: int) -> DetectionImages:
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    objects = []
    for number in range(count):
        x, y = torch.randint(0, 16, (2,), generator=generator).tolist()
        images[number, number % 3, y : y + 16, x : x + 16] = 255
        box = torch.tensor([[x, y, x + 16, y + 16]], dtype=torch.float32)
        objects.append(ImageBoxes(box, torch.tensor([number % 3 + 1]), torch.tensor([False])))
    return DetectionImages(images, tuple(objects))


def boxes() -> DetectionSource:
    return DetectionSource(
        "squares", squares(24, 0), squares(3, 1), squares(9, 2), ("red", "green", "blue"), (3, 32, 32)
    )


def compared(networks: Mapping[str, nn.Module], **changes: Any) -> npe.TransferReport:
    return npe.transfer_networks(networks, **{"source": classes(), "epochs": 2, "settings": QUICK, **changes})


def test_every_network_is_trained_with_every_seed_and_measured_on_the_test_split() -> None:
    dense, narrow = net(), net(4)
    before = copy.deepcopy(dense.state_dict())

    report = compared({"dense": dense, "narrow": narrow}, seeds=(0, 1), epochs=20, batch_size=8)

    assert ("dense", "narrow") == report.networks
    assert [("dense", 0), ("dense", 1), ("narrow", 0), ("narrow", 1)] == [(r.network, r.seed) for r in report.rows]
    assert "accuracy" == report.metric
    assert all(row.metrics["accuracy"] > 0.6 for row in report.rows)
    assert all(len(row.losses) == 20 and row.losses[-1] < row.losses[0] for row in report.rows)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(before[name], tensor), "the networks are not changed"


def test_the_test_split_is_what_is_measured_and_no_other() -> None:
    wrong = classes()
    wrong = DataSource(**{**vars(wrong), "test": ImageArrays(wrong.test.images, (wrong.test.labels + 1) % 3)})

    report = compared({"dense": net()}, source=wrong, epochs=12, batch_size=8)

    assert report.rows[0].metrics["accuracy"] < 0.2


def test_a_seed_decides_everything_and_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    first = compared({"dense": net()}, seeds=(3,))
    networks = {"other": net(4), "dense": net()}
    torch.manual_seed(6)
    state = torch.get_rng_state()
    again = compared(networks, seeds=(1, 3))
    assert torch.equal(state, torch.get_rng_state())

    assert first.rows[0].losses == next(r for r in again.rows if (r.network, r.seed) == ("dense", 3)).losses
    assert first.rows[0].losses != next(r for r in again.rows if (r.network, r.seed) == ("dense", 1)).losses


@pytest.mark.parametrize("head", ["retinanet", "faster_rcnn", "ssdlite"])
def test_detectors_are_measured_by_average_precision(head: str) -> None:
    report = compared(
        {"dense": net()}, source=boxes(), head=head, epochs=1, maps=2, pyramid_channels=8, batch_size=8,
        normalisation=((0.5,) * 3, (0.5,) * 3),
    )  # fmt: skip

    assert "AP" == report.metric
    assert {"AP", "AP50", "AP75"} <= set(report.rows[0].metrics)
    assert head == report.facts["head"]


def test_a_detector_learns_what_squares_are() -> None:
    settings = QUICK.model_copy(update={"learning_rate": 1e-2, "max_gradient_norm": 10.0})
    report = compared(
        {"dense": net(16)}, source=boxes(), epochs=25, maps=2, pyramid_channels=16, batch_size=4, settings=settings
    )

    assert report.rows[0].metrics["AP50"] > 0.3
    assert report.rows[0].metrics["AP"] <= report.rows[0].metrics["AP50"]


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("stem.0.weight", "down.0.weight", "last.0.weight", "fc.weight")
    return {
        name: torch.rand(own.shape, generator=generator) < 0.25
        for name, own in model.named_parameters()
        if name in names
    }


@pytest.mark.parametrize("detects", [False, True])
def test_masked_weights_stay_zero_and_shares_are_told_by_what_they_are_of(detects: bool, tmp_path: Path) -> None:
    """R9: convolutions, network and whole have their own denominators."""
    dense, ticket = net(), net()
    masks = masks_of(ticket)
    with torch.no_grad():
        for name, own in ticket.named_parameters():
            own.mul_(masks.get(name, torch.ones(())))
    more: dict[str, Any] = {"source": boxes(), "maps": 2, "pyramid_channels": 8, "batch_size": 8} if detects else {}

    report = compared({"dense": dense, "ticket": ticket}, weight_masks={"ticket": masks}, folder=tmp_path, **more)

    whole, kept = (row.parameters for row in report.rows)
    convolutions = sum(own.numel() for name, own in dense.named_parameters() if own.dim() == 4)
    assert convolutions == whole["convolutions"]
    assert kept["convolutions"] == sum(int(own.sum()) for name, own in masks.items() if own.dim() == 4)
    gone = whole["convolutions"] - kept["convolutions"]
    assert gone == whole["network"] - kept["network"] == whole["all"] - kept["all"]
    assert whole["convolutions"] < whole["network"] < whole["all"]
    weights = safetensors.torch.load_file(tmp_path / "ticket-seed0.safetensors")
    prefix = "backbone.body." if detects else ""
    for name, mask in masks.items():
        if name != "fc.weight":  # the new head is not the masked one
            assert bool((weights[prefix + name][~mask] == 0).all()), name
            assert bool((weights[prefix + name][mask] != 0).any()), name


class Stops(Watcher):
    def __init__(self, after: int) -> None:
        self.left = after

    def epoch(self, log: npe.EpochLog) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 2, 3, 5, 7])
def test_an_interrupted_transfer_goes_on_and_ends_alike(after: int, tmp_path: Path) -> None:
    networks = {"dense": net(), "narrow": net(4)}
    expected = compared(networks, seeds=(0, 1), folder=tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):
        compared(networks, seeds=(0, 1), folder=tmp_path / "cut", watcher=Stops(after))
    told = Stops(100)
    found = compared(networks, seeds=(0, 1), folder=tmp_path / "cut", watcher=told)

    assert [(r.metrics, r.losses, r.parameters) for r in expected.rows] == [
        (r.metrics, r.losses, r.parameters) for r in found.rows
    ]
    assert 100 - told.left < 8, "what was finished is not trained again"
    for name in ("dense-seed0", "narrow-seed1"):
        one, two = (safetensors.torch.load_file(tmp_path / kind / f"{name}.safetensors") for kind in ("whole", "cut"))
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert ["identity.json"] == [path.name for path in (tmp_path / "cut" / "state").iterdir()]


def test_a_finished_transfer_is_read_and_more_seeds_are_added(tmp_path: Path) -> None:
    networks = {"dense": net()}
    first = compared(networks, folder=tmp_path)
    told = Stops(100)

    more = compared(networks, seeds=(0, 1), folder=tmp_path, watcher=told)

    assert 98 == told.left
    assert first.rows[0] == more.rows[0]
    assert [0, 1] == [row.seed for row in npe.TransferReport.load(tmp_path / "transfer.json").rows]
    assert [0] == [row.seed for row in compared(networks, folder=tmp_path).rows]
    assert [0, 1] == [row.seed for row in npe.TransferReport.load(tmp_path / "transfer.json").rows], "nothing is lost"


def test_another_transfer_is_not_mixed_into_a_folder(tmp_path: Path) -> None:
    compared({"dense": net()}, folder=tmp_path)
    content = (tmp_path / "transfer.json").read_bytes()

    same, other = classes(), {
        "order": {"train": classes().train.subset(torch.arange(48).flip(0))},
        "test labels": {"test": ImageArrays(classes().test.images, (classes().test.labels + 1) % 3)},
        "pixels": {"val": colours(12, 9)},
        "mean": {"mean": (0.4, 0.5, 0.5)},
        "augment": {"augment": "crop_flip"},
    }  # fmt: skip
    data = [{"source": DataSource(**{**vars(same), **own})} for own in other.values()]
    masks = [{"weight_masks": {"dense": masks_of(net())}}]
    for changes in (*data, *masks, {"epochs": 3}, {"networks": {"dense": net(4)}}, {"batch_size": 8}):
        with pytest.raises(OutputError, match="other"):
            compared(**{"networks": {"dense": net()}, "folder": tmp_path, **changes})
    assert content == (tmp_path / "transfer.json").read_bytes()


def test_masks_of_other_places_and_boxes_of_other_objects_are_another_transfer(tmp_path: Path) -> None:
    mask = torch.zeros(8, 3, 3, 3, dtype=torch.bool)
    mask[:4] = True
    networks = {"dense": net()}
    compared(networks, weight_masks={"dense": {"stem.0.weight": mask}}, folder=tmp_path / "m")
    with pytest.raises(OutputError, match="masks"):
        compared(networks, weight_masks={"dense": {"stem.0.weight": ~mask}}, folder=tmp_path / "m")
    more: dict[str, Any] = {"maps": 2, "pyramid_channels": 8, "batch_size": 8, "epochs": 1, "folder": tmp_path / "b"}
    compared(networks, source=boxes(), **more)
    moved = boxes()
    moved.test.objects[0].boxes.add_(1)
    with pytest.raises(OutputError, match="content"):
        compared(networks, source=moved, **more)


def test_results_without_their_state_are_not_believed_to_be_others(tmp_path: Path) -> None:
    compared({"dense": net()}, folder=tmp_path)
    shutil.rmtree(tmp_path / "state")

    with pytest.raises(OutputError, match="results of another comparison"):
        compared({"dense": net(4)}, folder=tmp_path)


def test_starting_anew_removes_the_earlier_comparison_and_nothing_else_and_only_once_all_is_checked(
    tmp_path: Path,
) -> None:
    compared({"dense": net()}, seeds=(0, 1), folder=tmp_path)
    (tmp_path / "my-seed-data.safetensors").write_text("mine")
    (tmp_path / "state" / "thesis.bin").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    with pytest.raises(ConfigError, match="0 epochs"):
        compared({"dense": net()}, folder=tmp_path, anew=True, epochs=0)
    with pytest.raises(ConfigError, match="holds classes"):
        compared({"dense": net()}, folder=tmp_path, anew=True, head="ssdlite")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    compared({"other": net(4)}, folder=tmp_path, anew=True)
    assert {
        "transfer.json", "other-seed0.safetensors", "my-seed-data.safetensors", "identity.json", "thesis.bin",
    } == {path.name for path in tmp_path.rglob("*") if path.is_file()}  # fmt: skip


@pytest.mark.parametrize("head", ["retinanet", "faster_rcnn", "ssdlite"])
def test_heads_of_networks_of_different_widths_start_alike(head: Any) -> None:
    drawn = []
    for model in (net(8), net(4)):
        torch.manual_seed(3)
        made = npe.detector(model, (32, 32), 3, head=head, maps=2, pyramid_channels=8)
        drawn.append({name: own for name, own in made.named_parameters() if not name.startswith("backbone.body.")})

    shared = [name for name, own in drawn[0].items() if own.shape == drawn[1][name].shape]
    assert [name for name in shared if not torch.equal(drawn[0][name], drawn[1][name])] == []
    weights = [drawn[0][name] for name in shared if drawn[0][name].dim() == 4]
    assert len({float(own.detach().abs().sum()) for own in weights}) == len(weights) > 0 or head == "ssdlite"


def test_classifiers_see_pixels_normalised_as_asked() -> None:
    plain = compared({"dense": net()})
    other = compared({"dense": net()}, normalisation=((0.1,) * 3, (0.01,) * 3))
    same = compared({"dense": net()}, normalisation=((0.5,) * 3, (0.5,) * 3))

    assert plain.rows[0].losses == same.rows[0].losses != other.rows[0].losses
    assert [0.1, 0.1, 0.1] == other.facts["mean"]


def test_a_control_may_be_built_anew_for_every_seed() -> None:
    seen: list[int] = []

    def control(seed: int) -> nn.Module:
        seen.append(seed)
        torch.manual_seed(seed)
        return Net(4).eval()

    report = compared({"dense": net(), "random": control}, seeds=(4, 5))  # type: ignore[dict-item]

    assert {4, 5} == set(seen)
    assert {("random", 4), ("random", 5)} <= {(row.network, row.seed) for row in report.rows}


def report_of(scores: Mapping[str, list[float]]) -> npe.TransferReport:
    rows = tuple(
        npe.TransferRow(name, seed, {"AP": own}, {"convolutions": 4, "network": 5, "all": 6}, (1.0,), 2.0)
        for name, found in scores.items()
        for seed, own in enumerate(found)
    )
    return npe.TransferReport(rows, "AP", {"data": "d", "head": "retinanet", "epochs": 1})


def test_differences_are_paired_by_seed() -> None:
    report = report_of({"dense": [0.5, 0.6, 0.7], "ticket": [0.4, 0.6, 0.5], "one": [0.3]})

    assert (pytest.approx(-0.1), pytest.approx(0.1), 3) == report.differences("ticket", "dense")
    assert (pytest.approx(-0.2), None, 1) == report.differences("one", "dense")


def test_the_page_and_the_table_say_what_was_found(tmp_path: Path) -> None:
    report = report_of({"dense": [0.5, 0.6], "ticket": [0.4, 0.6], "<b>": [0.3, 0.3]})

    write_page(tmp_path / "page.html", report)

    page = (tmp_path / "page.html").read_text()
    assert "−5.0 ± 7.1" in page
    assert "50.0 (40.0, 60.0)" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert ["dense", "55.0 (50.0, 60.0)", "–", "6 (1.000)"] == comparison_rows(report)[0]


def test_a_damaged_report_is_told(tmp_path: Path) -> None:
    compared({"dense": net()}, folder=tmp_path)
    (tmp_path / "transfer.json").write_text(json.dumps({"rows": [{}]}))

    with pytest.raises(OutputError, match="cannot be read"):
        compared({"dense": net()}, folder=tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no network": ({"networks": {}}, "0 networks"),
    "no seed": ({"seeds": ()}, r"seeds \[\]"),
    "a seed twice": ({"seeds": (1, 1)}, "every seed once"),
    "no epoch": ({"epochs": 0}, "0 epochs"),
    "a detector of classes": ({"head": "retinanet"}, "holds classes"),
    "a classifier of boxes": ({"head": "classifier", "source": boxes()}, "holds boxes"),
    "an unknown head": ({"head": "yolo", "source": boxes()}, "head is 'yolo'"),
    "masks of nobody": ({"weight_masks": {"other": {}}}, "masks for 'other'"),
    "a name with a slash": ({"networks": {"a/b": net()}}, "without slashes"),
    "a name that is too long": ({"networks": {"a" * 101: net()}}, "1 to 100 letters"),
    "a mask of no weight": ({"weight_masks": {"dense": {"x": torch.ones(2).bool()}}}, "The mask 'x' of 'dense'"),
    "a mask of another shape": (
        {"weight_masks": {"dense": {"stem.0.weight": torch.ones(1, 3, 1, 1).bool()}}},
        r"expected torch.bool and the shape of that parameter, \(8, 3, 3, 3\)",
    ),
    "a mask of numbers": ({"weight_masks": {"dense": {"stem.0.weight": torch.ones(8, 3, 3, 3)}}}, "torch.float32"),
    "too many maps": ({"source": boxes(), "maps": 9}, "9 feature maps were asked for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_training(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    told = Stops(100)

    with pytest.raises(ConfigError, match=message):
        compared(**{"networks": {"dense": net()}, "folder": tmp_path / "out", "watcher": told, **changes})

    assert 100 == told.left
    assert not (tmp_path / "out").exists()
