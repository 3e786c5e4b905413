import itertools
import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moesaic.telemetry.plots import HEAT_BINS, Series, bars, color_bar, heat_bin, heat_map, line_chart
from moesaic.telemetry.scale import MISSING, duration, fixed, short, ticks


def parse(picture: str) -> ElementTree.Element:
    assert "http" not in picture
    return ElementTree.fromstring(picture)


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter("text")]


def chart(*series: Series, **options) -> ElementTree.Element:
    return parse(line_chart(series, title="a <title> & more", x_label="tokens", y_label="loss", **options))


def test_a_line_carries_its_values_and_its_name():
    root = chart(Series("model <one>", [0, 1000, 2000], [3.0, 2.0, 1.5], "s0", "one"))
    assert root.get("aria-label") == "a <title> & more"
    data = json.loads(root.get("data-chart", ""))
    assert data["series"][0]["name"] == "model <one>"
    assert [point[2:] for point in data["series"][0]["at"]] == [["0", "3.000"], ["1k", "2.000"], ["2k", "1.500"]]
    assert "one" in texts(root)
    assert len(list(root.iter("polyline"))) == 1


@pytest.mark.parametrize("ys", [[], [math.nan, math.nan], [math.inf]])
def test_nothing_measured_is_said(ys):
    assert texts(chart(Series("empty", list(range(len(ys))), ys))) == ["nothing measured"]


def test_gaps_break_a_line_and_lone_points_are_dots():
    root = chart(Series("gap", [0, 1, 2, 3, 4, 5], [1, 2, math.nan, 3, math.nan, 4]))
    assert len(list(root.iter("polyline"))) == 1
    assert len([dot for dot in root.iter("circle") if dot.get("r") == "3.5"]) == 2
    one = chart(Series("one", [7], [1.25]))
    assert len(list(one.iter("polyline"))) == 0
    assert json.loads(one.get("data-chart", ""))["series"][0]["at"][0][3] == "1.250"


def test_a_cut_start_is_admitted():
    ys = [9.0, 5.0, 2.2, *(2.0 - 0.01 * step for step in range(20))]
    series = Series("steep", list(range(len(ys))), ys)
    assert "loss (the start lies above)" in texts(chart(series, cut_start=True))
    assert "loss" in texts(chart(series))


@given(st.lists(st.tuples(st.floats(0, 1e18), st.floats(-1e6, 1e6)), min_size=1, max_size=12))
@example([(0.0, 0.0), (5e-324, 0.0)])
def test_any_finite_points_make_a_picture(points):
    chart(Series("any", [x for x, _ in points], [y for _, y in points], label="any"), cut_start=True)


def test_names_at_the_edge_do_not_touch():
    lines = [Series(f"line {i}", [0, 1], [1, 1 + i / 1000], label=f"line {i}") for i in range(6)]
    heights = sorted(float(text.get("y", "")) for text in chart(*lines).iter("text") if "name" in text.get("class", ""))
    assert len(heights) == 6
    assert all(below - above >= 12.4 for above, below in itertools.pairwise(heights))


def test_a_heat_map_shows_every_cell():
    root = parse(
        heat_map(
            [[1.0, 0.0], [4.0, math.nan]],
            title="load",
            row_labels=["0", "<1>"],
            column_labels=["0", "1"],
            row_title="layer",
            column_title="expert",
        )
    )
    cells = list(root.iter("rect"))
    assert [cell.get("class") for cell in cells] == ["h8", "h0", "h16", "hn"]
    assert cells[2].get("data-tip") == "layer <1>, expert 0: 4.00 times the fair share"
    assert cells[3].get("data-tip") == "layer <1>, expert 1: no rows"
    assert {"1.0", "×", "4.0"} <= set(texts(root))
    assert texts(parse(heat_map([], title="none", row_labels=[], column_labels=[]))) == ["nothing measured"]


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_colours_follow_the_load(left, right):
    low, high = sorted((left, right))
    assert 0 <= heat_bin(low) <= heat_bin(high) < HEAT_BINS
    assert heat_bin(1) == HEAT_BINS // 2


def test_the_colour_bar_names_the_fair_share():
    assert "fair share" in texts(parse(color_bar()))


def test_bars():
    root = parse(bars(["code", "prose"], [("MoE", "s0", [1.5, math.nan])], title="by domain", x_label="bits per byte"))
    assert [bar.get("data-tip") for bar in root.iter("rect")] == ["code, MoE: 1.500", f"prose, MoE: {MISSING}"]
    assert "1.500" in texts(root)
    assert texts(parse(bars([], [], title="none", x_label=""))) == ["nothing measured"]


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_are_few_and_inside(low, span):
    span = max(span, 1e-6 * abs(low))  # closer ends than twelve digits tell apart are not asked for
    marks = ticks(low, low + span)
    assert len(marks) <= 10
    assert all(low - 1e-4 * span <= mark <= low + span * (1 + 1e-4) for mark in marks)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (999, "", "999"),
        (1000, "", "1k"),
        (999_999, "", "1M"),
        (1_234_567, "", "1.23M"),
        (2.5e14, "FLOP", "250 TFLOP"),
        (12, "B", "12 B"),
        (0.0123, "", "0.0123"),
        (math.nan, "", MISSING),
        (None, "B", MISSING),
    ],
)
def test_short_numbers(value, unit, text):
    assert short(value, unit) == text


def test_durations_and_decimals():
    assert [duration(s) for s in (0.5, 59.6, 185, 7620, math.nan)] == [
        "0.5 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
        MISSING,
    ]
    assert (fixed(1.23456), fixed(None)) == ("1.235", MISSING)
