import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.loader import Batches
from moesaic.data.mixture import DECK_SIZE
from moesaic.data.packed import Packed
from moesaic.errors import DataError
from tests.data.conftest import numbered


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(20, 400), min_size=1, max_size=4),
    batch_size=st.integers(1, 9),
    sequence_length=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    uniform=st.booleans(),
    data=st.data(),
)
def test_within_an_epoch_no_token_comes_twice_and_none_is_left_out(
    sizes: list[int], batch_size: int, sequence_length: int, seed: int, uniform: bool, data: st.DataObject
) -> None:
    """Also over resumes: now and then the batches are made anew, as after a stop, and asked for the next number."""
    packed = numbered({f"domain {i}": size for i, size in enumerate(sizes)})

    def start() -> Batches:
        return Batches(packed, batch_size, sequence_length, seed, "uniform" if uniform else "proportional")

    try:
        batches = start()
    except DataError:
        assert sum(domain.num_windows(sequence_length) for domain in packed.domains) < batch_size
        return
    dealt: list[list[int]] = [[] for _ in sizes]
    stops = data.draw(st.sets(st.integers(0, 1200 // batch_size), max_size=4))
    for step in range(1200 // batch_size):
        batches = start() if step in stops else batches
        inputs_BS, targets_BS, domain_ids_B, document_ids_BS = batches.batch(step)
        assert inputs_BS.shape == targets_BS.shape == document_ids_BS.shape == (batch_size, sequence_length)
        assert inputs_BS.dtype == targets_BS.dtype == domain_ids_B.dtype == document_ids_BS.dtype == np.int64
        assert np.array_equal(inputs_BS + 1, targets_BS)
        for row, domain in enumerate(domain_ids_B):
            dealt[domain].append(int(targets_BS[row, 0]))
    for firsts, size, count in zip(dealt, sizes, batches.num_windows, strict=True):
        for start_of_epoch in range(0, len(firsts), count):
            epoch = firsts[start_of_epoch : start_of_epoch + count]
            targets = [target for first in epoch for target in range(first, first + sequence_length)]
            assert len(set(targets)) == len(targets)
            if len(epoch) == count:  # all but fewer than a window, at the two ends
                assert set(range(2, size + 1)) - set(targets) <= {
                    *range(2, min(targets)),
                    *range(max(targets) + 1, size + 1),
                }
                assert size - 1 - len(targets) < sequence_length


def test_what_fits_no_window_changes_with_the_epoch() -> None:
    batches = Batches(numbered({"a": 35}), 3, 10, seed=0)
    seen = {int(first) for step in range(40) for first in batches.batch(step).inputs_BS[:, 0]}
    assert {first % 10 for first in seen} == {1, 2, 3, 4, 5}


def test_a_batch_depends_on_seed_and_number_alone() -> None:
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


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_samples_do_not_depend_on_the_batch_size(packed: Packed, batch_size: int) -> None:
    rows = [row for step in range(48) for row in zip(*Batches(packed, 1, 16, seed=1).batch(step), strict=True)]
    batches = Batches(packed, batch_size, 16, seed=1)
    found = [row for step in range(48 // batch_size) for row in zip(*batches.batch(step), strict=True)]
    assert all(
        np.array_equal(a, b) for one, other in zip(rows, found, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("sequence_length", [1, 16, 90, 250])
def test_shards_change_nothing(packed: Packed, packed_in_shards: Packed, sequence_length: int) -> None:
    """Windows of 250 lie across several shards of 100 and more."""
    one, other = (Batches(text, 2, sequence_length, seed=3) for text in (packed, packed_in_shards))
    for step in range(40):
        for expected, found in zip(one.batch(step), other.batch(step), strict=True):
            assert np.array_equal(expected, found)


@pytest.mark.parametrize("which", ["packed", "packed_in_shards"])
def test_a_new_document_begins_at_each_eos(which: str, request: pytest.FixtureRequest) -> None:
    batches = Batches(request.getfixturevalue(which), 5, 60, seed=0)
    for step in range(30):
        batch = batches.batch(step)
        begins_BS = batch.inputs_BS == 0
        begins_BS[:, 0] = False
        assert np.array_equal(batch.document_ids_BS, begins_BS.cumsum(axis=1))
        assert batch.document_ids_BS.max() > 0


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ("proportional", {"large": 0.9, "small": 0.1}),
        ("uniform", {"large": 0.5, "small": 0.5}),
        ({"small": 3, "large": 1}, {"large": 0.25, "small": 0.75}),
        ({"large": 1}, {"large": 1.0, "small": 0.0}),
    ],
)
def test_domains_get_their_share_of_every_deck(weights: dict[str, float] | str, shares: dict[str, float]) -> None:
    packed = numbered({"large": 9000, "small": 1000})
    batches = Batches(packed, DECK_SIZE // 4, 4, 0, weights)  # type: ignore[arg-type]
    counts = Counter(packed.names[d] for step in range(4, 8) for d in batches.batch(step).domain_ids_B)
    assert batches.shares == pytest.approx(shares)
    assert all(abs(counts[name] - share * DECK_SIZE) <= 1 for name, share in shares.items())


def test_a_run_of_epochs_goes_through_each_domain_so_often() -> None:
    packed = numbered({"a": 1001, "b": 201, "c": 501})
    epochs = {"a": 1, "b": 5}
    num_batches = (100 + 5 * 20) // 4
    batches = Batches(packed, 4, 10, 0, epochs=epochs, num_batches=num_batches)
    rows = [row for step in range(num_batches) for row in zip(*batches.batch(step)[::2], strict=True)]
    counts = Counter((int(domain), int(inputs[0])) for inputs, domain in rows)
    assert {domain for domain, _ in counts} == {0, 1}
    passes = Counter(counts.values())
    assert passes[1] >= 98 and passes[5] >= 18 and passes.total() == 120


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
    ],
)
def test_too_little_text_and_bad_weights(
    sizes: dict[str, int], batch_size: int, sequence_length: int, weights: dict[str, float] | str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Batches(numbered(sizes), batch_size, sequence_length, 0, weights)  # type: ignore[arg-type]


def test_epochs_and_run_must_fit() -> None:
    packed = numbered({"a": 1001})
    with pytest.raises(
        DataError, match=r"add up to 3,000 tokens, but the run trains on 1,500; make it 2 times as long"
    ):
        Batches(packed, 5, 10, 0, epochs={"a": 3}, num_batches=30)
    with pytest.raises(DataError, match="epochs for unknown domain 'b'; known: a"):
        Batches(packed, 5, 10, 0, epochs={"b": 3}, num_batches=30)
    with pytest.raises(DataError, match="given num_batches"):
        Batches(packed, 5, 10, 0, epochs={"a": 3})
    with pytest.raises(DataError, match="leave out the weights"):
        Batches(packed, 5, 10, 0, "uniform", epochs={"a": 3}, num_batches=60)


def test_the_batches_of_a_seed_stay_what_they_are() -> None:
    """A run that is resumed by a later version must see the same data: change this only with the file format."""
    batches = Batches(numbered({"a": 700, "b": 300}), 4, 16, seed=7)
    firsts = [batches.batch(step).inputs_BS[:, 0].tolist() for step in (0, 1, 100)]
    assert list(itertools.chain(*firsts)) == GOLDEN


GOLDEN = [457, 106, 281, 489, 105, 26, 441, 633, 378, 410, 134, 122]
