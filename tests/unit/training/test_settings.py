"""Training settings: learning rates and parameter groups against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import Batch, MethodContext, Phase, PruningMethod
from nni_prune_ext.training import MethodRun, ParameterGroup, TrainingSettings, checked_settings, fit
from nni_prune_ext.training.loop import run_phases


class One(nn.Module):
    """One number whose gradient is 1, so that plain SGD moves it by exactly the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros((), dtype=torch.float64))


def rates(*, epochs: int, batches: int, **values: object) -> list[float]:
    """Returns how far every step moved, with SGD and nothing else."""
    model, places = One(), list[float]()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        places.append(float(model.value))
        return model.value * 1.0

    settings = checked_settings(**{"learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0, **values})
    fit(model, [0] * batches, epochs=epochs, settings=settings, loss=loss)
    places.append(float(model.value))
    return [before - after for before, after in pairwise(places)]


# -- rates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "batches", "values", "expected"),
    [
        (2, 2, {}, [1.0, 0.8535533905932737, 0.5, 0.1464466094067262]),
        (2, 2, {"warmup_epochs": 1}, [0.01, 0.505, 1.0, 0.5]),
        (4, 1, {"warmup_epochs": 1}, [0.01, 1.0, 0.75, 0.25]),
        (2, 2, {"warmup_epochs": 0.5}, [0.01, 1.0, 0.75, 0.25]),
        (1, 4, {"warmup_epochs": 2}, [0.01, 0.505, 1.0, 0.5]),
        (2, 2, {"schedule": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        (3, 1, {"schedule": "constant", "warmup_epochs": 1.5}, [0.01, 0.67, 1.0]),
        (8, 1, {"schedule": "step"}, [1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]),
        (2, 2, {"schedule": "step", "milestones": (0.25,), "gamma": 0.5}, [1.0, 0.5, 0.5, 0.5]),
        (4, 1, {"schedule": "step", "warmup_epochs": 1, "milestones": (0.5,)}, [0.01, 1.0, 0.1, 0.1]),
        (10, 1, {"schedule": "step", "milestones": (0.7,)}, [1.0] * 7 + [0.1] * 3),
    ],
)
def test_every_step_has_the_rate_that_the_schedule_says(
    epochs: int, batches: int, values: Mapping[str, object], expected: list[float]
) -> None:
    assert expected == pytest.approx(rates(epochs=epochs, batches=batches, **values), abs=1e-12)


def test_accumulated_batches_share_the_rate_of_their_first_one() -> None:
    moved = rates(epochs=1, batches=5, accumulation_steps=2)

    cosine = [1.0, 0.6545084971874737, 0.09549150281252627]  # at 0, 2/5 and 4/5 of the only epoch
    assert [0.0, cosine[0], 0.0, cosine[1], cosine[2]] == pytest.approx(moved, abs=1e-12)


def test_every_phase_of_a_method_has_a_schedule_of_its_own_and_its_factor() -> None:
    places: list[float] = []

    class Noting(PruningMethod):
        def after_step(self, context: MethodContext) -> None:
            places.append(float(context.model.value))

    settings = checked_settings(learning_rate=1.0, momentum=0.0, weight_decay=0.0)
    run = MethodRun(model=One(), batches_=[0], loss=lambda model, batch: model.value * 1.0, settings=settings)
    run_phases(Noting(), run, [Phase("a", 2), Phase("b", 2, learning_rate_scale=0.1)])

    assert [1.0, 0.5, 0.1, 0.05] == pytest.approx([a - b for a, b in pairwise([0.0, *places])])
    assert [0.5, 0.05] == pytest.approx([log.learning_rate for log in run.logs if log.epoch == 1])


# -- parameter groups ------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(1, 1), nn.Linear(1, 1)
        for parameter in self.parameters():
            nn.init.ones_(parameter)


def after_one_step(groups: tuple[ParameterGroup, ...], gradient: float, **values: object) -> dict[str, float]:
    model = Named()
    settings = checked_settings(
        **{"learning_rate": 0.5, "momentum": 0.0, "weight_decay": 0.1, "parameter_groups": groups, **values}
    )
    fit(
        model,
        [0],
        epochs=1,
        settings=settings,
        loss=lambda model, _: sum(gradient * p.sum() for p in model.parameters()),
    )
    return {name: float(parameter) for name, parameter in model.named_parameters()}


def test_the_first_group_that_matches_a_name_wins_with_its_rate_and_decay() -> None:
    groups = (
        ParameterGroup(pattern="*.bias", weight_decay=0.0),
        ParameterGroup(pattern="head.*", learning_rate_scale=0.1, weight_decay=1.0),
        ParameterGroup(pattern="*", learning_rate_scale=2.0),
    )

    found = after_one_step(groups, gradient=1.0)

    expected = {
        "stem.weight": 1 - 2 * 0.5 * (1 + 0.1), "stem.bias": 1 - 0.5,
        "head.weight": 1 - 0.1 * 0.5 * (1 + 1.0), "head.bias": 1 - 0.5,
    }  # fmt: skip
    assert expected == pytest.approx(found)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_factor_of_zero_leaves_parameters_as_they_are(optimizer: str) -> None:
    found = after_one_step((ParameterGroup(pattern="stem.*", learning_rate_scale=0.0),), 1.0, optimizer=optimizer)

    assert (1.0, 1.0) == (found["stem.weight"], found["stem.bias"])
    assert found["head.weight"] < 1.0


def test_adamw_decays_apart_from_the_gradient() -> None:
    groups = (ParameterGroup(pattern="head.*", weight_decay=0.4),)

    found = after_one_step(groups, gradient=0.0, optimizer="adamw")

    expected = {"stem.weight": 0.95, "stem.bias": 0.95, "head.weight": 0.8, "head.bias": 0.8}  # 1 - rate * decay
    assert expected == pytest.approx(found)


def test_the_log_tells_the_common_rate_not_that_of_a_group() -> None:
    groups = (ParameterGroup(pattern="stem.*", learning_rate_scale=0.0),)

    (log,) = fit(
        Named(), [0], epochs=1, settings=TrainingSettings(learning_rate=0.5, parameter_groups=groups),
        loss=lambda model, _: model.head.weight.sum(),
    )  # fmt: skip

    assert 0.5 == log.learning_rate


# -- checks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"learning_rte": 0.1}, "learning_rte"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"schedule": "linear"}, "schedule"),
        ({"accumulation_steps": 0}, "accumulation_steps"),
        ({"max_gradient_norm": 0}, "max_gradient_norm"),
        ({"patience": 0}, "patience"),
        ({"gamma": 0}, "gamma"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"parameter_groups": [{"pattern": ""}]}, "parameter_groups.0.pattern"),
        ({"parameter_groups": [{"pattern": "*", "lr": 1}]}, "parameter_groups.0.lr"),
        ({"parameter_groups": [{"pattern": "*", "learning_rate_scale": -1}]}, "parameter_groups.0.learning_rate_scale"),
        ({"parameter_groups": [{"pattern": "*", "learning_rate_scale": float("inf")}]},
         "parameter_groups.0.learning_rate_scale"),
        ({"milestones": [1.5]}, "milestones"),
        ({"milestones": [float("nan")]}, "milestones"),
        ({"max_gradient_norm": float("inf")}, "max_gradient_norm"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_with_its_value_and_the_known_ones(values: Mapping[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}[.0-9]*' is .*Known settings: optimizer, learning_rate"):
        checked_settings(**values)
