import json

import numpy as np
import pytest

from moesaic.errors import DataError, TraceError
from moesaic.telemetry.inspection.findings import inspect_trace
from moesaic.telemetry.inspection.inspection import Inspection, agree, subject_of, why_not_comparable
from moesaic.telemetry.inspection.sentences import verdicts
from moesaic.telemetry.inspection.tokens import TokenTexts, frequent, loved
from moesaic.trace import Trace, TraceWriter
from tests.telemetry.inspection.known import DOMAINS, TEXTS, known_trace, tokenizer
from tests.trace.traces import two_layers


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    return known_trace(tmp_path_factory.mktemp("known") / "t.npz")


@pytest.fixture(scope="module")
def texts() -> TokenTexts:
    return TokenTexts(tokenizer())


def test_each_layer_is_found_to_go_by_what_it_goes_by(trace, texts):
    found = inspect_trace(trace, texts)
    by_domain, by_token, by_nothing = found.layers
    sizes = [len(texts.tokenizer.encode(text * 3)) * 12 for text in TEXTS.values()]
    assert (found.domains, found.domain_tokens, found.num_tokens) == (list(DOMAINS), sizes, sum(sizes))
    assert by_domain.domain_counts == [[sizes[0], sizes[0], 0, 0], [0, 0, sizes[1], sizes[1]]]
    share = sizes[0] / sum(sizes)
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert by_domain.information["domain"].value == pytest.approx(entropy)
    # Each domain's load is on two experts of its own: JSD from the average of (1/2, 1/2, 0, 0) and (0, 0, 1/2, 1/2).
    assert by_domain.divergence is not None and by_domain.divergence.value == pytest.approx(0.311278, abs=1e-6)
    assert by_domain.domain_divergence == pytest.approx(1)
    # A token says everything of its two experts but which of them.
    assert by_token.information["token"].value == pytest.approx(1, abs=0.2)
    assert by_token.vocabulary["token"].value == 1
    for name, against in by_nothing.information.items():
        assert against.value == pytest.approx(against.shuffled, abs=0.06), name
    assert by_domain.states == ["fair"] * 4 and by_domain.rows_per_token == 2


def test_counts_by_class_add_up_to_the_load(trace, texts):
    for layer in inspect_trace(trace, texts).layers:
        assert layer.class_counts is not None
        assert np.sum(layer.class_counts, 0).tolist() == layer.counts
        assert sum(layer.counts) == 2 * trace.num_tokens
        assert layer.mean_weights == [0.5] * 4


def test_loved_tokens_are_those_that_come_here(trace, texts):
    layer = inspect_trace(trace, texts).layers[1]
    assert layer.loved is not None
    for expert, tokens in enumerate(layer.loved):
        assert tokens and all(token.share == 1 for token in tokens)
        assert {token.token_id % 4 for token in tokens} <= {expert, (expert - 1) % 4}


def test_rare_tokens_stand_behind_frequent_ones():
    ids = np.array([7] * 400 + [3] * 8 + [5] * 2)
    tokens = frequent(ids)
    assert (tokens.ids_X.tolist(), tokens.counts_X.tolist()) == ([7, 3], [400, 8])
    assert tokens.labels_N.tolist() == [0] * 400 + [1] * 8 + [-1] * 2
    best = loved(tokens, np.array([[390, 10], [8, 0]]))
    assert [token.token_id for token in best[0]] == [7, 3]


def test_a_trace_without_ids_or_domains_tells_what_it_can(tmp_path, trace):
    with TraceWriter(tmp_path / "bare.npz", trace.fingerprint) as writer:
        for forward in trace:
            writer.append(forward._replace(token_ids_T=None, domain_ids_T=None))
    found = inspect_trace(Trace.open(tmp_path / "bare.npz"))
    layer = found.layers[0]
    assert (layer.information, layer.loved, layer.domain_counts, layer.divergence) == ({}, None, None, None)
    assert layer.counts == inspect_trace(trace).layers[0].counts
    with TraceWriter(tmp_path / "empty.npz", two_layers()):
        pass
    with pytest.raises(TraceError, match="holds no tokens"):
        inspect_trace(Trace.open(tmp_path / "empty.npz"))


def test_a_tokenizer_that_is_too_small_is_refused(tmp_path):
    other = known_trace(tmp_path / "t.npz", windows=1)
    small = TokenTexts(tokenizer())
    small.vocab_size = 40
    with pytest.raises(DataError, match="the tokenizer that its text was made with"):
        inspect_trace(other, small)


def test_two_traces_and_what_stands_in_the_way(tmp_path, trace, texts):
    other = known_trace(tmp_path / "other.npz", seed=1)
    found = agree(["other"], [other], trace)
    assert found.layers[0] == found.layers[2] == [1.0]
    assert found.layers[5][0] == pytest.approx(0.5, abs=0.06)
    assert found.chance[5][0] == pytest.approx(0.5, abs=0.02)
    shorter, wider = known_trace(tmp_path / "short.npz", windows=3), known_trace(tmp_path / "wide.npz", num_experts=5)
    assert why_not_comparable(shorter, trace) == "they read other texts"
    assert why_not_comparable(wider, trace) == "they have other layers, or other numbers of experts"
    with pytest.raises(TraceError, match="record both with the same text"):
        agree(["wide"], [wider], trace)


def test_the_document_and_its_sentences(trace, texts):
    inspection = Inspection(subjects=[subject_of("known", "known.npz", trace, texts)])
    tree = json.loads(json.dumps(inspection.to_json(), allow_nan=False))
    subject = tree["subjects"][0]
    assert subject["layers"][0]["divergence"].keys() == {"value", "shuffled"}
    sample = subject["samples"][0]
    assert "".join(sample["tokens"]).startswith(TEXTS[sample["domain"]])
    assert sample["experts"]["0"] == [[0, 1]] * len(sample["tokens"])
    way = next(way for way in subject["ways"] if way["text"] == ",")
    assert [share for _, share in way["experts"]["2"]] == [1, 1]
    told = [verdict.text for verdict in verdicts(inspection)]
    assert told[0] == "None of the 12 experts is surely dead, cold or oversized."
    assert any("specialise by domain most at layer 0: each domain's load is 0.311 bits" in text for text in told)
    assert any("the token" in text and "(layer 2)" in text for text in told)
