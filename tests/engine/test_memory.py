"""moesaic.engine.memory: what a packed model takes, told before it is read."""

import pytest
import torch

from moesaic.engine import memory
from moesaic.engine.engine import Engine
from moesaic.engine.packing import BITS, Precision
from moesaic.errors import ConfigError
from moesaic.models.decoder import Decoder
from tests.tiny import tiny_config


@pytest.mark.parametrize("bits", [None, *BITS])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_about_what_is_packed(bits, tied):
    config = tiny_config(tied=tied)
    precision = Precision(bits=bits)
    engine = Engine(Decoder(config, dtype=torch.float32).initialize(), bits=bits, threads=1)
    packed = sum(engine.program.packed_bytes.values())
    table = 4 * config.vocab_size * config.hidden_size
    told = memory.packed_bytes(config, precision, 4) - table
    assert 0.3 < told / packed < 1.5  # tiny matrices are mostly what fills up their strips


def test_too_large_a_model_is_refused_with_the_numbers(monkeypatch):
    config = tiny_config()
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match=r"GB packed, and 0\.0 GB of memory are free; use fewer bits \(8 or 4\)"):
        memory.require_memory(config, Precision(), 4)
    with pytest.raises(ConfigError, match="use a smaller model"):
        memory.require_memory(config, Precision(bits=4), 4)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    memory.require_memory(config, Precision(), 4)


def test_the_system_says_how_much_is_free():
    assert (memory.available_bytes() or 1) > 0
