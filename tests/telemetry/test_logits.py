from dataclasses import replace

import numpy as np
import pytest
import torch

from moesaic.config import RouterConfig
from moesaic.layers.router import RouterLayer
from moesaic.routing import RoutingDecision, TokenFacts
from moesaic.telemetry.heard import score_sums
from moesaic.telemetry.load import LayerLoad, LogitFacts
from moesaic.telemetry.logits import SAMPLED
from moesaic.telemetry.recorder import LoadRecorder
from tests.tiny import lively, tiny_config

T, E, K, D = 40, 6, 2, 9


def decide(mask_T: torch.Tensor | None = None, scale: float = 1.0, **settings):
    torch.manual_seed(0)
    router = RouterLayer(RouterConfig(**{"name": "softmax_topk", "num_experts": E, "top_k": K, **settings}), D).eval()
    assert router.weight is not None
    with torch.no_grad():
        router.weight.normal_(0.0, scale)
    with torch.no_grad():
        return router(torch.randn(T, D), TokenFacts(mask_T=mask_T))


def heard(decisions: dict[int, RoutingDecision]) -> tuple[LayerLoad, ...]:
    recorder = LoadRecorder({layer: one.rows.num_experts for layer, one in decisions.items()}, K)
    recorder.hear_all(decisions)
    return recorder.finish_step().layers


def read(decision: RoutingDecision) -> LogitFacts:
    facts = heard({0: decision})[0].logits
    assert facts is not None
    return facts


def test_facts_by_numpy():
    decision = decide()
    logits = decision.logits_TE.numpy().astype(np.float64)
    ranked = np.sort(logits, axis=1)[:, ::-1]
    facts = read(decision)
    assert facts.num_sampled == T
    assert facts.rms == pytest.approx(np.sqrt((logits**2).mean()), rel=1e-6)
    assert facts.peak == pytest.approx(abs(logits).max(), rel=1e-6)
    assert facts.margin == pytest.approx((ranked[:, K - 1] - ranked[:, K]).mean(), rel=1e-5)
    assert facts.flips_bf16 <= 0.05 and 0 <= facts.flips_noise < 0.1


def test_choices_that_hang_on_rounding_are_counted():
    """Logits near 256 are 2 apart in bf16: whatever decides below that is lost, and ties go to the lower expert."""
    decision = decide()
    near = 256 + torch.linspace(0, 0.5, E).repeat(T, 1)  # the last two are chosen, then the first two
    object.__setattr__(decision, "logits_TE", near)
    facts = read(decision)
    assert facts.flips_bf16 == 1 and facts.flips_noise > 0.3


def test_masked_tokens_do_not_count_and_padding_alone_tells_nothing():
    mask_T = torch.arange(T) % 4 == 0
    assert read(decide(mask_T)).num_sampled == T // 4
    assert heard({0: decide(torch.zeros(T, dtype=torch.bool))})[0].logits is None


def test_a_selection_bias_that_decides_shows_as_a_negative_margin():
    decision = decide(name="sigmoid_topk", selection_bias=True)
    before = read(decision).margin
    assert decision.rechoose is not None and decision.rechoose.selection_bias_E is not None
    decision.rechoose.selection_bias_E[0] = 10.0  # chosen by every token, whatever its logit
    assert before > 0 > read(decision).margin


@pytest.mark.parametrize("name", ["sigmoid_topk", "switch", "gshard_top2", "relu", "top_p", "sinkhorn", "sparsemixer"])
def test_every_router_that_can_choose_again_is_read(name):
    top_k = 1 if name == "switch" else K
    facts = read(decide(name=name, top_k=top_k))
    assert facts.num_sampled == T and 0 <= facts.flips_bf16 <= 1


def test_mean_scores_and_their_entropy():
    decision = decide()
    (entropy,), (scores_E,) = score_sums(decision.scores_TE[None])
    scores = decision.scores_TE.double()
    assert scores_E.numpy() == pytest.approx(scores.sum(0).numpy(), rel=1e-5)
    assert float(entropy) == pytest.approx(float(-(scores * scores.log()).sum()), rel=1e-5)


