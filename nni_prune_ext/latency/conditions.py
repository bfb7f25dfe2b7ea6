"""Under which conditions a latency is meant: on which runtime, for how many images, by which clock."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LatencyConditions(BaseModel):
    """Where and how the latency of a target is measured; the arithmetic is fp32.

    Attributes:
        runtime: name of a registered runtime that works on this machine.
        batch: images per run.
        percentile: of the times of single runs; 50 is the median.
        threads: CPU threads of one run.
        clock: ``auto`` takes the CPU time of the thread where it counts the work (one thread on the CPU), else elapsed
            time, which only an idle machine gives reliably.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str = Field(default="onnxruntime-cpu", min_length=1, description="a registered runtime")
    batch: int = Field(default=1, ge=1, strict=True, description="images per run")
    percentile: Literal[50, 95, 99] = Field(default=50, description="of the times of single runs; 50 is the median")
    threads: int = Field(default=1, ge=1, strict=True, description="CPU threads of one run")
    clock: Literal["auto", "cpu", "wall"] = Field(
        default="auto", description="`cpu`: time of the thread; `wall`: elapsed; `auto`: `cpu` where it counts the work"
    )

    @model_validator(mode="after")
    def _check(self) -> LatencyConditions:
        if self.clock == "cpu" and self.threads != 1:
            raise ValueError(
                f"The clock is 'cpu' with {self.threads} threads, but it counts one thread only. Expected threads 1. "
                "Choose the clock 'wall', or one thread"
            )
        return self

    def __str__(self) -> str:
        """Says the conditions in words, for messages and reports."""
        which = "median" if self.percentile == 50 else f"{self.percentile}th percentile"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{which} on {self.runtime}, batch {self.batch}, {threads}"
