from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moesaic.config.router import GroupConfig, HashSettings, ReluSettings, RouterConfig
from moesaic.errors import ConfigError
from moesaic.routing import RoutingDecision, Rows
from moesaic.routing.balancers import (
    BALANCE_LOSSES,
    choice_counts,
    mean_over_layers,
    move_penalty,
    refuse_unfit,
    router_z_loss,
    sequence_balance_loss,
    switch_balance_loss,
    update_selection_bias,
)
from tests.routing import balance_equations as equations


def decide(logits_TE, top_k, mask_T=None, documents=None):
    scores_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = scores_TE.topk(top_k)
    rows = Rows.from_topk(ids_TK, weights_TK, logits_TE.shape[1], mask_T=mask_T)
    ids_T = None if documents is None else torch.tensor(documents)
    return RoutingDecision(rows, logits_TE, scores_TE, mask_T=mask_T, document_ids_T=ids_T)


def collapsed(expert, num_experts=4, num_tokens=32):
    logits_TE = torch.full((num_tokens, num_experts), -30.0)
    logits_TE[:, expert] = 30.0
    return decide(logits_TE, 1)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_perfect_balance_is_one_whatever_k(top_k):
    num_experts = 8
    logits_TE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for token in range(num_experts):
        for choice in range(top_k):
            logits_TE[token, (token + choice) % num_experts] = 3.0 - choice * 0.1
    assert switch_balance_loss(decide(logits_TE, top_k)).item() == pytest.approx(1.0)
    assert sequence_balance_loss(decide(logits_TE, top_k)).item() == pytest.approx(1.0)


def test_collapse_of_one_layer_is_the_number_of_experts():
    assert switch_balance_loss(collapsed(2)).item() == pytest.approx(4.0)


@pytest.mark.parametrize("name", [name for name, loss in BALANCE_LOSSES.items() if loss.evens and name != "load"])
def test_layers_collapsed_onto_different_experts_are_the_worst_in_every_layer(name, capsys):
    """Pooling them, as transformers does, finds perfect balance: 1.0 times K."""
    layers = [
        replace(collapsed(expert), groups=GroupConfig(num_groups=4, top_groups=1, score="max")) for expert in range(4)
    ]
    ours = [BALANCE_LOSSES[name].of(layer).item() for layer in layers]
    gate_logits: Any = tuple(layer.logits_TE for layer in layers)
    pooled = load_balancing_loss_func(gate_logits, 4, 1)
    with capsys.disabled():
        print(f"\n4 layers, each collapsed onto another expert: {name} {ours}, transformers {float(pooled):.3f}")
    assert ours == pytest.approx([4.0] * 4)
    assert mean_over_layers(name, layers).item() == pytest.approx(4.0)
    assert float(pooled) == pytest.approx(1.0)


def test_balance_loss_by_hand_and_its_gradient():
    logits_TE = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    decision = decide(logits_TE, 1)
    scores = logits_TE.softmax(-1)
    assert torch.allclose(switch_balance_loss(decision), 3 * (0.5 * scores[:, 0].mean() + 0.5 * scores[:, 1].mean()))
    switch_balance_loss(decision).backward()
    assert logits_TE.grad is not None and logits_TE.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", [switch_balance_loss, sequence_balance_loss, router_z_loss])
def test_padding_counts_nowhere(loss):
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    junk = torch.full((6, 5), 7.0, dtype=torch.float64)
    mask_T = torch.cat([torch.ones(11), torch.zeros(6)]).bool()
    padded = decide(torch.cat([logits_TE, junk]), 2, mask_T)
    assert loss(padded).item() == pytest.approx(loss(decide(logits_TE, 2)).item(), rel=1e-12)


def test_all_padding_is_zero_and_not_nan():
    decision = decide(torch.randn(4, 3), 1, torch.zeros(4).bool())
    assert switch_balance_loss(decision).item() == 0.0
    assert router_z_loss(decision).item() == 0.0
    assert sequence_balance_loss(decision).item() == 0.0


