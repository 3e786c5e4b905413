"""What is written is what is read, in bounded memory, whole or not at all."""

import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from moesaic.errors import TraceError
from moesaic.trace import Fingerprint, LayerFingerprint, TokenRows, Trace, TracedForward, TraceWriter
from moesaic.trace import writer as writer_module
from tests.full_disk import full_disk
from tests.trace.traces import (
    DOMAINS,
    Case,
    assert_same_rows,
    cases,
    dipping,
    some_forward,
    some_rows,
    two_layers,
    write_trace,
)

RELAXED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@RELAXED
@given(case=cases())
def test_forwards_come_back_as_they_were(case: Case, tmp_path):
    trace = Trace.open(write_trace(tmp_path / "trace.npz", case))
    assert trace.fingerprint == case.fingerprint
    assert (trace.domains, len(trace)) == (DOMAINS, len(case.forwards))
    assert trace.num_tokens == sum(forward.num_tokens for forward in case.forwards)
    for found, wanted in zip(trace, case.forwards, strict=True):
        for layer, rows in wanted.rows.items():
            assert_same_rows(found.rows[layer], rows)
            # Where no capacity changed anything in this forward, what was chosen is what was computed.
            chosen = wanted.chosen.get(layer, rows)
            assert_same_rows(found.chosen.get(layer, found.rows[layer]), chosen)
            if layer in wanted.chosen:
                assert layer in found.chosen
        size = wanted.num_tokens
        masks, documents = (wanted.mask_T, np.ones(size, bool)), (wanted.document_ids_T, np.zeros(size, int))
        for got, (given_T, default_T) in ((found.mask_T, masks), (found.document_ids_T, documents)):
            assert got is not None
            assert got.tolist() == (default_T if given_T is None else given_T).tolist()
        for got, given_T in ((found.token_ids_T, wanted.token_ids_T), (found.domain_ids_T, wanted.domain_ids_T)):
            assert (got is None) == (given_T is None)
            assert got is None or given_T is None or got.tolist() == given_T.tolist()


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(1, "u1"), (255, "u1"), (256, "<u2"), (65_535, "<u2"), (65_536, "<u4"), (70_000, "<u4")],
)
def test_ids_take_as_few_bytes_as_the_experts_need(tmp_path, num_experts, dtype):
    rows = TokenRows(np.array([0, 1]), np.array([num_experts - 1]), np.array([0]), np.array([0.5], np.float32))
    fingerprint = Fingerprint("mixtral", (LayerFingerprint(0, "softmax_topk", num_experts, 1),))
    write_trace(tmp_path / "trace.npz", Case(fingerprint, [TracedForward({0: rows})]))
    read = Trace.open(tmp_path / "trace.npz").rows(0)
    assert (read.expert_ids_R.dtype, read.expert_ids_R.tolist()) == (np.dtype(dtype), [num_experts - 1])


def test_the_same_forwards_give_the_same_bytes(tmp_path):
    first, second = write_trace(tmp_path / "a.npz"), write_trace(tmp_path / "b.npz")
    assert first.read_bytes() == second.read_bytes()


def test_no_forward_is_kept(tmp_path):
    with TraceWriter(tmp_path / "trace.npz", two_layers()) as writer:
        forward = some_forward(50, seed=1)
        arrays = [weakref.ref(array) for rows in forward.rows.values() for array in rows[:4]]
        writer.append(forward)
        del forward
        assert [array() for array in arrays] == [None] * len(arrays)


def test_memory_does_not_grow_with_the_file(tmp_path):
    forward = some_forward(20_000, seed=1)
    forward = forward._replace(chosen={3: some_rows(20_000, 300, seed=5)})
    tracemalloc.start()
    with TraceWriter(tmp_path / "trace.npz", two_layers()) as writer:
        for _ in range(40):
            writer.append(forward)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "trace.npz").stat().st_size
    assert size > 30e6
    assert peak < size / 6


def test_an_error_leaves_nothing_new(tmp_path):
    def fail(path):
        with TraceWriter(path, two_layers()) as writer:
            writer.append(some_forward(30_000, seed=0))
            assert [entry.name for entry in tmp_path.iterdir()] in ([], ["old.npz"])  # also if the process is killed
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "new.npz")
    assert list(tmp_path.iterdir()) == []
    before = write_trace(tmp_path / "old.npz").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "old.npz")
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.npz"]
    assert (tmp_path / "old.npz").read_bytes() == before


