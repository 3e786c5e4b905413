"""Tokens for rows of logits: what transformers' rules give, log probabilities, and nothing of the rows beside."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from moesaic.engine.sampling import Sampling
from moesaic.errors import GenerationError
from moesaic.serve.choice.choosing import LEAST_LOGPROB, Row, choose, scored
from moesaic.serve.choice.rules import Rules, check_rules
from moesaic.serve.choice.writing import Writing
from moesaic.serve.request import Request, TokenInfo

VOCAB = 37
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


def writing(prompt: list[int], new: list[int], sampling: Sampling, **options: Any) -> Writing:
    request = Request(prompt_ids=tuple(prompt), max_new_tokens=99, sampling=sampling, **options)
    made = Writing(request, lambda ids: " ".join(map(str, ids)), 500)
    made.add([TokenInfo(token) for token in new])
    return made


def some_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def penalized(prompt: list[int], new: list[int], sampling: Sampling, logits_V: Tensor) -> Tensor:
    """By transformers, and by OpenAI's formula: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    ids: Any = torch.tensor([prompt + new])
    values: Any = logits_V[None].clone()
    values = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, values)[0]
    counts = torch.bincount(torch.tensor(new, dtype=torch.long), minlength=VOCAB)
    return values - counts * sampling.frequency_penalty - (counts > 0) * sampling.presence_penalty


@given(TOKENS, TOKENS, TOKENS, st.integers(0, 12))
@settings(max_examples=60)
def test_penalties_and_drafts(prompt: list[int], new: list[int], drafts: list[int], looked_at: int) -> None:
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=-0.4)
    rules = Rules(Request(prompt_ids=tuple(prompt), max_new_tokens=99, sampling=sampling))
    logits = some_logits(VOCAB)
    for size in sorted({0, min(looked_at, len(new)), len(new)}):
        for kept in ([], drafts, drafts[:2]):
            found = rules.apply(logits.numpy(), prompt + new[:size], kept)
            assert torch.allclose(torch.from_numpy(found), penalized(prompt, new[:size] + kept, sampling, logits))


def test_no_rules_change_nothing() -> None:
    logits = some_logits(VOCAB).numpy()
    assert Rules(Request(prompt_ids=(1,), max_new_tokens=1)).apply(logits, [1]) is logits


def test_biases_and_early_ends() -> None:
    logits = some_logits(3, VOCAB)
    best = int(logits[0].argmax())
    first = writing([1], [], Sampling(logit_bias={5: 100.0}))
    second = writing([1], [2], Sampling(), min_new_tokens=3, eos_token_ids=frozenset({best}))
    chosen = choose(logits[[0, 0, 0]].numpy(), [Row(first), Row(second, [4]), Row(second, [4, 4])])
    assert [chosen[0].token_id, chosen[2].token_id] == [5, best]
    assert chosen[1].token_id == int(logits[0].topk(2).indices[1])
    with pytest.raises(GenerationError, match="logit_bias of token 37; the model knows 0 to 36"):
        check_rules(Request(prompt_ids=(1,), max_new_tokens=1, sampling=Sampling(logit_bias={37: 1.0})), VOCAB)


def test_a_row_is_chosen_alone() -> None:
    """The same tokens with other rows beside it, and as drafts or as tokens that were written."""
    logits = some_logits(6, VOCAB).numpy()
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=4, presence_penalty=1.0)
    new = [3, 9, 3, 20, 6, 1]
    alone = [choose(logits[[at]], [Row(writing([7], new[:at], sampling))])[0] for at in range(6)]
    drafted = choose(logits, [Row(writing([7], [], sampling), new[:at]) for at in range(6)])
    assert alone == drafted


def test_seeds() -> None:
    logits = np.zeros((1, VOCAB), np.float32)

    def drawn(sampling: Sampling) -> list[int]:
        return [choose(logits, [Row(writing([1], [0] * at, sampling))])[0].token_id for at in range(12)]

    assert drawn(Sampling(temperature=1, seed=1)) == drawn(Sampling(temperature=1, seed=1))
    assert drawn(Sampling(temperature=1, seed=1)) != drawn(Sampling(temperature=1, seed=2))
    first, second = (writing([1], [], Sampling(temperature=1)).rules.sampling.seed for _ in range(2))
    assert first != second, "without a seed each request has one of its own"


def test_log_probabilities_are_the_models() -> None:
    """Of its own distribution, whatever the rules."""
    logits = some_logits(1, VOCAB)
    sampling = Sampling(temperature=0.3, top_k=1, logit_bias={9: 100.0})
    [info] = choose(logits.numpy(), [Row(writing([1], [], sampling, top_logprobs=5))])
    wanted = torch.log_softmax(logits[0].double(), -1)
    assert info.token_id == 9 and info.logprob == pytest.approx(wanted[9].item(), abs=1e-6)
    values, ids = wanted.topk(5)
    assert [token for token, _ in info.top] == ids.tolist()
    assert [value for _, value in info.top] == pytest.approx(values.tolist(), abs=1e-6)


@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_impossible_tokens_have_a_number_too(count: int) -> None:
    logits = np.full(7, -np.inf, np.float32)
    logits[[2, 5]] = 1.0
    (info,) = scored([logits], [0], [count])
    assert info.logprob == LEAST_LOGPROB and len(info.top) == min(count, 7)
    assert [token for token, _ in info.top] == [2, 5, 0, 1, 3, 4, 6][:count]
    assert all(math.isfinite(value) for _, value in info.top)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=90), st.integers(0, 20))
@settings(max_examples=100)
def test_the_likeliest_with_ties(values: list[int], count: int) -> None:
    wanted = sorted(range(len(values)), key=lambda token: (-values[token], token))[:count]
    (info,) = scored([np.array(values, np.float32)], [0], [count])
    assert [token for token, _ in info.top] == wanted
