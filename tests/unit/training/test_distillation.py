"""Distillation against PyTorch's own divergence, at its limits, between a network and its pruned version."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from small_task import everything, same, small_batches, small_net
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import Batch
from nni_prune_ext.methods.baselines import L1
from nni_prune_ext.pipeline import prune
from nni_prune_ext.testing.method_bench import Bench, modes_of, traces_on
from nni_prune_ext.training import Distillation, LossFunction, cross_entropy, distilled, fit
from nni_prune_ext.training.distillation import attention_distance, soft_cross_entropy


@pytest.fixture
def batch() -> Batch:
    return small_batches(1)[0]


def gradients(loss: LossFunction, model: nn.Module, batch: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(loss(model, batch), list(model.parameters()), allow_unused=True))


# -- logits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 4)])
def test_the_term_is_torchs_divergence_times_the_squared_temperature(
    shape: tuple[int, ...], temperature: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    found = soft_cross_entropy(student, teacher, temperature)

    own, theirs = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    rows = [t.movedim(1, -1).reshape(-1, shape[1]) for t in (own, theirs)]
    expected = functional.kl_div(*rows, reduction="batchmean", log_target=True) * temperature**2
    assert torch.allclose(expected, found, rtol=1e-5)
    assert found.dim() == 0


def test_two_classes_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0 * torch.log(torch.tensor(3.0)), 0.0]])

    found = soft_cross_entropy(student, teacher, 2.0)

    expected = 4 * (0.75 * torch.log(torch.tensor(0.75 / 0.5)) + 0.25 * torch.log(torch.tensor(0.25 / 0.5)))
    assert float(expected) == pytest.approx(float(found), rel=1e-5)


def test_nothing_to_distil_is_refused() -> None:
    with pytest.raises(ValidationError, match="nothing is distilled"):
        Distillation(weight=0.0)


def test_with_hardly_any_weight_it_is_the_users_loss_and_with_all_of_it_the_labels_play_no_part(batch: Batch) -> None:
    student, teacher = small_net(), small_net(seed=1)
    none = distilled(cross_entropy, teacher, Distillation(weight=1e-12))
    whole = distilled(cross_entropy, teacher, Distillation(weight=1.0))
    half = distilled(cross_entropy, teacher, Distillation(weight=0.5))
    other = (batch[0], (batch[1] + 1) % 3)

    assert torch.allclose(cross_entropy(student, batch), none(student, batch))
    assert torch.equal(whole(student, batch), whole(student, other))
    with torch.no_grad():
        mean = (none(student, batch) + whole(student, batch)) / 2
        assert torch.allclose(mean, half(student, batch))
        expected = soft_cross_entropy(student(batch[0]), teacher.eval()(batch[0]), 4.0)
        assert torch.allclose(expected, whole(student, batch))


def test_a_student_that_equals_its_teacher_learns_nothing_from_it(batch: Batch) -> None:
    student = small_net().eval()
    teacher = copy.deepcopy(student)
    settings = Distillation(weight=1.0, features=("0", "2"))

    loss = distilled(cross_entropy, teacher, settings)

    assert 0.0 == pytest.approx(float(loss(student, batch).detach()), abs=1e-6)
    assert all(g is None or float(g.abs().max()) < 1e-6 for g in gradients(loss, student, batch))


def test_distilling_brings_the_student_nearer_to_its_teacher(batch: Batch) -> None:
    student, teacher = small_net().eval(), small_net(seed=1).eval()
    before = soft_cross_entropy(student(batch[0]), teacher(batch[0]), 4.0)

    fit(student, [batch] * 20, epochs=1, loss=distilled(cross_entropy, teacher, Distillation(weight=1.0)))

    after = soft_cross_entropy(student.eval()(batch[0]), teacher(batch[0]), 4.0)
    assert float(after.detach()) < 0.5 * float(before.detach())


# -- features --------------------------------------------------------------------------------------------------


def test_attention_maps_by_hand() -> None:
    student = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])  # energies 9 and 4
    teacher = torch.tensor([[[[0.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]])  # energies 0 and 1, other channels

    found = attention_distance(student, teacher, "x")

    length = (81 + 16) ** 0.5
    assert ((9 / length) ** 2 + (4 / length - 1) ** 2) / 2 == pytest.approx(float(found))


def test_features_have_their_factor_and_are_averaged_over_the_names(batch: Batch) -> None:
    student, teacher = small_net().eval(), small_net(seed=1).eval()
    settings = Distillation(weight=0.0, features=("0", "2"), feature_weight=7.0)

    found = distilled(cross_entropy, teacher, settings)(student, batch)

    first = attention_distance(student[0](batch[0]), teacher[0](batch[0]), "0")
    second = attention_distance(student[:3](batch[0]), teacher[:3](batch[0]), "2")
    assert float(cross_entropy(student, batch) + 7 * (first + second) / 2) == pytest.approx(float(found))


def test_a_pruned_network_learns_from_the_whole_one_by_names(batch: Batch) -> None:
    bench = Bench.of(L1, {})
    teacher = bench.model
    student = prune(teacher, bench.example, target="macs=0.5", groups=bench.groups).model
    loss = distilled(
        cross_entropy, teacher, Distillation(weight=0.0, features=("inside.0", "back"), feature_weight=9.0)
    )

    found = loss(student.eval(), bench.batches[0])

    assert student.inside[0].out_channels < teacher.inside[0].out_channels
    assert float(cross_entropy(student, bench.batches[0])) < float(found)
    assert float(gradients(loss, student, bench.batches[0])[0].abs().max()) > 0


@pytest.mark.parametrize("size", [(), (4,)])
def test_dead_features_give_no_gradient_that_is_no_number(size: tuple[int, ...]) -> None:
    student = torch.zeros(2, 3, 4, *size, requires_grad=True)

    attention_distance(student, torch.rand(2, 5, 4, *size), "x").backward()

    assert bool(student.grad.isfinite().all())


# -- outputs and calls -----------------------------------------------------------------------------------------


class Segments(nn.Module):
    """Gives what torchvision's segmentation models give."""

    def __init__(self, key: str = "out") -> None:
        super().__init__()
        self.conv, self.key = nn.Conv2d(3, 4, 3, padding=1), key

    def forward(self, images: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        return {self.key: self.conv(images) * scale, "aux": self.conv(images)}


def segment_loss(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0], scale=2.0)["out"], torch.zeros(4, 8, 8, dtype=torch.int64))


