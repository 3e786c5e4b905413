"""moesaic.engine.cache: blocks go to texts and come back; what is in them stays as they grow."""

import pytest
import torch

from moesaic.engine.builder import CacheShape
from moesaic.engine.cache import BLOCK_TOKENS, BlockCache, Text
from moesaic.errors import GenerationError
from moesaic.kernels.paged import CACHE_FORMATS, CacheFormat
from moesaic.plan.formats import CACHE_BYTES

SHAPES = [CacheShape(2, 8, 8, False), CacheShape(1, 12, 8, True)]


def test_no_block_serves_two_texts():
    cache, texts = BlockCache(SHAPES, format="bf16"), [Text() for _ in range(5)]
    for length in (1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 20 * BLOCK_TOKENS):
        for text in texts:
            cache.make_room(text, length)
        held = [block for text in texts for block in text.blocks]
        assert len(held) == len(set(held)) and max(held) < cache.num_blocks
        assert {len(text.blocks) for text in texts} == {-(-length // BLOCK_TOKENS)}


def test_what_is_in_blocks_stays_as_they_grow():
    cache, text = BlockCache(SHAPES, format="fp32"), Text()
    assert cache.make_room(text, 1)
    for keys, values in cache.layers:
        keys.fill_(7)
        values.fill_(9)
    assert not cache.make_room(text, 2)
    assert cache.make_room(text, 100 * BLOCK_TOKENS)
    for keys, values in cache.layers:
        assert torch.equal(keys[:16], torch.full_like(keys[:16], 7))
        assert torch.equal(values[:16], torch.full_like(values[:16], 9))


def test_a_cut_text_gives_blocks_back():
    cache, text = BlockCache(SHAPES, format="bf16"), Text()
    cache.make_room(text, 10 * BLOCK_TOKENS)
    text.length = 10 * BLOCK_TOKENS
    cache.cut(text, BLOCK_TOKENS + 1)
    assert (text.length, len(text.blocks)) == (BLOCK_TOKENS + 1, 2)
    cache.make_room(Text(), 14 * BLOCK_TOKENS)
    assert cache.num_blocks == 16


def test_a_cache_that_may_not_grow_says_so_and_changes_nothing():
    cache, text = BlockCache(SHAPES, format="bf16", max_blocks=3), Text()
    cache.make_room(text, 2 * BLOCK_TOKENS)
    with pytest.raises(GenerationError, match="the cache holds 96 tokens and may not grow"):
        cache.make_room(text, 4 * BLOCK_TOKENS)
    assert len(text.blocks) == 2
    cache.make_room(text, 3 * BLOCK_TOKENS)


def test_bytes_of_a_token():
    """As csrc/paged.h counts them: values, and a shared latent, fill whole sixteens; a scale for up to 32 numbers."""
    rows_to_take = CacheShape(1, 12, 12, True, taken=True)
    numbers, scales = [2 * (8 + 16), 16], [2 * (1 + 1), 1]
    shapes = [*SHAPES, rows_to_take]
    assert BlockCache(shapes, format="fp32").bytes_per_token == 4 * (sum(numbers) + 16)
    assert BlockCache(shapes, format="bf16").bytes_per_token == 2 * (sum(numbers) + 16)
    assert BlockCache(shapes, format="int8").bytes_per_token == sum(numbers) + 2 * sum(scales) + 2 * 16


@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_a_plan_counts_the_same_bytes(format: CacheFormat):
    """Where numbers fill whole scales."""
    keys_and_values, latent = CacheShape(4, 64, 64, False), CacheShape(1, 576, 512, True)
    cache = BlockCache([keys_and_values, latent], format=format)
    assert cache.bytes_per_token == CACHE_BYTES[format] * (4 * (64 + 64) + 576)


def test_blocks_are_free_when_the_last_holder_lets_go():
    cache, text = BlockCache(SHAPES, format="bf16", max_blocks=5), Text()
    cache.make_room(text, 3 * BLOCK_TOKENS)
    other = Text(length=2 * BLOCK_TOKENS, blocks=text.blocks[:2])
    cache.hold(other.blocks)
    cache.cut(text, 0)
    assert cache.num_free == 3
    cache.cut(other, 0)
    assert cache.num_free == 5


def test_who_writes_to_a_block_that_others_hold_gets_a_copy():
    cache, text = BlockCache(SHAPES, format="fp32"), Text()
    cache.make_room(text, BLOCK_TOKENS + 1)
    for number, (keys, values) in enumerate(cache.layers):
        keys[text.blocks[1]] = 3 + number
        values[text.blocks[1]] = 5 + number
    other = Text(length=BLOCK_TOKENS + 1, blocks=list(text.blocks))
    cache.hold(other.blocks)
    assert not cache.make_room(other, BLOCK_TOKENS + 2)
    assert other.blocks[0] == text.blocks[0] and other.blocks[1] != text.blocks[1]
    assert [cache.holders(block) for block in (*text.blocks, *other.blocks)] == [2, 1, 2, 1]
    for number, (keys, values) in enumerate(cache.layers):
        assert (keys[other.blocks[1]] == 3 + number).all() and (values[other.blocks[1]] == 5 + number).all()


def test_room_is_reclaimed_before_it_is_refused():
    cache, kept, text = BlockCache(SHAPES, format="bf16", max_blocks=4), Text(), Text()
    cache.make_room(kept, 3 * BLOCK_TOKENS)
    asked = []

    def reclaim(count: int) -> None:
        asked.append(count)
        cache.cut(kept, len(kept.blocks) * BLOCK_TOKENS - count * BLOCK_TOKENS)

    cache.reclaim = reclaim
    cache.make_room(text, 3 * BLOCK_TOKENS)
    assert (asked, len(kept.blocks), cache.num_free) == ([2], 1, 0)


def test_reserved_blocks_are_there_at_once_and_no_more_are_made():
    cache = BlockCache(SHAPES, format="bf16")
    cache.reserve(40)
    layers = cache.layers
    assert not cache.make_room(Text(), 40 * BLOCK_TOKENS)
    assert cache.layers is layers
    with pytest.raises(GenerationError, match="may not grow"):
        cache.make_room(Text(), 1)
    with pytest.raises(GenerationError, match="30 blocks for a cache that has 40"):
        cache.reserve(30)
