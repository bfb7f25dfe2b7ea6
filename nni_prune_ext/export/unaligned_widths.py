"""Convolutions whose number of input channels keeps ONNX Runtime's CPU from its fast, blocked layout.

Read off the optimised graphs of ONNX Runtime 1.31 with AVX-512: an ordinary convolution of 16 or more input channels
and a depthwise one of any number get the blocked layout only where that number is a multiple of 4; below 16 an ordinary
one always does. Blocks are filled up to 16 channels, so that 17 cost what 32 cost: rounding widths up is free.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

BLOCK = 16
"""Widths are filled up to multiples of this."""
_MULTIPLE = 4
_SHOWN = 3


def unaligned_convolutions(model: nn.Module) -> dict[str, int]:
    """Returns name → input channels of every convolution without the blocked layout; nothing for aligned networks.

    Grouped convolutions that are not depthwise are left out: no width of theirs is free.
    """
    rewritten = tuple(f"{name}." for name, part in model.named_modules() if hasattr(part, "for_export"))
    return {
        name: part.in_channels
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d) and not f"{name}.".startswith(rewritten) and _is_unaligned(part)
    }


def unaligned_sentence(found: Mapping[str, int]) -> str:
    """Says which convolutions they are and what to do about it; empty if there are none."""
    if not found:
        return ""
    shown = ", ".join(f"{name}: {width}" for name, width in list(found.items())[:_SHOWN])
    more = ", …" if len(found) > _SHOWN else ""
    return (
        f"{len(found)} convolutions read a number of channels that is no multiple of {_MULTIPLE} ({shown}{more}): "
        f"ONNX Runtime's CPU leaves its fast layout there. Rounding widths up to {BLOCK} is free: prune with "
        f"Limits(multiple={BLOCK}), at least {_MULTIPLE} (on the command line --multiple)."
    )


def _is_unaligned(layer: nn.Conv2d) -> bool:
    depthwise = layer.groups == layer.in_channels
    ordinary = layer.groups == 1 and layer.in_channels >= BLOCK
    return (ordinary or (depthwise and layer.groups > 1)) and layer.in_channels % _MULTIPLE != 0
