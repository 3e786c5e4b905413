"""Traces of any shape, and files that claim to be traces."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from moesaic.trace import Fingerprint, LayerFingerprint, TokenRows, TracedForward, TraceWriter
from moesaic.trace.archive import ArrayParts, seal, write_archive

DOMAINS = ("books", "code", "law")
NUM_EXPERTS = (1, 2, 5, 255, 256, 65_535, 65_536, 70_000)  # both sides of where ids take one more byte


class Case(NamedTuple):
    """A model and what it did."""

    fingerprint: Fingerprint
    forwards: list[TracedForward]


@st.composite
def token_rows(draw: st.DrawFn, num_tokens: int, num_experts: int, weight_on: Any, dtype: str) -> TokenRows:
    """Any rows: tokens without any, experts chosen twice, gaps between choices, any bits as weights."""
    counts_T = draw(st.lists(st.integers(0, 3), min_size=num_tokens, max_size=num_tokens))
    num_rows = sum(counts_T)
    ids = st.lists(st.integers(0, num_experts - 1), min_size=num_rows, max_size=num_rows)
    choices = [sorted(draw(st.sets(st.integers(0, 9), min_size=n, max_size=n))) for n in counts_T]
    bits = draw(st.binary(min_size=num_rows * np.dtype(dtype).itemsize, max_size=num_rows * np.dtype(dtype).itemsize))
    return TokenRows(
        row_offsets=np.concatenate([[0], np.cumsum(counts_T)]).astype(np.int64),
        expert_ids_R=np.array(draw(ids), dtype=np.int64),
        choices_R=np.array([choice for of_token in choices for choice in of_token], dtype=np.int64),
        weights_R=np.frombuffer(bits, dtype),
        weight_on=weight_on,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A few forwards of a model of one to three layers; domains, token ids, masks where hypothesis wants them."""
    indices = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=3)))
    layers = tuple(LayerFingerprint(i, "softmax_topk", draw(st.sampled_from(NUM_EXPERTS)), 1) for i in indices)
    weight_on, dtype = draw(st.sampled_from(["output", "input"])), draw(st.sampled_from(["<f4", "<f8"]))
    has = {name: draw(st.booleans()) for name in ("tokens", "domains")}
    forwards = []
    for _ in range(draw(st.integers(0, 4))):
        num_tokens = draw(st.integers(0, 5))

        def column(values: st.SearchStrategy, dtype: Any, size: int = num_tokens) -> np.ndarray:
            return np.array(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype)

        def rows(layer: LayerFingerprint, size: int = num_tokens) -> TokenRows:
            return draw(token_rows(size, layer.num_experts, weight_on, dtype))

        forwards.append(
            TracedForward(
                rows={layer.layer: rows(layer) for layer in layers},
                chosen={layer.layer: rows(layer) for layer in layers if draw(st.booleans())},
                token_ids_T=column(st.integers(0, 2**32 - 1), np.int64) if has["tokens"] else None,
                mask_T=draw(st.sampled_from([None, column(st.booleans(), bool)])),
                document_ids_T=draw(st.sampled_from([None, column(st.integers(0, 9), np.int64)])),
                domain_ids_T=column(st.integers(-1, 2), np.int64) if has["domains"] else None,
            )
        )
    return Case(Fingerprint("mixtral", layers), forwards)


def two_layers() -> Fingerprint:
    """Layers 1 and 3 route, to 2 of 5 and of 300 experts."""
    return Fingerprint(
        "mixtral", (LayerFingerprint(1, "softmax_topk", 5, 2), LayerFingerprint(3, "softmax_topk", 300, 2))
    )


def some_rows(num_tokens: int, num_experts: int, seed: int) -> TokenRows:
    """Zero to two rows a token."""
    generator = np.random.default_rng(seed)
    counts_T = generator.integers(0, 3, num_tokens)
    num_rows = int(counts_T.sum())
    return TokenRows(
        row_offsets=np.concatenate([[0], np.cumsum(counts_T)]).astype(np.int64),
        expert_ids_R=generator.integers(0, num_experts, num_rows),
        choices_R=np.concatenate([np.arange(n) for n in counts_T]).astype(np.int64),
        weights_R=generator.random(num_rows, dtype=np.float32),
    )


def some_forward(num_tokens: int, seed: int, **facts: Any) -> TracedForward:
    """Of the model with two layers."""
    rows = {layer.layer: some_rows(num_tokens, layer.num_experts, seed + layer.layer) for layer in two_layers().layers}
    return TracedForward(rows=rows, **facts)


def write_trace(path: Path, case: Case | None = None) -> Path:
    """A trace of the case; without one of three forwards, the second of which has a capacity in layer 3."""
    if case is None:
        domains = np.array([0, 1, 2, 2, 1, -1, 0])
        forwards = [some_forward(7, seed, token_ids_T=np.arange(7) + seed, domain_ids_T=domains) for seed in range(3)]
        forwards[1] = forwards[1]._replace(chosen={3: some_rows(7, 300, 99)})
        case = Case(two_layers(), forwards)
    with TraceWriter(path, case.fingerprint, domains=DOMAINS) as writer:
        for forward in case.forwards:
            writer.append(forward)
    return path


def forge(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any] | None = None) -> Path:
    """Write arrays with a right checksum, whatever they say; `about` changes what the file says of itself."""
    if about is not None:
        tree = {**json.loads(arrays["about"].tobytes()), **about}
        arrays = {**arrays, "about": np.frombuffer(json.dumps(tree).encode(), np.uint8)}
    with path.open("w+b") as file:
        parts = (ArrayParts(name, array.dtype, len(array), [array.tobytes()]) for name, array in arrays.items())
        write_archive(file, parts)
        seal(file)
    return path


def dipping(offsets: np.ndarray) -> np.ndarray:
    """From 0 to the right end, but not always upwards."""
    return np.concatenate([offsets[:1], offsets[-1:], offsets[2:]])


def assert_same_rows(found: TokenRows, wanted: TokenRows) -> None:
    """The same numbers, and weights of the same bits."""
    assert found.row_offsets.tolist() == wanted.row_offsets.tolist()
    assert found.expert_ids_R.tolist() == wanted.expert_ids_R.tolist()
    assert found.choices_R.tolist() == wanted.choices_R.tolist()
    assert found.weights_R.dtype == wanted.weights_R.dtype
    assert found.weights_R.tobytes() == wanted.weights_R.tobytes()
    assert found.weight_on == wanted.weight_on
