"""Recipes: what they may say, how they are changed from outside, and how every mistake is named with its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from nni_prune_ext.errors import RecipeError
from nni_prune_ext.recipes import Recipe, all_keys, checked_recipe, load_recipe, method_epochs, recipe_from
from nni_prune_ext.recipes.recipe import section_in

ROOT = Path(__file__).parents[2]
SOUND = """\
model: resnet20
data:
  source: digits
  batch_size: 20
method: l1
target: macs=0.5
recovery: 3
"""


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_short_forms_stand_for_sections(written):
    recipe = load_recipe(written(SOUND))

    assert "resnet20" == recipe.model.name
    assert ("digits", 20) == (recipe.data.source, recipe.data.batch_size)
    assert ("macs=0.5",) == recipe.target
    assert 3 == recipe.recovery_epochs


def test_a_recipe_is_read_back_from_its_own_yaml(written):
    recipe = load_recipe(
        written(SOUND),
        ["measure=false", "train={epochs: 2, learning_rate: 0.1}", "distillation.features=[layer3]", "out=there"],
    )

    again = load_recipe(written(recipe.to_yaml()))

    assert recipe == again
    assert again.measure is None


def test_the_options_of_the_method_are_written_out(written):
    recipe = load_recipe(written(SOUND))

    assert {"steps": 1, "schedule": "linear", "epochs_per_step": 0, "ratio_policy": None} == recipe.options


def test_epochs_of_the_method_are_counted(written):
    recipe = load_recipe(written(SOUND), ["options.steps=3", "options.epochs_per_step=2"])

    assert 4 == method_epochs(recipe)


MISTAKES = {
    "a value out of range": (
        "training:\n  learning_rate: -1\n",
        "recipe.yaml:9: training.learning_rate is -1: expected a value greater than 0.",
    ),
    "a value of another type": (
        "limits:\n  multiple: many\n",
        "recipe.yaml:9: limits.multiple is 'many': expected a whole number.",
    ),
    "text where a section belongs": (
        "limits: 3\n",
        "recipe.yaml:8: limits is 3: expected a mapping: keys with values.",
    ),
    "a switch where a number belongs": ("seed: true\n", "recipe.yaml:8: seed is True: expected a whole number."),
    "an unknown key": (
        "training:\n  learning_rat: 1\n",
        "recipe.yaml:9: training.learning_rat: there is no such key. Did you mean 'learning_rate'?",
    ),
    "a known key at the wrong place": (
        "epochs: 3\n",
        "recipe.yaml:8: epochs: there is no such key. Did you mean 'train.epochs' or 'recovery.epochs'?",
    ),
    "an unknown key in a list": (
        "training:\n  parameter_groups:\n  - pattern: a\n  - pattern: b\n    weight_deca: 0\n",
        "recipe.yaml:12: training.parameter_groups.1.weight_deca: there is no such key. Did you mean 'weight_decay'?",
    ),
    "a word that is not among the choices": (
        "training: {optimizer: adam}\n",
        "recipe.yaml:8: training.optimizer is 'adam': expected 'sgd' or 'adamw'. Did you mean 'adamw'?",
    ),
    "a key that is given twice": (
        "seed: 1\nseed: 2\n",
        "recipe.yaml:9: seed is given twice, first at recipe.yaml:8, expected once. Remove one.",
    ),
    "a key that is no text": ("1: 2\n", "recipe.yaml:8: the key 1 is not text, expected a name. Put it in quotes."),
    "no YAML": ("limits: [1\n", "recipe.yaml:9: not readable as YAML: expected ',' or ']'"),
    "a Python object": ("out: !!python/name:os.system x\n", "recipe.yaml:8: not readable as YAML: could not determine"),
    "limits that contradict each other": (
        "limits:\n  layers:\n    layer1.*: {min_ratio: 0.5, max_ratio: 0.2}\n",
        "recipe.yaml:10: limits.layers.layer1.*",
    ),
    "an unknown option of the method": (
        "options:\n  step: 2\n",
        "recipe.yaml:9: options.step: there is no such key. Did you mean 'steps'? Known options: steps, schedule",
    ),
    "a scheduler that nobody registered": (
        "options: {schedule: apg}\n",
        "recipe.yaml:8: options.schedule: There is no scheduler called 'apg'. Did you mean 'agp'",
    ),
    "an option of the method out of range": (
        "options:\n  steps: 0\n",
        "recipe.yaml:9: options.steps is 0: expected a value greater than or equal to 1. Known options: steps",
    ),
    "two sources of weights": (
        None,
        "recipe.yaml:3: model.pretrained conflicts with model.weights (recipe.yaml:4): two sources of weights",
    ),
}
TWO_WEIGHTS = "model:\n  name: resnet20\n  pretrained: true\n  weights: a.pt\nmethod: l1\ntarget: macs=0.5\n"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_key_and_line(mistake, written):
    text, expected = MISTAKES[mistake]

    with pytest.raises(RecipeError) as caught:
        load_recipe(written(TWO_WEIGHTS if text is None else SOUND + text))

    assert str(caught.value).startswith(expected)


CONFLICTS = {
    "recovery.epochs without data": "model: resnet20\nmethod: l1\ntarget: macs=0.5\nrecovery:\n  epochs: 3\n",
    "train without data": "model: resnet20\ntrain: {epochs: 3}\n",
    "method without data": "model: resnet20\nmethod: taylor\ntarget: macs=0.5\n",
    "options without data": "model: resnet20\nmethod: l1\ntarget: macs=0.5\noptions: {steps: 2, epochs_per_step: 1}\n",
    "training.patience without data": "model: resnet20\nmethod: l1\ntarget: macs=0.5\ntraining: {patience: 3}\n",
    "distillation without recovery": "model: resnet20\nmethod: l1\ntarget: macs=0.5\ndistillation: {weight: 0.5}\n",
    "control without recovery": "model: resnet20\nmethod: l1\ntarget: macs=0.5\ncontrol: true\n",
    "target without method": "model: resnet20\ndata: digits\ntrain: {epochs: 1}\ntarget: macs=0.5\n",
    "method without target": "model: resnet20\nmethod: l1\n",
    "model without method or train": "model: resnet20\ndata: digits\n",
}


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_keys_that_do_not_fit_are_both_named(conflict, written):
    text = CONFLICTS[conflict]
    key = conflict.split(" ")[0].split(".")[-1]
    line = next(n for n, content in enumerate(text.splitlines(), 1) if f"{key}:" in content)

    with pytest.raises(RecipeError) as caught:
        load_recipe(written(text))

    assert str(caught.value).startswith(f"recipe.yaml:{line}: {conflict}: ")


@pytest.mark.parametrize("target", ["5", "{macs: 0.5}", "[5]"])
def test_a_target_that_is_no_text_is_told_what_text_to_write(target, written):
    with pytest.raises(RecipeError, match=r"recipe.yaml:6: target.* expected text such as macs=0.5, or a list of it"):
        load_recipe(written(SOUND.replace("macs=0.5", target)))


def test_base_training_has_a_short_form_too(written):
    recipe = load_recipe(written(SOUND + "train: 5\n"), ["train.learning_rate=0.1"])

    assert (5, 0.1) == (recipe.train.epochs, recipe.train.learning_rate)


@pytest.mark.parametrize("key", ["seed", "data.batch_size", "recovery.epochs", "train.epochs"])
def test_a_switch_is_no_number(key, written):
    with pytest.raises(RecipeError, match="is True: expected a whole number"):
        load_recipe(written(SOUND), [f"{key}=true"])


def test_all_mistakes_are_told_at_once(written):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(SOUND + "seed: -1\nscope: wide\n"))

    assert ["recipe.yaml:8: seed", "recipe.yaml:9: scope"] == [
        line[: line.index(" is ")] for line in str(caught.value).splitlines()
    ]


def test_a_missing_key_is_named(written):
    with pytest.raises(RecipeError, match=r"recipe.yaml:1: model.name is missing"):
        load_recipe(written("model: {weights: a.pt}\n"))


def test_an_unreadable_target_is_told_with_what_is_readable(written):
    with pytest.raises(RecipeError, match=r"recipe.yaml:6: target: Cannot read the target 'flops=0.5'"):
        load_recipe(written(SOUND.replace("macs=0.5", "flops=0.5")))


@pytest.mark.parametrize("text", ["", "- 1\n", "resnet20\n"])
def test_a_file_without_keys_is_refused(text, written):
    with pytest.raises(RecipeError, match="holds no keys"):
        load_recipe(written(text))


def test_a_file_that_refers_to_itself_is_refused(written):
    with pytest.raises(RecipeError, match="nested"):
        load_recipe(written("model: &a {name: *a}\n"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="none.yaml"):
        load_recipe(tmp_path / "none.yaml")


def test_set_wins_over_the_file_and_makes_sections(written):
    recipe = load_recipe(
        written(SOUND),
        [
            "training.learning_rate=1e-3",
            "model.weights=dense.pt",
            "train.epochs=2",
            "limits.layers.layer1.*={max_ratio: 0.3}",
            "target=[macs=0.4, params=0.6]",
            "recovery=null",
        ],
    )

    assert 1e-3 == recipe.training.learning_rate
    assert ("resnet20", Path("dense.pt")) == (recipe.model.name, recipe.model.weights)
    assert 2 == recipe.train.epochs
    assert 0.3 == recipe.limits.layers["layer1.*"].max_ratio
    assert ("macs=0.4", "params=0.6") == recipe.target
    assert recipe.recovery is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "training.learning_rate=-1",
            "--set training.learning_rate=-1: training.learning_rate is -1: expected a value",
        ),
        ("training.gama=1", "--set training.gama=1: training.gama: there is no such key. Did you mean 'gamma'?"),
        ("seed", "Cannot read --set 'seed'. Expected KEY=VALUE"),
        ("=3", "Cannot read --set '=3'"),
        ("seed=[", "--set seed=[: the value is not readable as YAML"),
        ("seed.more=1", "--set seed.more=1: seed is {'more': 1}: expected a whole number."),
        ("method.more=1", "--set method.more=1: 'method' has no keys below it. Set it as a whole."),
        ("data=null", "recipe.yaml:7: recovery.epochs"),
    ],
)
def test_mistakes_in_set_name_its_text(text, expected, written):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(SOUND), [text])

    assert str(caught.value).startswith(expected)


def test_a_recipe_from_python_is_checked_as_well():
    with pytest.raises(RecipeError, match="recipe: method without data"):
        checked_recipe(Recipe(model="resnet20", method="taylor", target="macs=0.5"))

    with pytest.raises(RecipeError, match="recipe: seed is -1"):
        recipe_from({"model": "resnet20", "seed": -1})


ELSEWHERE = ("train.", "training.", "distillation.")
"""Sections whose keys the page on training settings describes."""
OWN_KEYS = [key for key in all_keys() if not key.startswith(ELSEWHERE) or key == "train.epochs"]


def default_of(key: str) -> str:
    """Returns the default of a key as the reference writes it."""
    model: type[BaseModel] = Recipe
    for part in key.split(".")[:-1]:
        section = section_in(model.model_fields[part].annotation)
        assert section is not None
        model = section
    field = model.model_fields[key.rpartition(".")[2]]
    if field.is_required():
        return "required"
    if field.default is None or isinstance(field.default, BaseModel) or field.default in ((), {}):
        return "–"
    text = yaml.safe_dump([field.default if not isinstance(field.default, tuple) else list(field.default)])
    return f"`{yaml.safe_load(text)[0] if isinstance(field.default, tuple) else text.strip().removeprefix('- ')}`"


@pytest.mark.parametrize("key", OWN_KEYS)
def test_every_key_is_in_the_reference_with_its_default(key):
    page = (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")

    assert f"| `{key}` | {default_of(key)} |" in page


def test_the_reference_names_no_key_that_does_not_exist():
    page = (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")

    assert set() == set(re.findall(r"^\| `([a-z_.]+)` \|", page, re.MULTILINE)) - set(all_keys())


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_sound_and_explains_itself(path):
    recipe = load_recipe(path)

    assert recipe == load_recipe(path, [f"seed={recipe.seed}"])
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert yaml.safe_load(recipe.to_yaml())["model"]["name"] == recipe.model.name
