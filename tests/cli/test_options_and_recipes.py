"""Options and recipes are one language: every option sets a recipe key, with the same default and the same checks."""

from __future__ import annotations

import pytest
import typer
from pydantic import BaseModel

from nni_prune_ext.cli import app
from nni_prune_ext.cli.job import recipe_of
from nni_prune_ext.cli.options import NOT_IN_RECIPES, RECIPE_KEYS
from nni_prune_ext.errors import ConfigError, NniPruneExtError
from nni_prune_ext.recipes import Recipe, all_keys, load_recipe
from nni_prune_ext.recipes.recipe import section_in

VERBS = typer.main.get_command(app).commands
PARAMETERS = [(verb, p) for verb in ("plan", "prune", "run") for p in VERBS[verb].params if p.name != "help"]


def options_of(verb: str, *words: str):
    return VERBS[verb].make_context(verb, list(words))


def read(*words: str) -> Recipe:
    context = options_of("prune", "resnet20", "--out", "out", "--target", "macs=0.5", *words)
    return recipe_of(context, context.params["settings"], method=context.params["method"])[0]


@pytest.mark.parametrize(("verb", "parameter"), PARAMETERS, ids=[f"{verb} {p.name}" for verb, p in PARAMETERS])
def test_every_option_sets_a_recipe_key_or_is_about_the_command(verb, parameter):
    key = RECIPE_KEYS.get(parameter.name)

    assert (key in set(all_keys())) != (parameter.name in NOT_IN_RECIPES)


@pytest.mark.parametrize("verb", ["plan", "prune"])
def test_options_and_recipes_have_the_same_defaults(verb):
    different = {}
    for parameter in VERBS[verb].params:
        key = RECIPE_KEYS.get(parameter.name)
        if key is None or parameter.required or parameter.name in ("method", "epochs", "measure", "quantize"):
            continue  # a recipe may prune nothing; no recovery or quantising is no section; measuring is a section
        model: type[BaseModel] = Recipe
        for part in key.split(".")[:-1]:
            model = section_in(model.model_fields[part].annotation) or model
        field = model.model_fields[key.rpartition(".")[2]]
        default = None if field.is_required() else field.default
        own = parameter.default
        if (own or None) != (default or None) and parameter.name not in ("distill", "temperature"):
            different[parameter.name] = (own, default)

    assert {} == different


CASES = {
    "--weights a.pt": ("model.weights", "a.pt"),
    "--pretrained": ("model.pretrained", True),
    "--num-classes 7": ("model.num_classes", 7),
    "--input-shape 1,3,8,8": ("model.input_shape", [1, 3, 8, 8]),
    "--data digits --batch-size 9": ("data.batch_size", 9),
    "--data digits --image-size 8": ("data.image_size", 8),
    "--data digits --limit-images 9": ("data.limit_images", 9),
    "--data digits --download": ("data.download", True),
    "--data digits --mean 0.5": ("data.mean", [0.5]),
    "--data digits --std 0.5,0.6": ("data.std", [0.5, 0.6]),
    "--method l2": ("method", "l2"),
    "--option steps=3": ("options.steps", 3),
    "--target params=0.5": ("target", ["macs=0.5", "params=0.5"]),
    "--max-ratio 0.5": ("limits.max_ratio", 0.5),
    "--min-channels 2": ("limits.min_channels", 2),
    "--multiple 4": ("limits.multiple", 4),
    "--exclude conv1 --exclude linear": ("limits.exclude", ["conv1", "linear"]),
    "--layer layer1.*=0.1:0.3": ("limits.layers", {"layer1.*": {"min_ratio": 0.1, "max_ratio": 0.3, "multiple": None}}),
    "--scope local": ("scope", "local"),
    "--data digits --epochs 3": ("recovery.epochs", 3),
    "--data digits --epochs 3 --distill 0.3": ("distillation.weight", 0.3),
    "--data digits --epochs 3 --temperature 2": ("distillation.temperature", 2.0),
    "--optimizer adamw": ("training.optimizer", "adamw"),
    "--learning-rate 0.3": ("training.learning_rate", 0.3),
    "--weight-decay 0": ("training.weight_decay", 0.0),
    "--schedule step": ("training.schedule", "step"),
    "--warmup-epochs 0.5": ("training.warmup_epochs", 0.5),
    "--accumulation-steps 2": ("training.accumulation_steps", 2),
    "--precision bf16": ("training.precision", "bf16"),
    "--channels-last": ("training.channels_last", True),
    "--data digits --patience 2": ("training.patience", 2),
    "--loss my.module:loss": ("loss", "my.module:loss"),
    "--metric my.module:iou": ("metric", "my.module:iou"),
    "--no-control": ("control", False),
    "--no-measure": ("measure", None),
    "--quantize fp16": ("quantize.precision", ["fp16"]),
    "--data digits --quantize int8 --calibration entropy": ("quantize.calibration", "entropy"),
    "--data digits --quantize int8 --calibration-images 64": ("quantize.images", 64),
    "--quantize fp16 --keep-float conv1": ("quantize.keep_float", ["conv1"]),
    "--target latency=0.7 --on torch-eager": ("latency.runtime", "torch-eager"),
    "--target latency=0.7 --batch 8": ("latency.batch", 8),
    "--target latency=0.7 --percentile 95": ("latency.percentile", 95),
    "--target latency=0.7 --threads 2 --clock wall": ("latency.threads", 2),
    "--target latency=0.7 --clock wall": ("latency.clock", "wall"),
    "--device cpu": ("device", "cpu"),
    "--keep-checkpoints": ("keep_checkpoints", True),
    "--seed 3": ("seed", 3),
    "--set training.gamma=0.5": ("training.gamma", 0.5),
    "--image-size 8": ("model.input_shape", [1, 3, 8, 8]),
}