@pytest.mark.parametrize("top_k", [1, 3])
def test_sequence_loss_is_each_documents_own_averaged_by_tokens(top_k):
    generator = torch.Generator().manual_seed(top_k)
    documents = [0] * 6 + [1] + [2] * 9 + [3] * 4
    numbers = torch.tensor(documents)
    mask_T = torch.rand(20, generator=generator) < 0.7
    mask_T[6], mask_T[16:] = True, False  # a document of one token, one that is all padding
    logits_TE = 2 * torch.randn(20, 5, generator=generator, dtype=torch.float64)
    decision = replace(decide(logits_TE, top_k, mask_T, documents), scores_TE=torch.sigmoid(logits_TE))
    expected = 0.0
    for document in range(3):
        mine = mask_T & (numbers == document)
        expected += equations.document(decision.scores_TE[mine].tolist(), top_k) * int(mine.sum()) / int(mask_T.sum())
    assert sequence_balance_loss(decision).item() == pytest.approx(expected, rel=1e-12)


def test_sequence_loss_of_micro_batches_is_that_of_the_batch():
    logits_TE = torch.randn(24, 5, dtype=torch.float64)
    whole = sequence_balance_loss(decide(logits_TE, 2, documents=[0] * 12 + [1] * 2 + [2] * 10))
    first = sequence_balance_loss(decide(logits_TE[:12], 2, documents=[0] * 12))
    second = sequence_balance_loss(decide(logits_TE[12:], 2, documents=[0] * 2 + [1] * 10))
    assert (first + second).item() / 2 == pytest.approx(whole.item(), rel=1e-12)


def test_sequence_loss_sees_what_the_batch_hides():
    """Each document has an expert of its own: even over the batch, collapsed within."""
    logits_TE = torch.cat([collapsed(expert).logits_TE for expert in range(4)])
    documents = [expert for expert in range(4) for _ in range(32)]
    assert switch_balance_loss(decide(logits_TE, 1)).item() == pytest.approx(1.0)
    assert sequence_balance_loss(decide(logits_TE, 1, documents=documents)).item() == pytest.approx(4.0)


def test_sequence_loss_counts_unbiased_choices():
    logits_TE = torch.randn(16, 4)
    decision = decide(logits_TE, 1)
    elsewhere = Rows.from_topk((logits_TE.argmax(-1, keepdim=True) + 1) % 4, torch.ones(16, 1), 4)
    assert torch.equal(sequence_balance_loss(decision), sequence_balance_loss(replace(decision, rows=elsewhere)))


def test_sequence_loss_needs_a_fixed_k():
    decision = decide(torch.randn(3, 4), 2)
    with pytest.raises(ConfigError, match='fixed number of experts a token; use "switch"'):
        sequence_balance_loss(replace(decision, rows=replace(decision.rows, top_k=None)))


