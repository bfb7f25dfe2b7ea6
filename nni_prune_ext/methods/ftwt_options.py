"""The options of FTWT; see ``ftwt``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Mode = Literal["decoupled", "joint"]


class FtwtOptions(BaseModel):
    """Options of FTWT: heads that predict per image which filters run, and the network that adapts to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mass: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="share of the heat that the filters kept for an image hold; with uniform targets, of units to "
        "drop; has no say where expected_macs is given",
        json_schema_extra={"source": "r in the paper, 0.80 to 1.00", "search": [0.8, 0.98]},
    )
    expected_macs: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the dense MACs that gates should leave; the mass is solved for it before training",
        json_schema_extra={"source": "ours; the paper states that MACs can be foreseen"},
    )
    epochs: int = Field(
        default=50,
        ge=1,
        description="training epochs with gates",
        json_schema_extra={"source": "authors' code: 50 (fine-tuning) or 200", "search": [1, 50]},
    )
    head_epochs: int = Field(
        default=0,
        ge=0,
        description="epochs before that in which the heads alone learn, on the targets of the network as it is: cheap",
        json_schema_extra={"source": "ours", "search": [0, 20]},
    )
    core_epochs: int = Field(
        default=0,
        ge=0,
        description="training epochs after the static cut, heads frozen",
        json_schema_extra={"source": "ours", "search": [0, 20]},
    )
    mode: Mode = Field(
        default="decoupled",
        description="whether the loss of the heads trains the heads alone or (joint) the network in front of them, too",
        json_schema_extra={"source": "decoupled is the paper's proposal; both are in its tables"},
    )
    cooldown: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the epochs after which the heads stand still and the network adapts to them",
        json_schema_extra={"source": "authors' code"},
    )
    head_learning_rate: float = Field(
        default=0.1,
        gt=0,
        allow_inf_nan=False,
        description="of SGD with momentum 0.9 for the heads, constant, without weight decay",
        json_schema_extra={"source": "authors' code", "search": [0.01, 1.0]},
    )
    pool: Literal["max", "avg"] = Field(
        default="max",
        description="how a head pools the input of its layer",
        json_schema_extra={"source": "figure 3: max; the released code: avg"},
    )
    softmax: bool = Field(
        default=True,
        description="heads see the softmax over channels of the pooled input; without, its values scaled by a constant",
        json_schema_extra={"source": "paper and code: with, an option of the code: without"},
    )
    targets: Literal["mass", "uniform"] = Field(
        default="mass",
        description="how the filters that an image needs are found: by mass, or equally many in every layer",
        json_schema_extra={"source": "mass is the paper's; uniform is its ablation"},
    )
    selection: Literal["input", "static"] = Field(
        default="input",
        description="input: a choice per image; static: for all images the same filters, the hottest on average, "
        "as many per layer: the control, in which no head learns, whatever head_epochs and mode say",
        json_schema_extra={"source": "ours: the paper lacks this control"},
    )
    block: Literal[1, 4, 8, 16] = Field(
        default=1,
        description="filters that are switched together, at most; smaller where a layer would have fewer than 4 blocks",
        json_schema_extra={"source": "1 is the paper's; blocks are ours, for speed", "search": [1, 16]},
    )
    layers: str | None = Field(
        default=None,
        description="names or patterns of the convolutions to gate, with commas; none: the usual places",
        json_schema_extra={"source": "ours"},
    )
    safe_start: bool = Field(
        default=True,
        description="heads begin with everything open; without, as PyTorch draws them",
        json_schema_extra={"source": "an option of the authors' code (pre-trained heads), by the bias here"},
    )
    calibration_batches: int = Field(
        default=16,
        ge=1,
        description="training batches on which filters are counted as never firing; as many others tell the leak",
        json_schema_extra={"source": "ours", "search": [4, 64]},
    )
    remove_never: bool = Field(
        default=True,
        description="removes the channels that reach nobody on these batches, beside what the target asks for",
        json_schema_extra={"source": "ours; nothing is removed in the paper"},
    )

    @model_validator(mode="after")
    def _heads_learn(self) -> FtwtOptions:
        if self.selection == "input" and not self.cooldown and not self.head_epochs:
            raise ValueError("cooldown is 0 and head_epochs is 0, so heads never learn; set one of them above 0")
        if self.targets == "uniform" and self.mass == 1:
            raise ValueError("mass is 1, but with uniform targets it is the share of units to drop; set it below 1")
        return self

    @property
    def patterns(self) -> list[str] | None:
        """Returns the names or patterns of the layers to gate."""
        return None if self.layers is None else [name.strip() for name in self.layers.split(",")]

    @property
    def learning_epochs(self) -> int:
        """Returns how many epochs the heads learn."""
        return max(1, int(self.cooldown * self.epochs)) if self.cooldown else 0
