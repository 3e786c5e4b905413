"""Damage is noticed, strangers are refused, and the sums are right."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.errors import TraceError
from moesaic.trace import Fingerprint, LayerFingerprint, Trace, TraceWriter
from tests.trace.traces import Case, cases, dipping, forge, some_forward, two_layers, write_trace

PAGE = Path(__file__).parents[2] / "docs" / "trace.md"


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def test_flipped_bits_are_noticed_all_over_the_file(tmp_path):
    whole = write_trace(tmp_path / "trace.npz").read_bytes()
    broken = tmp_path / "broken.npz"
    for place in [*range(0, len(whole) - 100, 11), *range(len(whole) - 100, len(whole))]:
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        broken.write_bytes(data)
        with pytest.raises(TraceError, match="SHA-256"):
            Trace.open(broken)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_noticed(data, tmp_path):
    whole = write_trace(tmp_path / "trace.npz").read_bytes()
    first, last = sorted(data.draw(st.lists(st.integers(0, len(whole)), min_size=2, max_size=2)))
    other = data.draw(st.binary(max_size=20))
    damaged = whole[:first] + other + whole[last:]
    if damaged == whole:
        return
    (tmp_path / "broken.npz").write_bytes(damaged)
    with pytest.raises(TraceError, match="no whole routing trace"):
        Trace.open(tmp_path / "broken.npz")


def test_a_file_cut_short_is_refused_wherever_it_was_cut(tmp_path):
    whole = write_trace(tmp_path / "trace.npz").read_bytes()
    for length in [0, 1, 63, 64, 65, *range(100, len(whole), 97), len(whole) - 1]:
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(TraceError, match="cut short"):
            Trace.open(tmp_path / "cut.npz")


def test_other_files_are_no_traces(tmp_path):
    np.savez(tmp_path / "other.npz", expert_ids=np.arange(9))
    with pytest.raises(TraceError, match="something else wrote it"):
        Trace.open(tmp_path / "other.npz")
    forge(tmp_path / "sealed.npz", {"expert_ids": np.arange(9)})
    with pytest.raises(TraceError, match="not as moesaic writes"):
        Trace.open(tmp_path / "sealed.npz")
    with pytest.raises(FileNotFoundError):
        Trace.open(tmp_path / "nowhere.npz")


def test_another_version_is_named(tmp_path):
    arrays = arrays_of(write_trace(tmp_path / "trace.npz"))
    forge(tmp_path / "new.npz", {"about": arrays["about"], "what it holds": np.arange(3)}, {"version": 2})
    with pytest.raises(TraceError, match=r"of version 2 and this moesaic reads version 1; record it again"):
        Trace.open(tmp_path / "new.npz")


BLANK: dict[str, np.ndarray] = {
    name: np.ones(3, np.uint8) for name in ("layers/3/row_offsets", "mask", "layers/1/expert_ids", "layers/1/weights")
}


def changed(arrays: dict[str, np.ndarray]) -> dict[str, tuple[dict, dict]]:
    """What no writer of ours writes: (arrays instead, about instead)."""
    offsets = arrays["layers/3/row_offsets"]
    return {
        "another format": ({}, {"format": "weights"}),
        "a layer too many": ({}, {"fingerprint": {**two_layers().to_json(), "family": 3, "layers": [{"layer": 9}]}}),
        "no layers": ({}, {"fingerprint": {"family": "mixtral", "layers": []}}),
        "a layer with text for a number": (
            {},
            {"fingerprint": {"family": "m", "layers": [{**two_layers().layers[0]._asdict(), "num_experts": "5"}]}},
        ),
        "fewer experts than ids": (
            {},
            {"fingerprint": Fingerprint("m", (LayerFingerprint(1, "a", 1, 1), two_layers().layers[1])).to_json()},
        ),
        "a weight on nothing": ({}, {"weight_on": {"1": "output", "3": "nothing"}}),
        "no weight_on": ({}, {"weight_on": {}}),
        "fewer domains than ids": ({}, {"domains": ["books"]}),
        "forwards that go back": ({"forward_offsets": np.array([0, 14, 7, 21])}, {}),
        "forwards that begin late": ({"forward_offsets": np.array([7, 14, 21, 21])}, {}),
        "forwards without an end": ({"forward_offsets": np.zeros(0, np.int64)}, {}),
        "forwards of half tokens": ({"forward_offsets": np.array([0.0, 7.0, 14.0, 21.0])}, {}),
        "tokens that are missing": ({"mask": arrays["mask"][:-1]}, {}),
        "rows that go back": ({"layers/3/row_offsets": dipping(offsets)}, {}),
        "rows beyond the end": ({"layers/3/row_offsets": offsets + (offsets == offsets[-1])}, {}),
        "rows of fewer tokens": ({"layers/3/row_offsets": offsets[1:] - offsets[1]}, {}),
        "an expert that is not": ({"layers/1/expert_ids": arrays["layers/1/expert_ids"] + np.uint8(4)}, {}),
        "weights in half precision": ({"layers/1/weights": arrays["layers/1/weights"].astype("<f2")}, {}),
    }


@pytest.mark.parametrize("change", changed(BLANK))
def test_a_right_checksum_is_not_enough(tmp_path, change):
    arrays = arrays_of(write_trace(tmp_path / "trace.npz"))
    instead, about = changed(arrays)[change]
    forge(tmp_path / "forged.npz", {**arrays, **instead}, about)
    with pytest.raises(TraceError, match="not as moesaic writes") as refusal:
        Trace.open(tmp_path / "forged.npz")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["mask", "layers/3/choices", "layers/3/chosen/weights", "forward_offsets"])
def test_no_array_may_be_missing(tmp_path, name):
    arrays = arrays_of(write_trace(tmp_path / "trace.npz"))
    del arrays[name]
    with pytest.raises(TraceError, match=f"not as moesaic writes.*{name}"):
        Trace.open(forge(tmp_path / "forged.npz", arrays))


def test_archives_of_other_kinds_are_refused(tmp_path):
    arrays = arrays_of(write_trace(tmp_path / "trace.npz"))
    square = {**arrays, "layers/1/weights": arrays["layers/1/weights"][:, None]}
    named = {**arrays, "layers/1/weights": np.array([{}])}
    for save, contents, seen in (
        (np.savez_compressed, arrays, "compressed"),
        (np.savez, square, r"layers/1/weights.npy has shape \(\d+, 1\)"),
        (np.savez, named, "dtype object"),
    ):
        save(tmp_path / "other.npz", allow_pickle=True, **contents)
        with pytest.raises(TraceError, match=seen):
            Trace.open(seal_by_hand(tmp_path / "other.npz"))


def seal_by_hand(path: Path) -> Path:
    """As the page says, without a line of ours: a comment of 64 bytes, the SHA-256 of everything before it."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"?" * 64
    data = path.read_bytes()[:-64]
    path.write_bytes(data + hashlib.sha256(data).hexdigest().encode())
    return path


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_numpy_can_write_a_trace_too(case: Case, tmp_path):
    ours = write_trace(tmp_path / "ours.npz", case)
    np.savez(tmp_path / "theirs.npz", allow_pickle=False, **arrays_of(ours))
    theirs = Trace.open(seal_by_hand(tmp_path / "theirs.npz"))
    for layer in case.fingerprint.num_experts:
        assert theirs.counts(layer).tolist() == Trace.open(ours).counts(layer).tolist()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_sums_are_those_of_plain_loops(case: Case, tmp_path):
    trace = Trace.open(write_trace(tmp_path / "trace.npz", case))
    assert trace.num_routed_tokens == sum(
        forward.num_tokens if forward.mask_T is None else int(forward.mask_T.sum()) for forward in case.forwards
    )
    for layer, num_experts in case.fingerprint.num_experts.items():
        counts, chosen, by_domain = [0] * num_experts, [0] * num_experts, np.zeros((3, num_experts), int)
        for forward in case.forwards:
            rows = forward.rows[layer]
            for token in range(forward.num_tokens):
                for row in range(rows.row_offsets[token], rows.row_offsets[token + 1]):
                    counts[rows.expert_ids_R[row]] += 1
                    domain = -1 if forward.domain_ids_T is None else forward.domain_ids_T[token]
                    if domain >= 0:
                        by_domain[domain, rows.expert_ids_R[row]] += 1
            for expert in forward.chosen.get(layer, rows).expert_ids_R:
                chosen[expert] += 1
        assert trace.counts(layer).tolist() == counts
        assert trace.chosen(layer).counts(num_experts).tolist() == chosen
        if any(forward.domain_ids_T is not None for forward in case.forwards):
            assert (trace.domain_counts(layer) == by_domain).all()
            totals = [max(1, total) for total in by_domain.sum(1).tolist()]
            assert np.allclose(trace.domain_shares(layer), [row / n for row, n in zip(by_domain, totals, strict=True)])


