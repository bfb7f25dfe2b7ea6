"""Options of methods as facts, as search spaces of NNI, and back from a trial."""

from __future__ import annotations

from enum import Enum
from typing import Literal

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.methods.base import MethodSpec, NoOptions, PruningMethod
from nni_prune_ext.methods.options import OptionFact, option_facts, options_from_trial, search_space
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.registry import plugins


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rate: float = Field(default=0.5, gt=0, lt=1, description="how fast", json_schema_extra={"source": "equation 3"})
    rounds: int = Field(default=3, ge=1, le=9)
    width: int = Field(default=8, ge=2, le=30, multiple_of=8)
    share: float = Field(default=0.2, ge=0, le=1, multiple_of=0.1)
    norm: Literal["l1", "l2"] = "l1"
    colour: Colour = Colour.RED
    fast: bool = False
    limit: float = Field(default=1.0, ge=0)
    seen: int | None = Field(default=None, ge=1, json_schema_extra={"search": [1, 4]})
    mode: Literal["a", "b"] | None = None
    name: str = "x"
    single: int = Field(default=1, ge=1, le=1)


SPEC = MethodSpec("toy", "for tests", "none", Options, lambda options: PruningMethod())


def facts() -> dict[str, OptionFact]:
    return {fact.name: fact for fact in option_facts(Options)}


def test_facts_say_type_default_range_choices_and_source() -> None:
    found = facts()

    assert list(Options.model_fields) == list(found)
    rate = OptionFact("rate", "float", 0.5, 0, 1, True, True, description="how fast", source="equation 3")
    assert rate == found["rate"]
    assert ("int", 3, 1, 9) == (
        found["rounds"].type,
        found["rounds"].default,
        found["rounds"].low,
        found["rounds"].high,
    )
    assert (("l1", "l2"), ("red", "blue"), (False, True)) == tuple(
        found[name].choices for name in ("norm", "colour", "fast")
    )
    assert ("red", ("a", "b", None), True) == (found["colour"].default, found["mode"].choices, found["mode"].optional)
    assert ("int", None, (1, 4)) == (found["seen"].type, found["seen"].default, found["seen"].search)
    assert None is found["name"].choices


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rate", "> 0, < 1"),
        ("rounds", "≥ 1, ≤ 9"),
        ("width", "≥ 2, ≤ 30, multiple of 8"),
        ("mode", "a, b, none"),
        ("seen", "≥ 1 or none"),
        ("name", ""),
    ],
)
def test_valid_values_are_said_in_words(name: str, expected: str) -> None:
    assert expected == facts()[name].valid


def test_the_search_space_holds_every_option_that_has_choices_or_a_finite_range() -> None:
    space = search_space(SPEC)

    assert {
        "rounds": {"_type": "randint", "_value": [1, 10]},
        "width": {"_type": "quniform", "_value": [8, 24, 8]},
        "norm": {"_type": "choice", "_value": ["l1", "l2"]},
        "colour": {"_type": "choice", "_value": ["red", "blue"]},
        "fast": {"_type": "choice", "_value": [False, True]},
        "seen": {"_type": "randint", "_value": [1, 5]},
        "mode": {"_type": "choice", "_value": ["a", "b", "none"]},
        "single": {"_type": "choice", "_value": [1]},
    } == {name: entry for name, entry in space.items() if name not in ("rate", "share")}
    assert "uniform" == space["rate"]["_type"]
    assert 0 < space["rate"]["_value"][0] < 1e-9
    assert 1 - 1e-9 < space["rate"]["_value"][1] < 1
    assert ["quniform", 0, 1, 0.1] == pytest.approx([space["share"]["_type"], *space["share"]["_value"]])


