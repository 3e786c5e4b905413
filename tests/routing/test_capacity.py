"""The limit to an expert's rows against its rules in plain Python, over random and adversarial routing."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.config import GroupConfig, MlpConfig, MoeConfig, RouterConfig
from moesaic.config.capacity import NO_NEXT_BEST, CapacityConfig, Rounding, expected_drop, refusal
from moesaic.config.router import ROUTER_KINDS
from moesaic.errors import ConfigError
from moesaic.routing import RoutingDecision, Rows
from moesaic.routing.capacity import limit
from tests.routing.capacity_equations import Row, Rules, slots
from tests.routing.limits import DROPS, OVERFLOWS, allowed, as_list, check, route, router_of

GROUPS = GroupConfig(num_groups=3, top_groups=2, score="max")


def inputs(router, ragged):
    """Random and adversarial batches: ties, one expert, logits of -inf, padding (some, all), no token, one token."""
    some = torch.tensor([True, False, True, True, True, False, True, True, True, True, False, True, True])
    bias_E = torch.linspace(-1.0, 0.5, router.num_experts, dtype=torch.float64)
    yield route(router, 13, ragged=ragged), None
    yield route(router, 13, ragged=ragged, mask_T=some, bias_E=bias_E, seed=1), bias_E
    tied = route(router, 13, ragged=ragged, ties=True, mask_T=some, seed=2)
    yield tied, None
    yield replace(tied, ranked_TE=tied.scores_TE.log()), None
    yield route(router, 9, ragged=ragged, collapsed=True, seed=3), None
    yield route(router, 5, ragged=ragged, mask_T=torch.zeros(5, dtype=torch.bool), seed=4), None
    yield route(router, 0, ragged=ragged), None
    yield route(router, 1, ragged=ragged, ties=True, seed=5), None


@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
@pytest.mark.parametrize("level", ["rank", "group", "device", "device group"])
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("drop", DROPS)
def test_every_combination_follows_the_rules(drop, overflow, level, ragged):
    per, group_size = ("device" if "device" in level else "expert"), (4 if "group" in level else None)
    routers = [RouterConfig(name="softmax_topk", num_experts=6, top_k=k, groups=GROUPS) for k in (1, 3)]
    if per == "expert":
        routers += [RouterConfig(name="softmax_topk", num_experts=e, top_k=k) for e, k in ((5, 2), (4, 4), (1, 1))]
    changed = 0
    for router in routers:
        for number, (decision, bias_E) in enumerate(inputs(router, ragged)):
            limits: list[tuple[Rounding, float]] = [("ceil", 0.3), ("round", 0.8) if number % 2 else ("floor", 1.3)]
            for rounding, factor in limits:
                capacity = CapacityConfig(
                    factor=factor, rounding=rounding, drop=drop, overflow=overflow, group_size=group_size, per=per
                )
                got = check(decision, capacity, router, bias_E)
                changed += len(set(as_list(decision.rows)) - set(as_list(got.rows)))
    assert changed > 100  # they were limits indeed


@settings(max_examples=100)
@given(data=st.data())
def test_any_settings_over_any_routing_follow_the_rules(data):
    num_experts = data.draw(st.integers(1, 7))
    router = RouterConfig(name="softmax_topk", num_experts=num_experts, top_k=data.draw(st.integers(1, num_experts)))
    capacity = CapacityConfig(
        factor=data.draw(st.floats(0.01, 3)),
        minimum=data.draw(st.integers(0, 3)),
        rounding=data.draw(st.sampled_from(["ceil", "floor", "round"])),
        multiple_of=data.draw(st.integers(1, 4)),
        drop=data.draw(st.sampled_from(DROPS)),
        overflow=data.draw(st.sampled_from(OVERFLOWS)),
        group_size=data.draw(st.none() | st.integers(1, 9)),
    )
    mask = data.draw(st.none() | st.lists(st.booleans(), max_size=16))
    num_tokens = data.draw(st.integers(0, 16)) if mask is None else len(mask)
    flags = {name: data.draw(st.booleans()) for name in ("ragged", "ties", "collapsed")}
    mask_T = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    check(route(router, num_tokens, mask_T=mask_T, seed=data.draw(st.integers(0, 99)), **flags), capacity, router)


def test_slots_are_counted_as_the_factor_is_written():
    router = RouterConfig(name="softmax_topk", num_experts=8, top_k=2)

    def count(num_tokens, **settings):
        return CapacityConfig(**settings).slots(num_tokens, router)

    assert count(80, factor=1.1) == 22  # in binary 1.1 * 20 is a little more, and its ceiling 23
    assert [count(10, factor=1.0, rounding=rounding) for rounding in ("floor", "round", "ceil")] == [2, 2, 3]
    assert [count(10, factor=1.4, rounding=rounding) for rounding in ("floor", "round", "ceil")] == [3, 4, 4]
    assert count(10, factor=1.0, multiple_of=4) == 4
    assert count(16, factor=1.0, multiple_of=4) == 4  # V-MoE rounds up to a multiple, and 4 is one
    assert count(1, factor=1.0, rounding="floor") == 0
    assert count(1, factor=1.0, minimum=4) == 4
    assert count(1, factor=1.0, minimum=3, multiple_of=2) == 4
    switch = RouterConfig(name="softmax_topk", num_experts=8, top_k=1)
    assert CapacityConfig(factor=1.25).slots(64, switch) == 10  # Switch, eq. 3: tokens / experts * factor
    gshard = RouterConfig(name="softmax_topk", num_experts=8, top_k=2)
    assert CapacityConfig(factor=1.0).slots(64, gshard) == 2 * 64 // 8  # GShard: 2 S / E


@given(
    factor=st.floats(1e-3, 1e3),
    num_tokens=st.integers(0, 10**6),
    num_experts=st.integers(1, 512),
    rounding=st.sampled_from(["ceil", "floor", "round"]),
    minimum=st.integers(0, 100),
    multiple_of=st.integers(1, 130),
)
def test_slots_follow_the_rules(factor, num_tokens, num_experts, rounding, minimum, multiple_of):
    router = RouterConfig(name="softmax_topk", num_experts=num_experts, top_k=1)
    capacity = CapacityConfig(factor=factor, rounding=rounding, minimum=minimum, multiple_of=multiple_of)
    rules = Rules(factor, num_experts, 1, minimum, rounding, multiple_of)
    assert capacity.slots(num_tokens, router) == slots(rules, num_tokens)


def test_all_first_choices_go_before_any_second_one():
    """Three tokens that want (1, 0), (1, 0) and (0, 1), at one slot an expert: the last one's first choice is 0."""
    router = RouterConfig(name="softmax_topk", num_experts=2, top_k=2)
    ids = torch.tensor([[1, 0], [1, 0], [0, 1]])
    scores_TE = torch.tensor([[0.4, 0.6], [0.1, 0.9], [0.7, 0.3]])
    rows = Rows.from_topk(ids, scores_TE.gather(1, ids), 2)
    decision = RoutingDecision(rows=rows, logits_TE=scores_TE, scores_TE=scores_TE)
    served = {}
    for drop in DROPS:
        kept = limit(decision, CapacityConfig(factor=0.3, drop=drop), router).rows
        served[drop] = kept.token_ids_R.tolist()
        assert kept.weights_R.tolist() == scores_TE[kept.token_ids_R, torch.tensor([0, 1])].tolist()  # not renormalised
    assert served == {"position": [2, 0], "probability": [2, 1], "batch_prioritized": [2, 1]}


