"""Drafts of a model's own layers: what is written is what it writes without them, whatever they say."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from moesaic.config import ModelConfig
from moesaic.engine import speculative
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.errors import ConfigError, GenerationError
from moesaic.models.decoder import Decoder
from tests.engine.test_ahead import FAMILIES, PROMPTS, config_of, engine_of
from tests.tiny import lively_decoder, tiny_config

PLAIN = tiny_config(windows=(None, 5))
TWO_AHEAD = dataclasses.replace(PLAIN, mtp=(PLAIN.layers[0],) * 2)


def repeater(config: ModelConfig = TWO_AHEAD) -> Decoder:
    """What follows a token depends on nothing but it, and the further layers know that."""
    model = lively_decoder(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down", "down_proj.weight")):
                weight.zero_()
            if name.endswith("projection.weight"):
                weight.copy_(torch.eye(*weight.shape))
            if "norm" in name:
                weight.fill_(1.0)
    return model.eval()


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"bits": 4, "threads": 2}, {"bits": 8, "cache_format": "fp32"}])
def test_writes_what_it_writes_without(case: str, settings: dict[str, Any]) -> None:
    engine = engine_of(case, **settings)
    wanted = engine.generate_batch(PROMPTS, 14, eos_token_ids=())
    found = speculative.generate_batch(engine, PROMPTS, 14, eos_token_ids=())
    assert found.token_ids == wanted
    assert 0 <= found.accepted <= found.drafted
    assert engine.cache.num_blocks == 16  # all came back


def test_right_drafts_are_accepted_and_save_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, steps = Engine(repeater(), threads=1, mtp=True), []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda pieces: steps.append(len(pieces)) or step(pieces))
    wanted = engine.generate_batch([[5, 6], [9]], 13, eos_token_ids=())
    steps.clear()
    found = speculative.generate_batch(engine, [[5, 6], [9]], 13, eos_token_ids=())
    assert found == (wanted, 16, 16)
    assert steps == [2] * 5  # a token from the prompts, then three of each text at a time


@pytest.mark.parametrize("wrong", [(), (0,), (1,), (0, 1)])
def test_wrong_drafts_change_nothing(monkeypatch: pytest.MonkeyPatch, wrong: tuple[int, ...]) -> None:
    """Drafts that are right but at some of their places."""
    engine = engine_of(FAMILIES[0])
    wanted = engine.generate_batch(PROMPTS, 12, eos_token_ids=())
    whole = [[*prompt, *new, 0, 0] for prompt, new in zip(PROMPTS, wanted, strict=True)]

    def drafts(_engine: Engine, texts: Sequence[tuple[Text, Sequence[int]]]) -> list[list[int]]:
        found = []
        for text, token_ids in texts:
            assert text.length == len(token_ids) - 1
            own = next(each for each in whole if each[: len(token_ids)] == list(token_ids))
            found.append([own[len(token_ids) + place] ^ (place in wrong) for place in range(2)])
        return found

    monkeypatch.setattr(speculative, "draft", drafts)
    found = speculative.generate_batch(engine, PROMPTS, 12, eos_token_ids=())
    assert found.token_ids == wanted
    assert found.accepted == {(): 3 * 7, (1,): 3 * 5}.get(wrong, 0)


def test_it_ends_as_it_would_have_ended() -> None:
    model, heard = repeater(), []
    engine = Engine(model, threads=1, mtp=True)
    alone = engine.generate([5, 6], 20, eos_token_ids=())
    for stop in set(alone):
        wanted = engine.generate_batch([[5, 6], [9]], 20, eos_token_ids=[stop])
        found = speculative.generate_batch(engine, [[5, 6], [9]], 20, eos_token_ids=[stop])
        assert found.token_ids == wanted
    speculative.generate_batch(engine, [[5, 6]], 5, eos_token_ids=(), on_token=lambda *each: heard.append(each))
    assert heard == [(0, token) for token in alone[:5]]
    full = speculative.generate_batch(engine, [[5] * 40, [7]], 100, eos_token_ids=())
    assert full.token_ids == engine.generate_batch([[5] * 40, [7]], 100, eos_token_ids=())
    assert list(map(len, full.token_ids)) == [8, 47]
    assert speculative.generate_batch(engine, [[5, 6]], 0) == ([[]], 0, 0)


def test_drafts_are_the_likeliest_of_each_layer() -> None:
    engine, text = Engine(repeater(), threads=1, mtp=True), Text()
    written = engine.generate([5, 6], 4, eos_token_ids=())
    engine.step([Piece(text, [5, 6])])
    for _ in range(2):  # drafts leave nothing behind
        assert speculative.draft(engine, [(text, [5, 6, written[0]])]) == [written[1:3]]
        assert text.ahead == {1: 1, 2: 0}
    assert speculative.draft(engine, []) == []
    short = Text()
    engine.step([Piece(short, [6])])
    assert speculative.draft(engine, [(text, [5, 6, written[0]]), (short, [6, written[0]])]) == [written[1:3]] * 2


def test_long_prompts_are_drafted_from_in_steps() -> None:
    config = dataclasses.replace(config_of(FAMILIES[2]), context_length=1300)
    engine = Engine(lively_decoder(config), threads=1, mtp=True)
    prompt = [token % 120 for token in range(1100)]
    assert speculative.generate_batch(engine, [prompt], 3, eos_token_ids=()).token_ids == [
        engine.generate(prompt, 3, eos_token_ids=())
    ]


def test_what_cannot_be_drafted_is_refused() -> None:
    model = repeater()
    with pytest.raises(ConfigError, match="an engine without layers that predict further tokens; make it with mtp"):
        speculative.generate_batch(Engine(model, threads=1), [[4]])
    engine, text = Engine(model, threads=1, mtp=True), Text()
    engine.step([Piece(text, [5, 6])])
    for token_ids in ([5, 6], [5, 6, 7, 8]):
        with pytest.raises(GenerationError, match=f"a text of {len(token_ids)} tokens of which 2 were run"):
            speculative.draft(engine, [(text, token_ids)])
    with pytest.raises(GenerationError, match="of which 0 were run"):
        speculative.draft(engine, [(Text(), [5])])
    with pytest.raises(GenerationError, match="an empty prompt"):
        speculative.generate_batch(engine, [[]])
