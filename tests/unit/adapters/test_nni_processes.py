"""Several processes (torchrun) that see different data get the same masks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def masks_of_two(folder: Path, *more: str) -> list[dict[str, Any]]:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    launcher = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        port,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [*launcher, str(HERE / "nni_process_job.py"), str(folder), *more]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert 0 == result.returncode, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_processes_with_different_data_agree_on_the_masks(tmp_path: Path) -> None:
    first, second = masks_of_two(tmp_path)

    assert first == second


def test_without_averaging_they_would_not(tmp_path: Path) -> None:
    first, second = masks_of_two(tmp_path, "alone")

    assert first != second