def test_padding_takes_no_slot_and_changes_nothing():
    router = RouterConfig(name="softmax_topk", num_experts=4, top_k=2)
    plain = route(router, 12, collapsed=True)
    places = torch.tensor([0, 2, 3, 7, 8, 9, 12, 13, 14, 15, 18, 19])
    ids, weights = plain.rows.as_topk()
    mask_T = torch.zeros(21, dtype=torch.bool).index_fill(0, places, True)
    scores_TE = torch.full((21, 4), 9.0, dtype=torch.float64).index_copy(0, places, plain.scores_TE)
    padded_ids = torch.zeros(21, 2, dtype=torch.int64).index_copy(0, places, ids)
    padded_weights = torch.full((21, 2), 9.0, dtype=torch.float64).index_copy(0, places, weights)
    rows = Rows.from_topk(padded_ids, padded_weights, 4, mask_T=mask_T)
    padded = RoutingDecision(rows=rows, logits_TE=scores_TE, scores_TE=scores_TE, mask_T=mask_T)
    for drop, overflow, group_size in itertools.product(DROPS, OVERFLOWS, (None, 5)):
        capacity = CapacityConfig(factor=0.8, drop=drop, overflow=overflow, group_size=group_size)
        without, with_padding = limit(plain, capacity, router), limit(padded, capacity, router)
        moved = [row._replace(token=int(places[row.token])) for row in as_list(without.rows)]
        assert as_list(with_padding.rows) == moved
        assert with_padding.slots == without.slots


