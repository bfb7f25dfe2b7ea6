"""Pictures in a report: PNG as text in ``report.json``, and their section on the page."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from nni_prune_ext.report.facts import RunReport
from nni_prune_ext.report.page_parts import Chart, Section

if TYPE_CHECKING:
    from torch import Tensor

_HIGHEST = 320
"""Pictures of more rows are scaled down to so many."""


def png_text(picture: Tensor) -> str:
    """Returns a picture, ``(C, H, W)`` uint8 with 1 or 3 channels, as PNG in base64."""
    from PIL import Image  # imported here because reports are read more often than written

    shown = Image.fromarray(picture.permute(1, 2, 0).expand(-1, -1, 3).contiguous().cpu().numpy())
    if shown.height > _HIGHEST:
        shown = shown.resize((max(round(shown.width * _HIGHEST / shown.height), 1), _HIGHEST), Image.Resampling.LANCZOS)
    elif shown.height < _HIGHEST // 4:
        shown = shown.resize((2 * shown.width, 2 * shown.height), Image.Resampling.NEAREST)
    content = io.BytesIO()
    shown.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode("ascii")


def pictures_section(report: RunReport) -> Section:
    """Returns the section of a report with pictures."""
    charts = [
        Chart(f'<img alt="" src="data:image/png;base64,{picture}">', caption)
        for caption, picture in report.pictures.items()
    ]
    return Section("Pictures", charts=charts)