def test_an_unbounded_option_is_refused_by_name_and_taken_with_a_range() -> None:
    with pytest.raises(ConfigError, match=r"'limit' of method 'toy' is any float \(≥ 0\).*ranges={'limit'"):
        search_space(SPEC, ["limit"])
    with pytest.raises(ConfigError, match="'name' of method 'toy' is any str.*Leave it out"):
        search_space(SPEC, ["name"])

    assert {"_type": "uniform", "_value": [0.0, 2.0]} == search_space(SPEC, ranges={"limit": (0, 2)})["limit"]
    assert {*search_space(SPEC), "limit"} == set(search_space(SPEC, ranges={"limit": (0, 2)}))
    assert {"norm", "limit"} == set(search_space(SPEC, ["norm"], ranges={"limit": (0, 2)}))
    assert {} == search_space(SPEC, [])


@pytest.mark.parametrize("span", [(0, 4), (4, 2), (1, 12), (float("nan"), 2)])
def test_a_range_outside_the_valid_values_is_refused(span: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="'rounds'.*≥ 1, ≤ 9"):
        search_space(SPEC, ranges={"rounds": span})


def test_a_range_without_a_valid_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="No valid value of option 'width'.*multiple of 8"):
        search_space(SPEC, ranges={"width": (9, 15)})


def test_an_unknown_option_is_refused_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="no option 'round'.*rounds"):
        search_space(SPEC, ["round"])
    with pytest.raises(ConfigError, match="There are: none"):
        search_space(MethodSpec("bare", "s", "r", NoOptions, lambda _: PruningMethod()), ["steps"])


def test_what_a_trial_hands_over_becomes_options() -> None:
    sampled = {
        "rounds": np.int64(4),
        "width": 15.9999999,
        "share": 0.30000000000000004,
        "seen": 2.0,
        "mode": "none",
        "fast": np.True_,
        "colour": "blue",
    }

    found = options_from_trial(SPEC, sampled)

    assert Options(rounds=4, width=16, share=0.30000000000000004, seen=2, fast=True, colour=Colour.BLUE) == found
    assert isinstance(found.model_dump()["width"], int)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [({"rounds": 10}, "rounds"), ({"rounds": 2.5}, "rounds"), ({"round": 2}, "round"), ({"norm": "none"}, "norm")],
)
def test_what_is_no_option_is_refused_by_name(parameters: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=f"parameter '{named}'.*'toy'.*Known options: rate, rounds"):
        options_from_trial(SPEC, parameters)


@pytest.mark.parametrize("name", plugins("pruners"))
def test_every_option_of_a_registered_method_is_described_and_has_a_source(name: str) -> None:
    for fact in option_facts(method_spec(name).options):
        assert fact.description, f"{fact.name} has no description"
        assert fact.source, f"{fact.name} has no source"


@pytest.mark.parametrize(
    "spec", [SPEC, *(method_spec(name) for name in plugins("pruners"))], ids=lambda spec: spec.name
)
def test_nni_takes_every_search_space_and_its_samples_are_valid_options(spec: MethodSpec) -> None:
    from nni.algorithms.hpo.random_tuner import RandomTuner
    from nni.common.hpo_utils import validate_search_space

    space, optional = search_space(spec), {fact.name for fact in option_facts(spec.options) if fact.optional}
    tuner = RandomTuner(seed=0)
    tuner.update_search_space(space)

    assert validate_search_space({n: e for n, e in space.items() if e["_value"] != [1]}, raise_exception=True)
    for number in range(50):
        sampled = tuner.generate_parameters(number)
        found = options_from_trial(spec, sampled).model_dump(mode="json")
        for name, value in sampled.items():
            assert pytest.approx(None if value == "none" and name in optional else value) == found[name]


def test_choices_of_the_baselines_come_from_the_registry() -> None:
    found = {fact.name: fact for fact in option_facts(method_spec("l1").options)}

    assert ("agp", "asfp", "cosine", "linear", "one_shot", "rewinding") == tuple(
        sorted(str(c) for c in found["schedule"].choices or ())
    )
    assert ("firing_signature", "ftwt_ratio", "psap_ratio", "uniform_ratio", None) == found["ratio_policy"].choices
    assert not {"uniform_ratio", "replace"} & set(found["schedule"].choices or ())
