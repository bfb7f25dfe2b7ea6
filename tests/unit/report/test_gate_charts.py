"""Charts of gated layers: a bar and numbers for each, gathered ones filled, and words for who cannot see them."""

from __future__ import annotations

from itertools import combinations
from xml.etree import ElementTree

import pytest
from gated_reports import gating
from matplotlib.figure import Figure
from matplotlib.text import Text

from nni_prune_ext.report.charts import LAYERS_PER_CHART
from nni_prune_ext.report.gate_charts import break_even_charts, firing_charts
from nni_prune_ext.report.gate_facts import GateLayerFacts, GatingFacts

SVG = "{http://www.w3.org/2000/svg}"


def layers(count: int) -> tuple[GateLayerFacts, ...]:
    return GatingFacts.model_validate(gating(layers=count)).layers


def texts(svgs: list[str]) -> list[str]:
    return [node.text or "" for svg in svgs for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def filled(svg: str) -> int:
    """Counts the shapes in the first colour of the page, the one in the legend included."""
    return svg.count("fill: var(--series-1")


@pytest.mark.parametrize("count", [1, 6, LAYERS_PER_CHART + 1])
def test_every_layer_has_its_counts(count: int) -> None:
    found = texts(firing_charts(layers(count), name="a"))

    for number, layer in enumerate(layers(count)):
        assert f"16 / {layer.varying} / {number}" in found
    assert {"always", "for some images", "never"} <= set(found)


def test_the_widths_of_the_parts_are_their_shares() -> None:
    own = GateLayerFacts(
        layer="a", filters=8, units=8, never=1, always=5, varying=2, rate=0.7, entropy_bits=0.1, break_even=None
    )
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nni_prune_ext.report.gate_charts.as_svg", lambda figure, **_: drawn.append(bars(figure)))
        firing_charts([own], name="a")

    assert [[(0.0, 62.5), (62.5, 25.0), (87.5, 12.5)]] == drawn


def bars(figure: Figure) -> list[tuple[float, float]]:
    return [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]


def test_gathered_layers_are_filled_and_the_others_are_not() -> None:
    own = layers(6)
    names = [own[number].layer for number in (1, 3)]

    [none], [two] = (break_even_charts(own, gathered, name="a") for gathered in ([], names))

    assert (1, 3) == (filled(none), filled(two))


def test_the_rate_stands_beside_the_break_even_rate_and_layers_without_one_are_left_out() -> None:
    found = texts(break_even_charts(layers(6), [], name="a"))

    assert 5 == sum(text.endswith(" / 0.75") for text in found)
    assert {"0.30 / 0.75", "0.88 / 0.75", "break-even", "firing, gathered", "firing, not gathered"} <= set(found)
    assert "stage0.block1.conv1" in found, "what all names begin with is left out"
    assert "stage0.block2.conv1" not in found


def test_bars_and_marks_are_as_long_as_the_rates() -> None:
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "nni_prune_ext.report.gate_charts.as_svg",
            lambda figure, **_: drawn.append((bars(figure), [list(line.get_xdata()) for line in figure.axes[0].lines])),
        )
        break_even_charts(layers(2), [], name="a")

    assert [([(0.0, 0.875), (0.0, 0.3)], [[0.75, 0.75], [0.75, 0.75]])] == drawn


def test_long_networks_have_several_charts_and_marks_stay_with_their_layers() -> None:
    own = layers(LAYERS_PER_CHART + 11)

    first, second = break_even_charts(own, [own[-1].layer], name="a")

    assert (1, 2) == (filled(first), filled(second))


def test_nothing_to_draw_is_no_chart() -> None:
    assert [] == firing_charts([], name="a")
    assert [] == break_even_charts(layers(6)[2:3], [], name="a")


def test_charts_have_words_and_the_colours_of_the_page() -> None:
    [firing] = firing_charts(layers(6), name="a")
    [bounds] = break_even_charts(layers(6), [layers(6)[1].layer], name="b")

    assert "Filters of 6 gated layers by how they fire; 401 fire for some images only" in title(firing)
    assert "Firing rate beside break-even rate of 5 gated layers, of which 1 are gathered" == title(bounds)
    for svg in (firing, bounds):
        assert "var(--series-1" in svg
        assert "#0" not in svg.replace("url(#", "").replace('href="#', "")


def title(svg: str) -> str:
    return ElementTree.fromstring(svg).findtext(f"{SVG}title") or ""


@pytest.mark.parametrize("draw", [firing_charts, lambda own, name: break_even_charts(own, [], name=name)])
def test_no_text_lies_on_another_or_outside_the_chart(draw) -> None:
    boxes = []

    def measure(figure: Figure, **_: object) -> str:
        figure.canvas.draw()
        found = [text for text in figure.findobj(Text) if text.get_text()]
        boxes.extend((text.get_text(), text.get_window_extent()) for text in found if text.get_visible())
        return ""

    wide = [layer.model_copy(update={"filters": 2048, "always": 1024, "varying": 1000}) for layer in layers(12)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nni_prune_ext.report.gate_charts.as_svg", measure)
        draw(wide, name="a")

    assert len(boxes) > 20
    assert [] == [text for text, box in boxes if box.x0 < 0 or box.x1 > 350 or box.y0 < 0]
    assert [] == [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
