"""`list` by kind and by name, for people and for machines."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from nni_prune_ext.cli.list_plugins import list_plugins
from nni_prune_ext.errors import ConfigError, PluginError
from nni_prune_ext.methods.options import option_facts
from nni_prune_ext.models.builtin import builtin_names
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.registry import Kind, plugins

APP = typer.Typer()
APP.command()(list_plugins)


def shown(*arguments: str) -> str:
    found = CliRunner().invoke(APP, list(arguments), catch_exceptions=False)
    assert 0 == found.exit_code
    return found.stdout


def test_a_method_is_shown_with_its_facts_and_all_its_options() -> None:
    text = shown("taylor")

    for word in ("taylor (pruner): smallest first-order", "arxiv.org/abs/1906.10771", "products:  plan", "needed"):
        assert word in text
    for fact in option_facts(method_spec("taylor").options):
        assert any(fact.name in line and fact.description.split()[0] in line for line in text.splitlines())
    assert "≥ 1" in text


@pytest.mark.parametrize("name", plugins("pruners"))
def test_the_machine_form_of_a_method_is_its_options(name: str) -> None:
    found = json.loads(shown(name, "--json"))

    spec = method_spec(name)
    assert (spec.name, "pruners", spec.summary, spec.needs_data, sorted(spec.products)) == tuple(
        found[key] for key in ("name", "kind", "summary", "needs_data", "products")
    )
    assert [(fact.name, fact.default) for fact in option_facts(spec.options)] == [
        (option["name"], option["default"]) for option in found["options"]
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("agp", ("scheduler", "schedule:")),
        ("firing_signature", ("scheduler", "ratio_policy:", "(needs data)")),
        ("torch-eager", ("runtime", "usable: PyTorch")),
        ("resnet56", ("model",)),
    ],
)
def test_whatever_is_listed_can_be_named(name: str, words: tuple[str, ...]) -> None:
    text = shown(name)

    assert all(word in text for word in words)


@pytest.mark.parametrize("kind", ["pruners", "schedulers", "runtimes"])
def test_the_machine_form_of_a_kind_holds_all_of_it(kind: Kind) -> None:
    found, everything = json.loads(shown(kind, "--json")), json.loads(shown("--json"))

    assert {kind, "event"} == found.keys()
    assert "done" == found["event"] == everything["event"] == json.loads(shown("models", "--json"))["event"]
    assert [*plugins(kind)] == [*found[kind]] == [*everything[kind]]
    assert list(builtin_names()) == everything["models"]
    assert all(
        "summary" in facts or "usable" in facts for facts in json.loads(shown(kind, "--check", "--json"))[kind].values()
    )


@pytest.mark.parametrize(
    ("name", "meant"), [("tailor", "'taylor'"), ("pruner", "'pruners'"), ("resnet57", "'resnet56'"), ("agpp", "'agp'")]
)
def test_a_name_that_is_nothing_is_refused_with_its_neighbour(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"no '{name}' to list.*Did you mean.*{meant}"):
        CliRunner().invoke(APP, [name], catch_exceptions=False)


def test_a_method_that_is_not_registered_is_shown_by_its_module_path() -> None:
    found = json.loads(shown("nni_prune_ext.methods.baselines:TAYLOR", "--json"))

    registered = json.loads(shown("taylor", "--json"))
    assert {"name", "location", "distribution"} == {key for key, value in registered.items() if found.get(key) != value}
    with pytest.raises(PluginError, match="baselines:SCORES"):
        CliRunner().invoke(APP, ["nni_prune_ext.methods.baselines:SCORES"], catch_exceptions=False)


@pytest.mark.parametrize("name", ["taylor", "agp", "torch-eager", "resnet56"])
def test_every_line_for_machines_says_what_it_is_and_is_strict_json(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["nni_prune_ext.cli.list_plugins"]  # the package has a function of that name
    monkeypatch.setattr(module, "_details", lambda kind, name: {"default": float("inf")})

    found = json.loads(shown(name, "--json"), parse_constant=pytest.fail)

    assert ("done", name, None) == (found["event"], found["name"], found.get("default"))


def test_a_list_of_names_loads_nothing_heavy() -> None:
    code = (
        "import sys; from nni_prune_ext.cli.list_plugins import list_plugins; list_plugins('', False, False);"
        "print([name for name in ('torch', 'onnxruntime', 'matplotlib', 'accelerate') if name in sys.modules])"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "[]" == found.stdout.splitlines()[-1]
