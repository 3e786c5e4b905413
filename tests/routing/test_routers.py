"""Every router against its equations in plain Python (equations.py), and what all of them must bear."""

import math
import random
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moesaic.config import (
    GroupConfig,
    HashSettings,
    NullSettings,
    RouterConfig,
    SinkhornSettings,
    SparseMixerSettings,
    TopPSettings,
)
from moesaic.config.router import ROUTER_KINDS
from moesaic.errors import ConfigError
from moesaic.routing import Rows
from moesaic.routing.routers import ROUTERS, RouterInput, hash_table
from moesaic.routing.routers.router import softplus
from tests.routing import equations
from tests.routing.equations import Batch

VOCAB = 17
RANKING = [name for name, kind in ROUTER_KINDS.items() if kind.ranks_scores]
GROUPING = [name for name in RANKING if name != "null_topk"]


def test_every_kind_of_router_is_registered():
    assert set(ROUTERS) == set(ROUTER_KINDS)


# --- cases: a configuration and a batch -------------------------------------------------------------------------------


def make_config(name, num_experts, top_k, *, choose=lambda given: given[0], **fields):
    """`choose` picks one of what its own settings may be."""
    kind = ROUTER_KINDS[name]
    weight, table = choose(list(equations.HASH_SCORES)), choose(["random", "balanced"])
    own = {
        "hash": HashSettings(vocab_size=VOCAB, weight=weight, table=table),
        "null_topk": NullSettings(num_null_experts=choose([1, 3])),
        "top_p": TopPSettings(p=choose([0.77, 0.05, 0.35, 0.4137, 0.999, 1.0])),
        "sinkhorn": SinkhornSettings(iterations=choose([7, 1])),
    }
    top_k = num_experts if name == "dense" else kind.top_k or top_k
    return RouterConfig(name=name, num_experts=num_experts, top_k=top_k, settings=own.get(name), **fields)


@st.composite
def configs(draw, names=tuple(ROUTER_KINDS), *, bias=False, groups=False):
    name = draw(st.sampled_from(names))
    fewest = 2 if name == "gshard_top2" else 1
    num_groups = draw(st.integers(1, 3)) if groups else 1
    size = draw(st.integers(1, 3)) if groups else 1
    num_experts = num_groups * size if groups else draw(st.integers(fewest, 7))
    fields = {"selection_bias": bias, "scaling_factor": draw(st.sampled_from([1.0, 2.5]))}
    most = num_experts
    if groups:
        top_groups = draw(st.integers(1, num_groups))
        score = draw(st.sampled_from(["max", "top2_sum"] if size > 1 else ["max"]))
        fields["groups"] = GroupConfig(num_groups=num_groups, top_groups=top_groups, score=score)
        most = top_groups * size
    if ROUTER_KINDS[name].renormalize is None:
        fields["renormalize"] = draw(st.booleans())
    top_k = draw(st.one_of(st.integers(1, most), st.just(most)))
    return make_config(name, num_experts, top_k, choose=lambda given: draw(st.sampled_from(given)), **fields)


@st.composite
def batches(draw, config, training=False):
    """Tokens that repeat, experts that tie or are closed (-inf), large and small logits, no tokens, only padding."""
    generator = random.Random(draw(st.integers(0, 2**32)))
    width, scale = config.num_choices, draw(st.sampled_from([1.0, 1.0, 300.0]))
    kinds = []
    for _ in range(draw(st.integers(1, 4))):
        z = [generator.gauss(0, scale) for _ in range(width)]
        for e in range(1, width):
            z[e] = generator.choice([z[e], z[e], z[generator.randrange(e)], -math.inf if draw(st.booleans()) else z[e]])
        kinds.append(z if any(math.isfinite(x) for x in z) else [0.0] * width)
    num_tokens = draw(st.integers(0, 6))
    return Batch(
        [list(generator.choice(kinds)) for _ in range(num_tokens)],
        config.top_k,
        renormalize=bool(config.renormalize),
        scale=config.scaling_factor,
        bias=[generator.choice([0.0, generator.uniform(-1, 1)]) for _ in range(config.num_experts)]
        if config.selection_bias
        else None,
        groups=(config.groups.num_groups, config.groups.top_groups, config.groups.score) if config.groups else None,
        mask=draw(st.sampled_from([None, [generator.random() < 0.6 for _ in range(num_tokens)], [False] * num_tokens])),
        training=training,
    )


