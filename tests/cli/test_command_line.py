"""The command line as a user meets it: what it prints, what it writes, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

import nni_prune_ext as npe
from nni_prune_ext.cli.job import tell_what_is_not_pruned
from nni_prune_ext.deployment import load_pruned
from nni_prune_ext.graph.channel_groups import ChannelGroups

SMALL = ["--input-shape", "1,3,16,16"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nni_prune_ext.cli import main; main()", *arguments]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_list_names_everything_registered(tmp_path):
    found = run("list", cwd=tmp_path)

    assert 0 == found.returncode
    for word in ("l1", "taylor", "agp", "uniform_ratio", "onnxruntime-cuda", "resnet56"):
        assert word in found.stdout


def test_plan_shows_groups_range_and_what_would_go_and_saves_it(tmp_path):
    found = run("plan", "resnet20", *SMALL, "--target", "macs=0.5", "--save", "plan.json", cwd=tmp_path)

    assert 0 == found.returncode, found.stderr
    assert "protected: linear (10): reaches the model's output" in found.stdout
    assert "reachable: down to" in found.stdout
    plan = npe.PruningPlan.load(tmp_path / "plan.json")
    assert plan.num_removed > 0
    assert ("layer2.0.shortcut", "layer3.0.shortcut") == plan.rewrites


def test_export_of_a_plan_runs_in_a_bare_session_without_extra_convolutions(tmp_path):
    assert 0 == run("plan", "resnet20", *SMALL, "--target", "macs=0.5", "--save", "plan.json", cwd=tmp_path).returncode

    found = run("export", "resnet20", *SMALL, "--plan", "plan.json", "--out", "net.onnx", cwd=tmp_path)

    assert 0 == found.returncode, found.stderr
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 16, 16).numpy()
    assert (3, 10) == session.run(None, {session.get_inputs()[0].name: images})[0].shape
    graph = onnx.load(tmp_path / "net.onnx")
    assert 19 == sum(node.op_type == "Conv" for node in graph.graph.node)
    properties = {p.key: p.value for p in graph.metadata_props}
    assert json.loads(properties["nni_prune_ext.plan"]) == json.loads((tmp_path / "plan.json").read_text())


def test_prune_writes_artefacts_that_rebuild_the_same_network(tmp_path):
    arguments = [
        "prune",
        "resnet20",
        "--data",
        "digits",
        "--limit-images",
        "60",
        "--batch-size",
        "20",
        "--target",
        "macs=0.5",
    ]

    found = run(*arguments, "--epochs", "1", "--multiple", "4", "--out", "out", cwd=tmp_path)

    assert 0 == found.returncode, found.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dense, longer, pruned = report["rows"]
    assert ["dense", "dense-trained-longer", "l1"] == [row["name"] for row in report["rows"]]
    assert 0 < pruned["macs"] <= dense["macs"] / 2
    assert longer["macs"] == dense["macs"]
    assert pruned["certificate"] <= 1e-9
    assert pruned["top1"] == pruned["top1_onnx"]
    assert report["targets"][0]["met"]
    example = (torch.randn(2, 1, 16, 16),)
    rebuilt = load_pruned(npe.build_model("resnet20", in_channels=1), tmp_path / "out" / "l1", example)
    assert pruned["params"] == sum(p.numel() for p in rebuilt.parameters())
    session = onnxruntime.InferenceSession(tmp_path / "out" / "l1" / "model.onnx", providers=["CPUExecutionProvider"])
    expected = rebuilt.eval()(*example).detach()
    found_outputs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: example[0].numpy()})[0])
    torch.testing.assert_close(found_outputs, expected, rtol=1e-4, atol=1e-4)

    again = run("export", "resnet20", "--artefact", "out/l1", "--out", "again.onnx", cwd=tmp_path)
    assert 0 == again.returncode, again.stderr
    shape = onnx.load(tmp_path / "again.onnx").graph.input[0].type.tensor_type.shape
    assert [1, 16, 16] == [size.dim_value for size in shape.dim[1:]]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    refused = run("prune", "resnet20", *SMALL, "--target", "macs=0.5", "--out", "out", cwd=tmp_path)
    assert 2 == refused.returncode
    assert "--overwrite" in refused.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    other = run(
        "prune",
        "resnet20",
        *SMALL,
        "--target",
        "macs=0.5",
        "--method",
        "l2",
        "--out",
        "out",
        "--overwrite",
        "--no-measure",
        cwd=tmp_path,
    )
    assert 0 == other.returncode, other.stderr
    assert ["dense", "l2", "recipe.yaml", "report.html", "report.json"] == sorted(
        path.name for path in (tmp_path / "out").iterdir()
    )


MISTAKES = {
    "unknown method": (
        ["prune", "resnet20", "--method", "tailor", "--target", "macs=0.5", "--out", "out"],
        "Did you mean 'taylor'",
    ),
    "unknown method with a short name": (
        ["prune", "resnet20", "--method", "l3", "--target", "macs=0.5", "--out", "out"],
        "Did you mean 'l2' or 'l1'?",
    ),
    "unknown schedule": (
        ["prune", "resnet20", "--option", "schedule=apg", "--target", "macs=0.5", "--out", "out", *SMALL],
        "Did you mean 'agp'",
    ),
    "unknown option": (
        ["prune", "resnet20", "--option", "step=2", "--target", "macs=0.5", "--out", "out"],
        "Known options: steps",
    ),
    "unknown model": (["plan", "resnet21"], "id you mean"),
    "unknown model of torchvision": (["plan", "torchvision:resnet51"], "id you mean"),
    "target out of range": (["prune", "resnet20", "--target", "ratio=1.5", "--out", "out"], "out of range"),
    "target below 0": (["prune", "resnet20", "--target", "macs=-1", "--out", "out"], "out of range"),
    "target neither a share nor a number of MACs": (
        ["prune", "resnet20", "--target", "macs=1.5", "--out", "out"],
        "Did you mean a share like 0.5?",
    ),
    "learning rate of 0": (
        ["prune", "resnet20", "--target", "macs=0.5", "--learning-rate", "0", "--out", "out"],
        "--learning-rate is 0.0: expected a value greater than 0",
    ),
    "factory that raises": (["plan", "broken_models:fails"], "RuntimeError: no such block"),
    "factory without its number of classes": (["plan", "broken_models:sized"], "--num-classes"),
    "unreadable target": (["prune", "resnet20", "--target", "flops=0.5", "--out", "out"], "Cannot read the target"),
    "infeasible target": (["prune", "resnet20", *SMALL, "--target", "macs=0.001", "--out", "out"], "cannot be met"),
    "infeasible with limits": (
        ["prune", "resnet20", *SMALL, "--target", "macs=0.5", "--exclude", "layer*", "--out", "out"],
        "cannot be met",
    ),
    "ratio limit out of range": (
        ["prune", "resnet20", "--target", "macs=0.5", "--max-ratio", "2", "--out", "out"],
        "--max-ratio is 2",
    ),
    "layer limit unreadable": (
        ["prune", "resnet20", "--target", "macs=0.5", "--layer", "conv1", "--out", "out"],
        "PATTERN=MIN:MAX",
    ),
    "data without classes": (
        ["prune", "resnet20", "--data", "imagefolder:empty", "--target", "macs=0.5", "--out", "out"],
        "empty",
    ),
    "data missing": (
        ["prune", "resnet20", "--data", "cifar10:nowhere", "--target", "macs=0.5", "--out", "out"],
        "nowhere",
    ),
    "data-driven method without data": (
        ["prune", "resnet20", *SMALL, "--method", "taylor", "--target", "macs=0.5", "--out", "out"],
        "needs training data",
    ),
    "weights file is a pickle with code": (
        ["prune", "resnet20", "--weights", "evil.pt", "--target", "macs=0.5", "--out", "out"],
        "evil.pt",
    ),
    "weights of another model": (
        ["prune", "resnet32", "--weights", "resnet20.safetensors", "--target", "macs=0.5", "--out", "out"],
        "resnet20.safetensors",
    ),
    "plan for another model": (
        ["export", "resnet32", *SMALL, "--plan", "plan20.json", "--out", "out/net.onnx"],
        "another model",
    ),
    "corrupt plan": (
        ["export", "resnet20", *SMALL, "--plan", "corrupt.json", "--out", "out/net.onnx"],
        "not a usable pruning plan",
    ),
    "foreign plan": (
        ["export", "resnet20", *SMALL, "--plan", "foreign.json", "--out", "out/net.onnx"],
        "not a usable pruning plan",
    ),
    "plan missing": (["export", "resnet20", *SMALL, "--plan", "none.json", "--out", "out/net.onnx"], "none.json"),
    "model that does not run": (["plan", "broken_models:raises"], "'inner.bad'"),
    "model that writes no channels": (["plan", "broken_models:no_layers"], "No layer of"),
    "example inputs do not fit": (["plan", "resnet20", "--input-shape", "1,3,0,8"], "input shape"),
    "example inputs without height and width": (["plan", "resnet20", "--input-shape", "1,3"], "N,C,H,W"),
    "example inputs of a wrong width": (
        ["plan", "vgg16_bn", "--input-shape", "1,3,8,8"],
        "does not run on the example inputs",
    ),
    "unwritable output": (["prune", "resnet20", "--target", "macs=0.5", "--out", "plan20.json/out"], "Cannot write"),
    "two sources of channels": (
        ["export", "resnet20", "--plan", "plan20.json", "--artefact", "x", "--out", "out/net.onnx"],
        "at most one",
    ),
}

BROKEN_MODELS = """
import torch
from torch import nn

