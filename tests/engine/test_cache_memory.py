"""Memory of caches goes back to the system, whatever malloc would keep of it."""

from pathlib import Path

import pytest

from moesaic.engine.cache import _blocks

BLOCKS, SIZE = 1024, 2**16


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) * 1024


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="what a process holds is read from Linux's /proc; it runs there"
)
def test_blocks_take_what_is_written_to_and_nothing_once_they_are_freed():
    before = resident()
    blocks = _blocks(BLOCKS, SIZE)
    assert resident() - before < BLOCKS * SIZE / 4
    blocks.fill_(1)
    assert resident() - before > BLOCKS * SIZE * 3 / 4
    del blocks
    assert resident() - before < BLOCKS * SIZE / 4


@pytest.mark.parametrize("shape", [(0, 64), (16, 0), (3, 5)])
def test_blocks_of_every_shape(shape):
    assert _blocks(*shape).shape == shape
