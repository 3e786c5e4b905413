"""What an engine reaches: its steps timed, each sample between two readings of what the machine gives.

A machine that is shared may read twice as much in one second as in the next, so a sample is compared with the bound
that its own two readings imply, and samples of all batches take turns.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from moesaic.bench.bound import Held, Number, Work, decode_work, prefill_work
from moesaic.bench.probes import Probes, apart, middle, times
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece, in_steps
from moesaic.engine.sampling import Sampling, sample
from moesaic.errors import ConfigError
from moesaic.kernels.blocks import Format
from moesaic.plan.rates import Speeds

SAMPLE_SECONDS = 0.5
PROMPT_TOKENS, MOST_STEPS = 32, 128
_APART, _TRIES = 0.25, 3
"""Of two readings around a sample: what they may differ by, and how often it is tried."""
_GREEDY = Sampling()
_GENERATOR = _GREEDY.generator()


class Sample(NamedTuple):
    """Seconds of one step, what the machine gave just before and after, seconds in each part's kernels."""

    seconds: float
    speeds: Speeds
    parts: dict[str, float]

    @property
    def bandwidth(self) -> float:
        """Bytes a second, of memory."""
        return self.speeds.bandwidth

    @property
    def outside(self) -> float:
        """Seconds of a step that are no kernel's."""
        return self.seconds - sum(self.parts.values())


@dataclass
class Case:
    """Steps of one kind: what runs `steps` of them, how many tokens each makes or reads, the work of one."""

    name: str
    tokens: int
    work: Work
    run: Callable[[], None]
    steps: int
    samples: list[Sample] = field(default_factory=list)


_PRODUCTS: dict[Format, Number] = {
    "fp32": "fp32", "bf16": "bf16", "fp8": "bf16", "int8": "int8", "int6": "int8", "int4": "int8", "mxfp4": "int8",
    "uneven4": "int8",
}  # fmt: skip


def held(engine: Engine, dtype: torch.dtype) -> Held:
    """What bounds need to know of an engine. dtype: of its embedding."""
    program = engine.program
    others = max(program.packed_bytes.keys() - {"experts", "head"}, key=lambda part: program.packed_bytes[part])
    of_others = _PRODUCTS[program.formats[others]]
    return Held(
        config=engine.config,
        packed_bytes=program.packed_bytes,
        formats=program.formats,
        embedding_element_bytes=2 if dtype == torch.bfloat16 else 4,
        cache_format=engine.cache.format,
        of_experts=_PRODUCTS[program.formats["experts"]] if "experts" in program.formats else of_others,
        of_head=_PRODUCTS[program.formats["head"]],
        of_others=of_others,
    )


def decode_case(engine: Engine, kept: Held, batch: int, context: int | None = None) -> Case:
    """One more token for each of `batch` texts; which one is drawn beforehand, so that texts stay different.

    context: tokens that texts have before; None: a few. What the engine would have chosen is computed all the same.
    Raises ConfigError where texts may not be long enough.
    """
    prompt = context or min(PROMPT_TOKENS, engine.max_length // 4)
    most = min(MOST_STEPS, engine.max_length - prompt)
    if prompt < 1 or most < 2:
        raise ConfigError(f"texts of {engine.max_length} tokens are too short to time steps; give a longer model")
    texts = [Text() for _ in range(batch)]
    for text, ids in zip(texts, _draw(engine, batch, prompt), strict=True):
        for pieces in in_steps([(text, ids)]):
            engine.step(pieces)
    ids_NB = list(zip(*_draw(engine, batch, most), strict=True))
    steps = _enough(lambda: _decode(engine, texts, ids_NB[:1]), most)
    work = decode_work(kept, batch, prompt + (steps + 1) / 2)
    name = f"decode {batch}" if context is None else f"decode {batch} at {context}"
    return Case(name, batch, work, partial(_decode, engine, texts, ids_NB[:steps]), steps)


def prefill_case(engine: Engine, kept: Held, num_tokens: int) -> Case:
    """A prompt of fewer tokens than the engine's texts have, up to its first new token."""
    (ids,) = _draw(engine, 1, num_tokens)

    def run(times: int) -> None:
        for _ in range(times):
            engine.generate(ids, 1)

    steps = _enough(lambda: run(1), MOST_STEPS)
    return Case(f"prefill {num_tokens}", num_tokens, prefill_work(kept, num_tokens), partial(run, steps), steps)


def take_samples(
    engine: Engine, probes: Probes, cases: Sequence[Case], count: int, tell: Callable[[str], None]
) -> None:
    """So many samples of each case, in turns. tell: hears of each that is done."""
    before = probes.speeds()
    for _ in range(count):
        for case in cases:
            sample, before = take_sample(engine, probes, case, before)
            case.samples.append(sample)
            tell(case.name)


def median(case: Case, of: Callable[[Sample], float]) -> float:
    """Of all samples of a case."""
    return statistics.median(map(of, case.samples))


def take_sample(engine: Engine, probes: Probes, case: Case, before: Speeds) -> tuple[Sample, Speeds]:
    """One of a case, and what the machine gave after it. before: what it gave just now.

    Where these are far apart the sample is taken anew, a few times at the most, whatever it was.
    """
    for _ in range(_TRIES):
        sample = _sample(engine, case)
        after = probes.speeds()
        found = Sample(sample[0], middle(before, after), sample[1]), after
        if apart(before, after) <= _APART:
            break
        before = after
    return found  # pyright: ignore[reportPossiblyUnboundVariable]  _TRIES is above 0


def _sample(engine: Engine, case: Case) -> tuple[float, dict[str, float]]:
    """Seconds of a step, and by part."""
    engine.program.native.reset_times()
    start = time.perf_counter()
    case.run()
    seconds = time.perf_counter() - start
    return seconds / case.steps, {part: spent / case.steps for part, spent in times(engine).items()}


def _decode(engine: Engine, texts: list[Text], ids_NB: Sequence[Sequence[int]]) -> None:
    """One step for each row of ids; afterwards the texts are as before."""
    lengths = [text.length for text in texts]
    for ids in ids_NB:
        sample(engine.step([Piece(text, [id]) for text, id in zip(texts, ids, strict=True)]), _GREEDY, _GENERATOR)
    for text, length in zip(texts, lengths, strict=True):
        engine.cache.cut(text, length)


def _enough(run_once: Callable[[], None], most: int) -> int:
    """How many times something runs in about SAMPLE_SECONDS; its first time warms up."""
    run_once()
    start = time.perf_counter()
    run_once()
    return max(1, min(most, round(SAMPLE_SECONDS / (time.perf_counter() - start))))


def _draw(engine: Engine, batch: int, num_tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(batch * 1_000_003 + num_tokens)
    return torch.randint(engine.config.vocab_size, (batch, num_tokens), generator=generator).tolist()
