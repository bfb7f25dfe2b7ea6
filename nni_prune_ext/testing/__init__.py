"""The promises of the package as checks: for us, and for authors of plugins.

Each check takes what a plugin registers and raises ``AssertionError`` with a sentence about the broken promise.
"""

from __future__ import annotations

from nni_prune_ext.testing.method_checks import check_method
from nni_prune_ext.testing.runtime_checks import check_runtime, tiny_runnable
from nni_prune_ext.testing.scheduler_checks import check_scheduler

__all__ = ["check_method", "check_runtime", "check_scheduler", "tiny_runnable"]
