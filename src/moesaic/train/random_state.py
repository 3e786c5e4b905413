"""The random numbers of the whole process (Python's, numpy's, torch's), taken down as JSON and put back.

torch has one generator for the CPU and one for each GPU that is in use.
"""

import base64
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Any]:
    """Where the generators stand, as JSON."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _text(torch.get_rng_state()),
        **({"cuda": [_text(state) for state in _gpu_states()]} if torch.cuda.is_initialized() else {}),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`. GPUs that it knows nothing of get numbers that follow from those of the CPU."""
    version, words, gauss = state["python"]
    name, keys, position, has_gauss, cached = state["numpy"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_state(state["torch"]))
    if not torch.cuda.is_initialized():
        return
    known = state.get("cuda", [])
    torch.cuda.manual_seed_all(zlib.crc32(base64.b64decode(state["torch"])))
    for number, text in enumerate(known[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_state(text), number)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever the block draws, training goes on with the numbers it would have had without it."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu_states = _gpu_states()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
        for number, gpu_state in enumerate(gpu_states):
            torch.cuda.set_rng_state(gpu_state, number)


def _gpu_states() -> list[Tensor]:
    """Of every GPU, in order; none where no GPU has been used."""
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _state(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