@pytest.mark.parametrize(("num_tokens", "fails"), [(40_000, "append"), (2_000, "close")])
def test_a_full_disk_leaves_what_was_there(tmp_path, num_tokens, fails):
    before = write_trace(tmp_path / "trace.npz").read_bytes()
    forward = some_forward(num_tokens, seed=0)
    writer = TraceWriter(tmp_path / "trace.npz", two_layers())
    with pytest.raises(OSError, match="File too large") as refusal, full_disk(50_000), writer:
        writer.append(forward)
    assert any(entry.name == fails and entry.path == Path(writer_module.__file__) for entry in refusal.traceback)
    assert (tmp_path / "trace.npz").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.npz"]


def test_folders_are_made_and_not_replaced(tmp_path):
    assert len(Trace.open(write_trace(tmp_path / "a" / "b" / "trace.npz"))) == 3
    with pytest.raises(TraceError, match="is a folder"):
        TraceWriter(tmp_path / "a", two_layers())


def spoil(rows: TokenRows, **fields) -> TracedForward:
    good = some_forward(7, seed=0)
    return good._replace(rows={**good.rows, 1: rows._replace(**fields)})


def refused() -> dict[str, tuple[TracedForward, str]]:
    good = some_forward(7, seed=0)
    rows = good.rows[1]
    ones = np.ones(rows.num_rows, int)
    return {
        "a layer too few": (good._replace(rows={1: rows}), r"layers \[1\]"),
        "a chosen layer too many": (good._replace(chosen={2: rows}), r"layers \[1, 2, 3\]"),
        "expert too high": (spoil(rows, expert_ids_R=ones * 5), "experts from 5 to 5; they must be 0 to 4"),
        "expert below 0": (spoil(rows, expert_ids_R=-ones), "experts from -1"),
        "experts that are not integers": (spoil(rows, expert_ids_R=ones / 2), "experts of float64"),
        "choice too high": (spoil(rows, choices_R=ones * 256), "choices from 256"),
        "half precision": (spoil(rows, weights_R=rows.weights_R.astype(np.float16)), "float16 weights"),
        "a weight too few": (spoil(rows, weights_R=rows.weights_R[1:]), "weights for the"),
        "other tokens": (spoil(some_rows(6, 5, seed=1)), "7 row_offsets for 7|8 row_offsets for 6"),
        "falling offsets": (spoil(rows, row_offsets=dipping(rows.row_offsets)), "do not rise"),
        "offsets from 1": (spoil(rows, row_offsets=np.maximum(rows.row_offsets, 1)), "do not rise"),
        "an unnamed domain": (good._replace(domain_ids_T=np.full(7, 3)), "domain_ids from 3 to 3"),
        "tokens of a shape": (good._replace(token_ids_T=np.zeros((1, 7), int)), r"shape \(1, 7\)"),
        "a token below 0": (good._replace(token_ids_T=np.full(7, -1)), "token_ids from -1"),
        "a mask of numbers": (good._replace(mask_T=np.ones(7)), "mask of float64"),
    }


@pytest.mark.parametrize("case", refused())
def test_impossible_forwards_are_refused(tmp_path, case):
    forward, seen = refused()[case]
    with TraceWriter(tmp_path / "trace.npz", two_layers(), domains=DOMAINS) as writer:
        writer.append(some_forward(4, seed=8))
        with pytest.raises(TraceError, match=seen):
            writer.append(forward)
        writer.append(some_forward(5, seed=9))  # nothing of the refused one has been written
    trace = Trace.open(tmp_path / "trace.npz")
    assert trace.forward_offsets.tolist() == [0, 4, 9]
    assert_same_rows(trace.forward(1).rows[3], some_forward(5, seed=9).rows[3])


def unlike() -> dict[str, TracedForward]:
    good = some_forward(7, seed=0)
    wide = {layer: rows._replace(weights_R=rows.weights_R.astype(np.float64)) for layer, rows in good.rows.items()}
    inputs = {layer: rows._replace(weight_on="input") for layer, rows in good.rows.items()}
    return {
        "token_ids": good._replace(token_ids_T=np.zeros(7, int)),
        "float64 weights on the output": good._replace(rows=wide),
        "float32 weights on the input": good._replace(rows=inputs),
    }


@pytest.mark.parametrize("seen", unlike())
def test_a_trace_is_of_one_kind(tmp_path, seen):
    with TraceWriter(tmp_path / "trace.npz", two_layers()) as writer:
        writer.append(some_forward(4, seed=8))
        with pytest.raises(TraceError, match=seen):
            writer.append(unlike()[seen])
