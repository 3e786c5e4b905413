"""Guided texts: valid by the jsonschema package, and cut short only by their length."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.sampling import Sampling
from moesaic.errors import GenerationError, MissingDependencyError
from moesaic.serve.choice import guidance as guidance_module
from moesaic.serve.choice.guidance import Guidance, Guide
from moesaic.serve.loop.loop import Loop
from moesaic.serve.request import Event, Finished, Grammar, GrammarKind, Request
from moesaic.serve.speculation.ngram import NgramDrafter
from tests.serve import tiny
from tests.serve.schemas import schema

END = tiny.tokenizer().encode("<|im_end|>")[0]
VOCAB = tiny.tokenizer().vocab_size + 3


@pytest.fixture(scope="module")
def guidance() -> Iterator[Guidance]:
    made = Guidance(tiny.tokenizer(), VOCAB)
    yield made
    made.close()


def request(kind: GrammarKind, text: str = "", eos: tuple[int, ...] = (END,)) -> Request:
    return Request(prompt_ids=(1,), max_new_tokens=9, grammar=Grammar(kind, text), eos_token_ids=frozenset(eos))


def guided(guidance: Guidance, kind: GrammarKind, text: str = "", eos: tuple[int, ...] = (END,)) -> Guide:
    found = guidance.guide(request(kind, text, eos))
    assert found is not None
    return found


def allowed(guide: Guide, drafts: Sequence[int] = ()) -> np.ndarray:
    """Which tokens, bool [V]."""
    return np.unpackbits(guide.allowed(drafts), count=VOCAB, bitorder="little").view(bool)


def write(guide: Guide, seed: int, most: int = 400) -> list[int]:
    """Tokens drawn evenly from those allowed."""
    generator, written = np.random.default_rng(seed), []
    while not guide.ended and len(written) < most:
        token = int(generator.choice(np.flatnonzero(allowed(guide))))
        assert guide.add(token)
        if token != END:
            written.append(token)
    assert not guide.error
    return written


def check(text: str, of: dict[str, Any]) -> None:
    jsonschema.validate(
        json.loads(text),
        of,
        jsonschema.Draft202012Validator,
        format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
    )


@pytest.mark.parametrize("number", range(12))
def test_random_text_is_of_its_schema(guidance: Guidance, number: int) -> None:
    guide = guided(guidance, "json_schema", json.dumps(schema(number)))
    written = write(guide, number, most=2000)
    assert guide.ended, "these schemas let no text go on for long"
    check(tiny.tokenizer().decode(written), schema(number))


def test_any_object(guidance: Guidance) -> None:
    for seed in range(5):
        guide = guided(guidance, "json_object")
        written = write(guide, seed, most=3000)
        text = tiny.tokenizer().decode(written)
        assert isinstance(json.loads(text), dict) if guide.ended else text.startswith("{")


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", "(ab|[0-9]{3})+x?", "(ab|[0-9]{3})+x?"),
        ("regex", "é{2,3}", "é{2,3}"),
        ("lark", 'start: "<" word ("," word)* ">"\nword: /[a-z]{1,3}/', "<[a-z]{1,3}(,[a-z]{1,3})*>"),
    ],
)
def test_expressions_and_grammars(guidance: Guidance, kind: GrammarKind, text: str, pattern: str) -> None:
    for seed in range(5):
        guide = guided(guidance, kind, text)
        assert re.fullmatch(pattern, tiny.tokenizer().decode(write(guide, seed))) and guide.ended


def test_ends_only_where_the_grammar_does(guidance: Guidance) -> None:
    guide, (digit,) = guided(guidance, "regex", "[0-9]{2,3}"), tiny.tokenizer().encode("7")
    assert not allowed(guide)[END] and allowed(guide)[digit]
    for _ in range(2):
        assert guide.add(digit)
    assert allowed(guide)[END] and allowed(guide)[digit] and not guide.ended
    assert guide.add(digit) and guide.ended, "nothing but the end could follow"


def test_what_is_not_allowed_ends_it(guidance: Guidance) -> None:
    (digit,), (letter,) = tiny.tokenizer().encode("7"), tiny.tokenizer().encode("x")
    broken = guided(guidance, "regex", "[0-9]{2}")
    assert not broken.add(letter) and broken.ended and broken.error
    whole = guided(guidance, "regex", "[0-9]{1,2}")
    assert whole.add(digit) and not whole.add(letter) and whole.ended and not whole.error


def test_ends_that_are_text(guidance: Guidance) -> None:
    """A token that ends this request, and is part of what must be written."""
    (brace,) = tiny.tokenizer().encode("}")
    guide = guided(guidance, "regex", r"\{[0-9]\}", (brace,))
    assert not allowed(guide)[brace]
    for token in tiny.tokenizer().encode("{7"):
        assert guide.add(token)
    assert np.flatnonzero(allowed(guide)).tolist() == [brace] and guide.add(brace) and guide.ended


def test_tokens_that_the_tokenizer_lacks_are_never_allowed(guidance: Guidance) -> None:
    assert not allowed(guided(guidance, "regex", "(?s:.*)"))[tiny.tokenizer().vocab_size :].any()
    assert allowed(guided(guidance, "regex", "(?s:.*)")).sum() > 200


@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 99)), max_size=8))
@settings(max_examples=25)
def test_drafts_change_nothing(guidance: Guidance, number: int, ways: list[tuple[int, bool, int]]) -> None:
    """Masks behind drafts are those behind the same tokens; wrong drafts are cut; looking ahead moves nothing."""
    text = json.dumps(schema(number))
    plain, drafted = (guided(guidance, "json_schema", text) for _ in range(2))
    for size, ahead, seed in ways:
        generator = np.random.default_rng(seed)
        drafts = generator.integers(0, VOCAB, size).tolist()
        if plain.ended:
            return
        right = int(generator.choice(np.flatnonzero(allowed(plain))))
        drafts = [right, *drafts]
        valid = drafts[: drafted.num_valid(drafts)]
        if ahead:
            guidance.look_ahead([(drafted, valid)])
        assert (allowed(drafted) == allowed(plain)).all()
        masks = [allowed(drafted, valid[:count]) for count in range(1, len(valid) + 1)]
        for token, mask in zip(valid, masks, strict=True):
            assert plain.add(token) == drafted.add(token)
            if not plain.ended:
                assert (allowed(plain) == mask).all()


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", "nonsense", "a JSON schema that cannot be used: expected ident"),
        ("json_schema", '{"type": "objec"}', "Invalid type: objec"),
        ("json_schema", '{"not": {}}', "Unimplemented keys"),
        ("json_schema", '{"type":"integer","minimum":5,"maximum":3}', "cannot be used|no text fulfils"),
        ("json_schema", '{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/a"}}}', "no text fulfils"),
        ("json_schema", '{"type":"string","pattern":"(?=a)b"}', "error: look-around"),
        ("json_schema", json.dumps({"enum": ["x" * 70_000]}), "70,014 characters; use 65,536 or fewer"),
        (
            "json_schema",
            json.dumps({"allOf": [{"anyOf": [{"const": [i, j]} for j in range(9)]} for i in range(9)]}),
            "cannot be used",
        ),
        ("regex", "(ab", "a regular expression that cannot be used: .*unclosed group"),
        ("regex", "", "only the empty one"),
        ("lark", 'start: "a" | b', "unknown name"),
        ("lark", "nonsense !!", "a grammar that cannot be used"),
    ],
    ids=range(12),
)
def test_impossible_grammars(guidance: Guidance, kind: GrammarKind, text: str, words: str) -> None:
    for _ in range(2):
        with pytest.raises(GenerationError, match=words) as raised:
            guidance.guide(request(kind, text))
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_compiling_has_its_time(guidance: Guidance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidance_module, "COMPILE_S", 0.0)
    slow = {"type": "integer", "multipleOf": 20_011}
    with pytest.raises(GenerationError, match="takes more than 0 s to compile"):
        guidance.guide(request("json_schema", json.dumps(slow)))


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    made = Guidance(tiny.tokenizer(), VOCAB)
    with pytest.raises(MissingDependencyError, match=r"pip install \"moesaic\[serve\]\""):
        made.guide(request("json_object"))
    made.close()


def test_without_a_grammar(guidance: Guidance) -> None:
    assert guidance.guide(Request(prompt_ids=(1,), max_new_tokens=1)) is None


def test_a_tokenizer_of_a_gguf_file() -> None:
    whole = tiny.tokenizer().backend
    vocab = sorted(whole.get_vocab(), key=lambda token: whole.token_to_id(token) or 0)
    merges = [" ".join(pair) for pair in json.loads(whole.to_str())["model"]["merges"]]
    special = whole.get_added_tokens_decoder()
    tokenizer = Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": vocab,
            "tokenizer.ggml.token_type": [3 if token in special else 1 for token in range(len(vocab))],
            "tokenizer.ggml.merges": merges,
        }
    )
    made = Guidance(tokenizer, VOCAB)
    written = write(guided(made, "json_schema", json.dumps(schema(3))), 0, most=2000)
    check(tokenizer.decode(written), schema(3))
    made.close()


def served(requests: list[Request], **settings: Any) -> list[list[Event]]:
    listener = tiny.Listener()
    guidance = Guidance(tiny.tokenizer(), VOCAB)
    loop = Loop(tiny.engine(), tiny.tokenizer().decode, listener, guidance=guidance, **settings)
    try:
        return tiny.run(loop, listener, requests)
    finally:
        loop.close()


def requests_of(numbers: range) -> list[Request]:
    return [
        Request(
            prompt_ids=(1, 2 + number % 50),
            max_new_tokens=450,
            sampling=Sampling(temperature=1.0, seed=number),
            grammar=Grammar("json_schema", json.dumps(schema(number))),
            eos_token_ids=frozenset({END}),
        )
        for number in numbers
    ]


def check_served(numbers: range) -> None:
    """Valid, or a beginning that the grammar accepts."""
    num_ended, guidance = 0, Guidance(tiny.tokenizer(), VOCAB)
    for number, events in zip(numbers, served(requests_of(numbers)), strict=True):
        last = events[-1]
        assert isinstance(last, Finished) and last.reason in ("stop", "length"), last
        if last.reason == "stop":
            num_ended += 1
            check(tiny.text_of(events), schema(number))
        else:
            guide = guided(guidance, "json_schema", json.dumps(schema(number)))
            assert all(guide.add(token) for token in tiny.new_ids(events))
    guidance.close()
    assert num_ended > 0.9 * len(numbers)


def test_the_model_writes_by_schemas() -> None:
    check_served(range(12))


@pytest.mark.slow
def test_the_model_writes_by_300_schemas() -> None:
    check_served(range(300))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guided_texts_are_the_same_with_drafts(temperature: float) -> None:
    requests = [replace(each, sampling=Sampling(temperature=temperature, seed=3)) for each in requests_of(range(8))]
    plain, drafted = served(requests), served(requests, drafter=NgramDrafter(shortest=1))
    assert [tiny.new_ids(events) for events in plain] == [tiny.new_ids(events) for events in drafted]
    last = [events[-1] for events in drafted]
    assert sum(each.usage.accepted for each in last if isinstance(each, Finished)) > 0


def test_a_request_that_writes_nothing_of_its_grammar() -> None:
    """Its length is reached at once, or it asks for an end before the grammar has one."""
    grammar = Grammar("regex", "[0-9]{2}")
    short = Request(prompt_ids=(1,), max_new_tokens=1, grammar=grammar)
    early = Request(
        prompt_ids=(1,), max_new_tokens=20, min_new_tokens=9, grammar=grammar, eos_token_ids=frozenset({END})
    )
    first, second = served([short, early])
    assert re.fullmatch("[0-9]", tiny.text_of(first)) and re.fullmatch("[0-9]{2}", tiny.text_of(second))
    assert [event.reason for event in (first[-1], second[-1]) if isinstance(event, Finished)] == ["length", "stop"]


def test_a_loop_without_guidance() -> None:
    listener = tiny.Listener()
    loop = Loop(tiny.engine(), tiny.tokenizer().decode, listener)
    with pytest.raises(GenerationError, match="without guidance"):
        loop.submit(Request(prompt_ids=(1,), max_new_tokens=1, grammar=Grammar("json_object")))
    loop.close()
