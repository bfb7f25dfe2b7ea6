"""The structure of example inputs as data: enough to make inputs of the same shapes and dtypes again."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nni_prune_ext.inputs import ExampleInputs

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class TensorStructure(BaseModel):
    """Shape and dtype of one tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    dtype: str = Field(pattern=f"^({'|'.join(sorted(_DTYPES))})$")


class ExampleStructure(BaseModel):
    """A tensor, or a flat tuple or list of tensors; what each nesting means is said at ``ExampleInputs``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tensor", "tuple", "list"]
    tensors: tuple[TensorStructure, ...] = Field(min_length=1)

    @classmethod
    def of(cls, example_inputs: ExampleInputs) -> ExampleStructure | None:
        """Describes example inputs; ``None`` where they are more than a flat row of tensors."""
        kind = type(example_inputs).__name__ if type(example_inputs) in (tuple, list) else "tensor"
        tensors = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
        if not tensors or not all(isinstance(item, Tensor) for item in tensors):
            return None
        described = [
            {"shape": tuple(item.shape), "dtype": str(item.dtype).removeprefix("torch.")}
            for item in tensors
            if isinstance(item, Tensor)
        ]
        return cls.model_validate({"kind": kind, "tensors": described})

    def inputs(self) -> ExampleInputs:
        """Makes inputs of this structure on the CPU: seeded normal floats, integers 0, flags ``True``."""
        generator = torch.Generator().manual_seed(0)
        tensors = [_filled(item, generator) for item in self.tensors]
        if self.kind == "tensor":
            return tensors[0]
        return tuple(tensors) if self.kind == "tuple" else list(tensors)


def _filled(item: TensorStructure, generator: torch.Generator) -> Tensor:
    dtype = _DTYPES[item.dtype]
    if dtype.is_floating_point:
        return torch.randn(item.shape, generator=generator).to(dtype)
    return torch.ones(item.shape, dtype=dtype) if dtype is torch.bool else torch.zeros(item.shape, dtype=dtype)
