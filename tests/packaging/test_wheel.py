"""The wheel says what it needs on every platform, and holds what type checkers look for."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PLATFORMS = {
    "linux/x86_64": {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"},
    "linux/aarch64": {"sys_platform": "linux", "platform_machine": "aarch64", "platform_system": "Linux"},
    "win32/AMD64": {"sys_platform": "win32", "platform_machine": "AMD64", "platform_system": "Windows"},
    "darwin/arm64": {"sys_platform": "darwin", "platform_machine": "arm64", "platform_system": "Darwin"},
    "darwin/x86_64": {"sys_platform": "darwin", "platform_machine": "x86_64", "platform_system": "Darwin"},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy, so that the working tree stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "nni_prune_ext", source / "nni_prune_ext", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert 0 == done.returncode, done.stdout + done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))))


def needed_on(metadata: Message, platform: str) -> set[str]:
    """Returns the names of what a plain install needs on a platform."""
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    environment = {**PLATFORMS[platform], "python_version": "3.12", "extra": ""}
    return {r.name for r in requirements if r.marker is None or r.marker.evaluate(environment)}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_exactly_one_onnx_runtime_is_needed_on_every_platform(metadata: Message, platform: str) -> None:
    runtimes = needed_on(metadata, platform) & {"onnxruntime", "onnxruntime-gpu"}

    expected = {"onnxruntime-gpu"} if platform in {"linux/x86_64", "win32/AMD64"} else {"onnxruntime"}
    assert expected == runtimes


@pytest.mark.parametrize("platform", PLATFORMS)
def test_one_install_brings_both_hosts_and_torch(metadata: Message, platform: str) -> None:
    assert {"torch", "torchvision", "torch-pruning", "nni", "onnx"} <= needed_on(metadata, platform)


def test_what_only_developers_need_is_not_installed_by_default(metadata: Message) -> None:
    assert not needed_on(metadata, "linux/x86_64") & {"pytest", "mypy", "ruff", "timm", "sphinx"}


def test_type_checkers_find_the_marker_and_python_is_new_enough(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert "nni_prune_ext/py.typed" in wheel.namelist()
    assert ">=3.10" == metadata["Requires-Python"]
    assert "nni_prune_ext" == metadata["Name"].replace("-", "_")


def test_every_module_of_the_source_tree_is_in_the_wheel_and_no_test(wheel: zipfile.ZipFile) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nni_prune_ext").rglob("*.py")}

    assert modules == {name for name in wheel.namelist() if name.endswith(".py")}


def test_the_wheel_registers_plugins_and_the_command(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith("/entry_points.txt"))).decode()

    for section in ("console_scripts", "nni_prune_ext.pruners", "nni_prune_ext.schedulers", "nni_prune_ext.runtimes"):
        assert f"[{section}]" in text