def test_groups_of_tokens_do_not_know_of_each_other():
    """So the same tokens on more ranks, split between groups, lose the same rows."""
    router = RouterConfig(name="softmax_topk", num_experts=4, top_k=2)
    whole = route(router, 24, collapsed=True, seed=8)
    ids, weights = whole.rows.as_topk()
    capacity = CapacityConfig(factor=0.7, drop="probability", overflow="next_best", group_size=6)
    together = as_list(limit(whole, capacity, router).rows)
    apart = []
    for first in (0, 12):
        part = slice(first, first + 12)
        rows = Rows.from_topk(ids[part], weights[part], 4)
        decision = RoutingDecision(rows=rows, logits_TE=whole.logits_TE[part], scores_TE=whole.scores_TE[part])
        apart += [row._replace(token=row.token + first) for row in as_list(limit(decision, capacity, router).rows)]
    assert sorted(together) == sorted(apart)


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_what_the_rows_say_of_themselves_stays_true(weight_on):
    router = RouterConfig(name="softmax_topk", num_experts=5, top_k=3)
    decision = route(router, 17, seed=6)
    decision = replace(decision, rows=replace(decision.rows, weight_on=weight_on))
    for overflow in OVERFLOWS:
        rows = limit(decision, CapacityConfig(factor=0.6, overflow=overflow), router).rows
        assert rows.weight_on == weight_on and rows.num_tokens == 17 and rows.top_k is None
        order_R, offsets = rows.by_token
        pairs = list(zip(rows.token_ids_R[order_R].tolist(), rows.choice_R[order_R].tolist(), strict=True))
        assert pairs == sorted(pairs)
        assert offsets.diff().tolist() == torch.bincount(rows.token_ids_R, minlength=17).tolist()
        assert len({(row.token, row.expert) for row in as_list(rows)}) == rows.token_ids_R.numel()


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_weights_and_lost_weights_have_the_gradient_of_the_scores(overflow):
    router = RouterConfig(name="softmax_topk", num_experts=4, top_k=2)
    capacity = CapacityConfig(factor=0.6, overflow=overflow)
    logits_TE = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits_TE[:, 2] += 2.0

    def weights(logits_TE):
        scores_TE = logits_TE.softmax(-1)
        ids = logits_TE.detach().topk(2).indices
        chosen = scores_TE.gather(1, ids)
        rows = Rows.from_topk(ids, chosen / chosen.sum(-1, keepdim=True), 4)
        got = limit(RoutingDecision(rows=rows, logits_TE=logits_TE, scores_TE=scores_TE), capacity, router)
        return got.rows.weights_R, *(() if got.shared_weight_T is None else (got.shared_weight_T,))

    assert torch.autograd.gradcheck(weights, (logits_TE.requires_grad_(),))


def test_a_score_of_zero_moves_with_weight_zero_and_a_finite_gradient():
    router = RouterConfig(name="softmax_topk", num_experts=3, top_k=1)
    scores_TE = torch.tensor([[0.0, 0.5, 0.1], [0.0, 0.2, 0.1]], requires_grad=True)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    rows = Rows.from_topk(ids, scores_TE.gather(1, ids), 3)
    decision = RoutingDecision(rows=rows, logits_TE=scores_TE, scores_TE=scores_TE)
    got = limit(decision, CapacityConfig(factor=1.0, overflow="next_best"), router).rows
    assert as_list(got) == [Row(0, 0, 0, 0.0), Row(1, 0, 1, 0.0)]
    got.weights_R.sum().backward()
    assert scores_TE.grad is not None and scores_TE.grad.isfinite().all()


