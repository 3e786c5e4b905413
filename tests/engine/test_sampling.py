"""Rules for the next token: what they allow, and what transformers makes of them."""

import math
from typing import Any, cast

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moesaic.engine.sampling import Sampling, sample
from moesaic.errors import ConfigError

NO_PROMPT: Any = torch.zeros(1, 1, dtype=torch.long)
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])  # probabilities 0.64, 0.24, 0.09, 0.03


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0; use 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0; use a number above 0"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5; use -2.0 to 2.0"),
        ({"frequency_penalty": math.nan}, "frequency_penalty=nan"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias -1: 1.0"),
        ({"logit_bias": {3: 101.0}}, "logit_bias 3: 101.0"),
        ({"seed": 2**64}, "a number of 64 bits"),
    ],
)
def test_impossible_rules(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        Sampling(**settings)
    assert "\n" not in str(raised.value)


def kept(**settings: Any) -> list[bool]:
    """Which of LOGITS' tokens are ever drawn."""
    drawn = sample(LOGITS.expand(4000, -1), Sampling(temperature=1.0, **settings), torch.Generator().manual_seed(0))
    return (torch.bincount(drawn, minlength=4) > 0).tolist()


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.2, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float) -> None:
    wanted = MinPLogitsWarper(min_p)(NO_PROMPT, cast(Any, LOGITS[None]))[0].isfinite().tolist()
    assert kept(min_p=min_p) == wanted


def test_all_cuts_together_keep_what_transformers_keeps() -> None:
    scores: Any = LOGITS[None]
    for cut in (TopKLogitsWarper(3), TopPLogitsWarper(0.95), MinPLogitsWarper(0.2)):
        scores = cut(NO_PROMPT, scores)
    assert kept(top_k=3, top_p=0.95, min_p=0.2) == scores[0].isfinite().tolist() == [True, True, False, False]


def test_biases_are_added() -> None:
    greedy = Sampling(logit_bias={3: 100.0, 0: -100.0})
    assert sample(LOGITS[None], greedy, torch.Generator()).tolist() == [3]
    with pytest.raises(ConfigError, match="logit_bias of token 4; the model knows 0 to 3"):
        sample(LOGITS[None], Sampling(logit_bias={4: 1.0}), torch.Generator())


def test_penalties_need_the_server() -> None:
    with pytest.raises(ConfigError, match="only the server counts"):
        sample(LOGITS[None], Sampling(presence_penalty=1.0), torch.Generator())


def test_seeds_of_choices() -> None:
    sampling = Sampling(temperature=1.0, seed=-3)
    seeds = [sampling.for_choice(index).seed for index in range(9)]
    assert seeds[0] == -3 and len(set(seeds)) == 9
    assert seeds == [sampling.for_choice(index).seed for index in range(9)]
    assert Sampling().for_choice(2).seed is None
