import json
import math

import pytest
import torch

from moesaic.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    RouterConfig,
    StackConfig,
)
from moesaic.config.capacity import CapacityConfig
from moesaic.errors import ConfigError
from moesaic.routing import RoutingDecision, Rows
from moesaic.routing.capacity import limit
from moesaic.telemetry.heard import score_sums
from moesaic.telemetry.load import StepLoad, sum_loads
from moesaic.telemetry.recorder import LoadRecorder


def decide(num_tokens: int, num_experts: int, top_k: int, seed: int, mask_T: torch.Tensor | None = None):
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    scores_TE = logits_TE.softmax(-1)
    weights_TK, expert_ids_TK = scores_TE.topk(top_k)
    rows = Rows.from_topk(expert_ids_TK, weights_TK, num_experts, mask_T=mask_T)
    return RoutingDecision(rows=rows, logits_TE=logits_TE, scores_TE=scores_TE, mask_T=mask_T), expert_ids_TK


def test_a_step_sums_all_its_micro_batches_and_then_starts_anew():
    recorder = LoadRecorder({1: 5, 3: 7}, 2)
    first, first_ids = decide(11, 5, 2, seed=0)
    second, second_ids = decide(6, 5, 2, seed=1)
    other, _ = decide(4, 7, 2, seed=2)
    for layer, decision in ((1, first), (3, other), (1, second)):
        recorder.hear(layer, decision)
    load = recorder.finish_step()
    expected = torch.bincount(torch.cat([first_ids, second_ids]).flatten(), minlength=5)
    assert [layer.layer for layer in load.layers] == [1, 3]
    assert load.layers[0].counts_E.tolist() == expected.tolist()
    assert load.layers[0].num_tokens == 17
    assert load.step == 1
    assert recorder.decisions == {}
    again = recorder.finish_step()
    assert again.step == 2
    assert again.layers[0].counts_E.sum() == 0
    assert math.isnan(again.layers[0].router_entropy)
    assert load.layers[0].counts_E.sum() == 34  # what was handed out does not change afterwards


def test_padding_counts_nowhere():
    mask_T = torch.tensor([True, False, True, True, False])
    masked, _ = decide(5, 4, 2, seed=3, mask_T=mask_T)
    recorder = LoadRecorder({0: 4}, 2, num_domains=2)
    recorder.set_domains(torch.tensor([0, 1, 1, 1, 0]))
    recorder.hear(0, masked)
    load = recorder.finish_step().layers[0]
    scores_TE = masked.scores_TE[mask_T]
    assert load.num_tokens == 3
    assert load.counts_E.sum() == 6
    assert load.router_entropy == pytest.approx(float(torch.distributions.Categorical(scores_TE).entropy().mean()))
    assert load.domain_counts_ME is not None
    assert load.domain_counts_ME.sum(1).tolist() == [2, 4]


def test_domains_by_token_and_by_batch():
    decision, expert_ids_TK = decide(9, 6, 3, seed=4)
    domains_BS = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 1, 1]])
    recorder = LoadRecorder({0: 6}, 3, num_domains=3)
    recorder.set_domains(domains_BS)
    recorder.hear(0, decision)
    recorder.set_domains(2)
    recorder.hear(0, decision)
    load = recorder.finish_step().layers[0]
    expected = torch.zeros(3, 6, dtype=torch.int64)
    for token, domain in enumerate(domains_BS.flatten().tolist()):
        for expert in expert_ids_TK[token].tolist():
            expected[domain, expert] += 1
            expected[2, expert] += 1
    assert load.domain_counts_ME is not None
    assert load.domain_counts_ME.tolist() == expected.tolist()
    assert load.domain_counts_ME.sum(0).tolist() == load.counts_E.tolist()


def test_entropy_of_sigmoid_scores_is_that_of_their_shares():
    scores_TE = torch.rand(8, 5)
    shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    expected = torch.distributions.Categorical(shares_TE).entropy().sum()
    assert float(score_sums(scores_TE[None])[0]) == pytest.approx(float(expected), rel=1e-5)
    certain_TE = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert float(score_sums(certain_TE[None])[0]) == 0
    assert math.isfinite(float(score_sums(torch.zeros(1, 2, 5))[0]))


