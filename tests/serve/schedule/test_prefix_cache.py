"""moesaic.serve.schedule.prefix_cache: what texts have in common is held once, and let go of in order."""

from moesaic.engine.builder import CacheShape
from moesaic.engine.cache import BLOCK_TOKENS, BlockCache
from moesaic.serve.schedule.prefix_cache import PrefixCache, SharedText

LONG = tuple(range(10 * BLOCK_TOKENS))


def prefixes_of(max_blocks: int) -> PrefixCache:
    return PrefixCache(BlockCache([CacheShape(1, 8, 8, False)], format="bf16", max_blocks=max_blocks))


def written(prefixes: PrefixCache, token_ids: tuple[int, ...]) -> SharedText:
    """A text that was run, from what there was of it."""
    text = SharedText()
    prefixes.take(text, prefixes.match(token_ids))
    prefixes.cache.make_room(text, len(token_ids))
    text.length = len(token_ids)
    prefixes.publish(text, token_ids)
    return text


def test_one_token_at_least_is_left_to_run() -> None:
    prefixes = prefixes_of(20)
    written(prefixes, LONG)
    found = [len(prefixes.match(LONG[:length])) for length in (0, 1, 32, 33, 64, 65, 320)]
    assert found == [0, 0, 0, 1, 1, 2, 9]
    assert len(prefixes.match((*LONG, 5))) == 10
    assert len(prefixes.match((*LONG[:40], 7, *LONG[41:]))) == 1


def test_equal_hashes_do_not_make_equal_blocks() -> None:
    zeros, same_hash = (0,) * BLOCK_TOKENS, (2**61 - 1,) * BLOCK_TOKENS
    assert hash(zeros) == hash(same_hash)
    prefixes = prefixes_of(20)
    written(prefixes, zeros)
    assert prefixes.match((*same_hash, 1)) == []
    written(prefixes, same_hash)
    assert prefixes.num_blocks == 2


def test_texts_hold_what_they_have_in_common_once() -> None:
    prefixes = prefixes_of(20)
    one, other = written(prefixes, (*LONG[:64], 1)), written(prefixes, (*LONG[:64], 2))
    assert one.blocks[:2] == other.blocks[:2] and one.blocks[2] != other.blocks[2]
    assert prefixes.num_available == 16


def test_a_block_that_two_have_computed_is_kept_once() -> None:
    prefixes = prefixes_of(20)
    texts = [SharedText(), SharedText()]
    for text in texts:
        prefixes.cache.make_room(text, 70)
        text.length = 70
    for text in texts:
        prefixes.publish(text, LONG)
    assert texts[0].blocks[:2] == texts[1].blocks[:2]
    assert (prefixes.num_blocks, prefixes.num_available) == (2, 16)


def test_blocks_stay_until_their_room_is_needed_and_go_from_the_end() -> None:
    prefixes = prefixes_of(6)
    prefixes.release(written(prefixes, LONG[:96]))
    prefixes.release(written(prefixes, (*LONG[:64], *range(900, 932))))  # the first two, and another third
    assert (prefixes.num_blocks, prefixes.num_available) == (4, 6)
    other = SharedText()
    prefixes.cache.make_room(other, 3 * BLOCK_TOKENS)
    assert (prefixes.num_blocks, prefixes.evictions) == (3, 1)
    assert len(prefixes.match(LONG)) == 2  # the third of the text that was left first is gone
    prefixes.cache.make_room(other, 5 * BLOCK_TOKENS)
    assert len(prefixes.match(LONG)) == 1
    prefixes.cache.make_room(other, 6 * BLOCK_TOKENS)
    assert prefixes.match(LONG) == []


def test_what_a_text_holds_is_not_let_go_of() -> None:
    prefixes = prefixes_of(6)
    text = written(prefixes, LONG[:65])
    prefixes.release(written(prefixes, LONG[:128]))
    assert prefixes.num_available == 3
    prefixes.clear()
    assert (prefixes.num_blocks, len(prefixes.match(LONG))) == (2, 2)
    prefixes.release(text)
    prefixes.clear()
    assert (prefixes.num_blocks, prefixes.cache.num_free) == (0, 6)