class Bad(nn.Module):
    def forward(self, x):
        raise RuntimeError("sizes do not match")

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.bad = Bad()
    def forward(self, x):
        return self.bad(x)

class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.inner = Inner()
    def forward(self, x):
        return self.inner(self.conv(x))

def raises():
    return Outer()

def no_layers():
    return nn.ReLU()

def fails():
    raise RuntimeError("no such block")

def sized(num_classes):
    return nn.Conv2d(3, num_classes, 1)

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.unused, self.last = nn.Conv2d(3, 4, 3), nn.Linear(2, 2), nn.Conv2d(4, 2, 3)
    def forward(self, x):
        return self.last(torch.relu(self.first(x)))

def unused_layer():
    return Unused()
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    (folder / "broken_models.py").write_text(BROKEN_MODELS)
    (folder / "corrupt.json").write_text('{"removed": {"conv1": [0')
    (folder / "foreign.json").write_text('{"name": "something else"}')
    (folder / "evil.pt").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    npe.save_weights(npe.build_model("resnet20"), folder / "resnet20.safetensors")
    assert 0 == run("plan", "resnet20", *SMALL, "--target", "macs=0.7", "--save", "plan20.json", cwd=folder).returncode
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message_with_exit_code_2_and_nothing_written(mistake, workplace):
    arguments, expected = MISTAKES[mistake]
    before = sorted(path.name for path in workplace.iterdir() if path.name != "__pycache__")

    found = run(*arguments, cwd=workplace)

    assert 2 == found.returncode, found.stdout + found.stderr
    assert expected in found.stderr
    assert found.stderr.startswith("error: ")
    assert "Traceback" not in found.stderr
    assert before == sorted(path.name for path in workplace.iterdir() if path.name != "__pycache__")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "-1"),
        ("--batch-size", "0"),
        ("--image-size", "0"),
        ("--limit-images", "0"),
        ("--num-classes", "0"),
        ("--seed", "-1"),
    ],
)
def test_a_number_out_of_range_is_refused_by_the_name_of_its_option(option, value, tmp_path):
    found = run("prune", "resnet20", "--target", "macs=0.5", "--out", "out", option, value, cwd=tmp_path)

    assert 2 == found.returncode
    assert f"Invalid value for '{option}'" in found.stderr
    assert not list(tmp_path.iterdir())


def test_layers_that_the_forward_pass_does_not_reach_are_named_by_plan_and_prune(workplace, tmp_path):
    plan = run("plan", "broken_models:unused_layer", *SMALL, cwd=workplace)
    out = str(tmp_path / "out")
    prune = run("prune", "broken_models:unused_layer", *SMALL, "--target", "macs=0.6", "--out", out, cwd=workplace)

    for found in (plan, prune):
        assert 0 == found.returncode, found.stderr
        assert "not reached by the forward pass, left as they are: unused.weight, unused.bias" in found.stdout


def test_branches_on_values_are_a_warning(capsys):
    tell_what_is_not_pruned(ChannelGroups((), (), {}, value_dependent=("'item' in block.gate",)))

    assert "warning: the forward pass reads values of tensors ('item' in block.gate)" in capsys.readouterr().err
