"""moesaic.serve.loop.runner: what is heard of requests, and what becomes of those that fail."""

from functools import cache

import numpy as np
import pytest
import torch

from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.engine.program import Program
from moesaic.errors import GenerationError
from moesaic.models.decoder import Decoder
from moesaic.serve.choice import choosing
from moesaic.serve.loop import runner
from moesaic.serve.request import Progress, PromptScored, Request
from tests.serve import tiny
from tests.serve.runners import (
    CONTEXT,
    KINDS,
    VOCAB,
    HalfRight,
    Stepped,
    alone,
    engine_of,
    model_of,
    outcome,
    prompt_of,
)

CASE = KINDS[0]
BAD = 77  # a token whose embedding is no number


@cache
def broken_model() -> Decoder:
    model = Decoder(model_of(CASE).config).initialize(3).eval()
    model.load_state_dict(model_of(CASE).state_dict())
    with torch.no_grad():
        dict(model.named_parameters())["embedding.weight"][BAD] = torch.nan
    return model


def without_bad(prompt: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(token if token != BAD else 5 for token in prompt)


def scored(events: list) -> PromptScored:
    [found] = [event for event in events if isinstance(event, PromptScored)]
    return found


@pytest.mark.parametrize("size", [1, 2, 31, 100, CONTEXT])
def test_a_prompt_alone_is_scored(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "rows_at_once", lambda vocab_size: 24)
    prompt = prompt_of(0, size)
    stepped = Stepped(engine_of(CASE))
    stepped.run([Request(prompt_ids=prompt_of(0, 40), max_new_tokens=1)])  # a prefix, not to be used
    number = stepped.add(Request(prompt_ids=prompt, max_new_tokens=0, prompt_logprobs=3))
    stepped.finish()
    events = stepped.events[number]
    tokens = scored(events).tokens
    assert [info.token_id for info in tokens] == list(prompt)
    assert (tokens[0].logprob, tokens[0].top) == (None, ())
    logprobs = torch.log_softmax(engine_of(CASE).step([Piece(Text(), prompt, "all")]), -1)
    for info, before in zip(tokens[1:], logprobs, strict=False):
        assert info.logprob == pytest.approx(float(before[info.token_id]), abs=1e-5)
        values, ids = before.topk(3)
        assert [token for token, _ in info.top] == ids.tolist()
        assert [value for _, value in info.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert outcome(events)[:2] == ([], "")
    assert (outcome(events).last.reason, outcome(events).last.usage[:2]) == ("length", (size, 0))


def test_a_prompt_is_scored_before_it_is_continued_beside_others() -> None:
    request = Request(prompt_ids=prompt_of(40, 50), max_new_tokens=60, prompt_logprobs=0)
    plain = Request(prompt_ids=prompt_of(40, 50), max_new_tokens=60)
    wanted = Stepped(engine_of(CASE))
    wanted.run([request])
    stepped = Stepped(engine_of(CASE), cache_tokens=7 * 32, step_tokens=24)
    found = stepped.run([plain, request, request])
    assert stepped.runner.scheduler.preemptions > 0
    assert [one.tokens for one in found] == 3 * [alone(CASE, plain).tokens]
    for number in (2, 3):
        assert isinstance(stepped.events[number][0], PromptScored)
        assert scored(stepped.events[number]) == scored(wanted.events[1])


def test_nothing_to_write_ends_at_once() -> None:
    [found] = Stepped(engine_of(CASE)).run([Request(prompt_ids=(3, 4), max_new_tokens=0)])
    assert (found.tokens, found.last.reason, found.last.usage[:2]) == ([], "length", (2, 0))


@pytest.mark.parametrize("cache_tokens", [64, 4096])
def test_refuses_what_has_no_room(cache_tokens: int) -> None:
    stepped = Stepped(engine_of(CASE), cache_tokens=cache_tokens)
    most = min(cache_tokens, CONTEXT)
    with pytest.raises(GenerationError, match=f"context of {most}; shorten it to {most - 1} tokens or fewer"):
        stepped.add(Request(prompt_ids=(5,) * most, max_new_tokens=1))
    [found] = stepped.run([Request(prompt_ids=(5,) * (most - 3), max_new_tokens=99)])
    assert (len(found.tokens), found.last.reason) == (3, "length")


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_refuses_unknown_tokens(token: int) -> None:
    with pytest.raises(GenerationError, match=f"the model knows 0 to {VOCAB - 1}"):
        Stepped(engine_of(CASE)).add(Request(prompt_ids=(5, token), max_new_tokens=1))


def test_one_that_fails_does_not_take_others_along() -> None:
    prompts = [prompt_of(0, size, seed) for seed, size in enumerate((3, 40, 9, 70))]
    requests = [Request(prompt_ids=without_bad(prompt), max_new_tokens=20) for prompt in prompts]
    bad = [Request(prompt_ids=(*prompt, BAD, 4), max_new_tokens=20) for prompt in prompts[:2]]
    mixed = [requests[0], bad[0], requests[1], requests[2], bad[1], requests[3]]
    stepped = Stepped(Engine(broken_model(), threads=1), step_tokens=32)
    found = stepped.run(mixed)
    assert [one.last.reason for one in found] == ["length", "error", "length", "length", "error", "length"]
    assert "infinite or none" in (found[1].last.error or "")
    wanted = [alone(CASE, request).tokens for request in requests]
    assert [one.tokens for one in found if one.last.reason == "length"] == wanted
    assert stepped.runner.counts["error"] == 2


def test_one_that_no_token_can_be_chosen_for_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(prompt_ids=prompt_of(0, 5 + seed, seed), max_new_tokens=9) for seed in range(3)]

    def choose(logits_NV: np.ndarray, rows: list[choosing.Row], program: Program) -> list:
        if any(row.writing.request is requests[1] and row.writing.num_new == 4 for row in rows):
            raise GenerationError("no token is allowed here")
        return choosing.choose(logits_NV, rows, program)

    monkeypatch.setattr(runner, "choose", choose)
    found = Stepped(engine_of(CASE)).run(requests)
    assert [len(one.tokens) for one in found] == [9, 4, 9]
    assert found[1].last.error == "no token is allowed here"
    assert found[2].tokens == alone(CASE, requests[2]).tokens


def test_a_cancelled_request_ends_where_it_is() -> None:
    stepped = Stepped(engine_of(CASE), max_running=1)
    one, waiting = (stepped.add(Request(prompt_ids=(5, 6), max_new_tokens=50)) for _ in range(2))
    for _ in range(4):
        stepped.step()
    for number in (waiting, one, one):
        stepped.end(number)
    assert not stepped.runner.busy
    assert [outcome(stepped.events[number]).last.reason for number in (one, waiting)] == ["cancelled", "cancelled"]
    assert [len(outcome(stepped.events[number]).tokens) for number in (one, waiting)] == [4, 0]
    assert stepped.runner.scheduler.prefixes.num_available == stepped.runner.engine.cache.num_blocks


def test_what_was_held_back_is_told_at_the_end() -> None:
    request = Request(prompt_ids=prompt_of(0, 7), max_new_tokens=50)
    text = alone(CASE, request).text
    stepped = Stepped(engine_of(CASE))
    number = stepped.add(Request(prompt_ids=prompt_of(0, 7), max_new_tokens=50, stop=(text + "never",)))
    for _ in range(30):
        stepped.step()
    assert tiny.text_of(stepped.events[number]) == ""
    stepped.end(number)
    found = outcome(stepped.events[number])
    assert len(found.text) > 8 and text.startswith(found.text.rstrip("�"))


def experts_told(stepped: Stepped, number: int) -> list[dict[int, np.ndarray]]:
    progress = [event for event in stepped.events[number] if isinstance(event, Progress)]
    return [event.experts for event in progress if event.experts is not None]


@pytest.mark.parametrize("drafts", [False, True])
def test_tells_the_experts_of_new_tokens(drafts: bool) -> None:
    prompt = prompt_of(0, 20)
    engine, text, token_ids = engine_of(CASE), Text(), list(prompt)
    by_layer: dict[int, list[np.ndarray]] = {}
    while len(token_ids) < 32:
        logits = engine.step([Piece(text, token_ids[text.length :])])
        for layer, found in engine.routed().items():
            by_layer.setdefault(layer, []).append(found.expert_ids_TM[-1].numpy())
        token_ids.append(int(logits[0].argmax()))
    request = Request(prompt_ids=prompt, max_new_tokens=12, experts=True)
    stepped = Stepped(engine_of(CASE), HalfRight({prompt: token_ids[20:]}, 5) if drafts else None)
    stepped.add(Request(prompt_ids=prompt_of(0, 50, 2), max_new_tokens=30, speculate=False))
    number = stepped.add(request)
    stepped.finish()
    progress = experts_told(stepped, number)
    assert len(progress) < 12 if drafts else len(progress) == 12
    for layer, rows in by_layer.items():
        assert np.array_equal(np.concatenate([experts[layer] for experts in progress]), np.stack(rows))
    assert not experts_told(stepped, 1)


def test_hits_are_verified() -> None:
    requests = [Request(prompt_ids=prompt_of(70, 1 + seed, seed), max_new_tokens=5) for seed in range(5)]
    stepped = Stepped(engine_of(CASE), verify_hits=0.5)
    stepped.run(requests)
    assert (stepped.runner.scheduler.hits, stepped.runner.counts["verified"]) == (4, 2)
    assert stepped.runner.counts["mismatches"] == 0
    for keys, _ in stepped.runner.engine.cache.layers:
        keys.fill_(5)
    stepped.run(requests[:3])
    assert (stepped.runner.counts["verified"], stepped.runner.counts["mismatches"]) == (3, 1)


def test_a_model_that_cannot_share_prefixes_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(prompt_ids=prompt_of(70, 1 + seed, seed), max_new_tokens=5) for seed in range(3)]
    engine = engine_of(CASE)
    monkeypatch.setattr(runner, "can_share", lambda engine: False)
    stepped = Stepped(engine)
    stepped.run(requests)
    assert (stepped.runner.scheduler.hits, stepped.runner.scheduler.prefixes.num_blocks) == (0, 0)