@pytest.mark.parametrize("words", CASES)
def test_an_option_sets_its_key(words):
    key, expected = CASES[words]

    found: object = read(*words.split(" ")).model_dump(mode="json")
    for part in key.split("."):
        assert isinstance(found, dict)
        found = found[part]

    assert expected == found


def test_every_option_that_sets_a_key_has_a_case():
    tried = {word for words in CASES for word in words.split(" ") if word.startswith("--")}

    options = {
        option for p in VERBS["prune"].params if p.name in RECIPE_KEYS for option in p.opts if option.startswith("--")
    }

    assert set() == options - tried - {"--out", "--control", "--measure"}


def test_a_file_of_limits_is_read_and_options_win_over_it(tmp_path):
    file = tmp_path / "advice.json"
    file.write_text('{"multiple": 4, "max_ratio": 0.5, "layers": {"layer1.0.conv1": {"multiple": 16}}}')

    limits = read("--limits", str(file), "--max-ratio", "0.7", "--layer", "conv1=0:0.1").limits

    assert (4, 0.7) == (limits.multiple, limits.max_ratio)
    assert 16 == limits.layers["layer1.0.conv1"].multiple
    assert 0.1 == limits.layers["conv1"].max_ratio


def test_what_a_file_of_limits_does_not_say_stays_open(tmp_path):
    file = tmp_path / "advice.json"
    file.write_text('{"layers": {"layer1.0.conv1": {"max_ratio": 0.5}}}')

    assert {"layers"} == read("--limits", str(file)).limits.model_fields_set


@pytest.mark.parametrize("text", [None, "{", "[]", '{"multiples": 4}', '{"layers": {"conv1": {"multiple": 0}}}'])
def test_a_file_without_limits_is_refused(tmp_path, text):
    file = tmp_path / "advice.json"
    if text is not None:
        file.write_text(text)

    with pytest.raises(ConfigError, match=r"--limits: '.*advice.json' holds no limits"):
        read("--limits", str(file))


MISTAKES = {
    "--learning-rate 0": "--learning-rate is 0.0: expected a value greater than 0.",
    "--optimizer adam": "--optimizer is 'adam': expected 'sgd' or 'adamw'. Did you mean 'adamw'?",
    "--max-ratio 2": "--max-ratio is 2.0: expected a value less than or equal to 1.",
    "--epochs 3": "--epochs without data: it needs training data, none was given. Add data (CLI: --data).",
    "--method taylor": "--method without data: it needs training data, none was given. Add data (CLI: --data).",
    "--option ratio_policy=firing_signature": "--option ratio_policy: options.ratio_policy without data: it needs",
    "--pretrained --weights a.pt": "--pretrained conflicts with --weights: two sources of weights",
    "--distill 0.5": "--distill: distillation without recovery: the teacher is only used in recovery.",
    "--control": "--control without recovery: nothing trains",
    "--quantize int8": "--quantize: quantize without data: int8 is calibrated on training images. Add data",
    "--quantize int4": "--quantize: quantize.precision.0 is 'int4': expected 'int8' or 'fp16'. Did you mean 'int8'?",
    "--batch-size 4": "--batch-size: data.source is missing, expected a value. Add it.",
    "--option steps=0": "--option steps: options.steps is 0: expected a value greater than or equal to 1.",
    "--option step=2": "--option step: options.step: there is no such key. Did you mean 'steps'?",
    "--layer conv1=0.5:0.2": "--layer conv1: limits.layers.conv1",
    "--layer conv1": "Cannot read the layer limit 'conv1'. Expected PATTERN=MIN:MAX",
    "--input-shape 1,3": "--input-shape: Not a usable input shape for 'resnet20'",
    "--set training.gama=2": "--set training.gama=2: training.gama: there is no such key. Did you mean 'gamma'?",
    "--set seed": "Cannot read --set 'seed'",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_names_the_option(words):
    with pytest.raises(NniPruneExtError) as caught:
        read(*words.split(" "))

    assert str(caught.value).startswith(MISTAKES[words])


def test_a_pattern_in_a_recipe_is_text_and_not_minutes_and_seconds(tmp_path):
    text = "model: resnet20\nmethod: lottery_jackpots\ntarget: sparsity=0.5\ndata: digits\noptions: {pattern: 2:4}\n"
    (tmp_path / "recipe.yaml").write_text(text)

    recipe = load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())

    assert "2:4" == recipe.options["pattern"]
    assert recipe == load_recipe(tmp_path / "again.yaml")
    assert "1:4" == load_recipe(tmp_path / "recipe.yaml", ["options.pattern=1:4"]).options["pattern"]
