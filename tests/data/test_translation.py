"""Batches of pairs: every pair once an epoch, by number alone, padded at the end, languages where they belong."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.pairs import Direction, read_pairs
from moesaic.data.sourced import IGNORED_TARGET
from moesaic.data.special_tokens import language_token
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.translation import POOL_BATCHES, PairBatches, Pairs, held_out_pairs
from moesaic.errors import DataError
from tests.data.test_pairs import write

START = 1
LANGUAGES = ("de", "en", "fr")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    generator = np.random.default_rng(0)
    rows = [
        {language: f"{language} {i} " + "words " * int(generator.integers(1, 9)) for language in LANGUAGES}
        for i in range(60)
    ]
    return read_pairs(write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows))


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return Tokenizer.train(corpus.train_texts(), 400, extra_tokens=tuple(map(language_token, LANGUAGES)))


@pytest.fixture(scope="module")
def pairs(corpus, tokenizer):
    return Pairs.of(corpus, tokenizer)


def test_rows_are_what_the_lines_say(corpus, tokenizer, pairs):
    batches = PairBatches(pairs, 8, 64, 0, START)
    batch = batches.batch(0)
    texts = {tuple(segment.texts.values()) for segment in corpus.segments}
    for row in range(8):
        direction = batches.directions[batch.domain_ids_B[row]]
        source = batch.source_ids_BM[row][batch.source_mask_BM[row]]
        target = batch.targets_BS[row][batch.targets_BS[row] != IGNORED_TARGET]
        inputs = batch.inputs_BS[row][batch.document_ids_BS[row] == 0]
        assert source[0] == tokenizer.language_id(direction.source) and source[-1] == tokenizer.eos_id
        assert inputs[0] == START and inputs[1] == tokenizer.language_id(direction.target)
        assert np.array_equal(inputs[2:], target[:-1]) and target[-1] == tokenizer.eos_id
        assert batch.targets_BS[row, 0] == IGNORED_TARGET  # the language is given
        found = {tokenizer.decode(source[1:-1]), tokenizer.decode(target[:-1])}
        assert any(found <= set(line) for line in texts)
    assert not batch.source_mask_BM.all() or not (batch.document_ids_BS == 0).all()


def test_no_held_out_segment_is_trained_on(corpus, pairs):
    for direction in pairs.train:
        assert not set(pairs.train[direction]) & set(pairs.held_out[direction])
        assert corpus.is_held_out[pairs.held_out[direction]].all()
    assert pairs.num_train_pairs == 6 * (~corpus.is_held_out).sum()


@settings(max_examples=15)
@given(batch_size=st.integers(1, 9), seed=st.integers(0, 2**32), stops=st.sets(st.integers(0, 60), max_size=3))
def test_every_pair_once_an_epoch_also_over_stops(pairs, batch_size, seed, stops):
    batches = PairBatches(pairs, batch_size, 64, seed, START, "uniform")
    size = len(batches.fitting[batches.directions[0]])
    dealt: dict[int, list[bytes]] = {}
    for number in range(-(-6 * size // (POOL_BATCHES * batch_size)) * POOL_BATCHES):
        if number in stops:
            batches = PairBatches(pairs, batch_size, 64, seed, START, "uniform")
        batch = batches.batch(number)
        for row, domain in enumerate(batch.domain_ids_B):
            source = batch.source_ids_BM[row][batch.source_mask_BM[row]]
            dealt.setdefault(int(domain), []).append(source.tobytes())
    for sources in dealt.values():
        times = Counter(sources)
        assert len(times) == size  # pools do not cut epochs, so some pairs came once more than others
        assert max(times.values()) - min(times.values()) <= 1


def test_sorting_leaves_little_padding(pairs):
    batches = PairBatches(pairs, 4, 64, 0, START)
    many = [batches.batch(number) for number in range(POOL_BATCHES)]
    assert np.mean([batch.source_mask_BM.mean() for batch in many]) > 0.85
    lengths = [batch.source_ids_BM.shape[1] for batch in many]
    assert lengths != sorted(lengths)


def test_weights_epochs_and_what_is_too_long(pairs):
    one_way = PairBatches(pairs, 4, 64, 0, START, {"en-fr": 1})
    assert one_way.shares["en-fr"] == 1.0
    assert {one_way.directions[i] for i in one_way.batch(3).domain_ids_B} == {Direction("en", "fr")}
    size = len(one_way.fitting[Direction("en", "fr")])
    PairBatches(pairs, 1, 64, 0, START, epochs={"en-fr": 2}, num_batches=2 * size)
    with pytest.raises(DataError, match="pairs, but the run trains on"):
        PairBatches(pairs, 1, 64, 0, START, epochs={"en-fr": 2}, num_batches=10 * size)
    with pytest.raises(DataError, match="unknown domain 'en-it'"):
        PairBatches(pairs, 4, 64, 0, START, {"en-it": 1})
    short = PairBatches(pairs, 4, 9, 0, START)
    assert short.num_left_out > 0
    assert max(short.batch(i).inputs_BS.shape[1] for i in range(20)) <= 9
    with pytest.raises(DataError, match="at most 3 tokens"):
        PairBatches(pairs, 4, 3, 0, START)


def test_held_out_pairs_come_alike_each_time(pairs):
    directions = (Direction("en", "fr"), Direction("de", "en"))

    def sizes(max_tokens):
        found = held_out_pairs(pairs, directions, 64, max_tokens, START)
        return {name: sum(len(batch.inputs_BS) for batch in batches) for name, batches in found.items()}

    assert sizes(None) == {d.name: len(pairs.held_out[d]) for d in directions}
    assert sizes(1) == {"en-fr": 1, "de-en": 1}
    first, second = (held_out_pairs(pairs, directions, 64, None, START) for _ in range(2))
    for name in first:
        for one, two in zip(first[name], second[name], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_tokenizer_without_the_language(corpus):
    with pytest.raises(DataError, match=r"no special token for the language 'de', neither <\|de\|> nor de"):
        Pairs.of(corpus, Tokenizer.train(corpus.train_texts(), 400))
