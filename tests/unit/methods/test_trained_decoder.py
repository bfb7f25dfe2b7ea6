"""The decoder as a file, and the joint loss of any method that looks at a loss."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_prune_ext as npe
from nni_prune_ext.errors import ArtefactError, CheckpointError, ConfigError, OutputError
from nni_prune_ext.methods.trained_decoder import TrainedDecoder, comparison_picture, reconstruction_error
from nni_prune_ext.training import Watcher

SHORT: dict[str, Any] = {"decoder_epochs": 2, "rounds": 2, "round_epochs": 1, "score_batches": 2}
EXAMPLE = torch.zeros(1, 3, 16, 16)


def images(count: int = 24) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 16, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator))
        for _ in range(count // 8)
    ]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return npe.build_model("resnet20", num_classes=4, in_channels=3).eval()


@pytest.fixture(scope="module")
def decoder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "decoder.safetensors"
    tickets(model, decoder_to=str(path), decoder_blocks=0, hint_share=0.3, hint_stride=1)
    return path


class Phases(Watcher):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def epoch(self, log: npe.EpochLog) -> None:
        self.seen.append(log.phase)


def tickets(model: nn.Module, *, watcher: Watcher | None = None, **options: object) -> npe.PruneResult:
    return npe.prune(
        model, EXAMPLE, method="reconstruction", target="macs=0.5", train_batches=images(),
        options={**SHORT, **options}, watcher=watcher,
    )  # fmt: skip


def test_a_decoder_from_a_file_is_the_one_that_was_trained_and_none_is_trained_again(
    model: nn.Module, tmp_path: Path
) -> None:
    path, watcher = tmp_path / "d.safetensors", Phases()
    trained = tickets(model, decoder_to=str(path))
    content = path.read_bytes()

    again = tickets(model, decoder_from=str(path), watcher=watcher)

    assert ["round 1", "round 2"] == watcher.seen
    assert trained.plan == again.plan
    assert trained.outcome.facts["rounds_error_last"] == again.outcome.facts["rounds_error_last"]
    assert content == path.read_bytes(), "the file is read only"


def test_the_file_carries_the_layers_of_its_decoder(model: nn.Module, decoder: Path) -> None:
    loaded = TrainedDecoder.load(decoder)

    assert {"hints": 2, "hint_share": 0.3, "hint_stride": 1, "blocks": 0} == loaded.decoder.settings
    assert ("layer2", "layer1") == loaded.decoder.hinted
    assert ["", "layer1", "layer2", "layer3"] == [own.module for own in loaded.maps]
    result = tickets(model, decoder_from=str(decoder))  # default options ask for other layers
    assert result.certificate is not None
    assert result.certificate.exact


def test_a_run_with_a_decoder_from_a_file_goes_on_after_an_interruption(
    model: nn.Module, decoder: Path, tmp_path: Path
) -> None:
    def run(folder: Path, watcher: Watcher | None = None) -> npe.PruneResult:
        return npe.prune(
            model, EXAMPLE, method="reconstruction", target="macs=0.5", train_batches=images(), watcher=watcher,
            options={**SHORT, "decoder_from": str(decoder)}, checkpoints=npe.Checkpoints(folder, {"job": 1}),
        )  # fmt: skip

    class Stops(Watcher):
        def epoch(self, log: npe.EpochLog) -> None:
            raise KeyboardInterrupt

    expected = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Stops())
    found = run(tmp_path / "cut")

    assert expected.plan == found.plan
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name]), name
    assert list(expected.outcome.pictures) == list(found.outcome.pictures)
    for caption, picture in expected.outcome.pictures.items():
        assert torch.equal(picture, found.outcome.pictures[caption]), caption


def test_other_weights_than_the_decoder_was_trained_on_are_refused_before_anything_is_trained(
    model: nn.Module, decoder: Path
) -> None:
    other, watcher = copy.deepcopy(model), Phases()
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)

    with pytest.raises(ConfigError, match="was trained on another network or other weights"):
        tickets(other, decoder_from=str(decoder), watcher=watcher)
    with pytest.raises(ConfigError, match="was trained on another network or other weights"):
        npe.joint_loss(other, EXAMPLE, decoder)
    assert not watcher.seen


def test_what_is_no_decoder_is_refused(model: nn.Module, tmp_path: Path, decoder: Path) -> None:
    missing, text, foreign, cut = (tmp_path / name for name in ("missing", "text", "foreign", "cut"))
    text.write_text("no tensors")
    safetensors.torch.save_file({"a": torch.zeros(1)}, foreign)
    tensors, header = safetensors.torch.load_file(decoder), {"format": "nni_prune_ext decoder 1", "decoder": "{}"}
    safetensors.torch.save_file(tensors, cut, header)

    for place in (missing, text, foreign, cut):
        with pytest.raises(ArtefactError, match=f"'{place}' cannot be read"):
            npe.joint_loss(model, EXAMPLE, place)


def test_a_place_that_cannot_be_written_is_told_before_anything_is_trained(model: nn.Module, tmp_path: Path) -> None:
    told = Phases()
    (tmp_path / "mine.txt").write_text("a thesis")

    with pytest.raises(OutputError, match="cannot be written"):
        tickets(model, decoder_to=str(tmp_path / "no" / "folder.safetensors"), watcher=told)
    with pytest.raises(OutputError, match="is not a decoder"):
        tickets(model, decoder_to=str(tmp_path / "mine.txt"), watcher=told)

    assert not told.seen
    assert "a thesis" == (tmp_path / "mine.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_to": "a", "reconstruction_weight": 0}, "there is no decoder"),
        ({"decoder_from": "a", "reconstruction_weight": 0}, "there is no decoder"),
        ({"decoder_to": "a", "decoder_from": "b"}, "both given"),
        ({"decoder_to": ""}, "decoder_to"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    model: nn.Module, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tickets(model, **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("encoder"),
        lambda facts: facts["settings"].update(hint_share="a"),
        lambda facts: facts["settings"].update(hint_share=float("nan")),
        lambda facts: facts["maps"][1].update(height=0, width=0),
        lambda facts: facts["maps"].clear(),
        lambda facts: facts["settings"].update(blocks=3),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(model: nn.Module, decoder: Path, tmp_path: Path, change: Any) -> None:
    with safetensors.safe_open(decoder, framework="pt") as opened:
        header = opened.metadata()
    facts = json.loads(header["decoder"])
    change(facts)
    safetensors.torch.save_file(
        safetensors.torch.load_file(decoder), tmp_path / "d", {**header, "decoder": json.dumps(facts)}
    )

    with pytest.raises(ArtefactError, match="cannot be read"):
        npe.joint_loss(model, EXAMPLE, tmp_path / "d")


def test_a_write_that_fails_leaves_the_file_before_as_it_was(
    model: nn.Module, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = TrainedDecoder.load(decoder)
    place = tmp_path / "again.safetensors"
    loaded.save(place)
    content = place.read_bytes()

    def half(path: Path, data: bytes) -> None:
        with path.open("wb") as handle:
            handle.write(data[: len(data) // 2])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OutputError, match="no space left"):
            loaded.save(place)
    assert content == place.read_bytes()


def test_a_decoder_is_read_as_it_was_written(model: nn.Module, decoder: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    loaded = TrainedDecoder.load(decoder)
    assert torch.equal(state, torch.get_rng_state()), "reading draws nothing"
    loaded.save(tmp_path / "again.safetensors")

    again = TrainedDecoder.load(tmp_path / "again.safetensors")
    assert (loaded.maps, loaded.encoder) == (again.maps, again.encoder)
    for name, tensor in loaded.decoder.state_dict().items():
        assert torch.equal(tensor, again.decoder.state_dict()[name])
    assert ["again.safetensors"] == [path.name for path in tmp_path.iterdir()]


class TestJointLoss:
    def test_is_the_task_loss_and_the_weighted_error_of_rebuilding_the_image(
        self, model: nn.Module, decoder: Path
    ) -> None:
        batch, loaded = images()[0], TrainedDecoder.load(decoder)
        seen: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(own.module).register_forward_hook(
                lambda _, args, output, name=own.module: seen.update({name: output})
            )
            for own in loaded.maps[1:]
        ]
        logits = model(batch[0])
        for handle in handles:
            handle.remove()
        error = functional.mse_loss(loaded.decoder(seen), batch[0])
        expected = functional.cross_entropy(logits, batch[1]) + 3 * error

        loss = npe.joint_loss(model, EXAMPLE, decoder, weight=3)(model, batch)

        assert torch.allclose(expected, loss, rtol=1e-6)
        assert float(error) > 0.01

    def test_reaches_the_network_but_not_the_decoder_and_leaves_no_hook(self, model: nn.Module, decoder: Path) -> None:
        own, joint = copy.deepcopy(model), npe.joint_loss(model, EXAMPLE, decoder)

        joint(own, images()[0]).backward()

        assert all(parameter.grad is not None for parameter in own.parameters())
        assert all(parameter.grad is None for parameter in joint.decoder.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in own.modules())

    def test_makes_another_criterion_keep_other_channels(self, model: nn.Module, decoder: Path) -> None:
        def removed(loss: Any) -> dict[str, tuple[int, ...]]:
            options = {"batches": 3}
            result = npe.prune(model, EXAMPLE, method="taylor", target="macs=0.5", train_batches=images(), loss=loss,
                               options=options)  # fmt: skip
            return dict(result.plan.removed)

        task = removed(npe.joint_loss(model, EXAMPLE, decoder, weight=0))

        assert task == removed(lambda own, batch: functional.cross_entropy(own(batch[0]), batch[1]))
        assert task != removed(npe.joint_loss(model, EXAMPLE, decoder, weight=1e6))

    def test_follows_every_cut_of_the_run_into_its_recovery(self, model: nn.Module, decoder: Path) -> None:
        result = npe.prune(
            model, EXAMPLE, method="taylor", target="macs=0.5", train_batches=images(), recover_epochs=2,
            loss=npe.joint_loss(model, EXAMPLE, decoder), options={"batches": 2, "steps": 2, "epochs_per_step": 1},
        )  # fmt: skip

        assert result.certificate is not None
        assert result.certificate.exact
        assert ["cut 1", "recovery", "recovery"] == [log.phase for log in result.logs][-3:]

    def test_reads_a_compact_network_as_the_silenced_one(self, model: nn.Module, decoder: Path) -> None:
        plan = npe.prune(model, EXAMPLE, method="l1", target="macs=0.5").plan
        removal = npe.remove_channels(model, plan, EXAMPLE)
        silent = npe.silence_channels(model, plan, EXAMPLE).double().eval()
        joint = npe.joint_loss(model, EXAMPLE, decoder, task=lambda own, batch: own(batch).sum() * 0, weight=1)
        batch = images()[0][0].double()
        joint.decoder.double()
        alive = joint.after_cut(removal.kept)

        compact = alive(removal.model.double().eval(), batch)
        silenced = joint(masked(silent, alive), batch)

        assert float(compact) == pytest.approx(float(silenced), rel=1e-9)
        assert float(compact) != pytest.approx(float(joint(model.double(), batch)), rel=1e-3)
        model.float()
        joint.decoder.float()

    def test_a_network_that_was_cut_unheard_is_told_so(self, model: nn.Module, decoder: Path) -> None:
        result = npe.prune(model, EXAMPLE, method="l1", target="macs=0.5")
        joint = npe.joint_loss(model, EXAMPLE, decoder)

        with pytest.raises(ConfigError, match="after_cut"):
            joint(result.model, images()[0])

    def test_images_of_another_size_are_told(self, model: nn.Module, decoder: Path) -> None:
        joint = npe.joint_loss(model, EXAMPLE, decoder)

        with pytest.raises(ConfigError, match=r"expected \(3, 16, 16\)"):
            joint(model, (torch.zeros(2, 3, 20, 20), torch.tensor([0, 1])))

    def test_a_task_that_raises_leaves_nothing_behind(self, model: nn.Module, decoder: Path) -> None:
        def raises(own: nn.Module, batch: Any) -> Tensor:
            own(batch[0])
            raise ValueError("mine")

        joint = npe.joint_loss(model, EXAMPLE, decoder, task=raises)
        with pytest.raises(ValueError, match="mine"):
            joint(model, images()[0])

        copy.deepcopy(joint)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_the_default_is_pickled(self, model: nn.Module, decoder: Path) -> None:
        joint = npe.joint_loss(model, EXAMPLE, decoder)

        again = pickle.loads(pickle.dumps(joint))

        assert float(joint(model, images()[0])) == float(again(model, images()[0]))

    def test_a_run_is_not_continued_with_another_weight_or_decoder(
        self, model: nn.Module, decoder: Path, tmp_path: Path
    ) -> None:
        def run(weight: float) -> None:
            npe.prune(
                model, EXAMPLE, method="l1", target="macs=0.5", train_batches=images(), recover_epochs=1,
                loss=npe.joint_loss(model, EXAMPLE, decoder, weight=weight), checkpoints=npe.Checkpoints(tmp_path, {}),
            )  # fmt: skip

        run(10)
        run(10)
        with pytest.raises(CheckpointError, match="loss"):
            run(5)

    @pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
    def test_a_weight_out_of_range_is_refused(self, model: nn.Module, decoder: Path, weight: float) -> None:
        with pytest.raises(ConfigError, match="weight is"):
            npe.joint_loss(model, EXAMPLE, decoder, weight=weight)

    def test_a_task_loss_that_does_not_run_the_model_is_told(self, model: nn.Module, decoder: Path) -> None:
        joint = npe.joint_loss(model, EXAMPLE, decoder, task=lambda own, batch: next(own.parameters()).sum())

        with pytest.raises(ConfigError, match="did not run"):
            joint(model, images()[0])


def masked(model: nn.Module, joint: npe.JointLoss) -> nn.Module:
    """Zeroes what the silenced network's feature maps still hold of cut channels: the shift of norms, say."""
    for own in joint.reading.maps[1:]:
        alive = torch.zeros(own.channels, dtype=torch.float64)
        alive[joint.reading.left(own)] = 1
        model.get_submodule(own.module).register_forward_hook(
            lambda _, args, output, alive=alive: output * alive[:, None, None]
        )
    return model


