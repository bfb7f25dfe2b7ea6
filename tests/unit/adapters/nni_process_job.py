"""One of several processes that prune one network with different data; writes its masks into a given folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nni
import torch
from nni.compression import TorchEvaluator
from nni_bench import config, network, step, training

from nni_prune_ext.pruning import TaylorPruner

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = network()
generator = torch.Generator().manual_seed(rank)
data = [
    (torch.randn(8, 1, 12, 12, generator=generator), torch.randint(0, 10, (8,), generator=generator)) for _ in range(3)
]
optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05)
alone = len(sys.argv) > 2
if alone:
    os.environ["WORLD_SIZE"] = "1"
_, masks = TaylorPruner(model, config(0.5), TorchEvaluator(training(data), optimizer, step), 3).compress()
found = {name: (own["weight"].flatten(1) != 0).any(1).int().tolist() for name, own in masks.items()}
(Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
torch.distributed.barrier()
os._exit(0)  # torch 2.11 at times aborts a process while its group is taken down
