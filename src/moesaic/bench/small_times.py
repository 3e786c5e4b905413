"""What a step does beside products with weights, timed on made-up models after caches were filled with other things, as
they are in a step of a large model: attention, norms, routing, and what lies outside of kernels."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from moesaic.bench.kernel_times import LAYERS, Kernels, Usual
from moesaic.bench.made_up import ATTENTIONS, WIDE, Sizes, made_up_config, made_up_engine
from moesaic.bench.probes import Probes, timed_step, times
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.engine.sampling import Sampling, sample
from moesaic.plan.rates import Outside, Routes, Scores

SEEN = (64, 256, 1024)
PROMPTS = (32, 128, 512)
TEXTS = 4
FEW, MANY = 1, 64
"""Rows for which norms and routers are timed."""
_PIECE, _IN_A_ROW = 256, 4


class Samples:
    """Seconds of anything by name, each with the processors' speed around it."""

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self._found: dict[tuple[object, ...], list[float]] = defaultdict(list)

    def add(self, found: Sequence[tuple[tuple[object, ...], float]], compute: float) -> None:
        """Of one go. compute: of the processors around it."""
        for name, seconds in found:
            self._found[name].append(seconds * compute)

    def seconds(self, name: tuple[object, ...], usual: Usual) -> float:
        """The median, at the usual speed."""
        return statistics.median(self._found[name]) / usual.compute


class Attentions:
    """Each kind of attention, of new tokens of texts and of prompts."""

    def __init__(self, probes: Probes, threads: int) -> None:
        self._probes, self._samples = probes, Samples(probes)
        self._engines = {
            kind: made_up_engine(made_up_config(kind, LAYERS, dense=True), threads=threads) for kind in ATTENTIONS
        }
        self._texts = {
            (kind, length): [_written(engine, length) for _ in range(TEXTS)]
            for kind, engine in self._engines.items()
            for length in SEEN
        }

    def sample(self) -> None:
        """All once."""
        for kind in self._engines:
            before = self._probes.compute()
            found = [*self._decode(kind), *self._prompts(kind)]
            self._samples.add(found, (before + self._probes.compute()) / 2)

    def _decode(self, kind: str):
        for length in SEEN:
            yield (kind, TEXTS, length), self._step(kind, self._texts[kind, length])
        yield (kind, 1, SEEN[0]), self._step(kind, self._texts[kind, SEEN[0]][:1])

    def _step(self, kind: str, texts: Sequence[Text]) -> float:
        engine, lengths = self._engines[kind], [text.length for text in texts]
        self._probes.bandwidth()
        parts = timed_step(engine, [Piece(text, [1]) for text in texts])
        for text, length in zip(texts, lengths, strict=True):
            engine.cache.cut(text, length)
        return parts["attention"] / LAYERS

    def _prompts(self, kind: str):
        for length in PROMPTS:
            text = Text()
            self._probes.bandwidth()
            parts = timed_step(self._engines[kind], [Piece(text, [1] * length, "none")])
            self._engines[kind].free(text)
            yield (kind, "prompt", length), parts["attention"] / LAYERS

    def decode(self, kind: str, usual: Usual) -> Scores:
        """Of one new token a text."""
        few = self._samples.seconds((kind, 1, SEEN[0]), usual)
        lengths = {length: self._samples.seconds((kind, TEXTS, length), usual) for length in SEEN}
        layer = max(0.0, (TEXTS * few - lengths[SEEN[0]]) / (TEXTS - 1))
        per_text = [(seconds - layer) / TEXTS for seconds in lengths.values()]
        return self._scores(kind, layer, [float(length) for length in SEEN], per_text)

    def prompt(self, kind: str, usual: Usual) -> Scores:
        """Of a prompt's tokens, whose queries share what they read."""
        per_token = [self._samples.seconds((kind, "prompt", length), usual) / length for length in PROMPTS]
        return self._scores(kind, 0.0, [(length + 1) / 2 for length in PROMPTS], per_token)

    def _scores(self, kind: str, layer: float, seen: list[float], per_token: list[float]) -> Scores:
        """What the two shortest have beside what grows with the tokens they see is a row's own."""
        per_seen, own = _widths(self._engines[kind])
        slope = (per_token[1] - per_token[0]) / (seen[1] - seen[0])
        row = min(max(0.0, per_token[0] - slope * seen[0]), 0.9 * per_token[0])
        seconds = [(each - row) / (length * per_seen) for each, length in zip(per_token, seen, strict=True)]
        return Scores(layer, row / own, seen, seconds)


def _written(engine: Engine, length: int) -> Text:
    text = Text()
    for start in range(0, length, _PIECE):
        engine.step([Piece(text, [1] * min(_PIECE, length - start), "none")])
    return text


