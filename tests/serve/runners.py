"""Requests run through an engine step by step, in the thread of the test; tiny models of each kind of attention."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from moesaic import families
from moesaic.engine.engine import Engine
from moesaic.engine.sampling import Sampling
from moesaic.models.decoder import Decoder
from moesaic.serve.choice.writing import Writing
from moesaic.serve.loop.runner import Runner
from moesaic.serve.loop.settings import LoopSettings
from moesaic.serve.request import Event, Finished, Request
from moesaic.serve.speculation.drafter import Drafter, Wanted
from tests.families.cases import CASES, COMMON
from tests.serve import tiny
from tests.tiny import lively_decoder

# Grouped queries; windows beside full attention, with sinks; latents.
KINDS = ("mixtral/top 2 of 5", "gpt_oss/as released", "deepseek_v3/as released, but for what predicts further tokens")
CONTEXT = 320
VOCAB = COMMON["vocab_size"]


@cache
def model_of(case: str) -> Decoder:
    fields: dict[str, Any] = {
        "model_type": case.partition("/")[0],
        **COMMON,
        **CASES[case],
        "max_position_embeddings": CONTEXT,
        "eos_token_id": None,
    }
    return lively_decoder(families.from_hf(fields)).eval()


def engine_of(case: str, **options: Any) -> Engine:
    return Engine(model_of(case), **{"threads": 1, **options})


def decode(token_ids: list[int]) -> str:
    """Some letters take two tokens."""
    return bytes(32 + token if token < 90 else (195, 128 + token % 64)[token % 2] for token in token_ids).decode(
        errors="replace"
    )


def prompt_of(common: int, own: int, seed: int = 0) -> tuple[int, ...]:
    """Tokens of which the first `common` are those of every other prompt."""
    return tuple((7 * place + place // 13) % VOCAB for place in range(common)) + tuple(
        (11 * place + 17 * seed + 3) % VOCAB for place in range(own)
    )


class Outcome(NamedTuple):
    tokens: list[int]
    text: str
    last: Finished


def outcome(events: Sequence[Event]) -> Outcome:
    last = events[-1]
    assert isinstance(last, Finished)
    assert not any(isinstance(event, Finished) for event in events[:-1])
    return Outcome(tiny.new_ids(events), tiny.text_of(events), last)


class Stepped:
    """A runner, and all that was heard of it. Steps are made as they are asked for."""

    def __init__(self, engine: Engine, drafter: Drafter | None = None, **settings: Any) -> None:
        self.runner = Runner(
            engine, decode, LoopSettings(**{"cache_tokens": 4096, "max_running": 8, **settings}), drafter
        )
        self.events: dict[int, list[Event]] = {}

    def add(self, request: Request) -> int:
        number = len(self.events) + 1
        self.events[number] = []
        self.runner.add(number, self.runner.writing(request))
        self._hear()
        return number

    def step(self) -> None:
        self.runner.step()
        self._hear()

    def end(self, number: int) -> None:
        self.runner.end(number, "cancelled")
        self._hear()

    def finish(self) -> None:
        while self.runner.busy:
            self.step()

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        """All of them, handed in together."""
        numbers = [self.add(request) for request in requests]
        self.finish()
        return [outcome(self.events[number]) for number in numbers]

    def _hear(self) -> None:
        for number, event in self.runner.take_heard():
            self.events[number].append(event)


def alone(case: str, request: Request, **options: Any) -> Outcome:
    """What is written of a request that is the only one ever."""
    [found] = Stepped(engine_of(case, **options), share_prefixes=False).run([request])
    return found


class HalfRight(Drafter):
    """Drafts what will be written behind a prompt, but for a token now and then."""

    def __init__(self, wanted: dict[tuple[int, ...], list[int]], wrong_every: int = 3) -> None:
        self.wanted, self.wrong_every = wanted, wrong_every

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._of(each.writing) for each in wanted]

    def _of(self, writing: Writing) -> list[int]:
        written = writing.num_new
        coming = self.wanted[writing.request.prompt_ids][written : written + 4]
        return [(token + (written + place) % self.wrong_every // 2) % VOCAB for place, token in enumerate(coming)]


SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=11)
