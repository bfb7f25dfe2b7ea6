"""The options of the mask search; see ``lottery_jackpots``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.mask_updates import Pattern


class JackpotOptions(BaseModel):
    """Options of the mask search.

    Attributes:
        control: runs a control in the place of the search. ``recalibrated``: the magnitude mask, statistics of norms
            measured anew, nothing trained; ``tuned``: the magnitude mask, tuned as long as search and tuning last;
            ``random_start``: the search from a random mask with the same counts; ``unrestricted``: without the short
            restriction.
        pattern: ``N:M`` keeps N of M consecutive input channels; single weights only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    search_epochs: int = Field(
        default=30,
        ge=0,
        description="epochs in which scores are trained and masks change",
        json_schema_extra={"source": "30 or 160 on CIFAR, 30 on ImageNet in the authors' code", "search": [1, 30]},
    )
    freeze_epochs: int = Field(
        default=1,
        ge=0,
        description="epochs of forward passes that measure the statistics of norms for the final mask",
        json_schema_extra={"source": "ours; 0 as in the authors' code", "search": [0, 2]},
    )
    tune_epochs: int = Field(
        default=10,
        ge=0,
        description="epochs in which the weights that are left are trained; 0 is search-only",
        json_schema_extra={"source": "10 for (T) in the authors' README, none for (S)", "search": [0, 10]},
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="peak rate of the scores, cosine per epoch; none means 0.1 for weights, 0.001 for channels",
        json_schema_extra={"source": "0.1 in the authors' code; channels: ours", "search": [0.001, 0.3]},
    )
    score_decay: float = Field(
        default=5e-4,
        ge=0,
        allow_inf_nan=False,
        description="weight decay of the scores",
        json_schema_extra={"source": "5e-4 on CIFAR, 1e-4 on ImageNet in the authors' code", "search": [0.0, 1e-3]},
    )
    gap: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="how much lower the scores of pruned entries begin: the barrier to a swap",
        json_schema_extra={"source": "1 and 0.99 in the authors' code of 2023", "search": [0.001, 0.1]},
    )
    restriction: Literal["fourth_power", "cosine", "one"] = Field(
        default="fourth_power",
        description="schedule of the share of requested swaps that is made; one makes all",
        json_schema_extra={"source": "our reading of the authors' code, where it is off; not confirmed"},
    )
    initialisation: Literal["magnitude", "random"] = Field(
        default="magnitude",
        description="what is kept at the beginning; counts come from magnitudes either way",
        json_schema_extra={"source": "arXiv:2104.08700, abstract"},
    )
    normalise_gradients: bool = Field(
        default=True,
        description="divides the gradient of channel scores by its root mean square per group",
        json_schema_extra={"source": "ours; no part in single weights"},
    )
    exploration: float = Field(
        default=0.1,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of channels whose gate is drawn from 0-1 in a step, and learnt from; 0: gates are 0 and 1",
        json_schema_extra={"source": "ours; no part in single weights", "search": [0.02, 0.3]},
    )
    gate: Literal["consumers", "norms"] = Field(
        default="consumers",
        description="where channel gates sit: at what reads a channel, or behind the norms that write it",
        json_schema_extra={"source": "ours; no part in single weights"},
    )
    pattern: str | None = Field(
        default=None,
        description="N:M pattern along input channels, for example 2:4; single weights only",
        json_schema_extra={"source": "ours"},
    )
    tune_learning_rate: float = Field(
        default=0.01,
        gt=0,
        allow_inf_nan=False,
        description="peak rate of the tuning, cosine per epoch, no weight decay",
        json_schema_extra={"source": "0.01 for (T) in the authors' README", "search": [0.001, 0.1]},
    )
    control: Literal["none", "recalibrated", "tuned", "random_start", "unrestricted"] = Field(
        default="none",
        description="a control experiment in the place of the search",
        json_schema_extra={"source": "ours"},
    )

    @field_validator("pattern")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                Pattern.parse(value)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return value

    def controlled(self) -> JackpotOptions:
        """Returns the options with what the control changes."""
        unsearched: dict[str, object] = {"search_epochs": 0, "initialisation": "magnitude"}
        changes: dict[str, dict[str, object]] = {
            "none": {},
            "recalibrated": {**unsearched, "tune_epochs": 0},
            "tuned": {**unsearched, "tune_epochs": self.search_epochs + self.tune_epochs},
            "random_start": {"initialisation": "random"},
            "unrestricted": {"restriction": "one"},
        }
        return self.model_copy(update=changes[self.control])
