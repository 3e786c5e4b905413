"""Tables become dataclasses and back; what does not fit is one line that names the table."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.fields import read_part, table_of


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    width: float
    kind: Literal["round", "square"] = "round"
    is_open: bool = False
    inner: Inner | None = None
    points: tuple[tuple[int, float], ...] = ()


inners = st.builds(Inner, depth=st.integers(-9, 9), note=st.none() | st.text(max_size=3))
outers = st.builds(
    Outer,
    width=st.floats(-9, 9),
    kind=st.sampled_from(["round", "square"]),
    is_open=st.booleans(),
    inner=st.none() | inners,
    points=st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), max_size=3).map(tuple),
)


@given(outers)
def test_a_table_of_a_part_reads_back(part: Outer) -> None:
    table = table_of(part)
    assert read_part(Outer, table, "outer") == part
    assert ("kind" in table) == (part.kind != "round")


def test_values_are_brought_to_their_types() -> None:
    part = read_part(Outer, {"width": 3, "inner": {"depth": 2}, "points": [[0, 1]]}, "outer")
    assert part == Outer(width=3.0, inner=Inner(depth=2), points=((0, 1.0),))
    assert isinstance(part.width, float)


def test_what_is_known_already_is_not_asked_for() -> None:
    assert read_part(Inner, {}, "inner", depth=4) == Inner(depth=4)
    with pytest.raises(ConfigError, match="unknown field 'depth' in inner; known: note"):
        read_part(Inner, {"depth": 1}, "inner", depth=4)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (3, "outer=3; it must be a table of settings"),
        ({}, "outer without width; give it there"),
        ({"width": "a"}, "outer.width='a'; it must be a number"),
        ({"width": True}, "outer.width=True; it must be a number"),
        ({"width": 1, "kind": "oval"}, "outer.kind='oval'; it must be one of 'round', 'square'"),
        ({"width": 1, "widht": 2}, "unknown field 'widht' in outer; did you mean 'width'"),
        ({"width": 1, "inner": {"depth": 1.5}}, "outer.inner.depth=1.5; it must be a whole number"),
        ({"width": 1, "inner": {}}, "outer.inner without depth; give it there"),
        ({"width": 1, "inner": 7}, "outer.inner=7; it must be a table of settings"),
        ({"width": 1, "points": [[1]]}, r"outer.points=\[\[1\]\]; it must be a list of \[a whole number, a number\]"),
    ],
)
def test_what_does_not_fit_is_one_line(table: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read_part(Outer, table, "outer")
    assert "\n" not in str(caught.value)
