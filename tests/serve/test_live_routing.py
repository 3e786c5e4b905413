"""What is counted of a served engine's steps is what the engine says of each, whatever the steps' sizes."""

import numpy as np
import pytest

from moesaic.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, StackConfig
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.serve.live_routing import LONGEST_S, LiveRouting
from moesaic.telemetry.prometheus import exposition
from tests.serve import tiny
from tests.tiny import lively_decoder


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine() -> Engine:
    return tiny.engine()


def step(engine: Engine, *lengths: int) -> dict[int, np.ndarray]:
    """Run texts of these lengths; the choices, by layer."""
    texts = [Text() for _ in lengths]
    engine.step(
        [Piece(text, [(5 * place + 3) % 90 for place in range(n)]) for text, n in zip(texts, lengths, strict=True)]
    )
    chosen = {layer: routed.expert_ids_TM.numpy() for layer, routed in engine.routed().items()}
    for text in texts:
        engine.free(text)
    return chosen


STEPS = [(1,), (7, 1, 3), (1, 1), (300,), (2,)]


def test_counts_are_those_of_the_steps(engine):
    live = LiveRouting(engine)
    seen = []
    for lengths in STEPS:
        seen.append(step(engine, *lengths))
        live.hear()
    total = live.total()
    assert (total.steps, total.tokens) == (5, 316)
    for layer, counted in total.layers.items():
        ids = [chosen[layer].reshape(-1) for chosen in seen]
        assert counted.counts_E.tolist() == np.bincount(np.concatenate(ids), minlength=5).tolist()
        assert counted.distinct == sum(len(np.unique(each)) for each in ids)


def test_a_window_forgets_and_idle_time_is_empty(engine):
    clock = Clock()
    live = LiveRouting(engine, clock)
    for at in (0.0, 1.0, 2.0, 3.0):
        clock.now = 100 + at
        step(engine, 4)
        live.hear()
    assert live.window(60).tokens == 16
    assert live.window(1.5).tokens == 8
    clock.now = 130.0
    assert live.window(10).tokens == 0
    assert live.window(10).layers[0].counts_E.sum() == 0
    step(engine, 2)
    live.hear()
    assert live.window(10).tokens == 2
    assert live.total().tokens == 18


def test_old_counts_are_not_kept(engine):
    clock = Clock()
    live = LiveRouting(engine, clock)
    for _ in range(300):
        clock.now += 1
        step(engine, 1)
        live.hear()
    assert len(live._marks) <= LONGEST_S + 2
    assert live.window(1e9).tokens == pytest.approx(60, abs=1)


def test_the_wire_and_the_metrics_say_the_same(engine):
    live = LiveRouting(engine)
    step(engine, 50)
    live.hear()
    told = live.to_json(live.total())
    assert [layer["layer"] for layer in told["layers"]] == [0, 1]
    first = told["layers"][0]
    assert sum(first["counts"]) == 50 * first["top_k"]
    assert 1 <= first["effective_experts"] <= first["distinct_per_step"] <= first["num_experts"] == 5
    text = exposition(live.as_load(live.total()))
    assert f'moesaic_expert_rows_total{{layer="0",expert="2"}} {first["counts"][2]}\n' in text


def test_before_the_first_token_nothing_is_known(engine):
    live = LiveRouting(engine)
    assert live.routes
    layer = live.to_json(live.total())["layers"][0]
    assert layer["counts"] == [0] * 5
    assert layer["load_entropy"] is layer["distinct_per_step"] is layer["dead"] is None


def test_a_dense_model_has_no_experts():
    layer = LayerConfig(
        attention=AttentionConfig(num_heads=2, num_key_value_heads=1, head_dim=6),
        feed_forward=MlpConfig(intermediate_size=20),
    )
    config = ModelConfig(
        family="llama", vocab_size=90, hidden_size=12, context_length=64, decoder=StackConfig(layers=(layer,))
    )
    live = LiveRouting(Engine(lively_decoder(config), threads=1))
    live.hear()
    assert not live.routes
    assert live.to_json(live.total()) == {"steps": 0, "tokens": 0, "layers": []}