class TestPictures:
    def test_a_run_shows_images_above_what_was_rebuilt_of_them(self, model: nn.Module, tmp_path: Path) -> None:
        result = tickets(model)

        dense, trained = result.outcome.pictures.values()
        for picture in (dense, trained):
            assert (torch.uint8, (3, 32, 128)) == (picture.dtype, tuple(picture.shape))
            assert not torch.equal(picture[:, :16], picture[:, 16:])

    def test_without_a_decoder_there_is_none(self, model: nn.Module) -> None:
        assert {} == tickets(model, reconstruction_weight=0).outcome.pictures

    def test_each_pair_has_the_range_of_its_image(self) -> None:
        image = torch.stack([torch.linspace(0, 1, 16).reshape(1, 4, 4), torch.linspace(-4, 4, 16).reshape(1, 4, 4)])
        rebuilt = torch.stack([image[0] * 0.5, image[1] + 100])

        picture = comparison_picture(image, rebuilt)

        assert (1, 8, 8) == tuple(picture.shape)
        ramp = torch.linspace(0, 255, 16).round().reshape(4, 4)
        assert torch.equal(ramp, picture[0, :4, :4].float())
        assert torch.equal(ramp, picture[0, :4, 4:].float())
        assert torch.equal((torch.linspace(0, 127.5, 16)).round().reshape(4, 4), picture[0, 4:, :4].float())
        assert bool((picture[0, 4:, 4:] == 255).all())

    def test_of_many_images_eight_are_shown(self) -> None:
        assert (3, 8, 32) == tuple(comparison_picture(torch.rand(20, 3, 4, 4), torch.rand(20, 3, 4, 4)).shape)


