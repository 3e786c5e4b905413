"""The engine's layers that predict further tokens against the decoder's (models/mtp.py), which define them.

B batch, S sequence, N rows of logits, V vocab.
"""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic import families, save
from moesaic.config import CapacityConfig, ModelConfig, MoeConfig
from moesaic.engine import memory
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.engine.packing import Precision
from moesaic.errors import ConfigError, GenerationError
from moesaic.models.decoder import Decoder
from tests.families.cases import COMMON, OUR_CASES
from tests.tiny import lively_decoder, tiny_config

FAMILIES = ["deepseek_v3/two further tokens", "deepseek_v3/a further token, tied", "glm4_moe/a further token"]
PLAIN = tiny_config(windows=(None, 5, None), shared=True)
CONFIGS = [*FAMILIES, "windows, three tokens, divided logits"]
PROMPTS = [[5, 9, 2, 47, 31, 8, 19], [4, 7], list(range(3, 44))]


def config_of(case: str) -> ModelConfig:
    if case in OUR_CASES:
        return families.from_hf({"model_type": case.partition("/")[0], **COMMON, **OUR_CASES[case]})
    return dataclasses.replace(PLAIN, mtp=PLAIN.layers, logits_divisor=3.0, embedding_multiplier=1.5)


@cache
def model_of(case: str) -> Decoder:
    return lively_decoder(config_of(case)).eval()


def engine_of(case: str, **settings: Any) -> Engine:
    return Engine(model_of(case), **{"threads": 1, **settings}, mtp=True)


@torch.no_grad()
def wanted_of(model: Decoder, token_ids: list[int]) -> list[Tensor]:
    """Logits of every depth, [S - k, V] of layer k."""
    hidden_BSD, ids_BS = model.hidden(torch.tensor([token_ids])), torch.tensor([token_ids])
    logits = [model.logits(hidden_BSD)[0]]
    for depth in range(1, min(len(model.config.mtp), len(token_ids) - 1) + 1):
        hidden_BSD = model.hidden_ahead(hidden_BSD[:, :-1], ids_BS[:, depth:], depth=depth)
        logits.append(model.logits(hidden_BSD)[0])
    return logits


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_of_whole_texts_are_those_of_the_decoder(case: str) -> None:
    engine, model = engine_of(case), model_of(case)
    texts = [Text() for _ in PROMPTS]
    wanted = [wanted_of(model, prompt) for prompt in PROMPTS]
    found = engine.step([Piece(text, prompt, "all") for text, prompt in zip(texts, PROMPTS, strict=True)])
    assert_near(found, torch.cat([each[0] for each in wanted]))
    for depth in range(1, engine.program.num_ahead + 1):
        pieces = [Piece(text, prompt[depth:], "all") for text, prompt in zip(texts, PROMPTS, strict=True)]
        assert_near(engine.ahead(pieces, depth), torch.cat([each[depth] for each in wanted if depth < len(each)]))


@pytest.mark.parametrize("settings", [{}, {"bits": 8}, {"bits": 4}, {"cache_format": "int8"}])
@pytest.mark.parametrize("case", CONFIGS)
def test_prompts_in_pieces_and_token_by_token_get_the_same_bits(case: str, settings: dict[str, Any]) -> None:
    whole, prompt = Text(), PROMPTS[-1]
    engine = engine_of(case, threads=2, **settings)
    engine.step([Piece(whole, prompt)])
    num_ahead = engine.program.num_ahead
    wanted = [engine.ahead([Piece(whole, prompt[depth:], "all")], depth) for depth in range(1, num_ahead + 1)]
    text, other = Text(), Text()
    found: list[list[Tensor]] = [[] for _ in range(num_ahead)]
    for start, end in ((0, 1), (1, 6), (6, 7), (7, 30), (30, 39), (39, 40), (40, 41)):
        engine.step([Piece(other, [7, 3]), Piece(text, prompt[start:end])])
        for depth in range(1, num_ahead + 1):
            new = prompt[text.ahead.get(depth, 0) + depth : end]
            found[depth - 1].append(engine.ahead([Piece(other, [9]), Piece(text, new, "all")], depth)[1:])
    for depth in range(num_ahead):
        assert torch.equal(torch.cat(found[depth]), wanted[depth])


@pytest.mark.parametrize("case", CONFIGS)
def test_what_was_a_draft_leaves_no_trace(case: str) -> None:
    """The layers run on tokens that the text does not get, it is cut, and goes on otherwise."""
    engine, prompt = engine_of(case), PROMPTS[-1]
    text = Text()
    engine.step([Piece(text, [*prompt[:20], 1, 2, 3])])
    for depth in range(1, engine.program.num_ahead + 1):
        engine.ahead([Piece(text, [*prompt[depth:20], 1, 2, 3, *range(5, 5 + depth)])], depth)
    engine.cache.cut(text, 20)
    assert all(places == 20 - depth for depth, places in text.ahead.items())
    engine.step([Piece(text, prompt[20:])])
    for depth, wanted in enumerate(wanted_of(model_of(case), prompt)[1:], 1):
        places = text.ahead[depth]
        assert_near(engine.ahead([Piece(text, prompt[places + depth :], "all")], depth), wanted[places:])


