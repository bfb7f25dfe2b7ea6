"""Plugins for nni_prune_ext. Check yours with `nni_prune_ext.testing`: check_method, check_scheduler, check_runtime."""
