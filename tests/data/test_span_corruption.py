"""T5's denoising: nothing is lost, lengths are as computed, sentinels come in order, and a number says everything."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.data.loader import Batches
from moesaic.data.sourced import IGNORED_TARGET, with_others_sources
from moesaic.data.span_corruption import SpanBatches, SpanCorruption, held_out_spans
from moesaic.data.special_tokens import sentinels
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError
from tests.data.conftest import numbered

SENTINELS = tuple(range(999, 899, -1))
T5 = SpanCorruption(sentinel_ids=SENTINELS, eos_id=0)


def packed_with_sentinels(**sizes: int):
    return dataclasses.replace(numbered(sizes), sentinel_ids=tuple(range(50_099, 49_999, -1)))


@given(
    ids=st.lists(st.integers(0, 898), min_size=2, max_size=600),
    density=st.floats(0.01, 0.99),
    mean=st.floats(1.0, 20.0),
    seed=st.integers(0, 2**32),
)
def test_source_and_target_put_together_are_the_text(ids, density, mean, seed):
    corruption = SpanCorruption(
        sentinel_ids=tuple(range(1999, 999, -1)), eos_id=0, noise_density=density, mean_span_length=mean
    )
    source, target, given_tokens = corruption.corrupt(np.array(ids), np.random.default_rng(seed))
    assert corruption.restore(list(source), list(target)) == ids
    lengths = corruption.lengths(len(ids))
    assert (len(source), len(target), given_tokens) == (lengths.source, lengths.target, 0)
    assert lengths.kept + lengths.taken == len(ids)
    assert lengths.taken == min(max(1, round(len(ids) * density)), len(ids) - 1)
    used = [token for token in source if token >= 1000]
    assert used == [token for token in target if token >= 1000] == list(corruption.sentinel_ids[: lengths.spans])
    assert source[-1] == target[-1] == 0


def test_as_t5_counts_them():
    """T5 reads 568 tokens so that the source is 512 long and the target 114, eos included."""
    lengths = T5.lengths(568)
    assert (lengths.spans, lengths.taken, lengths.source, lengths.target) == (28, 85, 512, 114)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7])
def test_tiny_texts(length):
    lengths = T5.lengths(length)
    assert (lengths.kept, lengths.taken, lengths.spans) == (length - 1, 1, 1)


def test_every_cut_is_equally_likely():
    """7 tokens kept and 3 taken in 2 spans: 6 ways to cut the kept ones, 2 to cut the others."""
    corruption = SpanCorruption(sentinel_ids=SENTINELS, eos_id=0, noise_density=0.3, mean_span_length=1.5)
    generator = np.random.default_rng(0)
    drawn = [list(corruption.corrupt(np.arange(1, 11), generator).source_ids) for _ in range(6000)]
    counts = np.unique(np.array(drawn), axis=0, return_counts=True)[1]
    assert len(counts) == 12
    assert 400 < counts.min() <= counts.max() < 600


def test_too_few_sentinels():
    few = dataclasses.replace(T5, sentinel_ids=SENTINELS[:2])
    with pytest.raises(DataError, match=r"needs 5 sentinels and the vocabulary has 2.*--sentinels 100"):
        few.corrupt(np.arange(100), np.random.default_rng(0))
    with pytest.raises(DataError, match="needs 1 sentinels and the vocabulary has 0"):
        SpanBatches(Batches(numbered({"a": 100}), 2, 16, 0), dataclasses.replace(T5, sentinel_ids=()), 0)


def test_what_does_not_belong_together_is_refused():
    source, target, _ = T5.corrupt(np.arange(1, 101), np.random.default_rng(0))
    with pytest.raises(DataError, match="other sentinels"):
        T5.restore(list(source[5:]), [SENTINELS[0], 3, SENTINELS[2], 0])
    with pytest.raises(DataError, match="does not begin with a sentinel"):
        T5.restore(list(source), list(target[1:]))


def test_batches_are_the_windows_corrupted_and_depend_on_the_number_alone():
    packed = packed_with_sentinels(one=400, other=300)
    corruption = SpanCorruption(sentinel_ids=packed.sentinel_ids, eos_id=packed.eos_id)

    def start(seed: int = 3) -> SpanBatches:
        return SpanBatches(Batches(packed, 4, 33, seed), corruption, start_id=packed.eos_id)

    batches = start()
    lengths = corruption.lengths(33)
    for number in (0, 1, 9, 4):
        batch, again, plain = batches.batch(number), start().batch(number), batches.windows.batch(number)
        assert all(np.array_equal(one, two) for one, two in zip(batch, again, strict=True))
        assert batch.source_ids_BM.shape == (4, lengths.source)
        assert batch.targets_BS.shape == batch.inputs_BS.shape == (4, lengths.target)
        assert batch.mask_BS is None and batch.source_mask_BM.all()
        assert np.array_equal(batch.inputs_BS[:, 1:], batch.targets_BS[:, :-1])
        assert (batch.inputs_BS[:, 0] == packed.eos_id).all()
        assert np.array_equal(batch.domain_ids_B, plain.domain_ids_B)
        for source, target, text in zip(batch.source_ids_BM, batch.targets_BS, plain.inputs_BS, strict=True):
            assert corruption.restore(source.tolist(), target.tolist()) == text.tolist()
    assert not np.array_equal(batches.batch(0).source_ids_BM, start(4).batch(0).source_ids_BM)


def test_held_out_text_is_asked_for_alike_each_time_and_its_end_is_padded():
    packed = packed_with_sentinels(one=90, other=70)
    texts_of = (np.arange(91), np.arange(1, 70))
    domains = (dataclasses.replace(d, held_out=ids) for d, ids in zip(packed.domains, texts_of, strict=True))
    packed = dataclasses.replace(packed, domains=tuple(domains))
    corruption = SpanCorruption(sentinel_ids=packed.sentinel_ids, eos_id=packed.eos_id)

    def texts(max_tokens: int | None) -> dict[str, list[list[int]]]:
        found: dict[str, list[list[int]]] = {}
        for name, batches in held_out_spans(packed, corruption, 16, max_tokens, 0).items():
            for batch in batches:
                sources = [ids[mask] for ids, mask in zip(batch.source_ids_BM, batch.source_mask_BM, strict=True)]
                targets = [ids[ids != IGNORED_TARGET] for ids in batch.targets_BS]
                found.setdefault(name, []).extend(map(corruption.restore, sources, targets))
        return found

    held_out = {domain.name: domain.held_out.tolist() for domain in packed.domains}
    whole = texts(None)
    for name, ids in held_out.items():
        joined = [token for text in whole[name] for token in text]
        assert joined == ids[: len(joined)]
        assert len(ids) - len(joined) <= 2  # the closing eos, and a window of one token
    assert texts(None) == whole
    assert all(len(text) <= 16 for text in texts(32)["one"]) and len(texts(32)["one"]) == 2


def test_wrong_sources_are_others():
    packed = packed_with_sentinels(one=400)
    corruption = SpanCorruption(sentinel_ids=packed.sentinel_ids, eos_id=packed.eos_id)
    batch = SpanBatches(Batches(packed, 4, 33, 0), corruption, start_id=0).batch(0)
    wrong = with_others_sources(batch)
    assert np.array_equal(wrong.source_ids_BM[1:], batch.source_ids_BM[:-1])
    assert np.array_equal(wrong.targets_BS, batch.targets_BS)


def test_the_vocabulary_ends_with_the_sentinels():
    tokenizer = Tokenizer.train(["some text to learn from"] * 3, 400, extra_tokens=sentinels(100))
    size = tokenizer.vocab_size
    assert size <= 400
    assert tokenizer.sentinel_ids == tuple(range(size - 1, size - 101, -1))
    assert tokenizer.encode_batch(["<extra_id_0>"])[0] != [size - 1]
    assert tokenizer.byte_lengths[size - 100 :].sum() == 0
    assert Tokenizer.train(["some text"] * 3, 300).sentinel_ids == ()
