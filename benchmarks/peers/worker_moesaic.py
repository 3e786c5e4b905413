"""moesaic's engine for run.py: `python worker_moesaic.py MODEL THREADS [BITS]`."""

import sys
import time

from worker import PROMPT_TOKENS, random_ids, serve

from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.engine.sampling import Sampling, sample
from moesaic.kernels.rounding import Bits


def main() -> None:
    """Answer with tokens a second, sample by sample, until standard input ends."""
    known: dict[str, Bits] = {"8": 8, "4": 4}
    bits = known[sys.argv[3]] if len(sys.argv) > 3 else None
    engine = Engine(sys.argv[1], bits=bits, threads=int(sys.argv[2]), max_length=1024)
    greedy = Sampling()
    generator = greedy.generator()

    def decode(batch: int, steps: int) -> float:
        texts = [Text() for _ in range(batch)]
        engine.step([Piece(text, random_ids(PROMPT_TOKENS)) for text in texts])
        ids_NB = [random_ids(batch) for _ in range(steps)]
        start = time.perf_counter()
        for ids in ids_NB:
            pieces = [Piece(text, [id]) for text, id in zip(texts, ids, strict=True)]
            sample(engine.step(pieces), greedy, generator)
        seconds = time.perf_counter() - start
        for text in texts:
            engine.free(text)
        return seconds

    def prefill(tokens: int) -> float:
        ids = random_ids(tokens)
        start = time.perf_counter()
        engine.generate(ids, 1)
        return time.perf_counter() - start

    decode(1, 2)
    prefill(64)
    serve(decode, prefill, packed_bytes=engine.program.packed_bytes)


main()
