"""moesaic.serve.schedule.promises: who computes what, and until when."""

from moesaic.engine.cache import BLOCK_TOKENS
from moesaic.serve.schedule.prefix_cache import Node
from moesaic.serve.schedule.promises import Promises
from moesaic.serve.schedule.waiting import Job

TOKENS = list(range(3 * BLOCK_TOKENS + 1))
FIRST = Node(Node(None, (), -1), tuple(TOKENS[:BLOCK_TOKENS]), 0)


def test_full_blocks_are_promised_until_they_are_there() -> None:
    promises, job = Promises(), Job(1, TOKENS)
    assert promises.maker(TOKENS, []) is None
    promises.make(job)
    assert promises.maker(TOKENS, []) is job
    assert promises.maker(TOKENS[: BLOCK_TOKENS + 1], []) is job
    assert promises.maker(TOKENS[:BLOCK_TOKENS], []) is None  # its last token is run in any case
    assert promises.maker([*TOKENS[:40], 7, *TOKENS[41:]], [FIRST]) is None  # another second block
    promises.keep(job, [FIRST])
    assert promises.maker(TOKENS, []) is None
    assert promises.maker(TOKENS, [FIRST]) is job
    promises.drop(job)
    assert promises.maker(TOKENS, [FIRST]) is None


def test_who_promised_last_is_waited_for() -> None:
    promises, slow, urgent = Promises(), Job(1, TOKENS, priority=1), Job(2, TOKENS)
    promises.make(slow)
    promises.make(urgent)
    assert promises.maker(TOKENS, []) is urgent
    promises.drop(slow)
    assert promises.maker(TOKENS, []) is urgent
    promises.drop(urgent)
    assert promises.maker(TOKENS, []) is None
