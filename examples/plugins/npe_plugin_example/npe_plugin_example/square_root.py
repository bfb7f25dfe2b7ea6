"""A schedule: any function of progress (0–1) that starts at 0, ends at exactly 1 and never falls."""

from __future__ import annotations

import math

from nni_prune_ext.schedules import SchedulerSpec

SQUARE_ROOT = SchedulerSpec("schedule", "fast first: the square root of progress", lambda: math.sqrt)
