"""Two processes against one with twice the accumulation over the same batches, and what they must not do: hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import process_job
import pytest
import safetensors.torch
from process_job import JOBS
from torch import Tensor

pytestmark = pytest.mark.skipif(os.name != "posix", reason="torchrun with gloo is tested on POSIX")
TOLERANCE = 1e-5
TIMEOUT_SECONDS = 200


def launched(out: Path, *names: str) -> tuple[int, str]:
    """Runs jobs in two processes; returns their exit status and what they complained of."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", process_job.__file__, str(out)]
    launcher = subprocess.Popen(
        [sys.executable, *command, *names], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        _, complaints = launcher.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)  # the launcher and both processes
        launcher.wait()
        raise
    return launcher.returncode, complaints


@dataclass(frozen=True)
class Launch:
    """Two processes that have ended: their folder, their exit status, and what they complained of."""

    out: Path
    status: int
    complaints: str


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    out = tmp_path_factory.mktemp("two")
    names = [*JOBS, "orders", "resumed", "failing"]  # the last one ends the processes, what was before is written
    launch = Launch(out, *launched(out, *names))
    assert (out / "resumed.1.safetensors").exists(), launch.complaints[-4000:]
    return launch


def of_process(two: Launch, name: str, rank: int) -> tuple[dict[str, object], dict[str, Tensor]]:
    facts = json.loads((two.out / f"{name}.{rank}.json").read_text())
    return facts, safetensors.torch.load_file(two.out / f"{name}.{rank}.safetensors")


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_give_what_one_gives_with_twice_the_accumulation(name: str, two: Launch) -> None:
    facts, tensors = JOBS[name](2)

    for rank in (0, 1):
        own_facts, own = of_process(two, name, rank)
        assert facts.get("plan") == own_facts.get("plan")
        for key in ("losses", "rates", "metrics"):
            if facts.get(key, [None])[0] is not None:
                assert facts[key] == pytest.approx(own_facts[key], abs=TOLERANCE)
        assert tensors.keys() == own.keys()
        differences = {key: float((tensors[key].double() - own[key].double()).abs().max()) for key in tensors}
        assert max(differences.values()) < TOLERANCE, differences


@pytest.mark.parametrize("name", JOBS)
def test_both_processes_hold_the_same_network_bit_for_bit(name: str, two: Launch) -> None:
    (facts, first), (other_facts, second) = (of_process(two, name, rank) for rank in (0, 1))

    assert facts == other_facts
    assert first.keys() == second.keys()
    assert all(bool((first[key] == second[key]).all()) for key in first)


@pytest.mark.parametrize("name", ["aimed_late", "aimed_again"])
def test_a_latency_is_the_one_that_the_main_process_measured(name: str, two: Launch) -> None:
    alone = JOBS[name](2)[0]["latency"]

    for rank in (0, 1):
        found = of_process(two, name, rank)[0]["latency"]
        assert alone["networks"] == found["networks"]
        assert (alone["dense_ms"], alone["achieved_ms"]) == (found["dense_ms"], found["achieved_ms"])
        assert found["achieved_ms"] == pytest.approx(found["asked_ms"], rel=0.1)


@pytest.mark.parametrize("loader", ["torch", "drawn"])
def test_every_batch_of_every_epoch_is_seen_once_although_dropout_lets_random_states_drift(
    loader: str, two: Launch
) -> None:
    first, second = (of_process(two, "orders", rank)[0][loader] for rank in (0, 1))

    assert (9, 6) == (len(first), len(second))
    epochs = [sorted([*first[3 * k : 3 * k + 3], *second[2 * k : 2 * k + 2]]) for k in range(3)]
    if loader == "drawn":
        assert epochs[0] == epochs[1] == epochs[2]
    assert all(5 == len(set(epoch)) for epoch in epochs)
    assert sum(epochs[0]) == pytest.approx(sum(epochs[1]), abs=1e-3)
    assert sum(epochs[0]) == pytest.approx(sum(epochs[2]), abs=1e-3)


def test_running_statistics_are_the_same_in_both_processes_without_recalibration(two: Launch) -> None:
    first, second = (of_process(two, "orders", rank)[1] for rank in (0, 1))

    assert "torch.1.running_mean" in first
    assert all(bool((first[key] == second[key]).all()) for key in first)


def test_two_processes_stopped_and_continued_end_bit_equal(two: Launch) -> None:
    for rank in (0, 1):
        facts, _ = of_process(two, "resumed", rank)
        assert {"different": 0, "same logs": True} == facts


def test_a_loss_that_is_no_number_in_one_process_ends_all_of_them(two: Launch) -> None:
    assert two.status != 0
    assert "The loss is nan in step 1 of epoch 1 of phase 'fit'" in two.complaints