def test_next_best_stays_inside_the_tokens_groups_and_off_experts_ruled_out():
    router = RouterConfig(name="sigmoid_topk", num_experts=6, top_k=2, groups=GROUPS, selection_bias=True)
    bias_E = torch.tensor([-1.0, -1.0, -0.9, -1.0, -0.8, -1.0], dtype=torch.float64)
    decision = route(router, 40, bias_E=bias_E, seed=3)
    ranked = allowed(router, decision.scores_TE, bias_E)
    got = check(decision, CapacityConfig(factor=0.9, overflow="next_best"), router, bias_E)
    before = {(row.token, row.choice): row.expert for row in as_list(decision.rows)}
    moved = [row for row in as_list(got.rows) if row.expert != before[row.token, row.choice]]
    assert len(moved) > 3
    assert all(ranked[row.token][row.expert] > -math.inf for row in moved)


def test_a_budget_per_device_lets_a_heavy_expert_take_what_its_neighbours_leave():
    router = RouterConfig(name="softmax_topk", num_experts=6, top_k=1, groups=GROUPS)
    ids = torch.tensor([[0]] * 4 + [[2], [3]])
    scores_TE = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = Rows.from_topk(ids, scores_TE.gather(1, ids), 6)
    decision = RoutingDecision(rows=rows, logits_TE=scores_TE, scores_TE=scores_TE)
    per_expert = limit(decision, CapacityConfig(factor=1.5), router).rows
    per_device = limit(decision, CapacityConfig(factor=1.5, per="device"), router).rows
    assert per_expert.counts_E.tolist() == [2, 0, 1, 1, 0, 0]  # ceil(1.5 * 6 / 6)
    assert per_device.counts_E.tolist() == [3, 0, 1, 1, 0, 0]  # 1.5 * 6 / 3 for experts 0 and 1 together


REFUSED = [
    (dict(factor=0), "above 0"),
    (dict(factor=-1.25), "above 0"),
    (dict(factor=math.inf), "finite"),
    (dict(factor=math.nan), "above 0"),
    (dict(factor=True), "above 0"),
    (dict(factor="1.25"), "above 0"),
    (dict(factor=1e300), "1,000,000,000 at most"),
    (dict(factor=1.0, multiple_of=10**24), "1,000,000,000 at most"),
    (dict(factor=1.0, minimum=-1), "0 or more"),
    (dict(factor=1.0, minimum=1.5), "whole number"),
    (dict(factor=1.0, rounding="nearest"), "known: ceil, floor, round"),
    (dict(factor=1.0, multiple_of=0), "above 0"),
    (dict(factor=1.0, drop="random"), "known: position, probability, batch_prioritized"),
    (dict(factor=1.0, overflow="next"), "known: residual, next_best, shared"),
    (dict(factor=1.0, group_size=0), "above 0"),
    (dict(factor=1.0, group_size=-5), "above 0"),
    (dict(factor=1.0, per="rank"), "known: expert, device"),
    (dict(factor=1.0, per="device", pad=True), 'per="expert"'),
]


@pytest.mark.parametrize(("fields", "says"), REFUSED, ids=str)
def test_impossible_settings_are_refused_with_what_would_work(fields, says):
    with pytest.raises(ConfigError, match=says) as refused:
        CapacityConfig(**fields)
    assert "\n" not in str(refused.value)


def moe_with(router, capacity, shared=False):
    shared_config = MlpConfig(intermediate_size=3) if shared else None
    return MoeConfig(router=router, intermediate_size=4, capacity=capacity, shared=shared_config)


