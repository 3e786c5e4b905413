"""Every balance loss against its equation in plain Python, over random and adversarial inputs; and its gradient."""

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.config.router import GroupConfig
from moesaic.routing import RoutingDecision, Rows
from moesaic.routing.balancers import BALANCE_LOSSES
from tests.routing import balance_equations as equations

COVERED = {  # name -> what the equation needs of a case
    "switch": lambda c: equations.switch(c.scores, c.choices, c.mask, c.num_experts),
    "global_running": lambda c: equations.switch(c.scores, c.choices, c.mask, c.num_experts, c.elsewhere),
    "global_exact": lambda c: equations.switch(c.scores, c.choices, c.mask, c.num_experts, c.elsewhere),
    "sequence": lambda c: equations.sequence(c.scores, c.documents, c.mask, c.top_k),
    "importance": lambda c: equations.importance(c.weights, c.choices, c.mask, c.num_experts),
    "load": lambda c: equations.load(c.logits, c.noisy, c.deviations, c.mask, c.top_k),
    "device": lambda c: equations.device(c.scores, c.choices, c.mask, c.num_experts, c.num_groups),
    "communication": lambda c: equations.communication(c.scores, c.choices, c.mask, c.num_experts, c.num_groups),
    "router_z": lambda c: equations.router_z(c.logits, c.mask),
    "entropy": lambda c: equations.entropy(c.scores, c.mask),
    "batch_entropy": lambda c: equations.batch_entropy(c.scores, c.mask, c.num_experts),
    "similarity": lambda c: equations.similarity(c.router_weight),
    "orthogonal": lambda c: equations.orthogonal(c.router_weight),
    "relu_sparsity": lambda c: equations.relu_sparsity(c.scores, c.choices, c.mask, c.num_experts, c.top_k),
}


@dataclass
class Case:
    """One layer's routing as lists."""

    logits: list[list[float]]
    scores: list[list[float]]
    noisy: list[list[float]]
    deviations: list[list[float]]
    choices: list[list[int]]
    weights: list[list[float]]
    mask: list[bool]
    documents: list[int]
    elsewhere: list[int]
    router_weight: list[list[float]]
    num_experts: int
    num_groups: int
    top_k: int

    def decision(self) -> RoutingDecision:
        shape = (len(self.mask), self.num_experts)
        mask_T = torch.tensor(self.mask, dtype=torch.bool)
        width = max([1, *(len(own) for own in self.choices)])
        ids_TM = torch.tensor([own + [-1] * (width - len(own)) for own in self.choices], dtype=torch.int64)
        weights_TM = as_tensor([own + [0.0] * (width - len(own)) for own in self.weights], (shape[0], width))
        fixed = all(len(own) == self.top_k for own in self.choices)
        rows = Rows.from_topk(
            ids_TM.view(shape[0], width), weights_TM, shape[1], mask_T=mask_T, fixed_top_k=fixed and width == self.top_k
        )
        return RoutingDecision(
            rows=replace(rows, top_k=self.top_k) if not shape[0] else rows,
            logits_TE=as_tensor(self.logits, shape),
            scores_TE=as_tensor(self.scores, shape),
            mask_T=mask_T,
            document_ids_T=torch.tensor(self.documents, dtype=torch.int64),
            ranked_TE=as_tensor(self.noisy, shape),
            noise_std_TE=as_tensor(self.deviations, shape),
            router_weight_ED=torch.tensor(self.router_weight, dtype=torch.float64),
            groups=GroupConfig(num_groups=self.num_groups, top_groups=self.num_groups, score="max"),
            top_k=self.top_k,
        )


def as_tensor(rows, shape):
    return torch.tensor(rows, dtype=torch.float64).view(shape)


def softmax(row):
    raised = [math.exp(z - max(row)) for z in row]
    return [value / math.fsum(raised) for value in raised]


SCORES = {
    "softmax": softmax,
    "sigmoid": lambda row: [0.0 if z == -math.inf else 1 / (1 + math.exp(-z)) for z in row],
    "relu": lambda row: [max(0.0, z) for z in row],
}

ALIKE = [0.0, 1.0, -2.0, -math.inf]  # few different values make ties the normal case