def test_the_error_is_the_mean_over_all_pixels(model: nn.Module, decoder: Path) -> None:
    joint = npe.joint_loss(model, EXAMPLE, decoder)
    for _ in joint.reading.attach(model):
        pass
    with torch.no_grad():
        model(images()[0][0])
        error, image, rebuilt = reconstruction_error(joint.decoder, joint.reading)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()

    assert torch.allclose(error, (rebuilt - image).square().mean())


def test_the_decoder_is_in_no_artefact(model: nn.Module, tmp_path: Path) -> None:
    """R15: training parts do not leak."""
    import onnx

    result = tickets(model)
    npe.write_artefacts(result.model, tmp_path / "net", EXAMPLE, plan=result.plan)

    graph = onnx.load(tmp_path / "net" / "model.onnx").graph
    weights = {name: tuple(own.shape) for name, own in result.model.state_dict().items()}
    stored = safetensors.torch.load_file(tmp_path / "net" / "model.safetensors")
    assert weights == {name: tuple(own.shape) for name, own in stored.items()}
    assert result.costs.params == sum(own.numel() for own in result.model.parameters())
    held = sum(int(torch.tensor(list(own.dims)).prod()) if own.dims else 1 for own in graph.initializer)
    assert held <= sum(own.numel() for own in stored.values())
    everything = json.dumps([own.name for own in graph.initializer]) + "".join(
        p.name for p in (tmp_path / "net").iterdir()
    )
    assert "decoder" not in everything
    assert result.costs.params / 2 < held
