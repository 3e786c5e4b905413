"""How numbers move over a run: the learning rate, and coefficients given as points."""

import math
from typing import Literal

from moesaic.train.recipe import Scheduled


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    warmup_steps: int,
    final_fraction: float,
    schedule: Literal["cosine", "wsd"] = "cosine",
    decay_fraction: float = 0.2,
) -> float:
    """The rate of step `step` (0-based): linear warm-up to `peak`, then by `schedule` down to `final_fraction` of it.

    cosine: half a wave over all the rest (SGDR, arXiv:1608.03983, eq. 5 without restarts).
    wsd: `peak` until the last `decay_fraction` of the steps, then a straight line (warmup-stable-decay of MiniCPM,
    arXiv:2404.06395, sec. 4, which leaves the decay open; the line is the cooldown of arXiv:2405.18392).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "wsd":
        decay_steps = max(1, round(steps * decay_fraction))
        decayed = min(1.0, max(0.0, (step + 1 - (steps - decay_steps)) / decay_steps))
        return peak * (1 - (1 - final_fraction) * decayed)
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (final_fraction + (1 - final_fraction) * cosine)


def scheduled(value: Scheduled, step: int) -> float:
    """A number at step `step` (0-based): itself, or its points' line, flat before the first and after the last."""
    if not isinstance(value, tuple):
        return value
    step_0, value_0 = value[0]
    for step_1, value_1 in value:
        if step < step_1:
            share = (step - step_0) / (step_1 - step_0) if step > step_0 else 0.0
            return value_0 + share * (value_1 - value_0)
        step_0, value_0 = step_1, value_1
    return value_0