def tensor(values, *shape):
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def seen_by_router(config, batch, **more):
    num_tokens = len(batch.logits)
    return RouterInput(
        tensor(batch.logits, num_tokens, config.num_choices),
        token_ids_T=torch.arange(num_tokens) * 5 % VOCAB,
        selection_bias_E=None if batch.bias is None else tensor(batch.bias, -1),
        mask_T=None if batch.mask is None else torch.tensor(batch.mask, dtype=torch.bool),
        training=batch.training,
        table_VK=hash_table(config) if config.name == "hash" else None,
        **more,
    )


def expected(config, batch, seen):
    if config.name == "hash":
        score, tiny = equations.HASH_SCORES[config.settings.weight]
        return equations.hashed(seen.table_VK.tolist(), seen.token_ids_T.tolist(), score, tiny)(batch)
    if config.name == "sparsemixer":
        return equations.sparsemixer(batch, config.settings.gap)
    if config.name == "top_p":
        return equations.top_p(batch, config.settings.p)
    if config.name == "null_topk":
        batch.bias = None if batch.bias is None else batch.bias + [0.0] * config.settings.num_null_experts
        return equations.null_topk(batch, config.num_experts)
    return equations.PLAIN[config.name](batch)


def assert_agrees(choice, answer, batch):
    ids, weights = choice.expert_ids_TM.tolist(), choice.weights_TM.tolist()
    assert len(ids) == len(answer)
    for token, wanted in enumerate(answer):
        if not batch.counts(token):
            continue
        found = [(e, w) if e >= 0 else None for e, w in zip(ids[token], weights[token], strict=True)]
        wanted = wanted + [None] * (len(found) - len(wanted))
        assert [pair and pair[0] for pair in found] == [pair and pair[0] for pair in wanted]
        assert [pair[1] for pair in found if pair] == pytest.approx([pair[1] for pair in wanted if pair], rel=1e-12)


def keeps_ties(logits, scores):
    """Whether equal logits have equal scores: torch rounds what fills a vector apart from what is left over."""
    return all(
        row_scores[a] == row_scores[b] or row[a] != row[b]
        for row, row_scores in zip(logits, scores, strict=True)
        for a in range(len(row_scores))
        for b in range(a)
    )


def check(config, batch, seen):
    choice = ROUTERS[config.name](seen, config)
    assume(keeps_ties(batch.logits, choice.scores_TE.tolist()))
    assert_agrees(choice, expected(config, batch, seen), batch)
    assert choice.weight_on == ("input" if config.name == "sigmoid_input" else "output")
    assert choice.scores_TE.shape == (len(batch.logits), config.num_experts)


# --- against the equations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ROUTER_KINDS))
def test_routers_follow_their_equations(name):
    @settings(max_examples=25)
    @given(st.data())
    def run(data):
        config = data.draw(configs((name,)))
        batch = data.draw(batches(config))
        check(config, batch, seen_by_router(config, batch))

    run()


@pytest.mark.parametrize("name", RANKING)
def test_routers_with_a_selection_bias_follow_their_equations(name):
    @settings(max_examples=15)
    @given(st.data())
    def run(data):
        config = data.draw(configs((name,), bias=True))
        batch = data.draw(batches(config))
        check(config, batch, seen_by_router(config, batch))

    run()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", GROUPING)
def test_routers_with_groups_follow_their_equations(name, bias):
    @settings(max_examples=15)
    @given(st.data())
    def run(data):
        config = data.draw(configs((name,), bias=bias, groups=True))
        batch = data.draw(batches(config))
        check(config, batch, seen_by_router(config, batch))

    run()