@st.composite
def cases(draw, score=None):
    """Sizes and kinds are hypothesis' to shrink; the numbers come of a seed, which is much quicker."""
    num_tokens, num_experts = draw(st.integers(0, 7)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, num_experts))
    kind = draw(st.sampled_from(["alike", "random", "one expert"]))
    mask = draw(st.sampled_from(["all", "some", "none"]))
    rng = random.Random(draw(st.integers(0, 2**32)))

    def matrix(make):
        return [[make() for _ in range(num_experts)] for _ in range(num_tokens)]

    logits = matrix(lambda: rng.choice(ALIKE) if kind == "alike" else rng.uniform(-6, 6))
    logits = [row if max(row) > -math.inf else [0.5] * num_experts for row in logits]
    if kind == "one expert":
        logits = logits[:1] * num_tokens
    name = score or draw(st.sampled_from(sorted(SCORES)))
    scores = [SCORES[name](row) for row in logits]
    choices = [equations.best(row, top_k) for row in scores]
    if name == "relu":
        choices = [[i for i, gate in enumerate(row) if gate > 0] for row in scores]
    starts = [rng.random() < 0.4 for _ in range(num_tokens)]
    return Case(
        logits=logits,
        scores=scores,
        noisy=[[z + rng.uniform(-2, 2) for z in row] for row in logits],
        deviations=matrix(lambda: rng.uniform(0.01, 3)),
        choices=choices,
        weights=[[row[i] for i in own] for row, own in zip(scores, choices, strict=True)],
        mask=[mask == "all" or (mask == "some" and rng.random() < 0.6) for _ in range(num_tokens)],
        documents=[sum(starts[1 : t + 1]) for t in range(num_tokens)],
        elsewhere=[rng.randrange(50) for _ in range(num_experts)],
        router_weight=[[rng.uniform(-3, 3) for _ in range(3)] for _ in range(num_experts)],
        num_experts=num_experts,
        num_groups=draw(st.sampled_from([n for n in range(1, num_experts + 1) if num_experts % n == 0])),
        top_k=top_k,
    )


def test_every_balance_loss_has_an_equation_here():
    assert set(COVERED) == set(BALANCE_LOSSES)


@pytest.mark.parametrize("name", sorted(set(COVERED) - {"load", "sequence", "relu_sparsity"}))
@settings(max_examples=80)
@given(case=cases())
def test_a_loss_is_its_equation(name, case):
    check(name, case)


@settings(max_examples=150)
@given(case=cases(score="softmax"))
def test_the_document_s_loss_is_its_equation(case):
    check("sequence", case)


@settings(max_examples=150)
@given(case=cases(score="relu"))
def test_the_relu_penalty_is_its_equation(case):
    check("relu_sparsity", case)


@settings(max_examples=150)
@given(case=cases(score="softmax"))
def test_the_smooth_load_is_its_equation(case):
    if case.top_k == case.num_experts:
        case.top_k -= 1
        case.choices = [own[: case.top_k] for own in case.choices]
        case.weights = [own[: case.top_k] for own in case.weights]
    if case.top_k:
        check("load", case)