def test_chunks_do_not_show(tmp_path, monkeypatch):
    trace = Trace.open(write_trace(tmp_path / "trace.npz"))
    whole = trace.counts(3).tolist(), trace.domain_counts(3).tolist()
    monkeypatch.setattr("moesaic.trace.rows.CHUNK", 4)
    monkeypatch.setattr("moesaic.trace.reader._CHUNK", 5)
    assert (trace.counts(3).tolist(), trace.domain_counts(3).tolist()) == whole


def test_arrays_are_mapped_and_aligned(tmp_path):
    trace = Trace.open(write_trace(tmp_path / "trace.npz"))
    for array in (trace.forward_offsets, *trace.token_facts.values(), *trace.rows(3)[:4], *trace.chosen(3)[:4]):
        assert array.__array_interface__["data"][0] % 64 == 0
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_what_is_not_there_is_named(tmp_path):
    with TraceWriter(tmp_path / "trace.npz", two_layers()) as writer:
        writer.append(some_forward(3, seed=1))
    trace = Trace.open(tmp_path / "trace.npz")
    for ask, seen in (
        (lambda: trace.forward(1), "forward 1 of .*holds 1"),
        (lambda: trace.forward(-1), "forward -1"),
        (lambda: trace.rows(2), r"layer 2 of .*layers \[1, 3\] route"),
        (lambda: trace.domain_counts(1), "domains"),
    ):
        with pytest.raises(TraceError, match=seen):
            ask()


