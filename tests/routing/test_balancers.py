from dataclasses import replace

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.routing import RoutingDecision, Rows
from moesaic.routing.balancers import (
    mean_over_layers,
    router_z_loss,
    sequence_balance_loss,
    switch_balance_loss,
    update_selection_bias,
)


def decide(logits_TE, top_k, mask_T=None, documents=None):
    scores_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = scores_TE.topk(top_k)
    rows = Rows.from_topk(ids_TK, weights_TK, logits_TE.shape[1], mask_T=mask_T)
    return RoutingDecision(rows, logits_TE, scores_TE, mask_T, None if documents is None else torch.tensor(documents))


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


def test_layers_collapsed_onto_different_experts_are_not_mistaken_for_balance():
    layers = [collapsed(expert) for expert in range(4)]
    assert mean_over_layers("switch", layers).item() == pytest.approx(4.0)


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


def by_equations(scores_TE, top_k):
    """DeepSeek-V3, eqs. 17-20, without alpha, for one document; in plain Python floats."""
    num_tokens, num_experts = scores_TE.shape
    total = 0.0
    for expert in range(num_experts):
        chosen, share = 0, 0.0
        for scores in scores_TE.tolist():
            best = sorted(range(num_experts), key=lambda e: (-scores[e], e))[:top_k]
            chosen += expert in best
            share += scores[expert] / sum(scores)
        total += num_experts / (top_k * num_tokens) * chosen * share / num_tokens
    return total


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
        expected += by_equations(decision.scores_TE[mine], top_k) * int(mine.sum()) / int(mask_T.sum())
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