def check(name, case):
    decision = case.decision()
    counts_E = torch.tensor(case.elsewhere, dtype=torch.float64)
    found = BALANCE_LOSSES[name].of(decision, counts_E).item()
    assert found == pytest.approx(COVERED[name](case), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", sorted(name for name, loss in BALANCE_LOSSES.items() if loss.evens))
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_perfect_balance_is_one_and_collapse_is_the_worst(name, top_k):
    """Each token ranks the experts in a circle, so that every choice and every rank is even; or all rank alike."""
    num_experts, num_groups = 6, 3
    circle = [[-((i - t) % num_experts) / 2 for i in range(num_experts)] for t in range(num_experts)]
    even = BALANCE_LOSSES[name].of(case_of(circle, top_k, num_groups, [0] * num_experts).decision()).item()
    assert even == pytest.approx(1.0, rel=1e-12)
    ranks = [[-30.0 * i for i in range(num_experts)]] * num_experts
    worst = BALANCE_LOSSES[name].of(case_of(ranks, top_k, num_groups, [0] * num_experts).decision()).item()
    most = {"device": 3, "communication": 3 / (1 if top_k < 3 else 2), "load": 6 / top_k}.get(name, 6 / top_k)
    if name == "device":
        most = 3 / (1 if top_k < 3 else 1.5)
    if name == "importance":
        most = 6  # nearly all of the weight is the first expert's
    assert worst == pytest.approx(most, rel=1e-6)


def case_of(logits, top_k, num_groups, documents):
    scores = [softmax(row) for row in logits]
    choices = [equations.best(row, top_k) for row in scores]
    return Case(
        logits=logits,
        scores=scores,
        noisy=logits,
        deviations=[[1.0] * len(row) for row in logits],
        choices=choices,
        weights=[[row[i] for i in own] for row, own in zip(scores, choices, strict=True)],
        mask=[True] * len(logits),
        documents=documents,
        elsewhere=[],
        router_weight=[[1.0]],
        num_experts=len(logits[0]),
        num_groups=num_groups,
        top_k=top_k,
    )


def test_communication_is_the_paper_s_where_tokens_use_every_group_they_may():
    logits = torch.randn(9, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).tolist()
    case = case_of(logits, 2, 3, [0] * 9)
    case.choices = [[i, (i + 2) % 6] for i in (t % 6 for t in range(9))]  # always two groups of two experts
    papers = equations.communication(case.scores, case.choices, case.mask, 6, 3, top_groups=2)
    assert BALANCE_LOSSES["communication"].of(case.decision()).item() == pytest.approx(papers, rel=1e-12)


@pytest.mark.parametrize("name", sorted(COVERED))
def test_gradcheck(name):
    """In fp64, with padding, two documents and choices that stay what they are."""
    generator = torch.Generator().manual_seed(7)
    logits_TE = torch.randn(8, 6, generator=generator, dtype=torch.float64).requires_grad_()
    noise_TE = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    std_TE = (torch.rand(8, 6, generator=generator, dtype=torch.float64) + 0.3).requires_grad_()
    weight_ED = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    mask_T = torch.tensor([True] * 7 + [False])
    ids_TK = (logits_TE + noise_TE * std_TE).detach().topk(2).indices
    counts_E = torch.tensor([3.0, 1, 4, 1, 5, 9], dtype=torch.float64)

    def of(logits_TE, std_TE, weight_ED):
        scores_TE = logits_TE.relu() if name == "relu_sparsity" else logits_TE.sigmoid()
        decision = RoutingDecision(
            rows=Rows.from_topk(ids_TK, scores_TE.gather(1, ids_TK), 6, mask_T=mask_T),
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            mask_T=mask_T,
            document_ids_T=torch.tensor([0] * 3 + [1] * 5),
            ranked_TE=logits_TE + noise_TE * std_TE,
            noise_std_TE=std_TE,
            router_weight_ED=weight_ED,
            groups=GroupConfig(num_groups=3, top_groups=2, score="max"),
            top_k=2,
        )
        return BALANCE_LOSSES[name].of(decision, counts_E)

    moved = torch.autograd.grad(of(logits_TE, std_TE, weight_ED), (logits_TE, std_TE, weight_ED), allow_unused=True)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in moved)
    assert torch.autograd.gradcheck(of, (logits_TE, std_TE, weight_ED))


@pytest.mark.parametrize("name", sorted(COVERED))
def test_gradients_stay_finite_beside_closed_experts(name):
    """Logits of -inf, and junk at padding."""
    logits_TE = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits_TE[0, 1] = logits_TE[1, 1:] = -torch.inf
    logits_TE[4] = 1e6
    logits_TE.requires_grad_()
    mask_T = torch.tensor([True, True, True, True, False])
    scores_TE = logits_TE.softmax(-1)
    ids_TK = torch.tensor([[0, 2], [0, 1], [3, 1], [2, 0], [1, 0]])
    weight_ED = torch.ones(4, 3, dtype=torch.float64).requires_grad_()
    decision = RoutingDecision(
        rows=Rows.from_topk(ids_TK, scores_TE.gather(1, ids_TK), 4, mask_T=mask_T),
        logits_TE=logits_TE,
        scores_TE=scores_TE,
        mask_T=mask_T,
        ranked_TE=logits_TE + 0.1,
        noise_std_TE=torch.ones(5, 4, dtype=torch.float64),
        router_weight_ED=weight_ED,
        groups=GroupConfig(num_groups=2, top_groups=1, score="max"),
        top_k=2,
    )
    loss = BALANCE_LOSSES[name].of(decision)
    assert loss.isfinite()
    found = torch.autograd.grad(loss, (logits_TE, weight_ED), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in found)