@pytest.mark.parametrize(
    ("other", "seen"),
    [
        (Fingerprint("qwen3_moe", two_layers().layers), "family mixtral, and here it is family qwen3_moe"),
        (
            Fingerprint("mixtral", (two_layers().layers[0], LayerFingerprint(3, "softmax_topk", 256, 2))),
            "layer 3 routing to 2 of 300 experts by softmax_topk, and here it is layer 3 routing to 2 of 256",
        ),
        (
            Fingerprint("mixtral", (two_layers().layers[0], LayerFingerprint(3, "sigmoid_topk", 300, 2))),
            "by softmax_topk, and here it is .* by sigmoid_topk",
        ),
        (Fingerprint("mixtral", two_layers().layers[:1]), "2 layers that route, and here it is 1 layers"),
        (Fingerprint("mixtral", two_layers().layers[1:]), "layer 1 routing .*, and here it is layer 3 routing"),
    ],
)
def test_another_model_is_refused_with_both_sides(tmp_path, other, seen):
    trace = Trace.open(write_trace(tmp_path / "trace.npz"))
    assert trace.require(two_layers()) is trace
    with pytest.raises(TraceError, match=seen):
        trace.require(other)


def snippets() -> list[str]:
    return [part.split("```")[0] for part in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]]


def test_the_page_reads_a_trace_with_numpy_alone(tmp_path, monkeypatch):
    first = snippets()[0]
    checksum = snippets()[1]
    assert len(first.splitlines()) <= 15
    assert "moesaic" not in first
    monkeypatch.chdir(tmp_path)
    trace = Trace.open(write_trace(tmp_path / "trace.npz"))
    seen: dict = {}
    exec(first, seen)
    exec(checksum, {})
    for layer in (1, 3):
        assert seen["counts"][layer].tolist() == trace.counts(layer).tolist()
    rows = trace.forward(1).rows[3]
    assert seen["about"] == json.loads(arrays_of(trace.path)["about"].tobytes())
    first_row, last_row = rows.row_offsets[2:4]
    assert seen["experts"].tolist() == rows.expert_ids_R[first_row:last_row].tolist()
    assert seen["weights"].tolist() == rows.weights_R[first_row:last_row].tolist()
