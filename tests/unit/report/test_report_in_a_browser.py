"""The page in headless Chromium: nothing wider than the window, at desktop and phone width, light and dark."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from gated_reports import gated_sample, gating, without_compact
from PIL import Image
from sample_reports import sample

from nni_prune_ext.report import RunReport
from nni_prune_ext.report.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
FRAME = """<!DOCTYPE html><title>waiting</title><body style="margin:0">
<iframe id="f" style="border:0;width:{width}px;height:3000px" srcdoc="{page}"></iframe>
<script>document.getElementById("f").onload = event => {{
  const root = event.target.contentDocument.documentElement;
  document.title = `inner ${{root.clientWidth}} content ${{root.scrollWidth}} boxes ` +
    [...root.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length;
}}</script>"""
"""A page of exactly the width asked for: Chromium's own windows are not narrower than 500 pixels on some systems."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the search path"),
]


def chromium(tmp_path, *arguments: str) -> str:
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def reports(count: int) -> list[RunReport]:
    long = "torchvision:a_model_with_quite_a_long_name_from.some.module.path:factory_function"
    methods = ["l1", "fpgm", "taylor", "geometric_median_with_a_long_name"][:count]
    return [
        RunReport.model_validate(sample(method=method, model=long, layers=60, met=number != 2))
        for number, method in enumerate(methods)
    ]


def gated_reports(count: int) -> list[RunReport]:
    entries = gating(layers=45), without_compact(gating(network="a_network_with_quite_a_long_name"))
    return [RunReport.model_validate(gated_sample(*entries)) for _ in range(count)]


@pytest.mark.parametrize(("made", "runs"), [(reports, 1), (reports, 4), (gated_reports, 1)])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_never_wider_than_the_window(tmp_path, made, runs, width):
    inner = page(made(runs)).replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=inner), encoding="utf-8")

    dom = chromium(tmp_path, "--dump-dom", f"--window-size={width + 20},3000", (tmp_path / "frame.html").as_uri())

    found = re.search(r"<title>inner (\d+) content (\d+) boxes (\d+)</title>", dom)
    assert found is not None, dom[:200]
    assert (width, width) == (int(found[1]), int(found[2]))
    if width == 390:
        assert 0 < int(found[3])  # tables are wider than a phone, and scroll in their box


MEASURE = """<script>onload = () => {
  const last = {"Before and after": 3, "Asked and achieved": 2};
  const right = [...document.querySelectorAll("table")].filter(table => table.caption.textContent in last)
    .flatMap(table => [...table.rows].map(row => row.cells[last[table.caption.textContent]]))
    .filter(cell => cell).map(cell => cell.getBoundingClientRect().right);
  const fonts = [...document.querySelectorAll("svg text")]
    .map(text => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a);
  parent.document.title = `right ${Math.max(...right)} font ${Math.min(...fonts)}`;
}</script>"""
PHONE = (
    '<!DOCTYPE html><title>waiting</title><iframe style="border:0;width:390px;height:3000px" srcdoc="{page}"></iframe>'
)


@pytest.mark.parametrize(("made", "runs"), [(reports, 1), (reports, 3), (gated_reports, 1)])
def test_a_phone_shows_what_counts_without_scrolling_and_in_letters_that_can_be_read(tmp_path, made, runs):
    inner = page(made(runs)).replace("</body>", MEASURE + "</body>")
    inner = inner.replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "frame.html").write_text(PHONE.format(page=inner), encoding="utf-8")

    dom = chromium(tmp_path, "--dump-dom", "--window-size=410,3000", (tmp_path / "frame.html").as_uri())

    found = re.search(r"<title>right ([0-9.]+) font ([0-9.]+)</title>", dom)
    assert found is not None, dom[:200]
    assert float(found[1]) <= 390  # up to top-1, MACs left and latency; up to target and verdict
    assert 11 <= float(found[2])


@pytest.mark.parametrize(("scheme", "paper"), [("1", (255, 255, 255)), ("0", (21, 24, 28))])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_drawn_in_the_readers_colours(tmp_path, width, scheme, paper):
    (tmp_path / "page.html").write_text(page(reports(1)), encoding="utf-8")
    shot = tmp_path / "shot.png"

    chromium(
        tmp_path,
        f"--screenshot={shot}",
        f"--window-size={width},1600",
        f"--blink-settings=preferredColorScheme={scheme}",
        (tmp_path / "page.html").as_uri(),
    )

    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24) or []
    assert paper == max(colours)[1]
    assert 50 < len(colours)  # text and charts, not an empty page
