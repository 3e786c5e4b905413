"""Vectors of prompts, taken in pieces, begun again, and of what is no number."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import GenerationError
from moesaic.serve.choice.pooling import PromptPooling
from moesaic.serve.request import PoolingKind, Request

HIDDEN_TD = torch.randn(23, 5, generator=torch.Generator().manual_seed(3))


def pooled(kind: PoolingKind, pieces: list[tuple[int, int]]) -> np.ndarray:
    pooling = PromptPooling(len(HIDDEN_TD), kind)
    for start, end in pieces:
        assert not pooling.complete
        pooling.add(start, HIDDEN_TD[start:end])
    assert pooling.complete
    return pooling.event().vector_D


@pytest.mark.parametrize("kind", ["mean", "last"])
@given(cuts=st.sets(st.integers(1, 22)), again=st.integers(0, 22))
def test_pieces_change_no_bit(kind: PoolingKind, cuts: set[int], again: int) -> None:
    ends = [*sorted(cuts), len(HIDDEN_TD)]
    pieces = list(zip([0, *ends[:-1]], ends, strict=True))
    preempted = [*[piece for piece in pieces if piece[1] <= again], *pieces]
    whole = pooled(kind, [(0, len(HIDDEN_TD))])
    assert np.array_equal(pooled(kind, pieces), whole)
    assert np.array_equal(pooled(kind, preempted), whole)
    vector_D = HIDDEN_TD.mean(0) if kind == "mean" else HIDDEN_TD[-1]
    assert np.allclose(whole, vector_D / vector_D.norm(), atol=1e-6)


def test_the_last_needs_no_tokens_that_another_left() -> None:
    assert np.array_equal(pooled("last", [(20, 23)]), pooled("last", [(0, 23)]))


def test_no_numbers_are_an_error() -> None:
    pooling = PromptPooling(2, "mean")
    pooling.add(0, torch.tensor([[1.0, torch.nan], [1.0, 2.0]]))
    with pytest.raises(GenerationError, match="no numbers"):
        pooling.event()


def test_a_vector_or_a_text() -> None:
    with pytest.raises(GenerationError, match="pooling with a text"):
        Request(prompt_ids=(1,), max_new_tokens=1, pooling="mean")
