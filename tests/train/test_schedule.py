import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.train.schedule import learning_rate, scheduled


def rates(**settings):
    plain = {"steps": 100, "peak": 2.0, "warmup_steps": 10, "final_fraction": 0.1}
    return [learning_rate(step, **(plain | settings)) for step in range(100)]


def test_cosine_warms_up_peaks_and_falls():
    found = rates()
    assert found[0] == pytest.approx(0.2)
    assert found[9] == found[10] == pytest.approx(2.0)
    assert found[99] == pytest.approx(0.2)
    assert all(after <= before for before, after in pairwise(found[10:]))
    assert found[54] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 44 / 89)))


def test_wsd_warms_up_stays_and_falls_in_a_line():
    found = rates(schedule="wsd", decay_fraction=0.25)
    assert found[:10] == rates()[:10]
    assert found[10:75] == [2.0] * 65
    assert found[75:] == pytest.approx(np.linspace(2.0, 0.2, 26)[1:])


@given(
    steps=st.integers(1, 300),
    warmup_steps=st.integers(0, 50),
    decay_fraction=st.floats(0.0, 1.0),
    schedule=st.sampled_from(["cosine", "wsd"]),
)
def test_any_schedule_stays_between_nothing_and_the_peak_and_ends_low(steps, warmup_steps, decay_fraction, schedule):
    found = [
        learning_rate(
            step,
            steps=steps,
            peak=1.0,
            warmup_steps=warmup_steps,
            final_fraction=0.1,
            schedule=schedule,
            decay_fraction=decay_fraction,
        )
        for step in range(steps)
    ]
    assert all(0 < rate <= 1 for rate in found)
    if steps > warmup_steps + 1:
        assert found[-1] == pytest.approx(0.1)


def test_points_are_joined_by_lines():
    points = ((10, 1.0), (20, 0.0), (40, 4.0))
    assert [scheduled(points, step) for step in (0, 10, 15, 20, 30, 40, 99)] == [1.0, 1.0, 0.5, 0.0, 2.0, 4.0, 4.0]
    assert scheduled(0.25, 7) == 0.25
    assert scheduled(((5, 3.0),), 0) == scheduled(((5, 3.0),), 9) == 3.0


@given(
    points=st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 10)), min_size=1, unique_by=lambda point: point[0]),
    step=st.integers(0, 1100),
)
def test_points_are_what_numpy_interpolates(points, step):
    points = tuple(sorted(points))
    steps, values = zip(*points, strict=True)
    assert scheduled(points, step) == pytest.approx(np.interp(step, steps, values), abs=1e-12)
