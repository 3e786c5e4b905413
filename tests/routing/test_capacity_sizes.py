"""Capacities that are no factor of an even load, budgets by document, and weights that are divided anew."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config import CapacityConfig, RouterConfig
from moesaic.errors import ConfigError
from moesaic.routing import RoutingDecision, Rows
from moesaic.routing.capacity import limit

ROUTER = RouterConfig(name="softmax_topk", num_experts=4, top_k=2)


def routed(num_tokens: int = 24, mask_T: Tensor | None = None, documents_T: Tensor | None = None) -> RoutingDecision:
    """Tokens that all want experts 1 and 2 more than the others."""
    generator = torch.Generator().manual_seed(6)
    logits_TE = torch.randn(num_tokens, 4, generator=generator) + torch.tensor([0.0, 2.0, 1.5, 0.0])
    scores_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = scores_TE.topk(2)
    rows = Rows.from_topk(ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True), 4, mask_T=mask_T)
    return RoutingDecision(rows, logits_TE, scores_TE, mask_T=mask_T, document_ids_T=documents_T)


@pytest.mark.parametrize(
    ("size", "num_tokens", "slots"),
    [
        ({"fixed": 7}, 3, 7),
        ({"fixed": 7}, 300, 7),
        ({"token_share": 0.3}, 10, 3),
        ({"token_share": 0.3}, 11, 4),
        ({"token_share": 1.1}, 20, 22),
        ({"token_share": 0.3, "rounding": "floor"}, 11, 3),
        ({"token_share": 0.3, "minimum": 9}, 11, 9),
        ({"fixed": 7, "multiple_of": 4}, 300, 8),
    ],
)
def test_slots(size: dict[str, Any], num_tokens: int, slots: int) -> None:
    assert CapacityConfig(**size).slots(num_tokens, ROUTER) == slots


def test_a_document_has_a_budget_of_its_own() -> None:
    """Limited together, each document keeps what it keeps when it is limited alone; padding takes no slot."""
    documents_T = torch.tensor([0] * 5 + [1] * 12 + [2] * 7)
    mask_T = torch.ones(24, dtype=torch.bool)
    mask_T[[0, 1, 20]] = False
    decision = routed(24, mask_T, documents_T)
    for capacity in (CapacityConfig(fixed=2, group_size="document"), CapacityConfig(factor=0.5, group_size="document")):
        rows = limit(decision, capacity, ROUTER).rows
        seen = set(zip(rows.token_ids_R.tolist(), rows.expert_ids_R.tolist(), strict=True))
        expected = set()
        for document in range(3):
            own_T = mask_T & (documents_T == document)
            alone = Rows.from_topk(*_topk(decision), 4, mask_T=own_T)
            alone_decision = RoutingDecision(alone, decision.logits_TE, decision.scores_TE, mask_T=own_T)
            whole = CapacityConfig(fixed=capacity.fixed, factor=capacity.factor)
            kept = limit(alone_decision, whole, ROUTER).rows
            expected |= set(zip(kept.token_ids_R.tolist(), kept.expert_ids_R.tolist(), strict=True))
        assert seen == expected
        assert len(seen) < decision.rows.token_ids_R.numel()


def _topk(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    weights_TK, ids_TK = decision.scores_TE.topk(2)
    return ids_TK, weights_TK


def test_what_is_left_is_divided_anew() -> None:
    """A token's only row weighs 1, its two rows what they weighed; a token without rows has none."""
    decision = routed()
    decision.rows.weights_R.requires_grad_()
    kept = limit(decision, CapacityConfig(factor=0.6, renormalize=True), ROUTER).rows
    plain = limit(decision, CapacityConfig(factor=0.6), ROUTER).rows
    assert torch.equal(kept.token_ids_R, plain.token_ids_R)
    counts_T = torch.bincount(kept.token_ids_R, minlength=24)
    assert {0, 1, 2} == set(counts_T.tolist())
    sums_T = torch.zeros(24).index_add(0, kept.token_ids_R, kept.weights_R)
    assert torch.allclose(sums_T[counts_T > 0], torch.ones(1))
    both_R = counts_T[kept.token_ids_R] == 2
    assert torch.allclose(kept.weights_R[both_R], plain.weights_R[both_R])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "capacity of no size; give factor, fixed or token_share"),
        ({"factor": 1.0, "fixed": 3}, "capacity of factor and fixed; give"),
        ({"fixed": 2.5}, "fixed=2.5 in CapacityConfig; it must be a whole number above 0"),
        ({"fixed": 0}, "capacity fixed=0; it must be above 0"),
        ({"token_share": -0.1}, "capacity token_share=-0.1; it must be above 0"),
        ({"factor": 1.0, "group_size": "row"}, "group_size='row'"),
        ({"factor": 1.0, "renormalize": True, "overflow": "shared"}, 'renormalize=true with overflow="shared"'),
    ],
)
def test_impossible_sizes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CapacityConfig(**settings)
