"""The whole layer with a limit to its experts' rows: every router, overflow and padding, while training only."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from moesaic.config import GroupConfig, MlpConfig, MoeConfig, RouterConfig
from moesaic.config.capacity import CapacityConfig, refusal
from moesaic.config.router import ROUTER_KINDS
from moesaic.errors import ConfigError
from moesaic.kernels import backend
from moesaic.layers.moe import MoeLayer, capacity_applied
from moesaic.routing import RoutingTape, TokenFacts
from moesaic.routing.routers import ROUTERS
from moesaic.routing.routers.hashed import hash_table
from tests.routing.limits import DROPS, OVERFLOWS, check, router_of

HIDDEN, TOKENS = 8, 19
NAMES = [name for name, kind in ROUTER_KINDS.items() if kind.takes_capacity and name in ROUTERS]
MASK_T = torch.tensor([True] * 5 + [False, True, True, False] + [True] * 10)


def make(name="softmax_topk", *, router=None, shared=True, dropout=0.0, dtype=torch.float64, **capacity):
    """A layer in training whose experts are far from evenly loaded."""
    router = router or router_of(name)
    limits = CapacityConfig(**{"factor": 0.7, **capacity}) if capacity else None
    config = MoeConfig(
        router=router,
        intermediate_size=5,
        shared=MlpConfig(intermediate_size=4) if shared else None,
        capacity=limits,
        expert_dropout=dropout,
    )
    torch.manual_seed(3)
    layer = MoeLayer(config, HIDDEN, 0).to(dtype).train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if layer.router.table is not None:
        layer.router.table = hash_table(router)
    return layer


def batch(dtype=torch.float64, seed=0):
    """x_1TD with a common direction, so that some experts are wanted by most tokens."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64) + 0.6
    ids_T = torch.randint(0, 61, (TOKENS,), generator=generator) % 7
    return x_TD[None].to(dtype), TokenFacts(token_ids_T=ids_T, mask_T=MASK_T)


def hear(layer, x, facts):
    tape = RoutingTape()
    return layer(x, facts, tape), tape.decisions[0]


def plain(layer, x_TD, decision):
    """Row by row: y = the rows that stayed + (1 + lost weight) * shared(x)."""
    y_TD = torch.zeros_like(x_TD)
    rows = decision.rows
    for token, expert, weight in zip(
        rows.token_ids_R.tolist(), rows.expert_ids_R.tolist(), rows.weights_R, strict=True
    ):
        x = x_TD[token] * (weight if rows.weight_on == "input" else 1)
        gate, up = (layer.experts.gate_up[expert] @ x).chunk(2)
        out = layer.experts.down[expert] @ (silu(gate) * up)
        y_TD[token] += out if rows.weight_on == "input" else out * weight
    if layer.shared_experts is not None:
        extra_T = decision.shared_weight_T
        y_TD += layer.shared_experts(x_TD) * (1 if extra_T is None else 1 + extra_T[:, None])
    return y_TD


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("name", NAMES)
def test_every_router_is_limited_by_the_rules(name, overflow):
    lost = 0
    for drop, group_size in itertools.product(DROPS, (None, 6)):
        capacity = CapacityConfig(factor=0.7, drop=drop, overflow=overflow, group_size=group_size)
        if refusal(router_of(name), capacity) is not None:
            assert overflow == "next_best"
            continue
        layer = make(name, factor=0.7, drop=drop, overflow=overflow, group_size=group_size)
        x, facts = batch()
        y, decision = hear(layer, x, facts)
        before = decision.before_capacity
        assert before is not None
        unlimited = replace(decision, rows=before, before_capacity=None)
        expected = check(unlimited, capacity, layer.router.config)
        assert torch.equal(decision.rows.weights_R, expected.rows.weights_R)
        assert torch.allclose(y[0], plain(layer, x[0], decision), rtol=1e-10, atol=1e-12)
        lost += before.token_ids_R.numel() - decision.rows.token_ids_R.numel()
    assert lost > 0 or overflow == "next_best"


@pytest.mark.parametrize("per", ["expert", "device"])
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_groups_and_biases_hold_for_rows_that_move_too(overflow, per):
    groups = GroupConfig(num_groups=3, top_groups=2)
    router = RouterConfig(name="sigmoid_topk", num_experts=6, top_k=2, selection_bias=True, groups=groups)
    capacity = CapacityConfig(factor=0.7, overflow=overflow, per=per, drop="probability")
    layer = make(router=router, overflow=overflow, per=per, drop="probability")
    layer.router.selection_bias = torch.tensor([-1.0, -0.4, 0.0, 0.3, -0.8, -0.2], dtype=torch.float64)
    x, facts = batch(seed=4)
    y, decision = hear(layer, x, facts)
    unlimited = replace(decision, rows=decision.chosen, before_capacity=None)
    check(unlimited, capacity, router, layer.router.selection_bias)
    assert torch.allclose(y[0], plain(layer, x[0], decision), rtol=1e-10, atol=1e-12)
    assert decision.rows.token_ids_R.numel() < decision.chosen.token_ids_R.numel()


