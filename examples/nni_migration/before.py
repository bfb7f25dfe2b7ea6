"""NNI's quick start: masks by L1 norm, speedup, fine-tuning. On current torch the call of ModelSpeedup fails."""

from __future__ import annotations

import torch.fx
from task import PARSER, Task

from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup

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
