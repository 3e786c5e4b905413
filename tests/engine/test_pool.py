"""The engine's threads: another program beside them, none at all, and many engines at once."""

import threading

import torch

from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.models.decoder import Decoder
from tests.tiny import tiny_config

MODEL = Decoder(tiny_config(), dtype=torch.float32).initialize(3).eval()
PROMPT = list(range(1, 41))


def logits(engine: Engine) -> torch.Tensor:
    text = Text()
    found = engine.step([Piece(text, PROMPT, "all")])
    engine.free(text)
    return found


def test_more_threads_than_processors_and_more_than_work():
    wanted = logits(Engine(MODEL, threads=1))
    for threads in (2, 7, 24):
        engine = Engine(MODEL, threads=threads)
        assert engine.program.native.threads == threads
        for _ in range(20):
            assert torch.equal(logits(engine), wanted)


def test_engines_run_beside_each_other():
    wanted = logits(Engine(MODEL, threads=1))
    engines = [Engine(MODEL, threads=2) for _ in range(4)]
    found: list[torch.Tensor] = []

    def run(engine: Engine) -> None:
        found.extend(logits(engine) for _ in range(30))

    users = [threading.Thread(target=run, args=(engine,)) for engine in engines]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert len(found) == 120 and all(torch.equal(each, wanted) for each in found)


def test_threads_that_slept_wake_up():
    engine = Engine(MODEL, threads=3)
    wanted = logits(engine)
    for _ in range(5):
        threading.Event().wait(0.02)  # much longer than they look for work
        assert torch.equal(logits(engine), wanted)
