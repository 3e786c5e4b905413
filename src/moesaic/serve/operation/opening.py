"""Opening a model for serving: what it will take of memory, then the engine and the tokenizer.

A further model beside one that is asked is packed by a process of its own, one thread at a low priority, and then
mapped into this one: no thread here waits for a lock or a processor that packing holds.
"""

import asyncio
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from moesaic.data.open_tokenizer import open_tokenizer
from moesaic.data.tokenizer import Tokenizer
from moesaic.engine.engine import Engine
from moesaic.engine.memory import available_bytes, packed_bytes
from moesaic.engine.packing import Precision
from moesaic.engine.weights import FileWeights
from moesaic.errors import ConfigError
from moesaic.hub.embedded import cache_folder
from moesaic.hub.resolve import weights_place
from moesaic.hub.sources import open_source
from moesaic.serve.operation.drafting import drafter_of
from moesaic.serve.operation.passing import clear_passed, passing_folder
from moesaic.serve.operation.settings import ModelSettings, parse_bytes
from moesaic.serve.speculation.drafter import Drafter

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_PACK = "import sys; from moesaic.serve.operation.packing_aside import main; sys.exit(main(sys.argv[1], sys.argv[2]))"


class Opened(NamedTuple):
    """cache_tokens: that the engine's cache is to hold."""

    engine: Engine
    tokenizer: Tokenizer
    drafter: Drafter | None
    cache_tokens: int


class Needs(NamedTuple):
    """Bytes of the weights packed, and of the cache; cache_tokens: that it holds; free: bytes (None: unknown)."""

    weights: int
    cache: int
    cache_tokens: int
    free: int | None


def needs_of(settings: ModelSettings) -> Needs:
    """What a model will take, from its description and its files' headers.

    Raises CheckpointError or ConfigError for a model that is not there or cannot be run.
    """
    importlib.import_module("moesaic.tune.upcycle")  # makes known the preset whose weights it makes
    weights = FileWeights(open_source(weights_place(settings.path)))
    dtype = _dtype(settings) or weights.dtype
    precision = Precision(bits=settings.bits, experts_bits=settings.experts_bits, dtype=_dtype(settings))  # pyright: ignore[reportArgumentType]
    in_bf16 = settings.bits is not None or dtype == torch.bfloat16
    element_bytes = 4 if settings.cache_format == "fp32" or not (in_bf16 or settings.cache_format) else 2
    per_token = weights.config.state_bytes_per_token(element_bytes)
    tokens = cache_tokens(settings, per_token)
    packed = packed_bytes(weights.config, precision, dtype.itemsize, weights.coded)
    return Needs(packed, tokens * per_token, tokens, available_bytes())


def cache_tokens(settings: ModelSettings, bytes_per_token: float) -> int:
    """How many tokens the cache is to hold."""
    if isinstance(settings.cache, int):
        return settings.cache
    return max(1, int(parse_bytes("cache", settings.cache) / bytes_per_token))


def open_model(settings: ModelSettings, packed_file: Path | None = None, threads: int | None = None) -> Opened:
    """The engine and all that belongs to it. threads: instead of the settings', only to pack: without drafts.

    Raises MoesaicError for a model that is not there or cannot be run.
    """
    importlib.import_module("moesaic.tune.upcycle")
    tokenizer = open_tokenizer(settings.path)
    engine = Engine(
        settings.path,
        bits=settings.bits,  # pyright: ignore[reportArgumentType]
        experts_bits=settings.experts_bits,  # pyright: ignore[reportArgumentType]
        values=settings.values,
        dtype=_dtype(settings),
        threads=threads or settings.threads,
        max_length=settings.max_length,
        cache_format=settings.cache_format,
        packed_file=packed_file,
        mtp=settings.speculation == "mtp",
    )
    drafter = None if threads is not None else drafter_of(settings, engine, tokenizer)
    return Opened(engine, tokenizer, drafter, cache_tokens(settings, engine.cache.bytes_per_token))


async def open_aside(settings: ModelSettings) -> Opened:
    """The same, packed by another process, for a server that goes on serving meanwhile."""
    clear_passed(cache_folder())
    with passing_folder(cache_folder()) as folder:
        file = folder / "packed.safetensors"
        await _pack(settings, file)
        return await asyncio.to_thread(open_model, settings, file)


async def _pack(settings: ModelSettings, file: Path) -> None:
    words = (sys.executable, "-c", _PACK, json.dumps(asdict(settings)), str(file))
    process = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, said = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines() or [f"it ended with {process.returncode}"]
        raise ConfigError(f"cannot load {settings.path}: {lines[-1]}")


def _dtype(settings: ModelSettings) -> torch.dtype | None:
    return None if settings.dtype is None else getattr(torch, DTYPES[settings.dtype])
