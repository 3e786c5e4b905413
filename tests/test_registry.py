import pytest

from moesaic.errors import ConfigError
from moesaic.registry import Registry


def test_names_lead_to_things_and_unknown_names_to_the_known_ones():
    shapes: Registry[int] = Registry("shape")
    shapes.register("circle")(1)
    shapes.register("square")(4)
    assert shapes["square"] == 4
    assert list(shapes) == ["circle", "square"]
    assert "squircle" not in shapes
    with pytest.raises(ConfigError, match=r"unknown shape 'sqare'; did you mean 'square'\? Known: circle, square"):
        shapes["sqare"]


def test_a_name_is_given_once():
    shapes: Registry[int] = Registry("shape")
    shapes.register("circle")(1)
    with pytest.raises(ValueError, match="twice"):
        shapes.register("circle")(2)