def _widths(engine: Engine) -> tuple[float, float]:
    """Multiplications for each token that a new one sees, and numbers of a new row, in one layer."""
    attention = engine.config.layers[0].attention
    if type(attention).__name__ == "MlaConfig":
        latent, rope, heads = attention.latent_rank, attention.rope_dim, attention.num_heads  # pyright: ignore[reportAttributeAccessIssue]
        return heads * (2 * latent + rope), heads * rope + latent + rope
    heads, groups, size = attention.num_heads, attention.num_key_value_heads, attention.head_dim  # pyright: ignore[reportAttributeAccessIssue]
    return heads * 2 * size, (heads + 2 * groups) * size


class Steps:
    """Whole steps, of which all that is no kernel's is kept."""

    def __init__(self, probes: Probes, short: Engine, long: Engine) -> None:
        """short, long: of few and of many words."""
        self._probes, self._samples, self._short, self._long = probes, Samples(probes), short, long

    def sample(self) -> None:
        """All once."""
        before = self._probes.compute()
        found = [(name, self._decode(*name)) for name in ((1, False), (16, False), (16, True))]
        found.append(((0, False), self._prompt()))
        self._samples.add(found, (before + self._probes.compute()) / 2)

    def _decode(self, count: int, many_words: bool) -> float:
        engine, greedy = self._long if many_words else self._short, Sampling()
        texts, generator = [_written(engine, 8) for _ in range(count)], greedy.generator()

        def step() -> None:
            sample(engine.step([Piece(text, [1]) for text in texts]), greedy, generator)

        seconds = _beside_kernels(engine, step)
        for text in texts:
            engine.free(text)
        return seconds

    def _prompt(self) -> float:
        return _beside_kernels(self._short, lambda: self._short.generate([1] * _PIECE, 1))

    def outside(self, usual: Usual) -> Outside:
        """Of each thing that there may be more of."""
        one, many, wordy, prompt = (
            self._samples.seconds(name, usual) for name in ((1, False), (16, False), (16, True), (0, False))
        )
        words, more = self._short.config.vocab_size, self._long.config.vocab_size
        logit = max(0.0, wordy - many) / (16 * (more - words))
        text = max(0.0, (many - one) / 15 - logit * words)
        token = max(0.0, prompt - one) / _PIECE
        return Outside(max(0.0, one - text - logit * words), text, token, logit)


def _beside_kernels(engine: Engine, step: Callable[[], object]) -> float:
    """Mean seconds of steps one after the other that are no kernel's."""
    step()
    engine.program.native.reset_times()
    start = time.perf_counter()
    for _ in range(_IN_A_ROW):
        step()
    return (time.perf_counter() - start - sum(times(engine).values())) / _IN_A_ROW


def norm_times(kernels: Sequence[Kernels], usual: Usual) -> tuple[float, float]:
    """In each layer, and for each number."""
    calls = 2 * LAYERS + 1  # nearly: the last, behind all layers, counts as one of its own
    few, many = (_median(kernels, WIDE, "norm", rows, usual) / calls for rows in (FEW, MANY))
    number = max(0.0, many - few) / ((MANY - FEW) * WIDE.hidden)
    return max(0.0, few - number * WIDE.hidden), number


def route_times(kernels: Sequence[Kernels], usual: Usual) -> Routes:
    """From routers of two sizes and of few and many tokens."""
    sizes = sorted({each.sizes for each in kernels}, key=lambda each: each.experts * each.hidden)
    weights = [each.experts * each.hidden for each in sizes]
    few, many = (
        np.array([_median(kernels, each, "router", rows, usual) / LAYERS for each in sizes]) for rows in (FEW, MANY)
    )
    by_token = np.maximum(0.0, many - few) / (MANY - FEW)
    fixed = np.maximum(0.0, few - by_token * FEW)
    (layer, weight), (token, token_weight) = _line(weights, fixed), _line(weights, by_token)
    return Routes(layer, weight, token, token_weight)


def _line(at: Sequence[float], values: np.ndarray) -> tuple[float, float]:
    """Through two points, falling nowhere and nowhere below 0."""
    slope = min(max(0.0, (values[1] - values[0]) / (at[1] - at[0])), values[1] / at[1])
    return float(max(0.0, values[0] - slope * at[0])), float(slope)


def _median(kernels: Sequence[Kernels], sizes: Sizes, part: str, rows: int, usual: Usual) -> float:
    found = [sample for each in kernels if each.sizes == sizes for sample in each.cold[rows]]
    return statistics.median(sample.parts[part] * usual.pace(sample).compute for sample in found)
