"""Pictures of a method in its report: shown as they are, one PNG each, and nothing but a PNG."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from sample_reports import sample

from nni_prune_ext.report import RunReport
from nni_prune_ext.report.page import page
from nni_prune_ext.report.pictures import png_text


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_a_picture_is_on_the_page_under_its_caption() -> None:
    text = png_text(torch.zeros(3, 100, 4, dtype=torch.uint8))

    found = page([RunReport.model_validate({**sample(), "pictures": {"seen & <rebuilt>": text}})])

    assert f'src="data:image/png;base64,{text}"' in found
    assert "seen &amp; &lt;rebuilt&gt;" in found
    assert "Pictures" not in page([RunReport.model_validate(sample())])


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_through(channels: int) -> None:
    picture = torch.randint(0, 255, (channels, 100, 6), dtype=torch.uint8)

    found = decoded(png_text(picture))

    assert np.array_equal(picture.expand(3, -1, -1).permute(1, 2, 0).numpy(), found)


def test_small_pictures_are_doubled_and_high_ones_scaled_down() -> None:
    small = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)

    assert np.array_equal(np.kron(small[0].numpy(), np.ones((2, 2))), decoded(png_text(small))[..., 0])
    assert (320, 160, 3) == decoded(png_text(torch.zeros(3, 640, 320, dtype=torch.uint8))).shape


@pytest.mark.parametrize("text", ["", '"><script>', "data:x", "AA AA", "AA==\n<b>"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        RunReport.model_validate({**sample(), "pictures": {"a": text}})
