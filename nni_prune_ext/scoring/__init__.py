"""HOW MUCH a channel matters: pure functions of tensors and role maps. Higher = keep."""