def test_they_catch_up_with_texts_that_went_on_without_them() -> None:
    engine, text, prompt = engine_of(FAMILIES[0]), Text(), PROMPTS[-1]
    for start, end in ((0, 30), (30, 31), (31, 41)):
        engine.step([Piece(text, prompt[start:end])])
    assert text.ahead == {}
    assert_near(engine.ahead([Piece(text, prompt[1:], "all")]), wanted_of(model_of(FAMILIES[0]), prompt)[1])


def test_the_routing_of_each_layer_is_heard() -> None:
    engine, text = engine_of(FAMILIES[0]), Text()
    engine.step([Piece(text, PROMPTS[0])])
    assert list(engine.routed()) == [*model_of(FAMILIES[0]).config.moe_layers]
    for depth, layer in ((1, 3), (2, 4)):
        engine.ahead([Piece(text, PROMPTS[0][depth:])], depth)
        assert {number: len(found.weights_TM) for number, found in engine.routed().items()} == {layer: 7 - depth}


@pytest.mark.parametrize(("bits", "cache_format"), [(8, None), (4, None), (8, "int8")])
def test_rounded_weights_and_a_narrow_cache_stay_near(bits: Any, cache_format: Any) -> None:
    case, prompt = FAMILIES[2], PROMPTS[-1]
    engine, text = engine_of(case, bits=bits, cache_format=cache_format), Text()
    engine.step([Piece(text, prompt)])
    found, wanted = engine.ahead([Piece(text, prompt[1:], "all")]), wanted_of(model_of(case), prompt)[1]
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=-1).mean() > (0.99 if bits == 8 else 0.8)


def test_an_engine_without_them_reads_none_and_keeps_nothing() -> None:
    model = model_of(FAMILIES[0])
    plain_model = lively_decoder(dataclasses.replace(model.config, mtp=()))
    without, plain = Engine(model, threads=1), Engine(plain_model, threads=1)
    assert without.program.packed_bytes == plain.program.packed_bytes
    assert without.cache.bytes_per_token == plain.cache.bytes_per_token
    for pieces in ([Piece(Text(), [4])], []):
        with pytest.raises(GenerationError, match=r"depth=1; this engine has 0 layers that .*; make it with mtp=True"):
            without.ahead(pieces)
    with pytest.raises(ConfigError, match="mtp, and this model has no layers that predict further tokens; leave it"):
        Engine(plain_model, mtp=True)


def test_places_that_are_not_there_yet_are_refused() -> None:
    engine, text = engine_of(FAMILIES[0]), Text()
    engine.step([Piece(text, [5, 6, 7])])
    with pytest.raises(GenerationError, match="4 places of a text of which step has seen 3; run that first"):
        engine.ahead([Piece(text, [6, 7, 8, 9])])
    with pytest.raises(GenerationError, match=r"1 places of a text of which ahead\(\.\.\., depth=1\) has seen 0"):
        engine.ahead([Piece(text, [7])], 2)
    with pytest.raises(GenerationError, match="depth=3; this engine has 2 layers that predict further tokens"):
        engine.ahead([Piece(text, [7])], 3)


def test_a_layer_that_is_not_lowered_is_named() -> None:
    first = PLAIN.layers[0]
    assert isinstance(first.feed_forward, MoeConfig)
    limited = dataclasses.replace(first.feed_forward, evaluation_capacity=CapacityConfig(factor=1.0))
    model = lively_decoder(dataclasses.replace(PLAIN, mtp=(dataclasses.replace(first, feed_forward=limited),)))
    Engine(model, threads=1)
    with pytest.raises(ConfigError, match="layer 3 limits its experts' tokens outside of training, which the engine"):
        Engine(model, mtp=True)


def test_a_number_that_is_not_finite_is_found_in_them() -> None:
    model = lively_decoder(config_of(FAMILIES[2]))
    with torch.no_grad():
        dict(model.named_parameters())["mtp.0.projection.weight"][3, 2] = torch.nan
    engine, text = Engine(model, threads=1, mtp=True), Text()
    engine.step([Piece(text, PROMPTS[0])])
    with pytest.raises(GenerationError, match="none: further tokens of layer 3, at token 0 of its text"):
        engine.ahead([Piece(text, PROMPTS[0][1:])])
    assert text.ahead.get(1, 0) == 0


def test_packed_files_hold_them_beside_the_rest(tmp_path: Path) -> None:
    folder, packed = tmp_path / "model", tmp_path / "packed"
    save(model_of(FAMILIES[0]), folder)

    def opened(mtp: bool) -> tuple[list[Tensor], int]:
        engine, text = Engine(folder, bits=8, threads=1, packed_file=packed, mtp=mtp), Text()
        found = [engine.step([Piece(text, PROMPTS[0], "all")])]
        found += [engine.ahead([Piece(text, PROMPTS[0][1:], "all")])] if mtp else []
        return found, packed.stat().st_mtime_ns

    plain, first = opened(False)
    ahead, second = opened(True)
    again, third = opened(True)
    beside, fourth = opened(False)
    assert first < second == third == fourth
    assert torch.equal(ahead[1], again[1])
    assert all(torch.equal(each[0], plain[0]) for each in (ahead, again, beside))


def test_memory_counts_them() -> None:
    config = config_of(FAMILIES[0])
    without, with_them = (memory.packed_bytes(config, Precision(), 4, mtp=mtp) for mtp in (False, True))
    assert with_them - without == 4 * config.mtp_total
