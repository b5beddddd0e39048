"""drawing.py: axes show what matters, marks keep their texts, and dark pictures are dark."""

from xml.etree import ElementTree

import pytest

from optimer_hf.report.drawing import (
    DARK,
    INK,
    LOOKS,
    PAPER,
    Panel,
    add_key,
    choose_limits,
    draw_interval,
    make_figure,
    to_svg,
    use_style,
)
from optimer_hf.scoring.intervals import Interval


@pytest.mark.parametrize(
    ("focus", "others", "inside", "outside"),
    [
        ([1.0, 2.0], [0.5, 3.5, -1.5], [0.0, 1.0, 2.0, 0.5, 3.5, -1.5], []),
        ([1.0, 2.0], [-90.0, 50.0], [0.0, 1.0, 2.0], [-90.0, 50.0]),
        ([-2.0, -1.0], [], [0.0, -2.0], [-4.0]),
        ([0.0, 0.0], [], [0.0], []),
    ],
)
def test_an_axis_shows_zero_and_the_focus_and_is_not_squeezed(focus, others, inside, outside):
    low, high = choose_limits(focus, others)
    assert low < high
    assert all(low <= value <= high for value in inside)
    assert not any(low <= value <= high for value in outside)


def panel_with(difference: float, hint: str) -> Panel:
    """Draw one difference on an axis from -1 to 1."""
    with use_style():
        figure, axes = make_figure(1.5)
        axes[0].set_xlim(-1, 1)
        interval = Interval(difference, difference - 0.1, difference + 0.1, "Student's t", 20)
        draw_interval(axes[0], 0, interval, LOOKS["merge"], 1.0, hint)
        add_key(figure, ["merge"])
        return Panel("p", "t", "c", "s", figure)


@pytest.mark.parametrize("hint", ['a <b> & "c"', "two\nlines", "plain"])
def test_the_text_of_a_mark_is_a_title_within_it(hint):
    tree = ElementTree.fromstring(to_svg(panel_with(0.5, hint)))
    titles = [e.text for e in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == [" ".join(hint.split()).replace('"', "'")]


@pytest.mark.parametrize(("difference", "text"), [(-7.5, "-7.5"), (30.0, "+30"), (0.5, None)])
def test_a_point_beyond_the_axis_is_an_arrow_with_its_number(difference, text):
    axis = panel_with(difference, "x").figure.axes[0]
    assert [label.get_text() for label in axis.texts] == ([text] if text else [])
    (x,) = axis.lines[-1].get_xdata()
    assert -1 <= x <= 1


def test_every_colour_of_light_pages_has_a_lighter_one_for_dark_pages():
    def brightness(colour: str) -> int:
        return sum(bytes.fromhex(colour[1:]))

    assert brightness(DARK[PAPER]) < brightness(PAPER)
    for light in DARK.keys() - {PAPER, "#8a8a96"}:
        assert brightness(DARK[light]) > brightness(light)
    assert brightness(DARK[INK]) > 600
