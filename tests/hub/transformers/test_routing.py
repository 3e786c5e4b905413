"""What a transformers model routes, as a trace that moesaic's own model of the same weights would write."""

import numpy as np
import pytest
import torch

from moesaic import families
from moesaic.errors import ConfigError, TraceError
from moesaic.hub.transformers import RoutingRecorder, record_routing
from moesaic.trace import Fingerprint
from tests.hub.transformers.tiny import tiny_model, tokens


def routed_by(model, ids):
    """(expert ids, weights) of each layer [T, K], recomputed from its router's logits."""
    logits = model(ids, output_router_logits=True).router_logits
    best = [torch.softmax(layer, -1).topk(2) for layer in logits]
    return [(each.indices, each.values / each.values.sum(-1, keepdim=True)) for each in best]


def test_every_choice_and_weight_is_recorded_and_nothing_changes(tmp_path):
    model, ids = tiny_model(), tokens()
    before = model(ids).logits
    trace = record_routing(model, [ids, {"input_ids": ids}], tmp_path / "trace.npz")
    assert torch.equal(model(ids).logits, before) and len(trace) == 2
    assert trace.fingerprint == Fingerprint.of(families.from_hf(model.config.to_dict()))
    for forward in trace:
        assert forward.token_ids_T is not None and np.array_equal(forward.token_ids_T, ids.flatten().numpy())
        assert forward.document_ids_T is not None and forward.document_ids_T.tolist() == [0] * 9 + [1] * 9
        for layer, (chosen, weights) in enumerate(routed_by(model, ids)):
            rows = forward.rows[layer]
            assert np.array_equal(rows.expert_ids_R.reshape(-1, 2), chosen.numpy())
            assert np.allclose(rows.weights_R.reshape(-1, 2), weights.detach().numpy(), atol=1e-6)


def test_padding_has_no_rows_and_domains_are_kept(tmp_path):
    model, ids = tiny_model().train(), tokens()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    batches = [("code", ids), ("prose", {"input_ids": ids, "attention_mask": mask})]
    trace = record_routing(model, batches, tmp_path / "trace.npz")
    assert model.training
    assert trace.domains == ("code", "prose") and trace.num_tokens == 36 and trace.num_routed_tokens == 32
    assert trace.domain_counts(0).sum(1).tolist() == [36, 28]


def test_decoding_is_recorded_token_by_token(tmp_path):
    model, ids = tiny_model(), tokens()
    with RoutingRecorder(model, tmp_path / "trace.npz") as recorder:
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    trace = record_routing(model, [text], tmp_path / "whole.npz")
    forwards = list(type(trace).open(recorder.path))
    assert [forward.num_tokens for forward in forwards] == [18, 2, 2]
    whole = trace.rows(1).expert_ids_R.reshape(2, -1, 2)
    assert np.array_equal(forwards[0].rows[1].expert_ids_R.reshape(2, 9, 2), whole[:, :9])
    assert np.array_equal(forwards[1].rows[1].expert_ids_R.reshape(2, 1, 2), whole[:, 9:10])


def test_another_familys_trace_says_what_can_be_seen(tmp_path):
    trace = record_routing(tiny_model("nemotron_h"), [tokens()], tmp_path / "trace.npz")
    assert trace.fingerprint.family == "nemotron_h"
    assert [layer[2:] for layer in trace.fingerprint.layers] == [(6, 2), (6, 2)]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="has no experts"):
        record_routing(torch.nn.Linear(3, 5), [tokens()], tmp_path / "trace.npz")
    with pytest.raises(TraceError, match="no forward pass"):
        record_routing(tiny_model(), [], tmp_path / "trace.npz")
    with pytest.raises(TraceError, match="domain_ids"):
        record_routing(tiny_model(), [tokens(), ("code", tokens())], tmp_path / "trace.npz")
    assert not (tmp_path / "trace.npz").exists()