@pytest.mark.parametrize("pad", [False, True], ids=["tight", "padded"])
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_input", "top_p"])
def test_gradcheck_through_router_limit_and_experts(name, overflow, pad):
    layer = make(name, factor=0.7, overflow=overflow, pad=pad)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x, facts = batch(seed=2)

    def output(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, facts))

    assert torch.autograd.gradcheck(output, (x.requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_input"])
def test_padding_to_slots_changes_neither_values_nor_gradients(name, dtype):
    """To the bit by the compiled kernels; to rounding by BLAS (fp64), which adds up by the number of rows."""
    tight = make(name, dtype=dtype, factor=0.9, overflow="next_best", multiple_of=4)
    padded = make(name, dtype=dtype, factor=0.9, overflow="next_best", multiple_of=4, pad=True)
    x, facts = batch(dtype)
    is_exact = dtype != torch.float64 and backend.describe().startswith("native")
    rtol, atol = (0.0, 0.0) if is_exact else (1e-12, 1e-14)
    if not is_exact and dtype != torch.float64:
        rtol, atol = 0.05, 0.05
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_tight, y_padded = tight(first, facts), padded(second, facts)
    assert torch.allclose(y_tight, y_padded, rtol=rtol, atol=atol)
    y_tight.square().sum().backward()
    y_padded.square().sum().backward()
    for one, other in [(first, second), *zip(tight.parameters(), padded.parameters(), strict=True)]:
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=rtol, atol=atol)


def test_experts_see_one_shape_and_zeros_in_empty_slots():
    layer = make(factor=1.0, minimum=3, multiple_of=4, pad=True)
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    for seed in range(3):
        x, facts = batch(seed=seed)
        _, decision = hear(layer, x, facts)
        x_PD, offsets = seen[-1]
        slots = decision.slots
        assert slots == 8  # 17 tokens of 2 choices over 6 experts: 5.7, up to a multiple of 4
        assert x_PD.shape == (6 * slots, HIDDEN) and offsets.tolist() == [slots * e for e in range(7)]
        for expert, count in enumerate(decision.rows.counts_E.tolist()):
            own = x_PD[expert * slots : (expert + 1) * slots]
            assert (own[count:] == 0).all() and (own[:count] != 0).any(dim=1).all()


@pytest.mark.parametrize("pad", [False, True], ids=["tight", "padded"])
def test_nothing_to_route_gives_zeros_and_zero_gradients(pad):
    layer = make(factor=1.0, shared=False, pad=pad)
    for num_tokens in (0, 4):
        x = torch.randn(1, num_tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
        y = layer(x, TokenFacts(mask_T=torch.zeros(num_tokens, dtype=torch.bool)))
        assert y.shape == x.shape and (y == 0).all()
        y.sum().backward()
        for parameter in layer.experts.parameters():
            assert parameter.grad is not None and (parameter.grad == 0).all()


def test_a_token_that_lost_all_gets_nothing_from_the_experts():
    layer = make(factor=0.4, shared=False)
    x, facts = batch()
    y, decision = hear(layer, x, facts)
    served = torch.zeros(TOKENS, dtype=torch.bool).index_fill(0, decision.rows.token_ids_R, True)
    assert (~served & MASK_T).any()
    assert (y[0, ~served] == 0).all() and (y[0, served] != 0).any(dim=1).all()


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_evaluation_is_dropless_unless_told_otherwise(overflow):
    layer, dropless = make(factor=0.5, overflow=overflow).eval(), make().eval()
    x, facts = batch()
    y, decision = hear(layer, x, facts)
    assert torch.equal(y, dropless(x, facts))
    assert decision.before_capacity is None and decision.slots is None and decision.shared_weight_T is None
    with capacity_applied(layer) as has_capacity:
        limited, decision = hear(layer, x, facts)
        assert has_capacity and decision.slots == 3  # 0.5 * 2 * 17 / 6
    assert torch.equal(limited, layer.train()(x, facts))
    assert not torch.equal(limited, y)
    assert torch.equal(layer.eval()(x, facts), y)
    with capacity_applied(dropless) as has_capacity:
        assert not has_capacity


def test_capacity_applied_ends_with_an_error_too():
    layer = make(factor=0.5).eval()
    with pytest.raises(RuntimeError, match="broken"), capacity_applied(layer):
        raise RuntimeError("broken")
    assert not layer.is_limited_in_evaluation


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("name", NAMES)
def test_dictated_choices_are_limited_alike(name, overflow):
    """As recomputation does it: the same choices, random numbers and bits give the same rows again."""
    capacity = CapacityConfig(factor=0.9, overflow=overflow)
    if refusal(router_of(name), capacity) is not None:
        return
    layer = make(name, factor=0.9, overflow=overflow)
    for seed in range(4):
        x, facts = batch(seed=seed)
        with torch.random.fork_rng():
            expected, first = hear(layer, x, facts)
        dictating = RoutingTape(choices={0: first.chosen})
        with torch.random.fork_rng():
            got = layer(x, facts, dictating)
        again = dictating.decisions[0]
        assert torch.equal(again.rows.token_ids_R, first.rows.token_ids_R)
        assert torch.equal(again.rows.expert_ids_R, first.rows.expert_ids_R)
        assert torch.equal(got, expected)


def test_replayed_rows_are_taken_as_they_are():
    layer = make(factor=0.5, overflow="residual")
    x, facts = batch()
    limited, decision = hear(layer, x, facts)
    tape = RoutingTape(replay={0: decision.rows})
    assert torch.equal(layer.eval()(x, facts, tape), limited)
    shared = make(factor=0.5, overflow="shared")
    limited, heard = hear(shared, x, facts)
    with pytest.raises(ConfigError, match=r"layer 0 replays rows.*dictate what was chosen"):
        shared(x, facts, RoutingTape(replay={0: heard.rows}))
    assert torch.equal(shared(x, facts, RoutingTape(choices={0: heard.chosen})), limited)
    tape = RoutingTape(replay={0: decision.chosen})
    dropless = layer(x, facts)
    assert torch.equal(layer.train()(x, facts, tape), dropless)
    assert tape.decisions[0].chosen is decision.chosen


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_bf16_stays_bf16_and_near_fp32(overflow):
    narrow, wide = make(dtype=torch.bfloat16, factor=0.7, overflow=overflow), make(factor=0.7, overflow=overflow)
    with torch.no_grad():
        for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
            other.copy_(one)
    x, facts = batch(torch.bfloat16)
    y, decision = hear(narrow, x, facts)
    expected, other = hear(wide, x.double(), facts)
    assert y.dtype == torch.bfloat16 and decision.rows.weights_R.dtype == torch.float32
    assert torch.equal(decision.rows.expert_ids_R, other.rows.expert_ids_R)
    assert torch.allclose(y.double(), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in narrow.parameters())


def test_expert_dropout_is_of_inner_activations_while_training_only():
    layer, without = make(dropout=0.4, shared=False), make(shared=False)
    x, facts = batch()
    assert torch.equal(layer.eval()(x, facts), without.eval()(x, facts))
    layer.train()
    torch.manual_seed(5)
    first, second = layer(x, facts), layer(x, facts)
    torch.manual_seed(5)
    assert torch.equal(layer(x, facts), first) and not torch.equal(first, second)
    seen = []
    layer.experts.register_forward_hook(lambda _, inputs, out: seen.append((inputs, out)))
    mean = torch.stack([layer(x, facts) for _ in range(300)]).mean(0)
    expected = without.train()(x, facts)
    assert torch.allclose(mean, expected, atol=0.25 * float(expected.detach().abs().max()))
    (x_RD, offsets), out_RD = seen[0]
    # An inner activation is 0 or 1 / (1 - p) of itself: each output is one of 2^5 sums.
    inner = RouterlessExpert(layer, x_RD[0], 0 if offsets[1] > 0 else int((offsets > 0).nonzero()[0]) - 1)
    assert min(float((out_RD[0] - option).detach().abs().max()) for option in inner.options(0.4)) < 1e-12


class RouterlessExpert:
    """One expert at one input, with every way to drop its inner activations."""

    def __init__(self, layer, x_D, expert):
        gate, up = (layer.experts.gate_up[expert] @ x_D).chunk(2)
        self.inner_F, self.down = silu(gate) * up, layer.experts.down[expert]

    def options(self, rate):
        for kept in itertools.product((0.0, 1 / (1 - rate)), repeat=self.inner_F.numel()):
            yield self.down @ (self.inner_F * torch.tensor(kept, dtype=self.inner_F.dtype))


@pytest.mark.parametrize("rate", [-0.1, 1.0, "0.1", True])
def test_impossible_dropout_is_refused(rate):
    with pytest.raises(ConfigError, match="expert_dropout"):
        MoeConfig(
            router=RouterConfig(name="softmax_topk", num_experts=4, top_k=2), intermediate_size=3, expert_dropout=rate
        )
