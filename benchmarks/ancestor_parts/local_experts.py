"""1991: adaptive mixtures of local experts, their three objectives, one net of equal size, and an ensemble.

Odd or even, from images of handwritten digits: ten shapes and one question, which no linear network can answer for all
of them, but which is easy for a few shapes at a time. T cases, E experts.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  its common name
from ancestor_parts.common import Cases, Claim, Part, Row, best_rate, data_set, less, median, split, talk
from torch import Tensor, nn

from moesaic.layers.mixture import AdaptiveMixture, gate_entropy

NUM_EXPERTS, EPOCHS, BATCH = 8, 15, 100
CRITERION = 0.98  # of the training cases on the right side
RATES = (0.01, 0.03, 0.1, 0.3)


class Learned(NamedTuple):
    """A trained mixture, and the epochs until it met the criterion (infinite: never)."""

    model: AdaptiveMixture
    epochs: float


def digits() -> Cases:
    """Images of 8 x 8 points; the target is +1 for odd digits, -1 for even ones."""
    raw = data_set("digits")
    x = torch.tensor(raw.data, dtype=torch.float32) / 16
    parity = torch.tensor(raw.target % 2, dtype=torch.float32)[:, None] * 2 - 1
    return split(x - x.mean(0), parity, 1200)


def share_right(outputs: Tensor, targets: Tensor) -> float:
    return ((outputs > 0) == (targets > 0)).float().mean().item()


def network(units: int, num_inputs: int) -> nn.Module:
    """A linear network, or one of `units` tanh units."""
    if units == 0:
        return nn.Linear(num_inputs, 1)
    return nn.Sequential(nn.Linear(num_inputs, units), nn.Tanh(), nn.Linear(units, 1))


def learn(objective: str, units: int, num_experts: int, rate: float, seed: int, cases: Cases) -> Learned:
    """Adam over shuffled batches. One expert is a plain network, trained on squared errors."""
    torch.manual_seed(seed)
    num_inputs = cases.x.shape[1]
    experts = [network(units, num_inputs) for _ in range(num_experts)]
    model = AdaptiveMixture(experts, nn.Linear(num_inputs, num_experts), objective)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    reached, batches = math.inf, math.ceil(len(cases.x) / BATCH)
    for epoch in range(EPOCHS):
        for number, chosen in enumerate(torch.randperm(len(cases.x)).split(BATCH), start=1):
            optimizer.zero_grad()
            model.loss(cases.x[chosen], cases.y[chosen]).backward()
            optimizer.step()
            if reached == math.inf and number % 3 == 0 and _meets_criterion(model, cases):
                reached = epoch + number / batches
    return Learned(model.requires_grad_(False), reached)


@torch.no_grad()
def _meets_criterion(model: AdaptiveMixture, cases: Cases) -> bool:
    return share_right(model(cases.x), cases.y) >= CRITERION


def learn_at_best_rate(objective: str, units: int, num_experts: int, seeds: int, cases: Cases) -> Row:
    """A row of the table: medians over seeds, at the learning rate that reaches the criterion in the fewest epochs."""
    runs = {rate: [learn(objective, units, num_experts, rate, seed, cases) for seed in range(seeds)] for rate in RATES}
    rate = best_rate(runs, lambda run: run.epochs)
    held = [share_right(run.model(cases.held_x), cases.held_y) for run in runs[rate]]
    entropy = [gate_entropy(run.model.gate(cases.held_x)).mean().item() for run in runs[rate]]
    row = {
        "trained as": f"{num_experts} experts, {objective}" if num_experts > 1 else f"one net, {units} tanh units",
        "epochs to criterion": median(run.epochs for run in runs[rate]),
        "slowest seed": max(run.epochs for run in runs[rate]),
        "held out right": median(held),
        "gate entropy": median(entropy) if num_experts > 1 else math.nan,
        "learning rate": rate,
    }
    talk(f"1991  {row['trained as']}: {row['epochs to criterion']:.2f} epochs")
    return row


def alone(outputs_TE: Tensor, owner_T: Tensor, targets_T: Tensor) -> Row:
    """How each network does by itself: everywhere, on the cases that the gate gives it, on all others."""
    right_TE = (outputs_TE > 0) == (targets_T > 0)[:, None]
    owns_TE = F.one_hot(owner_T, outputs_TE.shape[1]).bool()
    return {
        "one alone, everywhere": right_TE.float().mean().item(),
        "the best one alone": right_TE.float().mean(0).max().item(),
        "in its region": right_TE[owns_TE].float().mean().item(),
        "elsewhere": right_TE[~owns_TE].float().mean().item(),
        "two disagree": _disagreement(right_TE),
    }


def _disagreement(right_TE: Tensor) -> float:
    """The share of cases on which two networks differ, over all pairs."""
    num_cases, num_networks = right_TE.shape
    number_right_T = right_TE.sum(1)
    differing_T = number_right_T * (num_networks - number_right_T)
    return differing_T.sum().item() / (num_cases * num_networks * (num_networks - 1) / 2)


def against_ensemble(units: int, rate: float, seeds: int, cases: Cases) -> list[Row]:
    """A mixture, and the same networks trained independently on everything and averaged. Medians over seeds."""
    kinds: dict[str, list[Row]] = {"mixture": [], "ensemble": []}
    for seed in range(seeds):
        mixture = learn("likelihood", units, NUM_EXPERTS, rate, seed, cases).model.mixture(cases.held_x)
        first = 100 + NUM_EXPERTS * seed
        members = [learn("cooperative", units, 1, rate, first + i, cases).model for i in range(NUM_EXPERTS)]
        outputs = torch.cat([member(cases.held_x) for member in members], dim=1)
        owner, target = mixture.logits_TE.argmax(1), cases.held_y[:, 0]
        for name, whole, parts in (
            ("mixture", mixture.mean_TO[:, 0], mixture.outputs_TEO[..., 0]),
            ("ensemble", outputs.mean(1), outputs),
        ):
            kinds[name].append({"together": share_right(whole, target), **alone(parts, owner, target)})
    what = f"{NUM_EXPERTS} nets of {units} tanh units" if units else f"{NUM_EXPERTS} linear nets"
    talk(f"1991  mixture and ensemble of {what}")
    return [
        {"share right": f"{name} of {what}", **{key: median(row[key] for row in rows) for key in rows[0]}}
        for name, rows in kinds.items()
    ]


def is_no_ensemble(mixture: Row, ensemble: Row) -> Claim:
    """An expert is good where the gate sends cases and poor elsewhere; a member is as good everywhere."""
    local, alike = (row["in its region"] - row["elsewhere"] for row in (mixture, ensemble))
    text = (
        f"a {mixture['share right']} is no ensemble: an expert is better in its region by more than 0.1, a member not"
    )
    return Claim(text, local > 0.1 > abs(alike), f"{local:+.2f}; a member {alike:+.2f}")


def part(seeds: int, _corpus: Path | None) -> Part:
    """All of 1991."""
    cases = digits()
    num_inputs = cases.x.shape[1]
    equal_units = round((2 * NUM_EXPERTS * (num_inputs + 1) - 1) / (num_inputs + 2))
    likely, competing, together = (
        learn_at_best_rate(objective, 0, NUM_EXPERTS, seeds, cases)
        for objective in ("likelihood", "competitive", "cooperative")
    )
    net = learn_at_best_rate("cooperative", equal_units, 1, seeds, cases)
    pairs = [against_ensemble(units, likely["learning rate"], seeds, cases) for units in (0, 4)]
    key = "epochs to criterion"
    claims = [
        less("likelihood localises: its gates are surer than the cooperative ones", likely, together, "gate entropy"),
        less("likelihood meets the criterion in fewer epochs than cooperative", likely, together, key),
        less("likelihood meets the criterion in fewer epochs than competitive", likely, competing, key),
        less("likelihood meets the criterion in fewer epochs than one net of equal size", likely, net, key),
        *(is_no_ensemble(*pair) for pair in pairs),
    ]
    task = (
        f"odd or even from {len(cases.x)} images of digits, {len(cases.held_x)} held out; criterion {CRITERION:.0%} of "
        f"the former; {seeds} seeds, medians"
    )
    tables = {
        "objectives": [likely, competing, together, net],
        "networks by themselves, held out": [row for pair in pairs for row in pair],
    }
    return Part(task, tables, claims)
