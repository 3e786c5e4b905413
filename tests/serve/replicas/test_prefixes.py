"""Which replica gets a prompt."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.serve.replicas.prefixes import BLOCK_BYTES, MOST_BLOCKS, PrefixMap, beginnings, prompt_of

NAMES = ["a", "b", "c"]
running = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 50), min_size=1)
prompts = st.binary(max_size=5 * BLOCK_BYTES)


@given(prompts, prompts, prompts)
def test_prompts_share_the_beginnings_that_they_share(shared: bytes, one: bytes, other: bytes) -> None:
    found, wanted = beginnings(shared + one), beginnings(shared + other)
    whole = len(shared) // BLOCK_BYTES
    assert found[:whole] == wanted[:whole]
    assert len(found) == min(MOST_BLOCKS, len(shared + one) // BLOCK_BYTES)
    blocks = [(shared + text)[: (whole + 1) * BLOCK_BYTES] for text in (one, other)]
    if min(map(len, blocks)) == (whole + 1) * BLOCK_BYTES:
        assert (found[whole] == wanted[whole]) == (blocks[0] == blocks[1])


def test_long_prompts_are_looked_at_up_to_a_point() -> None:
    assert len(beginnings(bytes(2 * MOST_BLOCKS * BLOCK_BYTES))) == MOST_BLOCKS


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"[" * 100_000, b"\xff", b"{}", b'"text"'])
def test_bodies_that_say_nothing_have_an_empty_prompt(body: bytes) -> None:
    assert beginnings(prompt_of(body)) == []


def test_what_is_behind_the_prompt_does_not_matter() -> None:
    messages = [{"role": "user", "content": "x" * 400}]
    bodies = [{"model": "m", "messages": messages, "seed": seed} for seed in (1, 2)]
    bodies.append({"messages": [*messages, {"role": "user", "content": "more"}], "model": "m"})
    first, second, longer = (beginnings(prompt_of(json.dumps(body).encode())) for body in bodies)
    assert first == second and len(first) == 1 and longer[:1] == first


@given(running, prompts)
def test_every_replica_is_named_once_and_those_with_room_come_first(loads: dict[str, int], prompt: bytes) -> None:
    chooser = PrefixMap()
    prefix = beginnings(prompt)
    chooser.remember(prefix, "a")
    order = chooser.choose(prefix, loads)
    assert sorted(order) == sorted(loads)
    most = max(2.0, (sum(loads.values()) + 1) / len(loads) * chooser.slack)
    full = [loads[name] + 1 > most for name in order]
    assert full == sorted(full) and not full[0]
    if prefix:
        assert order == chooser.choose(prefix, dict(reversed(loads.items())))


def test_requests_without_a_beginning_go_to_all() -> None:
    chooser = PrefixMap()
    assert len({chooser.choose([], dict.fromkeys(NAMES, 0))[0] for _ in range(50)}) == len(NAMES)


def test_the_longest_beginning_decides() -> None:
    chooser, prompt = PrefixMap(), bytes(range(256)) * 8
    chooser.remember(beginnings(prompt[: 2 * BLOCK_BYTES] + b"x" * 2 * BLOCK_BYTES), "a")
    chooser.remember(beginnings(b"y" * 4 * BLOCK_BYTES), "b")
    idle = dict.fromkeys(NAMES, 0)
    assert chooser.choose(beginnings(prompt), idle)[0] == "a"
    chooser.remember(beginnings(prompt), "c")
    assert chooser.choose(beginnings(prompt), idle)[0] == "c"
    assert chooser.choose(beginnings(prompt), {"a": 0, "b": 0, "c": 9})[0] != "c"


@pytest.mark.parametrize("others", range(4))
def test_an_end_heard_of_late_does_not_lose_the_cache(others: int) -> None:
    chooser, prefix = PrefixMap(), beginnings(b"again" * BLOCK_BYTES)
    chooser.remember(prefix, "a")
    assert chooser.choose(prefix, {"a": 1} | {str(number): 0 for number in range(others)})[0] == "a"


def test_other_beginnings_spread_and_one_stays() -> None:
    idle = dict.fromkeys(NAMES, 0)
    prefixes = [beginnings(bytes([number]) * BLOCK_BYTES) for number in range(200)]
    first = [PrefixMap().choose(prefix, idle)[0] for prefix in prefixes]
    assert min(Counter(first).values()) > 40
    assert first == [PrefixMap().choose(prefix, idle)[0] for prefix in prefixes]


def test_only_the_newest_are_remembered() -> None:
    chooser = PrefixMap(remembered=3)
    old, new = beginnings(b"o" * BLOCK_BYTES), beginnings(b"n" * 3 * BLOCK_BYTES)
    idle = dict.fromkeys(NAMES, 0)
    before = chooser.choose(old, idle)
    chooser.remember(old, before[-1])
    assert chooser.choose(old, idle)[0] == before[-1]
    chooser.remember(new, "a")
    assert chooser.choose(old, idle) == before
