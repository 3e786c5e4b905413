"""Routing to be limited, and the comparison of a limit with its rules in plain Python."""

import pytest
import torch

from moesaic.config import RouterConfig
from moesaic.config.router import ROUTER_KINDS
from moesaic.routing import RoutingDecision, Rows
from moesaic.routing.capacity import limit
from tests.routing.capacity_equations import Row, Rules, inside_best_groups, limited

DROPS = ("position", "probability", "batch_prioritized")
OVERFLOWS = ("residual", "next_best", "shared")


def router_of(name):
    """Any router over 6 experts with its least settings."""
    kind = ROUTER_KINDS[name]
    settings = None
    if kind.settings is not None:
        needed = {"HashSettings": {"vocab_size": 61}, "NullSettings": {"num_null_experts": 2}}
        settings = kind.settings(**needed.get(kind.settings.__name__, {}))
    top_k = 6 if name == "dense" else kind.top_k or 2
    return RouterConfig(name=name, num_experts=6, top_k=top_k, settings=settings)


def route(router, num_tokens, *, ragged=False, ties=False, collapsed=False, mask_T=None, bias_E=None, seed=0):
    """A decision in fp64 by the K best of scores plus bias, inside each token's best groups.

    ragged: some choices are missing. ties: few different scores, 0 among them. collapsed: all tokens want expert 0.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, router.num_experts)
    scores_TE = torch.rand(shape, generator=generator, dtype=torch.float64)
    if ties:
        scores_TE = torch.randint(0, 3, shape, generator=generator).double() / 2
    if collapsed:
        scores_TE[:, 0] = 7.0
    ranked = allowed(router, scores_TE, bias_E)
    best = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[: router.top_k] for row in ranked]
    expert_ids_TK = torch.tensor(best, dtype=torch.int64).reshape(num_tokens, router.top_k)
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    if ragged:
        expert_ids_TK = expert_ids_TK.where(torch.rand(expert_ids_TK.shape, generator=generator) < 0.7, -1)
    rows = Rows.from_topk(expert_ids_TK, weights_TK, router.num_experts, mask_T=mask_T, fixed_top_k=not ragged)
    return RoutingDecision(rows=rows, logits_TE=scores_TE, scores_TE=scores_TE, mask_T=mask_T, groups=router.groups)


def allowed(router, scores_TE, bias_E):
    ranked = (scores_TE if bias_E is None else scores_TE + bias_E).tolist()
    if router.groups is None:
        return ranked
    return inside_best_groups(ranked, router.groups.num_groups, router.groups.top_groups, router.groups.score)


def as_list(rows):
    columns = (rows.token_ids_R, rows.choice_R, rows.expert_ids_R, rows.weights_R)
    return [Row(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def rules_of(capacity, router):
    return Rules(
        factor=capacity.factor,
        num_experts=router.num_experts,
        top_k=router.top_k,
        minimum=capacity.minimum,
        rounding=capacity.rounding,
        multiple_of=capacity.multiple_of,
        drop=capacity.drop,
        overflow=capacity.overflow,
        group_size=capacity.group_size,
        num_devices=router.groups.num_groups if capacity.per == "device" else None,
    )


def check(decision, capacity, router, bias_E=None):
    """`limit` against the equations: rows exactly, weights to fp64 rounding. Returns its decision."""
    got = limit(decision, capacity, router, bias_E)
    chosen = as_list(decision.rows)
    mask = decision.mask_T.tolist() if decision.mask_T is not None else [True] * decision.rows.num_tokens
    ranked_TE = decision.scores_TE if decision.ranked_TE is None else decision.ranked_TE
    ranked = [row[: router.num_experts] for row in allowed(router, ranked_TE.detach(), bias_E)]
    expected = limited(rules_of(capacity, router), chosen, decision.scores_TE.tolist(), ranked, mask)
    found = as_list(got.rows)
    assert [row[:3] for row in found] == [row[:3] for row in expected.rows]
    assert [row.weight for row in found] == pytest.approx([row.weight for row in expected.rows], rel=1e-13, abs=1e-15)
    assert got.slots == expected.slots
    assert got.chosen is decision.rows
    if capacity.overflow == "shared":
        assert got.shared_weight_T is not None
        assert got.shared_weight_T.tolist() == pytest.approx(expected.lost_weights, rel=1e-13, abs=1e-15)
    else:
        assert got.shared_weight_T is None
    return got
