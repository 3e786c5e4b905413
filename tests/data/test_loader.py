from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from moesaic.data.corpus import Corpus, build_corpus
from moesaic.data.loader import DECK_SIZE, Batches, Packed, PackedDomain, held_out_windows, pack
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError, RunFolderError


def numbered(sizes: Mapping[str, int]) -> Packed:
    """Domains whose training tokens are 0, 1, 2, ...: a window's first token tells which window it is."""
    empty = np.zeros(2, dtype=np.uint32)
    domains = [
        PackedDomain(name=name, train=np.arange(size, dtype=np.uint32), held_out=empty, held_out_bytes=0)
        for name, size in sizes.items()
    ]
    return Packed(domains=tuple(domains), byte_lengths=np.ones(max(sizes.values()), dtype=np.int64), eos_id=0)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    prose = [f"Sentence {i} of the prose, größer als {i * i}.\n" for i in range(200)]
    code = [f"def f{i}(x):\n    return x + {i}  # <|endoftext|>\n" for i in range(120)]
    return build_corpus("test", {"prose": prose, "code": code})


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Tokenizer:
    return Tokenizer.train({domain.name: domain.train for domain in corpus.domains}, 300)


@pytest.fixture(scope="module")
def packed(corpus: Corpus, tokenizer: Tokenizer) -> Packed:
    return pack(corpus, tokenizer)


def test_packed_domains_are_documents_between_eos_tokens(corpus: Corpus, tokenizer: Tokenizer, packed: Packed) -> None:
    assert packed.names == corpus.names == ("code", "prose")
    for domain, text in zip(packed.domains, corpus.domains, strict=True):
        for token_ids, documents in ((domain.train, text.train), (domain.held_out, text.held_out)):
            pieces = np.split(token_ids, np.flatnonzero(token_ids == 0))
            assert [tokenizer.decode(piece[1:].tolist()) for piece in pieces[1:-1]] == list(documents)
            assert token_ids.dtype == np.uint16
            assert token_ids[0] == token_ids[-1] == 0
        assert domain.held_out_bytes == text.held_out_bytes


