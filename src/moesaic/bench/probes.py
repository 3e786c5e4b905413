"""What a machine gives at a moment, memory, caches and processors, read in some hundredths of a second.

No reading knows of the model whose steps lie between two of them: they are of memory of their own, and of two small
made-up models, one of bf16 and one of whole numbers, that the processors' own caches hold.
"""

import statistics
from collections.abc import Mapping

from torch import Tensor

from moesaic.bench.machine import WatchedProbe, last_cache_bytes
from moesaic.bench.made_up import Sizes, in_turn, made_up_config, made_up_engine
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.plan.rates import Speeds

_OF_CACHE = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
_LEAST_CACHE, _LEAST_FAR = 2**22, 2**28
_SMALL = Sizes(hidden=192, inner=96, experts=4, top_k=4, vocabulary=256)
_LAYERS, _ROWS, _STEPS = 3, 64, 5
_FEW_WORDS = 8192


class Probes:
    """Memory to read, and models to run. Takes 8 times what the last cache holds, or a quarter of what is free."""

    def __init__(self, threads: int) -> None:
        cache = max(_LEAST_CACHE, last_cache_bytes())
        wanted = max(_LEAST_FAR, int(_OF_CACHE[-1] * cache)) // 64 * 64
        self.watched = WatchedProbe(threads, wanted)
        self.far = self.watched.probe.num_bytes
        self._sizes = [max(64, min(self.far, int(cache * factor)) // 64 * 64) for factor in _OF_CACHE]
        config = made_up_config(layers=_LAYERS, sizes=_SMALL)
        self._engines = [made_up_engine(config, bits=bits, threads=threads) for bits in (None, 8)]
        for engine in self._engines:
            parts_of_step(engine, _ROWS, _SMALL)

    @property
    def sizes(self) -> list[float]:
        """Bytes of the readings that are `near`."""
        return [float(size) for size in self._sizes]

    def bandwidth(self) -> float:
        """Bytes a second of memory that no cache holds; afterwards caches hold nothing else."""
        return self.watched.bandwidth(self._sizes[-2])

    def compute(self, steps: int = _STEPS) -> float:
        """Steps a second of both small models, the middle one of so many."""
        return 1 / statistics.median(sum(map(_small_step, self._engines)) for _ in range(steps))

    def speeds(self) -> Speeds:
        """All of them."""
        near = [self._again(size) for size in self._sizes[:-1]]
        far = [self.watched.bandwidth(self.far) for _ in range(2)]
        return Speeds(statistics.mean(far), self.compute(), (*near, statistics.mean(far)))

    def _again(self, size: int) -> float:
        """Bytes a second of what was just read before."""
        self.watched.bandwidth(size)
        times = max(1, self._sizes[2] // size)
        return statistics.mean(self.watched.bandwidth(size) for _ in range(times))


def middle(before: Speeds, after: Speeds) -> Speeds:
    """Of what lies between two readings."""
    near = tuple((first + last) / 2 for first, last in zip(before.near, after.near, strict=True))
    return Speeds((before.bandwidth + after.bandwidth) / 2, (before.compute + after.compute) / 2, near)


def apart(before: Speeds, after: Speeds) -> float:
    """By how much two readings differ, of memory or of processors: 0 for not at all."""
    pairs = ((before.bandwidth, after.bandwidth), (before.compute, after.compute))
    return max(max(pair) / min(pair) - 1 for pair in pairs)


def _small_step(engine: Engine) -> float:
    parts = parts_of_step(engine, _ROWS, _SMALL)
    return parts["projections"] + parts["experts"]


def times(engine: Engine) -> dict[str, float]:
    """Seconds by part since they were reset."""
    parts: dict[str, float] = {}
    for part, _layer, seconds in engine.program.native.times():
        parts[part] = parts.get(part, 0.0) + seconds
    return parts


def timed_step(engine: Engine, pieces: list[Piece], choices: Mapping[int, Tensor] | None = None) -> dict[str, float]:
    """Seconds of a step by part: of equal layers those of the middle one for each, whatever held one of them up. The
    first, in which threads wake up, is left out."""
    engine.program.native.reset_times()
    engine.step(pieces, choices)
    by_layer: dict[str, dict[int, float]] = {}
    for part, layer, seconds in engine.program.native.times():
        if layer:
            layers = by_layer.setdefault(part, {})
            layers[layer] = layers.get(layer, 0.0) + seconds
    return {part: statistics.median(layers.values()) * len(layers) for part, layers in by_layer.items()}


def parts_of_step(engine: Engine, rows: int, sizes: Sizes) -> dict[str, float]:
    """The same of a prompt of so many tokens, the same rows for each expert, and logits of all where words are few."""
    text = Text()
    choices = dict.fromkeys(engine.config.moe_layers, in_turn(rows, sizes))
    parts = timed_step(
        engine, [Piece(text, list(range(rows)), "all" if sizes.vocabulary <= _FEW_WORDS else "last")], choices
    )
    engine.free(text)
    return parts
