"""The options of the reconstruction method; see ``reconstruction``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Criterion = Literal["magnitude", "taylor"]


class ReconstructionOptions(BaseModel):
    """Options of the reconstruction method: a decoder, then rounds of training, pruning and rewinding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reconstruction_weight: float = Field(
        default=10.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the reconstruction loss beside the task loss; 0 is the control without a decoder",
        json_schema_extra={"source": "lambda in section 4.1", "search": [0.0, 30.0]},
    )
    decoder_epochs: int = Field(
        default=50,
        ge=1,
        description="epochs in which the decoder alone is trained",
        json_schema_extra={"source": "section 4.1", "search": [1, 50]},
    )
    decoder_learning_rate: float = Field(
        default=1e-4,
        gt=0,
        allow_inf_nan=False,
        description="of AdamW for the decoder; a tenth after a fifth of its epochs, a hundredth after three fifths",
        json_schema_extra={"source": "section 4.1: epochs 10 and 30 of 50", "search": [1e-5, 1e-2]},
    )
    decoder_weight_decay: float = Field(
        default=2e-4,
        ge=0,
        allow_inf_nan=False,
        description="of AdamW for the decoder",
        json_schema_extra={"source": "section 4.1"},
    )
    decoder_blocks: int = Field(
        default=1,
        ge=0,
        description="residual blocks per resolution of the decoder",
        json_schema_extra={"source": "ours; the authors' layers are not published", "search": [0, 3]},
    )
    hints: int = Field(
        default=2,
        ge=0,
        description="how many feature maps in front of the last one are mixed into the decoder",
        json_schema_extra={"source": "section 4.4: the two at strides 8 and 16", "search": [0, 3]},
    )
    hint_stride: int = Field(
        default=8,
        ge=1,
        description="smallest stride, in pixels, of a feature map that is mixed in; nets for small images have none",
        json_schema_extra={"source": "section 4.4", "search": [1, 16]},
    )
    hint_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of a hint in what it is mixed into",
        json_schema_extra={"source": "t in section 4.1", "search": [0.0, 0.5]},
    )
    feature_maps: str | None = Field(
        default=None,
        description="modules whose outputs the decoder reads, first to last, with commas; none: one per resolution",
        json_schema_extra={"source": "ours"},
    )
    decoder_to: str | None = Field(
        default=None,
        min_length=1,
        description="safetensors file to write the trained decoder to, for other runs and as part of other losses",
        json_schema_extra={"source": "ours"},
    )
    decoder_from: str | None = Field(
        default=None,
        min_length=1,
        description="such a file: that decoder is taken, layers included, instead of training one",
        json_schema_extra={"source": "ours"},
    )
    rounds: int = Field(
        default=8,
        ge=1,
        description="rounds of training, pruning and rewinding",
        json_schema_extra={"source": "7 to 11 in section 4.2", "search": [1, 11]},
    )
    round_epochs: int = Field(
        default=10,
        ge=1,
        description="training epochs per round",
        json_schema_extra={"source": "section 4.1", "search": [1, 10]},
    )
    share_per_round: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="share of what is left that a round removes, as far as the target goes: it sets the shape only",
        json_schema_extra={"source": "section 4.1", "search": [0.1, 0.5]},
    )
    rewind: bool = Field(
        default=True,
        description="loads the first weights again after every round; without, each round goes on from the last",
        json_schema_extra={"source": "algorithm 1; without it is the IMP of the ablation"},
    )
    criterion: Criterion = Field(
        default="taylor",
        description="what a channel is worth: the effect of a gate on the joint loss, or the size of the trained "
        "weights that hold it; single weights always go by magnitude",
        json_schema_extra={"source": "algorithm 1: magnitude, which fails for channels under MACs; taylor is ours"},
    )
    score_batches: int = Field(
        default=50,
        ge=1,
        description="training batches that the criterion taylor is averaged over",
        json_schema_extra={"source": "ours", "search": [1, 50]},
    )
    keep_stem: bool = Field(
        default=True,
        description="leaves the single weights of the first convolution whole",
        json_schema_extra={"source": "code of Chen et al., arXiv:2012.06908, whose procedure the paper follows"},
    )

    @model_validator(mode="after")
    def _one_decoder(self) -> ReconstructionOptions:
        files = [name for name in ("decoder_from", "decoder_to") if getattr(self, name) is not None]
        if files and not self.reconstruction_weight:
            raise ValueError(f"{files[0]} is given, but with reconstruction_weight 0 there is no decoder; leave it out")
        if len(files) > 1:
            raise ValueError("decoder_from and decoder_to are both given, expected one: a decoder is read or trained")
        return self

    def share_gone(self, rounds: int) -> float:
        """Returns how much of the way to the target is made after so many rounds, 0–1."""
        kept = 1 - self.share_per_round
        return float((1 - kept**rounds) / (1 - kept**self.rounds))