def test_a_packed_corpus_is_kept_and_read_again(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines: list[str] = []
    first = pack(corpus, tokenizer, tmp_path / "new", progress=lines.append)
    second = pack(corpus, tokenizer, tmp_path / "new", progress=lines.append)
    assert lines == ["tokenizing code", "tokenizing prose"]
    for one, other in zip(first.domains, second.domains, strict=True):
        assert np.array_equal(one.train, other.train) and np.array_equal(one.held_out, other.held_out)
        assert (one.name, one.held_out_bytes) == (other.name, other.held_out_bytes)
    (kept,) = (tmp_path / "new").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    third = pack(corpus, tokenizer, tmp_path / "new", progress=lines.append)
    assert len(lines) == 4
    assert np.array_equal(third.domains[0].train, first.domains[0].train)


def test_another_corpus_or_tokenizer_is_packed_anew(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pack(corpus, tokenizer, tmp_path)
    pack(build_corpus("test", {"code": corpus.domains[0].train}), tokenizer, tmp_path)
    pack(corpus, Tokenizer(tokenizer.backend, eos_token="<|im_end|>"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_packing_errors(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no eos token to put between documents"):
        pack(corpus, Tokenizer(tokenizer.backend))
    with pytest.raises(DataError, match="not byte-level BPE"):
        pack(corpus, Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), eos_token="a"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match="set MOESAIC_CACHE to another folder"):
        pack(corpus, tokenizer, tmp_path / "file" / "cache")


def test_large_vocabularies_are_packed_in_four_bytes(corpus: Corpus, tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens([f"<extra {i}>" for i in range(2**16)])
    packed = pack(corpus, Tokenizer(backend, eos_token="<|endoftext|>"))
    assert packed.domains[0].train.dtype == np.uint32


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(20, 400), min_size=1, max_size=4),
    batch_size=st.integers(1, 9),
    sequence_length=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    uniform=st.booleans(),
)
def test_within_an_epoch_no_window_comes_twice_and_none_is_left_out(
    sizes: list[int], batch_size: int, sequence_length: int, seed: int, uniform: bool
) -> None:
    packed = numbered({f"domain {i}": size for i, size in enumerate(sizes)})
    try:
        batches = Batches(packed, batch_size, sequence_length, seed, "uniform" if uniform else "proportional")
    except DataError:
        assert sum(batches_of(packed, sequence_length)) < batch_size
        return
    dealt: list[list[int]] = [[] for _ in sizes]
    for step in range(1200 // batch_size):
        inputs_BS, targets_BS, domain_ids_B = batches.batch(step)
        assert inputs_BS.shape == targets_BS.shape == (batch_size, sequence_length)
        assert inputs_BS.dtype == targets_BS.dtype == domain_ids_B.dtype == np.int64
        assert np.array_equal(inputs_BS + 1, targets_BS)
        for row, domain in enumerate(domain_ids_B):
            assert inputs_BS[row, 0] % sequence_length == 0
            dealt[domain].append(int(inputs_BS[row, 0]) // sequence_length)
    for windows, count in zip(dealt, batches.num_windows, strict=True):
        for start in range(0, len(windows), count):
            epoch = windows[start : start + count]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < count or set(epoch) == set(range(count))


def batches_of(packed: Packed, sequence_length: int) -> list[int]:
    return [domain.num_windows(sequence_length) for domain in packed.domains]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    packed = numbered({"a": 3000, "b": 900})
    one, other = Batches(packed, 4, 8, seed=5), Batches(packed, 4, 8, seed=5)
    in_order = [one.batch(step) for step in range(600)]
    for step in (599, 0, 300, 17):
        for expected, found in zip(in_order[step], other.batch(step), strict=True):
            assert np.array_equal(expected, found)
    different = Batches(packed, 4, 8, seed=6)
    assert any(not np.array_equal(in_order[step].inputs_BS, different.batch(step).inputs_BS) for step in range(3))


def test_epochs_come_in_different_orders() -> None:
    batches = Batches(numbered({"a": 101}), 10, 10, seed=0)
    first, second = batches.batch(0).inputs_BS[:, 0], batches.batch(1).inputs_BS[:, 0]
    assert sorted(first) == sorted(second)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ("proportional", {"large": 0.9, "small": 0.1}),
        ("uniform", {"large": 0.5, "small": 0.5}),
        ({"small": 3, "large": 1}, {"large": 0.25, "small": 0.75}),
        ({"large": 1}, {"large": 1.0}),
    ],
)
def test_domains_get_their_share_of_every_deck(weights: dict[str, float] | str, shares: dict[str, float]) -> None:
    packed = numbered({"large": 9000, "small": 1000})
    batches = Batches(packed, DECK_SIZE // 4, 4, 0, weights)  # type: ignore[arg-type]
    counts = Counter(packed.names[d] for step in range(4, 8) for d in batches.batch(step).domain_ids_B)
    assert counts.keys() == shares.keys()
    assert all(abs(counts[name] - share * DECK_SIZE) <= 1 for name, share in shares.items())


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30))
def test_a_deck_is_full_and_every_weighted_domain_is_in_it(weights: list[float]) -> None:
    packed = numbered({f"d{i}": 10 for i in range(len(weights))})
    counts = Batches(packed, 1, 2, 0, {f"d{i}": weight for i, weight in enumerate(weights)}).deck_counts
    assert sum(counts) == DECK_SIZE
    assert min(counts) >= 1


@pytest.mark.parametrize(
    ("sizes", "batch_size", "sequence_length", "weights", "message"),
    [
        (
            {"a": 30, "b": 20},
            8,
            10,
            "uniform",
            r"makes 3 windows of 10 tokens, fewer than one batch of 8; give more text",
        ),
        ({"a": 300, "b": 10}, 8, 10, "uniform", r"domain 'b' has 10 training tokens, fewer than one window of 11"),
        ({"a": 300}, 0, 10, "uniform", r"batch_size=0, sequence_length=10; both must be 1 or more"),
        ({"a": 300}, 2, 10, {"c": 1.0}, r"weights for unknown domain 'c'; known: a"),
        ({"a": 300}, 2, 10, {"a": -1.0}, r"must be numbers of 0 or more"),
        ({f"d{i}": 30 for i in range(1025)}, 2, 10, "uniform", r"1025 domains; at most 1024 can be mixed"),
        ({"a": 300}, 2, 10, "equal", r"weights='equal'; use 'proportional', 'uniform'"),
    ],
)
def test_too_little_text_and_bad_weights(
    sizes: dict[str, int], batch_size: int, sequence_length: int, weights: dict[str, float] | str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Batches(numbered(sizes), batch_size, sequence_length, 0, weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("sequence_length", [1, 7, 64, 100_000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_held_out_token_is_scored_once(packed: Packed, sequence_length: int, batch_size: int) -> None:
    for domain in packed.domains:
        batches = list(held_out_windows(packed, sequence_length, batch_size=batch_size)[domain.name])
        targets = np.concatenate([batch.targets_BS[batch.mask_BS] for batch in batches])
        inputs = np.concatenate([batch.inputs_BS[batch.mask_BS] for batch in batches])
        assert np.array_equal(targets, domain.held_out[1:])
        assert np.array_equal(inputs, domain.held_out[:-1])
        assert sum(batch.num_bytes for batch in batches) == domain.held_out_bytes
        assert all(batch.inputs_BS.shape[1] == sequence_length for batch in batches)
        assert all(1 <= len(batch.inputs_BS) <= batch_size for batch in batches)


def test_a_maximum_takes_windows_from_all_over_the_held_out_text(packed: Packed) -> None:
    batches = list(held_out_windows(packed, 8, max_tokens_per_domain=40)["prose"])
    everything = list(held_out_windows(packed, 8)["prose"])
    assert len(batches) == 5
    assert not np.array_equal(batches[1].inputs_BS, everything[1].inputs_BS)
    for batch in batches:
        assert batch.num_bytes == packed.byte_lengths[batch.targets_BS[batch.mask_BS]].sum()
    assert len(list(held_out_windows(packed, 8, max_tokens_per_domain=1)["prose"])) == 1
