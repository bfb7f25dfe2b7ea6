"""The same NNI program before and after the change of the package name: masks, size, accuracy, and where it fails.

    python examples/benchmarks/nni_migration.py --data cifar10:ROOT --weights resnet20.pt \
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --finetune-epochs 3 --out nni_migration.json

Runs examples/nni_migration/before.py (NNI's documented call, and NNI's workaround with torch.fx) and after.py as
programs, and trains
the dense network equally long as control. Rows that are in the output file already are not run again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = {
    "NNI, documented call": ["before.py"],
    "NNI, workaround with torch.fx": ["before.py", "--fx"],
    "nni_prune_ext": ["after.py"],
}
CONTROL = """
import sys
sys.path.insert(0, {folder!r})
from task import PARSER, Task
options = PARSER.parse_args()
task = Task(options)
task.report("dense", task.model)
task.fit(task.model, 1 if options.smoke else options.finetune_epochs, 0.02)
task.report("fine-tuned", task.model)
"""
MASKS = """
import json, sys
sys.path.insert(0, {folder!r})
import torch
from task import PARSER, Task
import nni.compression.pruning as old
import nni_prune_ext.pruning as new
options = PARSER.parse_args()
task = Task(options)
found = []
for package in (old, new):
    pruner = package.L1NormPruner(task.model, [{{"op_types": ["Conv2d"], "sparse_ratio": options.ratio}}])
    _, masks = pruner.compress()
    found.append({{n: (own["weight"].flatten(1) != 0).any(1) for n, own in masks.items()}})
    pruner.unwrap_model()
same = {{n: float((found[0][n] == found[1][n]).float().mean()) for n in found[0]}}
print(json.dumps({{"layers": len(same), "layers_with_equal_masks": sum(v == 1 for v in same.values()),
                  "share_of_filters_with_equal_masks": sum(same.values()) / len(same)}}))
"""


def main() -> None:
    """Runs what is missing and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options, passed = parser.parse_known_args()
    rows = json.loads(options.out.read_text()) if options.out.exists() else {}
    folder = str(HERE.parent / "nni_migration")
    jobs = {name: [str(Path(folder) / program[0]), *program[1:]] for name, program in PROGRAMS.items()}
    with tempfile.TemporaryDirectory() as made:
        for name, text in (("dense, trained equally long", CONTROL), ("masks compared", MASKS)):
            path = Path(made) / f"{len(jobs)}.py"
            path.write_text(text.format(folder=folder))
            jobs[name] = [str(path)]
        for name, command in jobs.items():
            if name not in rows:
                rows[name] = _run([*command, *passed])
                rows["conditions"] = _conditions(passed)
                _write(options.out, rows)
    print(json.dumps(rows, indent=1))


def _run(command: list[str]) -> dict[str, object]:
    began = time.perf_counter()
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    row: dict[str, object] = {"lines": lines, "exit_code": result.returncode}
    row["seconds"] = round(time.perf_counter() - began, 1)
    if result.returncode:
        row["error"] = result.stderr.strip().splitlines()[-1][:400]
    return row


def _conditions(passed: list[str]) -> dict[str, object]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "nni", "nni_prune_ext")}
    shown = [part if "/" not in part else Path(part.partition(":")[2] or part).name for part in passed]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "arguments": shown,
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}",
    }


def _write(path: Path, rows: dict[str, object]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