def test_a_recorder_samples_evenly_and_touches_no_random_number():
    model, tokens = lively(tiny_config()), torch.randint(0, 61, (4, 40))
    recorder = LoadRecorder.for_model(model.config)
    plain = model(tokens)
    state = torch.get_rng_state()
    heard = model(tokens, tape=recorder)
    assert torch.equal(plain, heard) and torch.equal(state, torch.get_rng_state())
    load = recorder.finish_step().layers[0]
    assert load.logits is not None and load.mean_scores_E is not None
    assert SAMPLED * 0.8 <= load.logits.num_sampled <= SAMPLED
    assert load.mean_scores_E.sum() == pytest.approx(1)
    assert load.router_entropy <= load.average_entropy <= np.log(5)


@pytest.mark.parametrize("most_bytes", [1, 4 << 20])
def test_layers_heard_together_tell_what_each_tells_alone(most_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moesaic.telemetry.heard.MOST_STACKED_BYTES", most_bytes)
    biased = {"name": "sigmoid_topk", "selection_bias": True}
    mask_T = torch.arange(T) % 3 == 0
    several = [{}, biased, biased, {"name": "top_p"}, {}, {"num_experts": 7}, {"name": "top_p"}]
    decisions = {layer: decide(mask_T, scale=0.3 + layer, **settings) for layer, settings in enumerate(several)}
    bias_E = decisions[2].rechoose.selection_bias_E  # type: ignore[union-attr]
    bias_E[3] = 0.4
    recorder = LoadRecorder({layer: one.rows.num_experts for layer, one in decisions.items()}, K, num_domains=3)
    domain_ids_B = torch.tensor([2, 0, 1, 1])
    for _ in range(2):
        recorder.hear_all(decisions, domain_ids_B)
    together = recorder.finish_step(1)
    recorder.set_domains(domain_ids_B.repeat_interleave(T // 4))
    for _ in range(2):
        for layer, decision in decisions.items():
            recorder.hear(layer, decision)
    alone = recorder.finish_step(1)
    for one, other in zip(together.layers, alone.layers, strict=True):
        assert one.logits is not None and one.domain_counts_ME is not None and one.domain_counts_ME.any(1).all()
        assert flat(one) == pytest.approx(flat(other), rel=1e-5)
    margins = [layer.logits.margin for layer in together.layers if layer.logits]
    assert len(set(margins)) == len(several)


def flat(load: LayerLoad) -> dict[str, float]:
    """Every number of a layer's load, by name."""
    tree = load.to_json()
    found = {name: value for name, value in tree.items() if isinstance(value, int | float)} | tree["logits"]
    for name in ("counts", "domain_counts", "mean_scores"):
        found |= {f"{name} {at}": float(value) for at, value in enumerate(np.ravel(tree[name]))}
    return found


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 63, 64, 65, 131])
def test_any_number_of_tokens_is_heard(num_tokens: int):
    """By loops over tokens, in double precision."""
    torch.manual_seed(num_tokens)
    router = RouterLayer(RouterConfig(name="softmax_topk", num_experts=E, top_k=K), D).eval()
    assert router.weight is not None
    with torch.no_grad():
        router.weight.normal_()
        decisions = {
            layer: router(torch.randn(num_tokens, D), TokenFacts(mask_T=torch.rand(num_tokens) < 0.8))
            for layer in range(3)
        }
    shared_T = decisions[0].mask_T
    decisions[1] = replace(decisions[1], mask_T=shared_T)  # of one mask, and one of another
    for load, decision in zip(heard(decisions), decisions.values(), strict=True):
        mask_T = decision.mask_T
        assert mask_T is not None
        scores = [row.double() for row, counts in zip(decision.scores_TE, mask_T.tolist(), strict=True) if counts]
        assert load.num_tokens == len(scores)
        assert (load.logits is None) == (not mask_T[:: -(-num_tokens // SAMPLED) or 1].any())
        if scores:
            entropies = [-float((row * row.log()).sum()) for row in scores]
            assert load.router_entropy == pytest.approx(sum(entropies) / len(scores), rel=1e-5)
            assert load.mean_scores_E == pytest.approx((sum(scores) / len(scores)).numpy(), rel=1e-5)  # type: ignore
