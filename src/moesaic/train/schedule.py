"""How the learning rate moves over a run."""

import math


def learning_rate(step: int, *, steps: int, peak: float, warmup_steps: int, final_fraction: float) -> float:
    """The rate of step `step` (0-based): linear warm-up to `peak`, then a cosine down to `final_fraction` of it.

    Cosine: SGDR, arXiv:1608.03983, eq. 5 without restarts.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (final_fraction + (1 - final_fraction) * cosine)