@settings(max_examples=25)
@given(st.data())
def test_noisy_topk_adds_learned_noise_while_training(data):
    config = data.draw(configs(("noisy_topk",)))
    batch = data.draw(batches(config, training=True))
    noise_logits_TE = torch.randn(len(batch.logits), config.num_experts, dtype=torch.float64) * 5
    batch.noise_std = [[equations.softplus(x) + 0.01 for x in row] for row in noise_logits_TE.tolist()]
    torch.manual_seed(4)
    batch.normal = torch.randn(len(batch.logits), config.num_experts, dtype=torch.float64).tolist()
    torch.manual_seed(4)
    seen = seen_by_router(config, batch, noise_logits_TE=noise_logits_TE)
    choice = ROUTERS["noisy_topk"](seen, config)
    assert_agrees(choice, expected(config, batch, seen), batch)
    assert choice.noise_std_TE is not None and choice.ranked_TE is not None
    for found, wanted in zip(choice.noise_std_TE.tolist(), batch.noise_std, strict=True):
        assert found == pytest.approx(wanted, rel=1e-12)


@settings(max_examples=25)
@given(st.data())
def test_gshard_drops_seconds_while_training(data):
    config = data.draw(configs(("gshard_top2",)))
    batch = data.draw(batches(config, training=True))
    torch.manual_seed(5)
    batch.uniform = torch.rand(len(batch.logits), 1, dtype=torch.float64).tolist()
    torch.manual_seed(5)
    check(config, batch, seen_by_router(config, batch))


@settings(max_examples=25)
@given(st.data())
def test_sparsemixer_samples_while_training(data):
    config = data.draw(configs(("sparsemixer",)))
    batch = data.draw(batches(config, training=True))
    shape = (len(batch.logits), config.num_experts)
    torch.manual_seed(6)
    uniform = []
    for _ in range(config.top_k):
        batch.exponential.append(torch.empty(shape, dtype=torch.float64).exponential_().tolist())
        uniform.append(torch.rand(shape[0], 1, dtype=torch.float64))
    batch.uniform = torch.cat(uniform, dim=1).tolist()
    torch.manual_seed(6)
    check(config, batch, seen_by_router(config, batch))


@settings(max_examples=25)
@given(st.data())
def test_base_assigns_evenly_and_best_while_training(data):
    num_experts = data.draw(st.integers(1, 3))
    config = make_config("base", num_experts, 1)
    batch = data.draw(batches(config, training=True))
    choice = ROUTERS["base"](seen_by_router(config, batch), config)
    ids = choice.expert_ids_TM[:, 0].tolist()
    routed = [t for t in range(len(ids)) if batch.counts(t)]
    counts = [sum(ids[t] == e for t in routed) for e in range(num_experts)]
    assert max(counts) - min(counts) <= 1 and sum(counts) == len(routed)
    assert [ids[t] for t in range(len(ids)) if not batch.counts(t)] == [-1] * (len(ids) - len(routed))
    if routed:
        # A closed pair costs more than any other sum can bring.
        values = [[max(x, -1e9) for x in batch.logits[t]] for t in routed]
        assert math.fsum(values[i][ids[t]] for i, t in enumerate(routed)) == pytest.approx(
            equations.best_balanced_sum(values), rel=1e-9, abs=1e-9
        )


@settings(max_examples=25)
@given(st.data())
def test_sinkhorn_chooses_by_scaled_scores_while_training(data):
    """Among values that are equal to rounding either may be chosen: what is compared is what was chosen."""
    config = data.draw(configs(("sinkhorn",)))
    batch = data.draw(batches(config, training=True))
    batch.logits = [[max(min(x, 30.0), -30.0) if math.isfinite(x) else x for x in z] for z in batch.logits]
    choice = ROUTERS["sinkhorn"](seen_by_router(config, batch), config)
    routed = [t for t in range(len(batch.logits)) if batch.counts(t)]
    scaled = equations.sinkhorn_scaled([batch.logits[t] for t in routed], config.settings.iterations)
    for t, values in zip(routed, scaled, strict=True):
        ids = choice.expert_ids_TM[t].tolist()
        assert len(set(ids)) == config.top_k
        wanted = sorted(values, reverse=True)[: config.top_k]
        assert [values[e] for e in ids] == pytest.approx(wanted, rel=1e-9)
        pairs = equations.weighed(equations.softmax(batch.logits[t]), ids, batch)
        assert choice.weights_TM[t].tolist() == pytest.approx([pair[1] for pair in pairs if pair], rel=1e-12)


