"""The options of PSAP (re-derived from the abstract); see ``psap``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from nni_prune_ext.scoring.weight_sparsity import Threshold

Mode = Literal["gate", "straight_through", "zeroise"]
Protection = Literal["none", "random", "literal", "gate"]
_ASSUMED = "assumed: the paper's text was not available"


class PsapOptions(BaseModel):
    """Options of PSAP; what the abstract confirms is that ratios follow weight sparsity, and that gradients protect."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(
        default=40,
        ge=1,
        description="training epochs, soft pruning and the compact network together",
        json_schema_extra={"source": "ours; 200 from scratch in the code of SFP", "search": [4, 200]},
    )
    soft_share: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="share of the epochs after which channels are removed for good; the compact network trains on",
        json_schema_extra={"source": _ASSUMED, "search": [0.5, 1.0]},
    )
    interval: int = Field(
        default=1,
        ge=1,
        description="epochs from one pruning step to the next",
        json_schema_extra={"source": "1 in the code of SFP", "search": [1, 5]},
    )
    schedule: str = Field(
        default="asfp",
        description="how the share of the target grows over the pruning steps",
        json_schema_extra={"source": f"{_ASSUMED}; ASFP", "registered": "schedule"},
    )
    ratio_policy: str | None = Field(
        default=None,
        description="how ratios differ from group to group; none: in proportion to the weight sparsity ratio",
        json_schema_extra={"source": "abstract", "registered": "ratio_policy"},
    )
    sparsity_threshold: Threshold = Field(
        default="rms",
        description="what a small weight is: below a share of the layer's RMS or largest weight, a value, a quantile",
        json_schema_extra={"source": _ASSUMED},
    )
    sparsity_level: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="that share, value or quantile",
        json_schema_extra={"source": _ASSUMED, "search": [0.02, 0.5]},
    )
    step_bound: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="how far a group's ratio may leave the pace of the schedule in one step",
        json_schema_extra={"source": _ASSUMED, "search": [0.02, 0.3]},
    )
    largest_ratio: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="largest share of a group that the ratios ask for, where the target allows; max_ratio bounds, too",
        json_schema_extra={"source": _ASSUMED, "search": [0.5, 0.95]},
    )
    criterion: str = Field(
        default="l2",
        description="registered pruner whose scores rank the channels of a group, with its default options",
        json_schema_extra={"source": f"{_ASSUMED}; L2 in SFP"},
    )
    mode: Mode = Field(
        default="gate",
        description="what pruning does before the removal: gate makes readers deaf to a channel, whose weights get "
        "no gradient, straight_through lets readers learn as if they heard it, zeroise sets what writes it to zero",
        json_schema_extra={"source": f"{_ASSUMED}; straight_through as in DPF, zeroise as in SFP"},
    )
    protect: Protection = Field(
        default="gate",
        description="which channels gradients protect: gate by the gradient of a gate at the readers, literal by that "
        "of zeroed weights, random as many as gate, none no one",
        json_schema_extra={"source": "abstract; which gradient is assumed"},
    )
    probe_batches: int = Field(
        default=8,
        ge=1,
        description="training batches per probe, forward and backward without a step of the optimizer",
        json_schema_extra={"source": _ASSUMED, "search": [1, 32]},
    )
    probe_deviations: float = Field(
        default=2.0,
        ge=0,
        allow_inf_nan=False,
        description="standard deviations above the mean of the group's closed channels from which a probed one is "
        "protected; by 2, one of five or fewer cannot stand out",
        json_schema_extra={"source": _ASSUMED, "search": [0.0, 3.0]},
    )
    protected_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="largest share of a group's candidates that one probe protects, rounded up",
        json_schema_extra={"source": _ASSUMED, "search": [0.0, 0.5]},
    )
    refills: int = Field(
        default=0,
        ge=0,
        description="probes of the channels that take the places of protected ones",
        json_schema_extra={"source": _ASSUMED, "search": [0, 2]},
    )
    shield_steps: int = Field(
        default=3,
        ge=1,
        description="pruning steps for which a protected channel stays protected",
        json_schema_extra={"source": _ASSUMED, "search": [1, 10]},
    )
    use_deviations: float = Field(
        default=2.0,
        ge=0,
        allow_inf_nan=False,
        description="standard deviations above the group's mean use in training from which a channel is no candidate",
        json_schema_extra={"source": _ASSUMED, "search": [1.0, 4.0]},
    )

    @property
    def soft_epochs(self) -> int:
        """Returns the number of epochs before the removal, at least one."""
        return min(max(round(self.epochs * self.soft_share), 1), self.epochs)

    @property
    def steps(self) -> int:
        """Returns the number of pruning steps, the last one at the removal."""
        return -(-self.soft_epochs // self.interval)
