import json
import random

import numpy as np
import torch

from moesaic.train.random_state import random_state, restore_random_state, undisturbed


def draw():
    return random.gauss(0, 1), float(np.random.standard_normal()), random.random(), torch.randn(3).tolist()


def test_the_state_survives_json():
    draw()  # both Gaussian generators keep half a pair, which is part of the state
    state = json.dumps(random_state())
    expected = [draw() for _ in range(3)]
    restore_random_state(json.loads(state))
    assert [draw() for _ in range(3)] == expected


def test_undisturbed_gives_back_what_was_drawn():
    before = random_state()
    with undisturbed():
        draw()
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
    assert random_state() == before