def test_segmentation_models_are_distilled_by_their_out_and_called_alike(batch: Batch) -> None:
    student, teacher = Segments(), Segments()

    found = distilled(segment_loss, teacher, Distillation(weight=1.0))(student, batch)

    expected = soft_cross_entropy(student.conv(batch[0]) * 2, teacher.conv(batch[0]) * 2, 4.0)
    assert float(expected) == pytest.approx(float(found), rel=1e-5)


def test_an_output_without_logits_is_refused_but_may_be_distilled_by_features(batch: Batch) -> None:
    student, teacher = Segments("masks"), Segments("masks")

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0])["masks"].mean()

    with pytest.raises(ConfigError, match=r"returns a dict, expected logits .*Set weight=0"):
        distilled(loss, teacher, Distillation())(student, batch)
    distilled(loss, teacher, Distillation(weight=0.0, features=("conv",)))(student, batch)


# -- the teacher -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_is_not_changed(training: bool) -> None:
    teacher = small_net(dropout=0.5, seed=1).train(training)
    teacher[1].eval()
    teacher[0].weight.requires_grad_(False)
    before, modes, student = everything(teacher), modes_of(teacher), small_net()

    fit(student, small_batches(), epochs=2, loss=distilled(cross_entropy, teacher, Distillation(features=("0",))))

    assert same(before, everything(teacher))
    assert modes == modes_of(teacher)
    assert [] == traces_on(teacher) + traces_on(student)


def test_the_teacher_answers_without_dropout_and_by_its_running_statistics(batch: Batch) -> None:
    student, teacher = small_net(), small_net(dropout=0.9, seed=1).train()
    loss = distilled(cross_entropy, teacher, Distillation(weight=1.0))

    assert torch.equal(loss(student, batch), loss(student, batch))


# -- mistakes --------------------------------------------------------------------------------------------------


class Lazy(nn.Module):
    """Has a layer that is called in training only, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.aux, self.never = small_net(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.aux(images) if self.training else images)


@pytest.mark.parametrize(("name", "which"), [("aux", "teacher"), ("never", "student")])
def test_a_feature_that_one_of_the_two_does_not_compute_is_named(name: str, which: str, batch: Batch) -> None:
    student, teacher = Lazy(), Lazy()

    with pytest.raises(ConfigError, match=f"feature '{name}' was not computed by the {which}"):
        distilled(cross_entropy, teacher, Distillation(features=(name,)))(student, batch)

    assert [] == traces_on(student) + traces_on(teacher)


def test_a_feature_that_the_teacher_does_not_have_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="feature 'layer3' is not a module of Sequential"):
        distilled(cross_entropy, small_net(), Distillation(features=("layer3",)))


def test_a_feature_that_the_student_does_not_have_is_refused_and_leaves_no_hook(batch: Batch) -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

    with pytest.raises(ConfigError, match="feature '4' is not a module of Sequential"):
        distilled(cross_entropy, small_net(), Distillation(features=("4",)))(student, batch)

    assert [] == traces_on(student)


def test_a_feature_that_is_no_map_or_of_another_size_is_refused_with_both_shapes(batch: Batch) -> None:
    student, teacher = small_net(), small_net()

    with pytest.raises(ConfigError, match=r"feature '6' has shapes \(4, 3\) and \(4, 3\), expected feature maps"):
        distilled(cross_entropy, teacher, Distillation(features=("6",)))(student, batch)
    teacher[0].stride = (2, 2)
    with pytest.raises(ConfigError, match=r"feature '0' has shapes \(4, 8, 6, 6\) and \(4, 8, 3, 3\)"):
        distilled(cross_entropy, teacher, Distillation(features=("0",)))(student, batch)

    assert [] == traces_on(student) + traces_on(teacher)


def test_a_feature_that_is_no_tensor_is_refused(batch: Batch) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.net = Pair(), small_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.pair(x)[0])

    student, teacher = Net(), Net()

    with pytest.raises(ConfigError, match="feature 'pair' gives a tuple, expected a tensor"):
        distilled(cross_entropy, teacher, Distillation(features=("pair",)))(student, batch)

    assert [] == traces_on(student) + traces_on(teacher)


def test_a_loss_that_does_not_call_the_model_is_refused(batch: Batch) -> None:
    with pytest.raises(ConfigError, match="did not call the model"):
        distilled(lambda model, batch: torch.zeros(()), small_net(), Distillation())(small_net(), batch)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"weight": 1.1}, {"weight": -0.1}, {"feature_weight": -1}, {"x": 1}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Distillation(**wrong)
