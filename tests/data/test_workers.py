import os

import numpy as np
import pytest

from moesaic.data import workers
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.workers import encoder
from moesaic.errors import DataError

TEXTS = [f"text {i} of {i**2}\n" * (i % 5 + 1) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def test_documents_come_back_in_order_whoever_encodes_them(tokenizer: Tokenizer) -> None:
    batches = [(i, TEXTS[i : i + 3]) for i in range(0, 40, 3)]
    results = []
    for count in (1, 2):
        with encoder(tokenizer, count) as encode:
            results.append(list(encode(iter(batches))))
    for (tag, one), (other_tag, other), (number, texts) in zip(*results, batches, strict=True):
        assert tag == other_tag == number
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.lengths, other.lengths)
        pieces = np.split(one.ids, np.cumsum(one.lengths)[:-1])
        assert [tokenizer.decode(piece[1:].tolist()) for piece in pieces] == texts
        assert all(piece[0] == tokenizer.eos_id for piece in pieces)


def test_batches_are_taken_as_they_are_needed(tokenizer: Tokenizer) -> None:
    """Text that does not fit into memory must not be drawn in faster than it is encoded."""
    drawn = []

    def batches():
        for number in range(100):
            drawn.append(number)
            yield number, TEXTS[:1]

    with encoder(tokenizer, 2) as encode:
        for tag, _ in encode(batches()):
            assert len(drawn) - tag <= 2 * workers._AHEAD


def test_a_worker_that_dies_is_one_line(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_encode_in_worker", os._exit)
    message = r"a process that tokenizes ended.*with fewer --workers"
    with pytest.raises(DataError, match=message) as caught, encoder(tokenizer, 2) as encode:
        list(encode([(0, 1)]))  # type: ignore[list-item]
    assert "\n" not in str(caught.value)
