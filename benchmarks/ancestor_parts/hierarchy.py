"""1994: hierarchical mixtures, EM against gradient ascent from the same start, counted in sweeps through the cases.

The standard error of the area of a tumour's nuclei, from ten other measurements: benign and malignant tumours follow
laws of their own, with noise of their own.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from ancestor_parts.common import Cases, Claim, Part, Row, best_rate, data_set, less, median, split, talk
from torch import Tensor

from moesaic.layers.hierarchical_mixture import HierarchicalMixture

BRANCHING, EM_STEPS, TARGET_STEP = (2, 2), 40, 10
RATES = (0.01, 0.03, 0.1, 0.3)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam,
    "steepest ascent": torch.optim.SGD,
}


class Curve(NamedTuple):
    """The log-likelihood a case after so many sweeps, and the held-out one at the end."""

    sweeps: list[int]
    values: list[float]
    held_out: float

    def sweeps_to(self, target: float) -> float:
        """Infinite where the target was not reached."""
        return next((s for s, v in zip(self.sweeps, self.values, strict=True) if v >= target), math.inf)


def tumours() -> Cases:
    """Ten measurements of 569 tumours, and the standard error of their area: all of mean 0 and variance 1."""
    raw = torch.tensor(data_set("breast_cancer").data, dtype=torch.float64)
    raw = (raw - raw.mean(0)) / raw.std(0)
    return split(raw[:, :10], raw[:, 13:14], 456)


def tree(cases: Cases, branching: Sequence[int], seed: int) -> HierarchicalMixture:
    return HierarchicalMixture(cases.x.shape[1], cases.y.shape[1], branching, min_variance=1e-3, seed=seed)


@torch.no_grad()
def a_case(model: HierarchicalMixture, x: Tensor, y: Tensor) -> float:
    return model.log_likelihood(x, y).item() / len(x)


def by_em(cases: Cases, branching: Sequence[int], seed: int) -> Curve:
    model = tree(cases, branching, seed)
    sweeps, values, spent = [], [], 0
    for _ in range(EM_STEPS):
        step = model.em_step(cases.x, cases.y)
        sweeps.append(spent + 1)  # a step's own E-step is what evaluates the steps before it
        values.append(step.log_likelihood / len(cases.x))
        spent += step.sweeps
    sweeps.append(spent + 1)
    values.append(a_case(model, cases.x, cases.y))
    return Curve(sweeps, values, a_case(model, cases.held_x, cases.held_y))


def by_gradient(cases: Cases, method: str, rate: float, seed: int, num_sweeps: int) -> Curve:
    """From the same start as EM; a sweep is one gradient. A likelihood that is no number ends the curve."""
    model = tree(cases, BRANCHING, seed)
    optimizer = OPTIMIZERS[method](model.parameters(), lr=rate, fused=True)
    sweeps, values = [], []
    for sweep in range(1, num_sweeps + 1):
        optimizer.zero_grad()
        value = model.log_likelihood(cases.x, cases.y) / len(cases.x)
        if not torch.isfinite(value):
            return Curve(sweeps, [*values[:-1], -math.inf], -math.inf)
        sweeps.append(sweep)
        values.append(value.item())
        (-value).backward()
        optimizer.step()
    return Curve(sweeps, values, a_case(model, cases.held_x, cases.held_y))


def row(name: str, curves: list[Curve], targets: list[float]) -> Row:
    return {
        "fit by": name,
        "sweeps to the target": median(c.sweeps_to(t) for c, t in zip(curves, targets, strict=True)),
        "sweeps in all": median(float(c.sweeps[-1]) for c in curves),
        "at the end": median(c.values[-1] for c in curves),
        "held out": median(c.held_out for c in curves),
    }


def gradient_row(method: str, seeds: int, budget: int, cases: Cases, targets: list[float]) -> Row:
    runs = {rate: [by_gradient(cases, method, rate, seed, budget) for seed in range(seeds)] for rate in RATES}
    rate = best_rate(runs, lambda curve: -curve.values[-1])
    talk(f"1994  {method} done")
    return row(f"{method}, rate {rate}", runs[rate], targets)


def part(seeds: int, _corpus: Path | None) -> Part:
    """All of 1994."""
    cases, key = tumours(), "sweeps to the target"
    em = [by_em(cases, BRANCHING, seed) for seed in range(seeds)]
    talk("1994  EM done")
    targets = [curve.values[TARGET_STEP] for curve in em]
    budget = round(median(curve.sweeps[-1] for curve in em))
    fitted = row(f"EM, {EM_STEPS} steps", em, targets)
    gradients = [gradient_row(method, seeds, budget, cases, targets) for method in OPTIMIZERS]
    line = row("EM, one linear leaf", [by_em(cases, (1,), 0)], [math.nan]) | {key: math.nan}
    rise = min(after - before for curve in em for before, after in itertools.pairwise(curve.values))
    claims = [
        Claim("EM never lowers the log-likelihood", rise >= -1e-12, f"smallest rise {rise:.1e} nats a case"),
        *(
            less(f"EM reaches the target in fewer sweeps than {each['fit by']}", fitted, each, key)
            for each in gradients
        ),
    ]
    task = (
        f"the standard error of area from 10 measurements of {len(cases.x)} tumours, {len(cases.held_x)} held out; "
        f"{seeds} starts, medians; target: EM's log-likelihood after {TARGET_STEP} steps; sweeps of inner loops count"
    )
    return Part(task, {"log-likelihood, nats a case": [fitted, *gradients, line]}, claims)