def test_sinkhorn_evens_the_load_out():
    config = make_config("sinkhorn", 4, 1)
    logits_TE = torch.randn(400, 4, generator=torch.Generator().manual_seed(1)) * 0.1 + torch.tensor([2.0, 0, 0, 0])
    plain = ROUTERS["sinkhorn"](RouterInput(logits_TE), config).expert_ids_TM.flatten().bincount(minlength=4)
    even = (
        ROUTERS["sinkhorn"](RouterInput(logits_TE, training=True), config).expert_ids_TM.flatten().bincount(minlength=4)
    )
    assert plain.tolist() == [400, 0, 0, 0]
    assert even.min() > 70


# --- an oracle that nobody here wrote ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_sparsemixer_is_that_of_transformers_with_its_gradient(training):
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    config = make_config("sparsemixer", 7, 2)
    assert isinstance(config.settings, SparseMixerSettings)
    # Close together, so that several experts pass the gap and the midpoint is reached.
    logits = 1 + 0.01 * torch.randn(500, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pulls = torch.randn(500, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))

    torch.manual_seed(7)
    choice = ROUTERS["sparsemixer"](RouterInput(ours, training=training), config)
    torch.manual_seed(7)
    # Their last draw is made twice, of which the second counts; leave it at the first.
    with mock.patch.object(torch.Tensor, "uniform_", lambda drawn: drawn):
        weights, ids = sparsemixer(theirs, config.settings.gap, training, 2)
    assert torch.equal(choice.expert_ids_TM, ids)
    assert torch.allclose(choice.weights_TM, weights, rtol=1e-7 if training else 1e-14, atol=0)  # their third is fp32
    if training:
        assert 20 < (weights < 0.3334 * 0.5).sum() < 900
    (choice.weights_TM * pulls).sum().backward()
    (weights * pulls).sum().backward()
    assert theirs.grad is not None and theirs.grad.abs().max() > 0.01
    assert ours.grad is not None and torch.allclose(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_experts", [1, 5])
def test_softmax_then_top_k_then_dividing_is_top_k_then_softmax(num_experts):
    logits_TE = torch.randn(300, num_experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    for top_k in range(1, num_experts + 1):
        one = make_config("softmax_topk", num_experts, top_k, renormalize=True)
        other = make_config("topk_softmax", num_experts, top_k)
        first, second = (ROUTERS[each.name](RouterInput(logits_TE), each) for each in (one, other))
        assert torch.equal(first.expert_ids_TM, second.expert_ids_TM)
        assert torch.allclose(first.weights_TM, second.weights_TM, rtol=1e-13, atol=0)


# --- what all must bear -----------------------------------------------------------------------------------------------

HARD_LOGITS = {
    "no tokens": torch.zeros(0, 5),
    "ties": torch.zeros(4, 5),
    "closed experts": torch.tensor([[0.3, -torch.inf, -torch.inf, -torch.inf, 0.3], [-torch.inf] * 4 + [-2.0]]),
    "large": torch.tensor([[3e4, -3e4, 0.0, 3e4, -1.0], [-3e4, -3e4, -3e4, -2.9e4, -3e4]]),
    "infinitely unlikely": torch.tensor([[0.0, -200.0, -300.0, -400.0, -500.0]]),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("top_k", [2, 5])
@pytest.mark.parametrize("hard", list(HARD_LOGITS))
@pytest.mark.parametrize("name", list(ROUTER_KINDS))
def test_hard_logits_give_rows_and_finite_gradients(name, hard, top_k, training):
    config = make_config(name, 5, top_k, selection_bias=ROUTER_KINDS[name].ranks_scores)
    given = HARD_LOGITS[hard]
    nulls = given.new_zeros(len(given), config.num_choices - 5)
    for mask_T in (None, torch.zeros(len(given), dtype=torch.bool)):
        logits_TE = torch.cat([given, nulls], dim=1).requires_grad_()
        seen = RouterInput(
            logits_TE,
            token_ids_T=torch.arange(len(given)),
            selection_bias_E=torch.linspace(-1, 1, 5) if config.selection_bias else None,
            mask_T=mask_T,
            training=training,
            noise_logits_TE=torch.zeros_like(logits_TE),
            table_VK=hash_table(config) if name == "hash" else None,
        )
        choice = ROUTERS[name](seen, config)
        rows = Rows.from_topk(
            choice.expert_ids_TM, choice.weights_TM, 5, mask_T=mask_T, fixed_top_k=config.kind.fixed_top_k
        )
        pairs = set(zip(rows.token_ids_R.tolist(), rows.expert_ids_R.tolist(), strict=True))
        assert len(pairs) == len(rows.token_ids_R), "an expert twice for one token"
        if mask_T is not None:
            assert not pairs
        elif config.kind.fixed_top_k:
            assert len(pairs) == len(given) * config.top_k
        assert rows.weights_R.isfinite().all() and (rows.weights_R >= 0).all()
        if rows.weights_R.requires_grad:
            rows.weights_R.sum().backward()
            assert logits_TE.grad is not None and logits_TE.grad.isfinite().all()


TIE_BREAKERS = [name for name in ROUTER_KINDS if name not in ("expert_choice", "hash", "base")]


@pytest.mark.parametrize("name", TIE_BREAKERS)
def test_among_equal_scores_the_lower_expert_wins(name):
    config = make_config(name, 6, 3)
    choice = ROUTERS[name](RouterInput(torch.full((40, config.num_choices), 0.25)), config)
    for ids in choice.expert_ids_TM.tolist():
        chosen = [e for e in ids if e >= 0]
        assert chosen == list(range(len(chosen))) and chosen


def test_among_equal_tokens_experts_take_the_earlier():
    config = make_config("expert_choice", 4, 2)
    choice = ROUTERS["expert_choice"](RouterInput(torch.zeros(6, 4)), config)
    assert [sorted(e for e in ids if e >= 0) for ids in choice.expert_ids_TM.tolist()] == [[0, 1, 2, 3]] * 3 + [[]] * 3


@pytest.mark.parametrize("score", ["max", "top2_sum"])
@pytest.mark.parametrize("name", GROUPING)
def test_no_token_leaves_its_groups_whatever_the_bias(name, score):
    """A mask of 0 instead of minus infinity sends every such token outside."""
    groups = GroupConfig(num_groups=8, top_groups=2, score=score)
    config = make_config(name, 32, 6, groups=groups, selection_bias=True)
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.randn(100_000, 32, generator=generator) * 2 - 4
    bias_E = -torch.rand(32, generator=generator)
    ids = ROUTERS[name](RouterInput(logits_TE, selection_bias_E=bias_E), config).expert_ids_TM
    reached = torch.zeros(100_000, 8).scatter(1, ids // 4, 1.0).sum(-1)
    print(f"{name}, {score}: {int((reached > 2).sum())} of {len(ids)} tokens outside their 2 groups")
    assert reached.max() <= 2


def test_a_bias_chooses_but_never_weighs_and_gets_no_gradient():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0], requires_grad=True)
    config = RouterConfig(name="sigmoid_topk", num_experts=4, top_k=2, selection_bias=True)
    choice = ROUTERS["sigmoid_topk"](RouterInput(logits, selection_bias_E=bias), config)
    scores = torch.sigmoid(logits)[0]
    assert choice.expert_ids_TM.tolist() == [[3, 0]]
    assert torch.allclose(choice.weights_TM[0], scores[[3, 0]] / (scores[3] + scores[0]))
    choice.weights_TM[0, 0].backward()
    assert logits.grad is not None
    assert bias.grad is None


# --- gradients and dictated choices -----------------------------------------------------------------------------------

SMOOTH = [name for name in ROUTER_KINDS if name != "hash"]


def prepared(config, logits_TE, training, seed=0):
    torch.manual_seed(seed)
    return RouterInput(
        logits_TE,
        token_ids_T=torch.arange(len(logits_TE)) % VOCAB,
        training=training,
        noise_logits_TE=torch.full_like(logits_TE, -0.5),
        table_VK=hash_table(config) if config.name == "hash" else None,
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_of_weights_are_those_of_finite_differences(name, training):
    if name == "sparsemixer" and training:
        pytest.skip("its gradient estimates that of sampling, which no difference shows")
    config = make_config(name, 5, 2, scaling_factor=1.5)
    logits_TE = torch.randn(6, config.num_choices, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    first = ROUTERS[name](prepared(config, logits_TE, training), config).expert_ids_TM

    def weights(logits_TE):
        choice = ROUTERS[name](prepared(config, logits_TE, training), config)
        assert torch.equal(choice.expert_ids_TM, first), "a choice changed on the way"
        return choice.weights_TM.masked_fill(first < 0, 0.0), choice.scores_TE

    assert torch.autograd.gradcheck(weights, logits_TE.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("weight", ["softmax", "sigmoid", "sqrt_softplus"])
def test_gradients_of_learned_hash_weights(weight):
    own = HashSettings(vocab_size=VOCAB, weight=weight)
    config = RouterConfig(name="hash", num_experts=5, top_k=2, settings=own)
    logits_TE = torch.randn(6, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda logits: ROUTERS["hash"](prepared(config, logits, True), config).weights_TM, logits_TE
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", list(ROUTER_KINDS))
def test_dictated_choices_are_weighed_with_the_same_bits(name, training):
    """As recomputation does it: the same logits and random state, what was chosen handed in."""
    config = make_config(name, 6, 2)
    logits_TE = torch.randn(50, config.num_choices, generator=torch.Generator().manual_seed(9))
    mask_T = torch.arange(50) % 5 > 0

    def weighed(rows):
        """The weights of the rows that are dictated or chosen, their gradient, the number that is drawn next."""
        logits = logits_TE.clone().requires_grad_()
        seen = prepared(config, logits, training)._replace(mask_T=mask_T)
        if rows is not None:
            width = rows.choices().shape[1]
            seen = seen._replace(dictated_TM=torch.nn.functional.pad(rows.choices(), (0, max(0, 2 - width)), value=-1))
        choice = ROUTERS[name](seen, config)
        drawn = torch.rand(1)
        if rows is None:
            ids, weights, ragged = choice.expert_ids_TM, choice.weights_TM, not config.kind.fixed_top_k
            rows = Rows.from_topk(ids, weights, 6, mask_T=mask_T, fixed_top_k=not ragged)
        else:
            rows = rows.weighed(choice.weights_TM)
        if rows.weights_R.requires_grad:
            (rows.weights_R * torch.arange(1, len(rows.weights_R) + 1)).sum().backward()
        return rows, logits.grad, drawn

    rows, gradient, drawn = weighed(None)
    again, gradient_again, drawn_again = weighed(rows)
    assert torch.equal(rows.weights_R, again.weights_R) and torch.equal(drawn, drawn_again)
    assert (name == "hash") == (gradient is None)
    assert (gradient is None) == (gradient_again is None)
    assert gradient is None or gradient_again is None or torch.equal(gradient, gradient_again)


@pytest.mark.parametrize("name", ["softmax_topk", "topk_softmax", "sigmoid_topk", "noisy_topk"])
def test_dictated_choices_that_are_missing_take_no_part_in_the_weights(name):
    """Other rows may have fewer choices: the weights are then those over what is there."""
    config = make_config(name, 4, 2)
    logits_TE = torch.tensor([[0.5, 2.0, -1.0, 0.1], [0.5, 2.0, -1.0, 0.1]], dtype=torch.float64)
    dictated = torch.tensor([[3, -1], [-1, -1]])
    choice = ROUTERS[name](RouterInput(logits_TE, dictated_TM=dictated), config)
    assert choice.weights_TM[0, 0] == pytest.approx(1.0) and choice.weights_TM.isfinite().all()


# --- what is drawn at random ------------------------------------------------------------------------------------------


def within(successes, trials, probability):
    """Five standard deviations: wrong once in two million runs, were the seed not fixed."""
    return abs(successes - trials * probability) < 5 * math.sqrt(trials * probability * (1 - probability))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4, 0.5])
def test_gshard_keeps_seconds_as_often_as_it_says(share):
    config = make_config("gshard_top2", 2, 2)
    logits_TE = torch.tensor([0.0, math.log(share / (1 - share))]).expand(20_000, 2)
    torch.manual_seed(11)
    choice = ROUTERS["gshard_top2"](RouterInput(logits_TE, training=True), config)
    kept = int((choice.expert_ids_TM[:, 1] >= 0).sum())
    print(f"second kept {kept / 20_000:.4f}, said {min(1, 2 * share):.4f}")
    assert within(kept, 20_000, min(1.0, 2 * share)) or (share == 0.5 and kept >= 19_990)
    assert torch.allclose(choice.weights_TM, torch.tensor([1 - share, share]))


def test_noise_is_normal_with_its_learned_deviation():
    config = make_config("noisy_topk", 4, 2)
    logits_TE, noise_TE = torch.zeros(20_000, 4), torch.tensor([-2.0, 0.0, 1.0, 3.0]).expand(20_000, 4)
    torch.manual_seed(12)
    choice = ROUTERS["noisy_topk"](RouterInput(logits_TE, training=True, noise_logits_TE=noise_TE), config)
    assert choice.ranked_TE is not None
    std_E = softplus(noise_TE[0]) + 0.01
    # The standard errors of a mean and of a deviation, five times.
    assert (choice.ranked_TE.mean(0).abs() < 5 * std_E / math.sqrt(20_000)).all()
    assert ((choice.ranked_TE.std(0) / std_E - 1).abs() < 5 / math.sqrt(2 * 20_000)).all()


def test_sparsemixer_draws_experts_by_their_probability():
    config = make_config("sparsemixer", 3, 1)
    logits_TE = torch.tensor([1.0, 0.999, 0.99]).expand(20_000, 3)
    torch.manual_seed(13)
    choice = ROUTERS["sparsemixer"](RouterInput(logits_TE, training=True), config)
    counts = choice.expert_ids_TM.flatten().bincount(minlength=3).tolist()
    for count, share in zip(counts, torch.softmax(logits_TE[0], 0).tolist(), strict=True):
        assert within(count, 20_000, share)


# --- hash tables ------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 60), st.data())
def test_balanced_tables_differ_by_one_id_at_most_after_every_id(num_experts, vocab_size, data):
    top_k = data.draw(st.integers(1, num_experts))
    own = HashSettings(vocab_size=vocab_size, table="balanced", seed=data.draw(st.integers(0, 99)))
    table = hash_table(RouterConfig(name="hash", num_experts=num_experts, top_k=top_k, settings=own))
    assert table.dtype == torch.int32 and table.shape == (vocab_size, top_k)
    assert all(len(set(ids)) == top_k for ids in table.tolist())
    for stop in range(1, vocab_size + 1):
        counts = table[:stop].flatten().bincount(minlength=num_experts)
        assert counts.max() - counts.min() <= 1


def test_random_tables_are_even_to_chance_and_their_seeds_own():
    def table(seed, vocab_size=30_000):
        own = HashSettings(vocab_size=vocab_size, table="random", seed=seed)
        return hash_table(RouterConfig(name="hash", num_experts=8, top_k=3, settings=own))

    first = table(0)
    assert torch.equal(first, table(0)) and not torch.equal(first, table(1))
    assert all(len(set(ids)) == 3 for ids in first[:1000].tolist())
    for choice in range(3):
        assert all(within(count, 30_000, 1 / 8) for count in first[:, choice].bincount(minlength=8).tolist())


@pytest.mark.parametrize(
    ("token_ids", "table", "message"),
    [
        (None, None, "hash routing needs the ids of the tokens"),
        ([0, 17], None, "token ids 0 to 17 for a hash table of 17 ids"),
        ([-1, 3], None, "token ids -1 to 3 for a hash table of 17 ids"),
        ([0, 1], torch.full((17, 2), -1, dtype=torch.int32), "a hash table with experts -1 to -1 of 4"),
    ],
)
def test_hash_routing_says_what_it_misses(token_ids, table, message):
    config = make_config("hash", 4, 2)
    ids = None if token_ids is None else torch.tensor(token_ids)
    seen = RouterInput(torch.zeros(2, 4), token_ids_T=ids, table_VK=hash_table(config) if table is None else table)
    with pytest.raises(ConfigError, match=message):
        ROUTERS["hash"](seen, config)


def test_an_unknown_router_lists_the_known_ones():
    with pytest.raises(ConfigError, match="Known: base, dense, expert_choice"):
        ROUTERS["softmax_top"]
