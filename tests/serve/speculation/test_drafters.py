"""Drafts change how fast a text is written, and nothing of what is written."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.engine.sampling import Sampling
from moesaic.errors import ConfigError
from moesaic.serve.choice.writing import Writing
from moesaic.serve.request import Request
from moesaic.serve.speculation.drafter import Drafter, Wanted
from moesaic.serve.speculation.guard import guarded
from moesaic.serve.speculation.model import AheadDrafter, ModelDrafter, check_same_tokens
from moesaic.serve.speculation.ngram import NgramDrafter
from tests.serve import tiny
from tests.serve.runners import CONTEXT, KINDS, VOCAB, Stepped, alone, engine_of, model_of, prompt_of
from tests.tiny import lively_decoder, tiny_config

RULES = [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.1)]


def requests(sampling: Sampling) -> list[Request]:
    return [
        Request(prompt_ids=prompt_of(common, own, seed), max_new_tokens=40, sampling=sampling, priority=seed % 2)
        for seed, (common, own) in enumerate([(0, 3), (40, 5), (64, 1), (20, 40)])
    ]


def drafter_of(kind: str, case: str, engine: Engine) -> Drafter:
    if kind == "n-gram":
        return NgramDrafter(shortest=1)
    if kind == "the same model":
        return ModelDrafter(engine_of(case), VOCAB)
    if kind == "another model":
        other = model_of(KINDS[2] if case == KINDS[0] else KINDS[0])
        return ModelDrafter(Engine(other, threads=1, max_length=90), VOCAB)
    return guarded(drafter_of(kind.removeprefix("guarded "), case, engine), engine)


@pytest.mark.parametrize("sampling", RULES, ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "kind", ["n-gram", "the same model", "another model", "guarded n-gram", "guarded the same model"]
)
@pytest.mark.parametrize("case", [KINDS[0], KINDS[2]])
def test_the_same_tokens(case: str, kind: str, sampling: Sampling) -> None:
    engine = engine_of(case)
    stepped = Stepped(engine, drafter_of(kind, case, engine), cache_tokens=9 * 32, step_tokens=60, max_running=4)
    found = stepped.run(requests(sampling))
    wanted = [alone(case, request) for request in requests(sampling)]
    assert [each.tokens for each in found] == [each.tokens for each in wanted]
    counts = stepped.runner.counts
    if kind == "the same model":
        assert counts["accepted"] == counts["drafted"] > 60, "it draws by the same random numbers"
    if kind == "another model":
        assert counts["drafted"] > 2 * counts["accepted"]


@pytest.mark.parametrize("sampling", RULES, ids=["greedy", "drawn"])
def test_layers_that_predict_further_tokens(sampling: Sampling) -> None:
    config = dataclasses.replace(tiny_config(vocab_size=VOCAB), context_length=CONTEXT)
    model = lively_decoder(dataclasses.replace(config, mtp=(config.layers[0],) * 2)).eval()
    engine = Engine(model, threads=1, mtp=True)
    wanted = Stepped(Engine(model, threads=1), share_prefixes=False).run(requests(sampling))
    stepped = Stepped(engine, AheadDrafter(engine), max_running=4)
    found = stepped.run(requests(sampling))
    assert [each.tokens for each in found] == [each.tokens for each in wanted]
    assert stepped.runner.counts["drafted"] > 50
    with pytest.raises(ConfigError, match="make it with mtp=True"):
        AheadDrafter(engine_of(KINDS[0]))


def test_a_request_may_do_without() -> None:
    engine = engine_of(KINDS[0])
    stepped = Stepped(engine, NgramDrafter(shortest=1))
    stepped.run([Request(prompt_ids=(1, 2, 1, 2, 1, 2), max_new_tokens=30, speculate=False)])
    assert stepped.runner.counts["drafted"] == 0


class Wrong(Drafter):
    """Drafts that are right by chance."""

    def propose(self, wanted: Any) -> list[list[int]]:
        return [
            [(len(each.writing.token_ids) * 7 + step) % VOCAB for step in range(min(3, each.room))] for each in wanted
        ]


def test_the_distribution_stays() -> None:
    """Of a text's second token, against the model's own probabilities; seeds are fixed."""
    engine, count = engine_of(KINDS[0]), 600
    firsts = [Piece(Text(), [1, 2, token]) for token in range(VOCAB)]
    of_first = torch.softmax(engine.step([Piece(Text(), [1, 2])])[0].double(), -1)
    wanted = (of_first[:, None] * torch.softmax(engine.step(firsts).double(), -1)).sum(0).numpy()
    stepped = Stepped(engine_of(KINDS[0]), Wrong(), max_running=32, cache_tokens=4096)
    found = stepped.run(
        [
            Request(prompt_ids=(1, 2), max_new_tokens=4, sampling=Sampling(temperature=1.0, seed=seed))
            for seed in range(count)
        ]
    )
    assert stepped.runner.counts["accepted"] > 0
    counts = np.bincount([each.tokens[1] for each in found], minlength=VOCAB)
    often = wanted * count >= 5
    counts, wanted = np.append(counts[often], counts[~often].sum()), np.append(wanted[often], wanted[~often].sum())
    assert stats.chisquare(counts, wanted / wanted.sum() * count).pvalue > 0.01


def writing(tokens: list[int]) -> Writing:
    return Writing(Request(prompt_ids=tuple(tokens), max_new_tokens=99), lambda ids: "", 999)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 12), st.integers(1, 9))
@settings(max_examples=100)
def test_n_grams_are_found(tokens: list[int], first: int, room: int) -> None:
    """As a search through the whole text finds them, however the text has grown."""
    first = min(first, len(tokens))
    drafter, text = NgramDrafter(longest=4, shortest=2, most=6), writing(tokens[:first])
    for token in [*tokens[first:], None]:
        found = drafter.propose([Wanted(text, Text(), room)])
        assert found == [searched(text.token_ids, min(room, 6))]
        if token is not None:
            text.token_ids.append(token)


def searched(tokens: list[int], room: int) -> list[int]:
    for size in (4, 3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:] and len(tokens) > size:
                repeated = tokens[end:] * room
                return repeated[:room]
    return []


def test_a_draft_model_with_other_tokens() -> None:
    check_same_tokens(tiny.tokenizer(), tiny.tokenizer())
    other = Tokenizer.train(["another text altogether"] * 3, vocab_size=270)
    with pytest.raises(ConfigError, match="a draft model with another vocabulary"):
        check_same_tokens(tiny.tokenizer(), other)


def test_a_draft_model_with_a_shorter_context() -> None:
    engine = Engine(model_of(KINDS[0]), threads=1, max_length=50)
    stepped = Stepped(engine_of(KINDS[0]), ModelDrafter(engine, VOCAB))
    request = Request(prompt_ids=prompt_of(0, 30), max_new_tokens=60)
    [found] = stepped.run([request])
    assert found.tokens == alone(KINDS[0], request).tokens and CONTEXT > 90
    assert 0 < stepped.runner.counts["accepted"] < 25
    assert not engine.cache._holders or max(engine.cache._holders) == 0, "texts that have ended are freed"