@pytest.mark.parametrize("name", ROUTER_KINDS)
def test_routers_that_take_no_capacity_refuse_it_at_configuration_time(name):
    router, plain, moving = (
        router_of(name),
        CapacityConfig(factor=1.0),
        CapacityConfig(factor=1.0, overflow="next_best"),
    )
    if not ROUTER_KINDS[name].takes_capacity:
        with pytest.raises(ConfigError, match=r"use one of: softmax_topk.*top_p") as refused:
            moe_with(router, plain)
        assert "expert_choice" not in str(refused.value).split("one of")[1]
        return
    assert moe_with(router, plain).capacity == plain
    assert refusal(router, plain) is None
    if name in NO_NEXT_BEST:
        with pytest.raises(ConfigError, match=r'overflow="residual" works.*use one of: softmax_topk'):
            moe_with(router, moving)
    else:
        assert moe_with(router, moving).capacity == moving


def test_capacities_that_lack_what_they_need_are_refused():
    plain = RouterConfig(name="softmax_topk", num_experts=6, top_k=2)
    shared = CapacityConfig(factor=1.0, overflow="shared")
    with pytest.raises(ConfigError, match="without a shared expert; add one"):
        moe_with(plain, shared)
    assert moe_with(plain, shared, shared=True).capacity == shared
    assert refusal(plain, shared) is None
    assert refusal(plain, shared, has_shared=False) is not None
    device = CapacityConfig(factor=1.0, per="device")
    with pytest.raises(ConfigError, match="without groups; give it groups"):
        moe_with(plain, device)
    assert moe_with(replace(plain, groups=GROUPS), device).capacity == device


def poisson_drop(mean, slots):
    """E[(N - C)+] / mean by the sum itself, far into the tail."""
    terms = (
        (n - slots) * math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(slots + 1, slots + 4000)
    )
    return math.fsum(terms) / mean


@pytest.mark.parametrize("mean", [0.01, 0.5, 1.0, 7.3, 64.0, 500.0])
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.25, 2.0, 10.0])
def test_expected_drop_is_the_poisson_sum(mean, factor):
    slots = round(factor * mean)
    assert expected_drop(mean, slots) == pytest.approx(poisson_drop(mean, slots), rel=1e-9, abs=1e-300)


def test_expected_drop_at_its_ends():
    assert expected_drop(0.0, 3) == 0.0
    assert expected_drop(5.0, 0) == pytest.approx(1.0)
    assert expected_drop(1e6, 500_000) == pytest.approx(0.5)
    assert expected_drop(1e6, 2_000_000) == 0.0
    # A normal load of the same mean and variance loses sigma / sqrt(2 pi) of it at C = mean.
    assert expected_drop(1e6, 1_000_000) == pytest.approx(1e3 / math.sqrt(2 * math.pi) / 1e6, rel=1e-3)


def test_an_even_router_drops_what_luck_alone_drops():
    """64 experts, 4 choices, 4096 tokens whose choices are drawn evenly: within 5 standard errors of 20 draws."""
    router = RouterConfig(name="softmax_topk", num_experts=64, top_k=1)
    capacity, shares = CapacityConfig(factor=1.0), []
    for seed in range(20):
        ids = torch.randint(0, 64, (4096, 1), generator=torch.Generator().manual_seed(seed))
        scores_TE = torch.ones(4096, 64)
        rows = Rows.from_topk(ids, torch.ones(4096, 1), 64)
        got = limit(RoutingDecision(rows=rows, logits_TE=scores_TE, scores_TE=scores_TE), capacity, router)
        shares.append(1 - got.rows.token_ids_R.numel() / 4096)
    shares = torch.tensor(shares)
    error = float(shares.std()) / math.sqrt(20)
    # Loads that sum to T are a little less spread than independent ones: a factor sqrt(1 - 1/E).
    assert abs(float(shares.mean()) - expected_drop(64, 64) * math.sqrt(1 - 1 / 64)) < 5 * error
    print(f"dropped {float(shares.mean()):.4f}, expected {expected_drop(64, 64):.4f}")


def test_a_compilation_leaves_it_to_python():
    router = RouterConfig(name="softmax_topk", num_experts=5, top_k=2)
    decision = route(router, 13, ragged=False)
    capacity = CapacityConfig(factor=0.3)

    def weights(scores_TE):
        return limit(replace(decision, scores_TE=scores_TE * 1), capacity, router).rows.weights_R * 2

    compiled = torch.compile(weights, backend="eager")
    assert torch.equal(compiled(decision.scores_TE), weights(decision.scores_TE))
