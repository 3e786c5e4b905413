from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.routing import Rows


@st.composite
def choices(draw):
    """Expert ids [T, K], distinct for each token, and a mask."""
    num_tokens, num_experts = draw(st.integers(0, 13)), draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    ids = [draw(st.permutations(range(num_experts)))[:top_k] for _ in range(num_tokens)]
    mask = [draw(st.booleans()) for _ in range(num_tokens)]
    return torch.tensor(ids, dtype=torch.int64).reshape(num_tokens, top_k), num_experts, torch.tensor(mask).bool()


@given(choices())
def test_rows_hold_every_choice_once_sorted_by_expert_then_token(drawn):
    expert_ids_TK, num_experts, mask_T = drawn
    weights_TK = torch.arange(expert_ids_TK.numel(), dtype=torch.float32).reshape(expert_ids_TK.shape)
    rows = Rows.from_topk(expert_ids_TK, weights_TK, num_experts, mask_T=mask_T)
    found = list(
        zip(
            rows.expert_ids_R.tolist(),
            rows.token_ids_R.tolist(),
            rows.choice_R.tolist(),
            rows.weights_R.tolist(),
            strict=True,
        )
    )
    expected = sorted(
        (int(expert_ids_TK[t, k]), t, k, float(weights_TK[t, k]))
        for t in range(expert_ids_TK.shape[0])
        for k in range(expert_ids_TK.shape[1])
        if mask_T[t]
    )
    assert found == expected
    assert rows.counts_E.sum() == len(expected)


@given(choices())
def test_as_topk_gives_back_what_rows_were_made_of(drawn):
    expert_ids_TK, num_experts, mask_T = drawn
    weights_TK = torch.rand(expert_ids_TK.shape)
    ids, weights = Rows.from_topk(expert_ids_TK, weights_TK, num_experts, mask_T=mask_T).as_topk()
    assert torch.equal(ids[mask_T], expert_ids_TK[mask_T])
    assert torch.equal(weights[mask_T], weights_TK[mask_T])
    assert (ids[~mask_T] == -1).all()
    assert (weights[~mask_T] == 0).all()


@given(choices())
def test_by_token_lists_each_tokens_rows_in_the_order_of_its_choices(drawn):
    expert_ids_TK, num_experts, mask_T = drawn
    rows = Rows.from_topk(expert_ids_TK, torch.rand(expert_ids_TK.shape), num_experts, mask_T=mask_T)
    order = rows.by_token
    ragged = replace(rows, top_k=None).by_token
    assert torch.equal(order.row_ids_R, ragged.row_ids_R)
    assert torch.equal(order.token_offsets, ragged.token_offsets)
    for token in range(rows.num_tokens):
        mine = order.row_ids_R[order.token_offsets[token] : order.token_offsets[token + 1]]
        assert (rows.token_ids_R[mine] == token).all()
        assert rows.choice_R[mine].tolist() == (list(range(expert_ids_TK.shape[1])) if mask_T[token] else [])


def test_rows_without_a_fixed_number_of_choices_refuse_as_topk():
    empty = torch.zeros(0, dtype=torch.int64)
    rows = Rows(empty, torch.zeros(3, dtype=torch.int64), torch.zeros(0), empty, num_tokens=2, top_k=None)
    with pytest.raises(ConfigError, match="no fixed number"):
        rows.as_topk()


@given(choices())
def test_weighed_rows_differ_in_their_weights_alone(drawn):
    expert_ids_TK, num_experts, mask_T = drawn
    first, second = torch.rand(2, *expert_ids_TK.shape)
    rows = Rows.from_topk(expert_ids_TK, first, num_experts, mask_T=mask_T, weight_on="input")
    expected = Rows.from_topk(expert_ids_TK, second, num_experts, mask_T=mask_T, weight_on="input")
    weighed = rows.weighed(second)
    assert torch.equal(weighed.weights_R, expected.weights_R)
    assert weighed.token_ids_R is rows.token_ids_R
    assert (weighed.top_k, weighed.weight_on) == (rows.top_k, "input")


def test_rows_of_different_numbers_a_token_keep_the_order_of_their_choices():
    """As dropping leaves them: token 1 has lost its first choice, token 2 all."""
    rows = Rows(
        token_ids_R=torch.tensor([0, 3, 1, 0, 3]),
        expert_offsets=torch.tensor([0, 2, 3, 5]),
        weights_R=torch.ones(5),
        choice_R=torch.tensor([1, 0, 1, 0, 2]),
        num_tokens=4,
        top_k=None,
    )
    assert rows.by_token.row_ids_R.tolist() == [3, 0, 2, 1, 4]
    assert rows.by_token.token_offsets.tolist() == [0, 2, 3, 3, 5]