def test_z_loss_by_hand():
    logits_TE = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    expected = (torch.tensor(2.0).log() ** 2 + (1 + torch.tensor(2.0).log()) ** 2) / 2
    assert router_z_loss(decide(logits_TE, 1)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_selection_bias_moves_up_for_the_light_and_down_for_the_heavy():
    bias_E = torch.zeros(4)
    update_selection_bias(bias_E, torch.tensor([10, 2, 6, 6]), rate=0.5)
    assert bias_E.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_the_proportional_rule_moves_by_the_distance_relative_to_the_mean():
    bias_E = torch.zeros(4)
    update_selection_bias(bias_E, torch.tensor([12, 3, 6, 3]), rate=0.5, rule="proportional")
    assert bias_E.tolist() == [-0.5, 0.25, 0.0, 0.25]
    again_E = torch.zeros(4)
    update_selection_bias(again_E, torch.tensor([1200, 300, 600, 300]), rate=0.5, rule="proportional")
    assert torch.equal(bias_E, again_E)


def test_centered_moves_have_no_mean():
    bias_E = torch.tensor([1.0, 2.0, 3.0, 4.0])
    update_selection_bias(bias_E, torch.tensor([13, 1, 1, 1]), rate=0.5, centered=True)
    assert bias_E.tolist() == [0.25, 2.25, 3.25, 4.25]  # moves of -0.5 and three of 0.5, less their mean of 0.25


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_nothing_chosen_moves_nothing(rule):
    bias_E = torch.tensor([0.5, -0.5])
    update_selection_bias(bias_E, torch.zeros(2), rate=1.0, rule=rule, centered=True)
    assert bias_E.tolist() == [0.5, -0.5]


def test_a_bias_moves_by_what_was_chosen_before_any_capacity():
    """Padded to a capacity, all experts have the same rows; the bias must still see who was wanted."""
    wanted = torch.tensor([[0], [0], [0], [0], [1], [2]])
    before = Rows.from_topk(wanted, torch.ones(6, 1), 3, mask_T=torch.tensor([True] * 6))
    after = Rows.from_topk(torch.tensor([[0], [-1], [-1], [-1], [1], [2]]), torch.ones(6, 1), 3, fixed_top_k=False)
    decision = RoutingDecision(after, torch.zeros(6, 3), torch.zeros(6, 3), before_capacity=before)
    assert after.counts_E.tolist() == [1, 1, 1]
    bias_E = torch.zeros(3)
    update_selection_bias(bias_E, choice_counts(decision), rate=0.1)
    assert bias_E.tolist() == pytest.approx([-0.1, 0.1, 0.1])


@pytest.mark.parametrize("name", ["switch", "importance", "device", "communication"])
def test_balance_losses_judge_what_was_chosen_and_not_what_a_capacity_left(name):
    chosen = replace(decide(torch.randn(12, 4), 2), groups=GroupConfig(num_groups=2, top_groups=2, score="max"))
    left = Rows.from_topk(torch.tensor([[0, 1]]), torch.ones(1, 2), 4)
    limited = replace(chosen, rows=left, before_capacity=chosen.rows)
    assert torch.equal(BALANCE_LOSSES[name].of(limited), BALANCE_LOSSES[name].of(chosen))


@pytest.mark.parametrize(("used", "factor"), [(9, 1.5), (6, 1.0), (3, 1 / 1.5), (0, 1 / 1.5)])
def test_the_relu_penalty_grows_while_too_many_experts_are_used(used, factor):
    penalty = torch.tensor([2.0], dtype=torch.float64)
    move_penalty(penalty, torch.tensor([used, 0.0]), num_tokens=3, top_k=2, settings=ReluSettings(factor=1.5))
    assert penalty.item() == pytest.approx(2.0 * factor)


def router(name, **fields):
    return RouterConfig(**{"name": name, "num_experts": 4, "top_k": 2, **fields})


HASHED = router("hash", settings=HashSettings(vocab_size=9))


@pytest.mark.parametrize(
    ("loss", "config", "reason"),
    [
        ("switch", HASHED, r'the balance loss "switch" with router "hash", whose load no loss can move; leave it out'),
        ("importance", router("expert_choice"), "whose load no loss can move"),
        ("global_exact", router("base", top_k=1), "whose load no loss can move"),
        ("router_z", HASHED, "which has no weights"),
        ("load", router("softmax_topk"), 'ranks without noise; use router "noisy_topk", or the balance loss "import'),
        ("load", router("noisy_topk", top_k=4), "whose top_k is num_experts"),
        ("sequence", router("relu"), 'no fixed number of experts a token; use "switch" or "global_exact"'),
        ("device", router("softmax_topk"), "whose experts are in no groups; give it groups"),
        ("communication", router("softmax_topk"), "whose experts are in no groups"),
        ("relu_sparsity", router("top_p"), 'whose number of experts no ReLU decides; use router "relu"'),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(loss, config, reason):
    with pytest.raises(ConfigError, match=reason):
        refuse_unfit([loss], [config])


def test_layers_that_share_tokens_out_by_themselves_go_without_the_loss():
    refuse_unfit(["switch", "router_z"], [HASHED, router("softmax_topk")])
    with pytest.raises(ConfigError, match="ranks without noise"):
        refuse_unfit(["load"], [router("noisy_topk"), router("softmax_topk")])


def test_every_loss_fits_some_router_and_a_dense_model_has_none():
    """`refuse_unfit` raises otherwise."""
    groups = GroupConfig(num_groups=2, top_groups=2, score="max")
    fits = {"load": router("noisy_topk"), "relu_sparsity": router("relu")}
    for name in BALANCE_LOSSES:
        refuse_unfit([name], [fits.get(name, router("softmax_topk", groups=groups))])
        refuse_unfit([name], [])
