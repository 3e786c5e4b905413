import math

import numpy as np
import pytest

from moesaic.telemetry.drift import load_distance, load_swing, router_state, saturation
from moesaic.telemetry.load import LayerLoad, LogitFacts


def test_saturation_by_hand():
    """Tokens share 1 of 2, 2 of 2 and 0 of 1 choices; the fourth is routed nowhere later."""
    found = saturation([[0, 1], [2, 3], [0, 1], [0, 1]], [[1, 2], [3, 2], [3, -1], [-1, -1]], 4)
    assert (found.share, found.num_tokens) == (pytest.approx(0.5), 3)
    assert math.isnan(saturation([[0]], [[-1]], 2).share)


def test_unrelated_checkpoints_share_what_chance_gives():
    generator = np.random.default_rng(0)
    earlier, later = (np.array([generator.permutation(16)[:4] for _ in range(4000)]) for _ in range(2))
    found = saturation(earlier, later, 16)
    assert found.chance == pytest.approx(4 / 16, abs=0.01) and found.share == pytest.approx(found.chance, abs=0.02)


def test_distance_and_swing():
    assert load_distance([1, 1, 0, 0], [0, 0, 5, 5]) == 1 and load_distance([2, 6], [4, 4]) == 0.25
    assert math.isnan(load_distance([0, 0], [1, 1])) and math.isnan(load_swing([[1, 1]]))
    generator = np.random.default_rng(0)
    steady = generator.multinomial(60, [0.1, 0.2, 0.3, 0.4], size=300)
    assert load_swing(steady) < 0.01  # by chance alone they are 0.11 apart
    assert load_swing([[90, 10], [10, 90], [90, 10]]) == pytest.approx(0.8, abs=0.06)


def test_reasons_for_an_unstable_router():
    def load(rms: float, flips: float) -> LayerLoad:
        facts = LogitFacts(num_sampled=64, rms=rms, peak=rms, margin=0.1, flips_bf16=flips, flips_noise=0.0)
        counts = np.array([5, 5])
        return LayerLoad(layer=3, top_k=1, counts_E=counts, num_tokens=10, router_entropy=0.1, logits=facts)

    assert not router_state(load(2.0, 0.01), [[50, 50], [50, 50]]).is_unstable
    assert "softmax no gradient" in router_state(load(80.0, 0.0)).reasons[0]
    assert "bf16" in router_state(load(2.0, 0.2)).reasons[0]
    assert "window to window" in router_state(load(2.0, 0.0), [[90, 10], [10, 90]]).reasons[0]
