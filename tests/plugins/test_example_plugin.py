"""The example package installs with pip, is found, keeps all promises, and prunes by its name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugins" / "npe_plugin_example"

USE = """
import sys
from pathlib import Path

import torch
import nni_prune_ext as npe
from nni_prune_ext.registry import load_plugin, plugins
from nni_prune_ext.testing import check_method, check_runtime, check_scheduler, tiny_runnable
from nni_prune_ext.testing.method_bench import BenchNet

mine = {kind: [name for name, plugin in plugins(kind).items() if plugin.distribution == "npe_plugin_example"]
        for kind in ("pruners", "schedulers", "runtimes")}
assert {"pruners": ["bn_scale"], "schedulers": ["square_root"], "runtimes": ["onnx-reference"]} == mine, mine
check_method(load_plugin("pruners", "bn_scale"))
check_scheduler(load_plugin("schedulers", "square_root"))
check_runtime(load_plugin("runtimes", "onnx-reference")(), tiny_runnable(Path(sys.argv[1])))

model, x = BenchNet(), torch.randn(2, 3, 8, 8)
torch.nn.init.uniform_(model.inside[1].weight)
result = npe.prune(model, x, method="bn_scale", target="macs=0.6")
assert result.certificate.exact and result.achieved[0].met and result.method == "bn_scale"
stepwise = npe.prune(model, x, method="l1", target="macs=0.6", options={"steps": 2, "schedule": "square_root"})
assert stepwise.achieved[0].met
print("done")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, installed from a copy into a folder of its own."""
    source, target = tmp_path_factory.mktemp("source") / "example", tmp_path_factory.mktemp("installed")
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(target), str(source)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    return target


def test_an_installed_plugin_package_is_found_keeps_all_promises_and_prunes(installed: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])

    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip

    assert "done" == (done.stdout.splitlines() or [""])[-1], done.stderr


def test_the_example_stays_small_enough_to_be_read_in_one_go() -> None:
    files = [EXAMPLE / "pyproject.toml", *EXAMPLE.rglob("*.py")]

    assert 120 >= sum(len([line for line in file.read_text().splitlines() if line.strip()]) for file in files)
