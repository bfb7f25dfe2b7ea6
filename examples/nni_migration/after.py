"""The same program with the package name changed in two imports: it runs, and the network is really smaller."""

from __future__ import annotations

import torch.fx
from task import PARSER, Task

from nni_prune_ext.pruning import L1NormPruner
from nni_prune_ext.speedup import ModelSpeedup

options = PARSER.parse_args()
task = Task(options)
task.report("dense", task.model)

config_list = [{"op_types": ["Conv2d"], "sparse_ratio": options.ratio}]
pruner = L1NormPruner(task.model, config_list)
model, masks = pruner.compress()
masked = sum(int((own["weight"] == 0).sum()) for own in masks.values())
task.report("masked", model, masked_weights=masked)

pruner.unwrap_model()
graph = torch.fx.symbolic_trace(model) if options.fx else None
model = ModelSpeedup(model, task.dummy_input, masks, graph_module=graph).speedup_model()
task.report("sped up", model)

task.fit(model, 1 if options.smoke else options.finetune_epochs, 0.02)
task.report("fine-tuned", model)
