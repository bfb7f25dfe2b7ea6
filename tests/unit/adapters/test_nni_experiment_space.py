"""Search spaces of NNI come from the methods' options, and what NNI samples from them is always a recipe."""

from __future__ import annotations

import pytest
from nni.algorithms.hpo.gridsearch_tuner import GridSearchTuner
from nni.algorithms.hpo.random_tuner import RandomTuner
from nni.algorithms.hpo.tpe_tuner import TpeTuner

from nni_prune_ext.adapters.nni_experiment_space import checked_space, search_space_for, trial_recipe
from nni_prune_ext.errors import ConfigError, RecipeError, TargetError, UnknownPluginError
from nni_prune_ext.methods.options import option_facts
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.recipes import recipe_from
from nni_prune_ext.registry import plugins

BASE = recipe_from(
    {
        "model": "resnet20",
        "data": "digits",
        "method": "taylor",
        "options": {"steps": 3, "batches": 2},
        "target": "macs=0.5",
        "recovery": 2,
    }
)


def test_methods_are_nested_choices_with_the_options_that_they_have() -> None:
    space = search_space_for(["l1", "taylor"], ["macs=0.5"], tune={"steps": (1, 4), "batches": None})

    steps = {"_type": "randint", "_value": [1, 5]}
    assert [
        {"_name": "l1", "steps": steps},
        {"_name": "taylor", "steps": steps, "batches": {"_type": "randint", "_value": [1, 33]}},
    ] == space["method"]["_value"]
    assert {"_type": "choice", "_value": ["macs=0.5"]} == space["target"]


def test_what_is_not_searched_is_left_to_the_recipe() -> None:
    assert ["method"] == list(search_space_for(["l1"]))
    assert ["target"] == list(search_space_for([], ["macs=0.5"]))


def test_epochs_and_any_key_of_a_recipe_can_be_searched() -> None:
    space = search_space_for(["l1"], ["macs=0.5"], epochs=[1, 3, 1], settings={"scope": ["global", "local"]})

    assert [1, 3] == space["recovery.epochs"]["_value"]
    assert ["global", "local"] == space["scope"]["_value"]


@pytest.mark.parametrize(
    ("methods", "targets", "tune", "error", "says"),
    [
        ([], [], {}, ConfigError, "There is nothing to choose from"),
        ([], ["macs=0.5"], {"steps": None}, ConfigError, "None of the methods"),
        (["l1"], ["macs=0.5"], {"stepz": None}, ConfigError, "None of the methods l1 has the option 'stepz'.*steps"),
        (["tailor"], ["macs=0.5"], {}, UnknownPluginError, "taylor"),
        (["l1"], ["macz=0.5"], {}, TargetError, "macz"),
        (["l1"], ["macs=0.5"], {"steps": (0, 3)}, ConfigError, "0 to 3"),
    ],
)
def test_what_cannot_be_searched_is_refused(methods, targets, tune, error, says) -> None:
    with pytest.raises(error, match=says):
        search_space_for(methods, targets, tune=tune)


@pytest.mark.parametrize("tuner", [TpeTuner, RandomTuner, GridSearchTuner])
@pytest.mark.parametrize("name", plugins("pruners"))
def test_everything_that_nni_samples_is_a_recipe(name, tuner) -> None:
    options = [fact.name for fact in option_facts(method_spec(name).options) if fact.search or fact.choices]
    space = search_space_for([name], ["macs=0.5", "params=0.7"], tune=dict.fromkeys(options), epochs=[1, 2])
    made = tuner()
    made.update_search_space(space)

    recipes = [trial_recipe(BASE, made.generate_parameters(number)) for number in range(12)]

    assert {name} == {recipe.method for recipe in recipes}
    assert {1, 2} >= {recipe.recovery_epochs for recipe in recipes}


