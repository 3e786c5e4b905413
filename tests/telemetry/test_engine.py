import numpy as np
import torch

from moesaic.engine.engine import Engine
from moesaic.models.decoder import route
from moesaic.telemetry.engine import EngineRecorder
from moesaic.trace import Fingerprint, Trace, TraceWriter
from tests.tiny import lively, tiny_config

MODEL = lively(tiny_config(windows=(None, None, None), shared=True))
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7]]


def steps(engine: Engine, hear) -> list[torch.Tensor]:
    """A prompt in two pieces together with another, then a few single tokens."""
    from moesaic.engine.cache import Text
    from moesaic.engine.engine import Piece

    texts, logits = [Text(), Text()], []
    pieces = [
        [Piece(texts[0], PROMPTS[0][:4]), Piece(texts[1], PROMPTS[1])],
        [Piece(texts[0], PROMPTS[0][4:])],
        *[[Piece(text, [token]) for text in texts] for token in (11, 12, 13)],
    ]
    for each in pieces:
        logits.append(engine.step(each))
        hear()
    for text in texts:
        engine.free(text)
    return logits


def test_the_engine_counts_what_the_model_routes():
    engine = Engine(MODEL, threads=1)
    recorder = EngineRecorder(engine)
    plain = steps(engine, lambda: None)
    heard = steps(engine, recorder.hear)
    assert all(torch.equal(one, other) for one, other in zip(plain, heard, strict=True))
    load = recorder.finish()
    expected = {layer: np.zeros(5, int) for layer in (0, 1)}
    for prompt in PROMPTS:
        rows = route(MODEL, torch.tensor([[*prompt, 11, 12, 13]]))
        for layer, found in rows.items():
            expected[layer] += found.counts_E.numpy()
    assert load.step == 1 and [layer.num_tokens for layer in load.layers] == [16, 16]
    for layer in load.layers:
        assert layer.counts_E.tolist() == expected[layer.layer].tolist()
    assert recorder.finish().layers[0].counts_E.sum() == 0


def test_a_trace_of_the_engine_is_the_steps_own_rows(tmp_path):
    engine = Engine(MODEL, threads=1)
    with TraceWriter(tmp_path / "trace.npz", Fingerprint.of(MODEL.config)) as writer:
        recorder = EngineRecorder(engine, trace=writer)
        found = []
        steps(engine, lambda: (recorder.hear(), found.append(engine.routed())))
    trace = Trace.open(tmp_path / "trace.npz")
    assert len(trace) == 5 and trace.counts(0).tolist() == recorder.finish().layers[0].counts_E.tolist()
    for forward, routed in zip(trace, found, strict=True):
        assert forward.rows[1].expert_ids_R.tolist() == routed[1].expert_ids_TM.flatten().tolist()
        assert forward.rows[1].weights_R.tolist() == routed[1].weights_TM.flatten().tolist()


def test_a_dense_engine_is_silent():
    engine = Engine(lively(tiny_config(windows=(None, None))), threads=1)
    recorder = EngineRecorder(engine)
    recorder.hear()
    assert recorder.finish().layers[0].num_tokens == 0
