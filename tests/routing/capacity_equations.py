"""Capacity from its rules alone: lists and loops, no tensors, nothing of moesaic.

A row is (token, choice, expert, weight). Sources of the orders: GShard arXiv:2006.16668 (position), DeepSeek-V2
arXiv:2405.04434 (probability), V-MoE arXiv:2106.05974 (batch_prioritized).
"""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal, localcontext
from typing import NamedTuple

ROUNDINGS = {"ceil": ROUND_CEILING, "floor": ROUND_FLOOR, "round": ROUND_HALF_EVEN}


class Row(NamedTuple):
    token: int
    choice: int
    expert: int
    weight: float


class Rules(NamedTuple):
    """The settings, spelled as in CapacityConfig; num_devices: budgets are per device, None: per expert."""

    factor: float
    num_experts: int
    top_k: int
    minimum: int = 0
    rounding: str = "ceil"
    multiple_of: int = 1
    drop: str = "position"
    overflow: str = "residual"
    group_size: int | None = None
    num_devices: int | None = None


class Limited(NamedTuple):
    """rows by expert, token, choice; lost_weights of each token; slots of one budget over all groups of tokens."""

    rows: list[Row]
    lost_weights: list[float]
    slots: int


def slots(rules: Rules, num_tokens: int) -> int:
    """rounding(factor * K * T / E), at least the minimum, up to a multiple."""
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(repr(rules.factor)) * rules.top_k * num_tokens / (rules.num_devices or rules.num_experts)
        wanted = max(rules.minimum, int(exact.to_integral_value(ROUNDINGS[rules.rounding])))
    while wanted % rules.multiple_of:
        wanted += 1
    return wanted


def limited(rules: Rules, chosen: list[Row], scores: list[list[float]], ranked: list[list[float]], mask: list[bool]):
    """What a capacity leaves of the chosen rows. `ranked` has -inf where a token may not choose."""
    groups = token_groups(mask, rules.group_size)
    room = {}
    for group, size in enumerate([groups.count(g) for g in range(max([-1, *groups]) + 1)]):
        for number in range(rules.num_devices or rules.num_experts):
            room[group, number] = slots(rules, size)
    total = sum(count for (_, number), count in room.items() if number == 0)

    def budget(token, expert):
        return groups[token], expert if rules.num_devices is None else expert * rules.num_devices // rules.num_experts

    served, waiting = [], []
    for row in sorted(chosen, key=lambda row: turn(rules.drop, row, chosen, scores)):
        if room[budget(row.token, row.expert)] > 0:
            room[budget(row.token, row.expert)] -= 1
            served.append(row)
        else:
            waiting.append(row)
    if rules.overflow == "next_best":
        served += next_best(waiting, served, room, budget, scores, ranked)
    kept = {(row.token, row.choice) for row in served}
    lost = [0.0] * len(mask)
    for row in sorted(chosen, key=lambda row: row.choice):
        if (row.token, row.choice) not in kept:
            lost[row.token] += row.weight
    return Limited(sorted(served, key=lambda row: (row.expert, row.token, row.choice)), lost, total)


def token_groups(mask: list[bool], group_size: int | None) -> list[int]:
    """The group of every token, -1 for padding: every `group_size` tokens that count are one."""
    groups, counted = [], 0
    for counts in mask:
        groups.append((counted // group_size if group_size else 0) if counts else -1)
        counted += counts
    return groups


def turn(drop: str, row: Row, chosen: list[Row], scores: list[list[float]]):
    """Who is served before whom: smaller is earlier."""
    if drop == "position":
        return row.choice, row.token
    if drop == "probability":
        return -row.weight, row.choice, row.token
    assert drop == "batch_prioritized"
    best = max(scores[other.token][other.expert] for other in chosen if other.token == row.token)
    return row.choice, -best, row.token


def next_best(waiting: list[Row], served: list[Row], room, budget, scores, ranked) -> list[Row]:
    """The rows that found another expert: round by round, in each round one row a token, in the order of `waiting`."""
    has = {(row.token, row.expert) for row in served}
    moved = []
    while True:
        asks, asking = [], set()
        for row in waiting:
            open_experts = [
                expert
                for expert, value in enumerate(ranked[row.token])
                if value > -math.inf and (row.token, expert) not in has and room[budget(row.token, expert)] > 0
            ]
            if open_experts and row.token not in asking:
                asking.add(row.token)
                asks.append((row, max(open_experts, key=lambda expert: (ranked[row.token][expert], -expert))))
        if not asks:
            return moved
        for row, expert in asks:
            if room[budget(row.token, expert)] > 0:
                room[budget(row.token, expert)] -= 1
                has.add((row.token, expert))
                waiting = [other for other in waiting if other != row]
                old, new = scores[row.token][row.expert], scores[row.token][expert]
                moved.append(row._replace(expert=expert, weight=row.weight * new / old if old > 0 else 0.0))


def inside_best_groups(ranked: list[list[float]], num_groups: int, top_groups: int, score: str) -> list[list[float]]:
    """`ranked` with -inf outside each token's best groups: by their best expert, or by the sum of their two best."""
    kept = []
    for values in ranked:
        size = len(values) // num_groups
        judged = []
        for group in range(num_groups):
            inside = sorted(values[group * size : (group + 1) * size], reverse=True)
            judged.append((-(inside[0] if score == "max" else inside[0] + inside[1]), group))
        allowed = {group for _, group in sorted(judged)[:top_groups]}
        kept.append([value if index // size in allowed else -math.inf for index, value in enumerate(values)])
    return kept