def test_options_of_the_same_method_stay_unless_sampled() -> None:
    recipe = trial_recipe(BASE, {"method": {"_name": "taylor", "steps": 2.0}, "target": "params=0.6"})

    assert (2, 2) == (recipe.options["steps"], recipe.options["batches"])
    assert ("params=0.6",) == recipe.target


def test_options_of_another_method_do_not_leak_in() -> None:
    recipe = trial_recipe(BASE, {"method": "l1"})

    assert (1, False) == (recipe.options["steps"], "batches" in recipe.options)


def test_flat_names_and_dotted_keys_are_understood() -> None:
    recipe = trial_recipe(
        BASE,
        {"method": "l2", "options.steps": 4, "schedule": "agp", "recovery.epochs": 3.0, "training.learning_rate": 1e-5},
    )

    assert ("l2", 4, "agp") == (recipe.method, recipe.options["steps"], recipe.options["schedule"])
    assert (3, 1e-5) == (recipe.recovery_epochs, recipe.training.learning_rate)


def test_a_tuner_that_gives_out_a_budget_means_epochs_of_recovery() -> None:
    assert 7 == trial_recipe(BASE, {"TRIAL_BUDGET": 7}).recovery_epochs


def test_a_nested_choice_sets_further_keys() -> None:
    recipe = trial_recipe(BASE, {"training.optimizer": {"_name": "adamw", "training.learning_rate": 0.001}})

    assert ("adamw", 0.001) == (recipe.training.optimizer, recipe.training.learning_rate)


def test_a_measurement_that_was_switched_off_stays_off() -> None:
    off = recipe_from({**BASE.model_dump(exclude_none=True), "measure": False})

    assert trial_recipe(off, {"target": "macs=0.6"}).measure is None


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"target": "macs=2"}, "trial: target"),
        ({"learning_rate": 0.1}, "trial: learning_rate: there is no such key.*training.learning_rate"),
        ({"recovery.epochs": 1.5}, "trial: recovery.epochs is 1.5"),
        ({"method": "tailor"}, "trial: method is 'tailor'.*taylor"),
    ],
)
def test_a_parameter_that_makes_no_recipe_is_named(parameters, says) -> None:
    with pytest.raises(RecipeError, match=says):
        trial_recipe(BASE, parameters)


def test_an_option_out_of_range_is_named() -> None:
    with pytest.raises(ConfigError, match="'steps' is 0, which method 'l1' does not take"):
        trial_recipe(BASE, {"method": {"_name": "l1", "steps": 0}})


@pytest.mark.parametrize(
    ("space", "error", "says"),
    [
        ({}, ConfigError, "is empty"),
        ({"target": ["macs=0.5"]}, ConfigError, "'_type' to be one of choice"),
        ({"target": {"_type": "choise", "_value": ["macs=0.5"]}}, ConfigError, "'_type' to be one of choice"),
        ({"limits.multiple": {"_type": "quniform", "_value": [4, 8]}}, ConfigError, "list 3 numbers"),
        ({"target": {"_type": "choice", "_value": ["macs=0.5", "macs=5"]}}, RecipeError, "macs=5"),
        ({"method": {"_type": "choice", "_value": [{"_name": "l1", "steps": 3, "x": 1}]}}, ConfigError, "method.steps"),
    ],
)
def test_a_search_space_with_a_mistake_is_refused_before_anything_runs(space, error, says) -> None:
    with pytest.raises(error, match=says):
        checked_space(space, BASE)


def test_every_choice_of_a_space_is_tried_once() -> None:
    space = search_space_for(["l1", "fpgm"], ["macs=0.5", "macs=0.6", "macs=0.7"], tune={"steps": (1, 2)})
    space["training.momentum"] = {"_type": "normal", "_value": [0.9, 0.01]}

    tried = [(recipe.method, recipe.target[0]) for recipe in checked_space(space, BASE)]

    assert {"l1", "fpgm"} == {method for method, _ in tried}
    assert {"macs=0.5", "macs=0.6", "macs=0.7"} == {target for _, target in tried}
