"""The engine against the decoder that defines it, for a tiny model of every family's every corner.

T tokens, N rows of logits, V vocab.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic import families, save
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.errors import CheckpointError, ConfigError, GenerationError
from moesaic.models.decoder import Decoder
from tests.families.cases import CASES, COMMON
from tests.tiny import lively_decoder

REFERENCE_ONLY = ("deepseek_v32", "deepseek_v4", "glm_moe_dsa")
OURS = [case for case in CASES if not case.startswith(REFERENCE_ONLY)]
PROMPTS = [[5, 9, 2, 77, 31, 8, 19], [4], list(range(3, 44))]


@cache
def model_of(case: str) -> Decoder:
    fields: dict[str, Any] = {"model_type": case.partition("/")[0], **COMMON, **CASES[case]}
    return lively_decoder(families.from_hf(fields)).eval()


def rows(engine: Engine, text: Text, token_ids: list[int]) -> Tensor:
    """Logits of all of them."""
    return engine.step([Piece(text, token_ids, "all")])


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("case", OURS)
@torch.no_grad()
def test_logits_are_those_of_the_decoder(case: str) -> None:
    model = model_of(case)
    engine = Engine(model, threads=1)
    prompts = [prompt[: engine.max_length] for prompt in PROMPTS]
    wanted = [model(torch.tensor([prompt]))[0] for prompt in prompts]
    together = [Piece(Text(), prompt, "all") for prompt in prompts]
    assert_near(engine.step(together), torch.cat(wanted))
    longest, text = prompts[-1], Text()
    cuts = ((0, 5), (5, 6), (6, 30), (30, 41))
    in_pieces = [rows(engine, text, longest[start:end]) for start, end in cuts]
    assert_near(torch.cat(in_pieces), wanted[-1])


@pytest.mark.parametrize("case", OURS)
def test_writes_what_the_decoder_writes(case: str) -> None:
    from moesaic import generate

    model = model_of(case)
    engine = Engine(model, threads=2)
    prompts = [prompt[: engine.max_length - 12] for prompt in PROMPTS]
    written = engine.generate_batch(prompts, 12, eos_token_ids=())
    assert written == generate(model, prompts, 12, eos_token_ids=())


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(REFERENCE_ONLY)])
def test_says_which_part_it_does_not_run(case: str) -> None:
    with pytest.raises(ConfigError, match=r"which the engine does not run; moesaic\.load and moesaic\.generate do"):
        Engine(model_of(case))


@pytest.mark.parametrize(
    "settings", [{}, {"bits": 8}, {"bits": 4}, {"bits": 4, "values": "uneven"}, {"cache_format": "int8"}]
)
@pytest.mark.parametrize("case", ["mixtral/", "deepseek_v3/", "gpt_oss/", "llama4_text/"])
def test_a_token_has_the_same_bits_however_it_runs(case: str, settings: dict[str, Any]) -> None:
    model = model_of(next(name for name in OURS if name.startswith(case)))
    longest = PROMPTS[-1]
    alone = Engine(model, **settings, threads=1)
    wanted = rows(alone, Text(), longest)
    for threads in (1, 2, 3):
        engine = Engine(model, **settings, threads=threads)
        held = Text()
        rows(engine, held, [7] * 40)  # other blocks of the cache are taken
        text, others = Text(), [Text(), Text()]
        found = []
        for start, end in ((0, 1), (1, 8), (8, 31), (31, 40), (40, 41)):
            pieces = [Piece(others[0], [3, 4], "all"), Piece(text, longest[start:end], "all"), Piece(others[1], [9])]
            found.append(engine.step(pieces)[2:-1])
        assert torch.equal(torch.cat(found), wanted)


@pytest.mark.parametrize("case", ["mixtral/", "deepseek_v3/", "gpt_oss/", "llama4_text/"])
def test_a_cache_of_8_bits_stays_near_one_of_fp32(case: str) -> None:
    """Nearer than half the distance that weights of 8 bits bring, which are rounded alike; the experts are the same."""
    model = model_of(next(name for name in OURS if name.startswith(case)))
    exact = Engine(model, threads=1)
    wanted, places = rows(exact, Text(), PROMPTS[-1]), exact.routed()
    told = {layer: found.expert_ids_TM for layer, found in places.items()}

    def distance(**settings: Any) -> float:
        engine = Engine(model, threads=1, **settings)
        return float((engine.step([Piece(Text(), PROMPTS[-1], "all")], told) - wanted).norm() / wanted.norm())

    assert 0 < distance(cache_format="int8") < 0.5 * distance(bits=8, cache_format="fp32")


def test_routes_as_it_did_before_or_as_it_is_told() -> None:
    model = model_of(next(case for case in OURS if case.startswith("mixtral/")))
    engine = Engine(model, threads=1)
    wanted = rows(engine, Text(), PROMPTS[2])
    routed = engine.routed()
    assert {len(found.expert_ids_TM) for found in routed.values()} == {len(PROMPTS[2])}
    told = {layer: found.expert_ids_TM for layer, found in routed.items()}
    assert torch.equal(engine.step([Piece(Text(), PROMPTS[2], "all")], told), wanted)
    others = {layer: (ids + 1) % 3 for layer, ids in told.items()}
    assert not torch.equal(engine.step([Piece(Text(), PROMPTS[2], "all")], others), wanted)
    assert torch.equal(rows(engine, Text(), PROMPTS[2]), wanted)
    with pytest.raises(ValueError, match="dictated for another number of tokens"):
        engine.step([Piece(Text(), PROMPTS[0])], told)


@pytest.mark.parametrize("case", [OURS[0], next(case for case in OURS if case.startswith("deepseek_v3/"))])
@torch.no_grad()
def test_hidden_states_are_those_of_the_decoder(case: str) -> None:
    model = model_of(case)
    engine, prompt = Engine(model, threads=1), PROMPTS[2]
    with pytest.raises(GenerationError, match="no hidden states are at hand"):
        engine.hidden_states()
    engine.step([Piece(Text(), [4, 4], "none"), Piece(Text(), prompt, "none")])
    assert_near(engine.hidden_states()[2:], model.hidden(torch.tensor([prompt]))[0])


def test_a_text_goes_on_where_it_ended() -> None:
    engine = Engine(model_of(OURS[0]), threads=1)
    text = Text()
    first = engine.generate(PROMPTS[0], 4, eos_token_ids=(), text=text)
    whole = [*PROMPTS[0], *first]
    assert text.length == len(whole) - 1
    assert engine.generate([*whole, 5], 3, eos_token_ids=(), text=text) == engine.generate(
        [*whole, 5], 3, eos_token_ids=()
    )


def test_blocks_serve_other_texts_once_they_are_free() -> None:
    engine = Engine(model_of(OURS[0]), threads=1)
    for _ in range(20):
        text = Text()
        rows(engine, text, PROMPTS[-1])
        engine.free(text)
    assert engine.cache.num_blocks == 16


@pytest.mark.parametrize("token_ids", [[-1], [131], [4, 10**9]])
def test_refuses_unknown_tokens(token_ids: list[int]) -> None:
    engine = Engine(model_of(OURS[0]), threads=1)
    with pytest.raises(GenerationError, match="the model knows 0 to 130"):
        engine.step([Piece(Text(), token_ids)])


def test_refuses_texts_that_become_too_long() -> None:
    engine = Engine(model_of(OURS[0]), threads=1, max_length=16)
    with pytest.raises(GenerationError, match="a text of 17 tokens; this engine's texts have 16 or fewer"):
        engine.step([Piece(Text(), [5] * 17)])
    assert len(engine.generate([5] * 10, 128, eos_token_ids=())) == 6


def test_says_where_a_number_is_not_finite() -> None:
    model = Decoder(model_of(OURS[0]).config).initialize(3).eval()
    with torch.no_grad():
        dict(model.named_parameters())["layers.1.attention.o_proj.weight"][3, 2] = torch.nan
    engine = Engine(model, threads=1)
    with pytest.raises(GenerationError, match="infinite or none: projections of layer 1, at token 0 of its text"):
        engine.generate(PROMPTS[0], 2)


def test_says_which_expert_broke() -> None:
    model = Decoder(model_of(next(case for case in OURS if case.startswith("mixtral/"))).config).initialize(3).eval()
    with torch.no_grad():
        dict(model.named_parameters())["layers.2.feed_forward.experts.down"][1, 4, 2] = torch.inf
    engine = Engine(model, threads=1)
    with pytest.raises(GenerationError, match="experts of layer 2, expert 1, at token"):
        engine.generate(PROMPTS[2], 2)


@pytest.mark.parametrize("given", [{"threads": 0}, {"threads": -2}, {"max_length": 0}])
def test_refuses_sizes_below_one(given: dict[str, int]) -> None:
    name, value = next(iter(given.items()))
    with pytest.raises(ConfigError, match=f"{name}={value}; use 1 or more, or leave it out"):
        Engine(model_of(OURS[0]), **given)  # type: ignore[arg-type]


def test_refuses_a_text_twice_in_a_step() -> None:
    engine, text = Engine(model_of(OURS[0]), threads=1), Text()
    with pytest.raises(GenerationError, match="two pieces of one text in a step; put their tokens into one piece"):
        engine.step([Piece(text, [5, 6]), Piece(text, [7])])
    assert (text.length, text.blocks) == (0, [])


def test_goes_on_after_what_it_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, text = Engine(model_of(OURS[0]), threads=1), Text()
    wanted = rows(engine, Text(), PROMPTS[2])
    first = rows(engine, text, PROMPTS[2][:10])
    many = [Piece(Text(), PROMPTS[2]) for _ in range(20)]  # more blocks than there are
    for refused in ([*many, Piece(Text(), [5] * 65)], [*many, Piece(Text(), [10**6])]):
        with pytest.raises(GenerationError):
            engine.step(refused)
    monkeypatch.setattr(engine.cache, "max_blocks", 30)
    with pytest.raises(GenerationError, match="may not grow"):
        engine.step(many)
    assert torch.equal(torch.cat([first, rows(engine, text, PROMPTS[2][10:])]), wanted)


def test_refuses_another_dtype() -> None:
    with pytest.raises(ConfigError, match=r"dtype=torch\.float16; known: torch\.float32, torch\.bfloat16"):
        Engine(model_of(OURS[0]), dtype=torch.float16)


def test_refuses_another_cache() -> None:
    with pytest.raises(ConfigError, match="cache_format='fp8'; use fp32, bf16, int8, or leave it out"):
        Engine(model_of(OURS[0]), cache_format="fp8")  # pyright: ignore[reportArgumentType]


def test_refuses_other_bits() -> None:
    with pytest.raises(ConfigError, match="5 bits; known: 4, 8"):
        Engine(model_of(OURS[0]), bits=5)  # type: ignore[arg-type]


def test_uneven_values_are_for_four_bits() -> None:
    with pytest.raises(ConfigError, match="values='uneven' without 4 bits, which they are for; add bits=4, or leave"):
        Engine(model_of(OURS[0]), bits=8, values="uneven")
    with pytest.raises(ConfigError, match="values='odd'; known: even, uneven"):
        Engine(model_of(OURS[0]), bits=4, values="odd")  # type: ignore[arg-type]
    packed = Engine(model_of(OURS[0]), bits=8, experts_bits=4, values="uneven").program.packed_bytes
    assert packed == Engine(model_of(OURS[0]), bits=8, experts_bits=4).program.packed_bytes


def test_packed_weights_are_kept_in_a_file(tmp_path: Path) -> None:
    case = next(case for case in OURS if case.startswith("deepseek_v3/"))
    save(model_of(case), tmp_path / "model")
    packed = tmp_path / "packed"
    first = Engine(tmp_path / "model", bits=4, threads=1, packed_file=packed)
    wanted = rows(first, Text(), PROMPTS[0])
    before = packed.stat().st_mtime_ns
    again = Engine(tmp_path / "model", bits=4, threads=1, packed_file=packed)
    assert torch.equal(rows(again, Text(), PROMPTS[0]), wanted)
    assert packed.stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="packed, and it is written anew"):
        Engine(tmp_path / "model", bits=8, packed_file=packed)
    with pytest.raises(CheckpointError, match="packed, and it is written anew"):
        Engine(tmp_path / "model", bits=4, values="uneven", packed_file=packed)
    packed.write_bytes(packed.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="cut short or damaged; delete"):
        Engine(tmp_path / "model", bits=4, packed_file=packed)
    with pytest.raises(ConfigError, match="packed_file with a model in memory"):
        Engine(model_of(case), packed_file=packed)


def test_files_are_packed_as_a_model_in_memory_is(tmp_path: Path) -> None:
    case = next(case for case in OURS if case.startswith("gpt_oss/"))
    save(model_of(case), tmp_path)
    every: list[dict[str, Any]] = [{}, {"bits": 4}, {"bits": 8}, {"bits": 4, "values": "uneven"}]
    for settings in every:
        from_files = Engine(tmp_path, **settings, threads=2, dtype=torch.bfloat16)
        in_memory = Engine(model_of(case), **settings, threads=1, dtype=torch.bfloat16)
        assert torch.equal(rows(from_files, Text(), PROMPTS[2]), rows(in_memory, Text(), PROMPTS[2]))
