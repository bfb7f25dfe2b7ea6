"""The registry: names to places, lazily, loudly."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import EntryPoint, distribution
from pathlib import Path

import pytest

from nni_prune_ext import registry
from nni_prune_ext.errors import PluginError, UnknownPluginError
from nni_prune_ext.registry import BUILT_IN, load_plugin, plugins

KINDS = ["pruners", "schedulers", "runtimes"]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def registered(monkeypatch: pytest.MonkeyPatch, kind: str, **locations: str) -> None:
    """Pretends that another package has registered these plugins."""
    group = f"nni_prune_ext.{kind}"
    found = [EntryPoint(name, location, group) for name, location in locations.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry for entry in found if entry.group == group])


@pytest.mark.parametrize("kind", KINDS)
def test_the_built_in_table_says_what_the_entry_points_of_the_package_say(kind: str) -> None:
    entries = distribution("nni_prune_ext").entry_points.select(group=f"nni_prune_ext.{kind}")

    assert dict(BUILT_IN[kind]) == {entry.name: entry.value for entry in entries}


@pytest.mark.parametrize("kind", KINDS)
def test_every_built_in_plugin_loads(kind: str) -> None:
    assert all(load_plugin(kind, name) is not None for name in BUILT_IN[kind])


def test_names_are_sorted_and_say_where_they_come_from() -> None:
    found = plugins("schedulers")

    assert sorted(found) == list(found)
    assert ("nni_prune_ext.schedules:AGP", "nni_prune_ext") == (found["agp"].location, found["agp"].distribution)


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UnknownPluginError, match=r"no pruner called 'tailor'. Did you mean 'taylor'\?"):
        load_plugin("pruners", "tailor")


def test_an_unknown_name_without_a_near_one_is_refused_with_all_names() -> None:
    with pytest.raises(UnknownPluginError, match=r"There are: .*l1"):
        load_plugin("pruners", "zzzzzz")


def test_a_plugin_of_another_package_is_found_beside_the_built_in_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, "schedulers", foreign="math:pi [extra]", nested="os:path.sep")

    assert {"agp", "foreign"} <= plugins("schedulers").keys()
    assert "math:pi" == plugins("schedulers")["foreign"].location
    assert 3.14 < load_plugin("schedulers", "foreign") < 3.15
    assert "/" == load_plugin("schedulers", "nested")


def test_a_name_taken_twice_is_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, "pruners", l1="stranger:L1")

    with pytest.raises(
        PluginError, match=r"'nni_prune_ext\.methods\.baselines:L1' from nni_prune_ext and 'stranger:L1'"
    ):
        plugins("pruners")


def test_the_same_place_registered_twice_is_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, "pruners", l1=BUILT_IN["pruners"]["l1"])

    assert BUILT_IN["pruners"].keys() == plugins("pruners").keys()


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import a_module_that_nobody_has", "ModuleNotFoundError"),
        ("x = = 1", "SyntaxError"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("", "has no attribute 'THING'"),
    ],
)
def test_a_plugin_that_does_not_load_is_an_error_with_its_cause(
    source: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
    registered(monkeypatch, "runtimes", broken="broken_plugin:THING")

    with pytest.raises(PluginError, match=cause) as caught:
        load_plugin("runtimes", "broken")

    assert caught.value.__cause__ is not None
    assert "broken" in plugins("runtimes")  # listing does not import


LISTING = """
import sys
import nni_prune_ext
from nni_prune_ext.registry import plugins
assert plugins("pruners") and plugins("schedulers") and plugins("runtimes") and dir(nni_prune_ext)
heavy = {"torch", "torchvision", "nni", "torch_pruning", "onnx", "onnxruntime", "sklearn", "pydantic"}
print(sorted(heavy & set(sys.modules)))
"""


def test_listing_plugins_imports_nothing_heavy() -> None:
    done = run_python(LISTING)

    assert ("[]\n", "") == (done.stdout, done.stderr)


COMMAND_LINE = """
import sys
sys.argv = ["nni-prune-ext", sys.argv[1]]
from nni_prune_ext.cli import main
try:
    main()
except SystemExit as leaving:
    assert not leaving.code, leaving.code
print("imported:", sorted({"torch", "torchvision", "nni", "torch_pruning", "onnx", "onnxruntime"} & set(sys.modules)))
"""


@pytest.mark.skipif(importlib.util.find_spec("nni_prune_ext.cli") is None, reason="there is no command line yet")
@pytest.mark.parametrize("argument", ["--help", "list"])
def test_help_and_list_on_the_command_line_import_nothing_heavy(argument: str) -> None:
    done = run_python(COMMAND_LINE, argument)

    assert "imported: []" == done.stdout.splitlines()[-1], done.stderr


WITHOUT_HOSTS = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"nni", "torch_pruning"}:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
        return None


sys.meta_path.insert(0, Blocker())
import torch
import nni_prune_ext as npe
from nni_prune_ext.testing.method_bench import BenchNet

model, x = BenchNet(), torch.randn(2, 3, 8, 8)
result = npe.prune(model, x, method="l1", target="macs=0.6")
assert result.certificate.exact
for name in npe.__all__:
    getattr(npe, name)
print("done")
"""


def test_everything_works_where_nni_and_torch_pruning_are_not_installed() -> None:
    done = run_python(WITHOUT_HOSTS)

    assert "done\n" == done.stdout, done.stderr