def test_listening_leaves_no_trace_in_the_gradient():
    logits_TE = torch.randn(4, 3, requires_grad=True)
    scores_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = scores_TE.topk(2)
    rows = Rows.from_topk(ids_TK, weights_TK, 3)
    recorder = LoadRecorder({0: 3}, 2)
    recorder.hear(0, RoutingDecision(rows=rows, logits_TE=logits_TE, scores_TE=scores_TE))
    assert not recorder._held[0].entropy_L.requires_grad


def test_for_model_finds_the_routed_layers():
    attention = AttentionConfig(num_heads=2, num_key_value_heads=1, head_dim=4)
    moe = MoeConfig(router=RouterConfig(name="softmax_topk", num_experts=6, top_k=2), intermediate_size=5)
    layers = (
        LayerConfig(attention=attention, feed_forward=MlpConfig(intermediate_size=7)),
        LayerConfig(attention=attention, feed_forward=moe),
    )
    config = ModelConfig(
        family="qwen3_moe", vocab_size=11, hidden_size=8, context_length=16, decoder=StackConfig(layers=layers)
    )
    recorder = LoadRecorder.for_model(config, num_domains=2)
    assert recorder.num_experts_by_layer == {1: 6}
    assert recorder.finish_step(step=40).layers[0].top_k == 2


def test_mistakes_are_named():
    recorder = LoadRecorder({0: 4}, 2)
    with pytest.raises(ConfigError, match="made for layers: 0"):
        recorder.hear(2, decide(3, 4, 2, seed=0)[0])
    with pytest.raises(ConfigError, match="over 5 experts"):
        recorder.hear(0, decide(3, 5, 2, seed=0)[0])
    with pytest.raises(ConfigError, match="counts no domains"):
        recorder.set_domains(torch.tensor([0]))
    with pytest.raises(ConfigError, match="domain 3 of 2; use 0 to 1"):
        LoadRecorder({0: 4}, 2, num_domains=2).set_domains(3)


def limited(decision: RoutingDecision, factor: float) -> RoutingDecision:
    router = RouterConfig(name="softmax_topk", num_experts=decision.rows.num_experts, top_k=2)
    return limit(decision, CapacityConfig(factor=factor), router)


def test_dropped_rows_are_counted_beside_what_was_chosen():
    mask_T = torch.ones(30, dtype=torch.bool)
    mask_T[20:] = False
    first, _ = decide(12, 5, 2, seed=5)
    second, _ = decide(30, 5, 2, seed=6, mask_T=mask_T)
    plain, recorder = LoadRecorder({0: 5}, 2, num_domains=1), LoadRecorder({0: 5}, 2, num_domains=1)
    dropped = lost = 0
    for decision in (first, second):
        for listener in (plain, recorder):
            listener.set_domains(0)
        plain.hear(0, decision)
        after = limited(decision, 0.4)
        recorder.hear(0, after)
        chosen, kept = decision.rows.token_ids_R.tolist(), after.rows.token_ids_R.tolist()
        dropped += len(chosen) - len(kept)
        lost += len(set(chosen) - set(kept))
    expected, found = plain.finish_step(), recorder.finish_step()
    assert (expected.layers[0].dropped_rows, expected.layers[0].lost_tokens) == (0, 0)
    assert (found.layers[0].dropped_rows, found.layers[0].lost_tokens) == (dropped, lost)
    assert dropped > lost > 0
    assert found.dropped_share == found.layers[0].dropped_share == dropped / 64
    assert found.layers[0].domain_counts_ME is not None
    for name in ("counts", "num_tokens", "router_entropy", "domain_counts"):
        assert found.layers[0].to_json()[name] == expected.layers[0].to_json()[name]
    two = sum_loads([found, found])
    assert (two.layers[0].dropped_rows, two.layers[0].lost_tokens) == (2 * dropped, 2 * lost)
    assert recorder.finish_step().layers[0].dropped_rows == 0


def test_loads_of_older_runs_read_as_dropless():
    decision, _ = decide(12, 5, 2, seed=5)
    recorder = LoadRecorder({0: 5}, 2)
    recorder.hear(0, limited(decision, 0.4))
    tree = recorder.finish_step().to_json()
    again = StepLoad.from_json(json.loads(json.dumps(tree)))
    assert again.to_json() == tree and again.layers[0].dropped_rows > 0
    for layer in tree["layers"]:
        del layer["dropped_rows"], layer["lost_tokens"]
    older = StepLoad.from_json(tree)
    assert (older.layers[0].dropped_rows, older.layers[0].lost_tokens, older.dropped_share) == (0, 0, 0.0)
    assert older.layers[0].counts_E.tolist() == again.layers[0].counts_E.tolist()
