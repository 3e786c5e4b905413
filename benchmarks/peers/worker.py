"""What the engines' own scripts share: one line in, the name of a case; one line out, tokens a second as JSON.

Standard library alone, since each script runs in its engine's environment.
"""

import json
import random
import sys
from collections.abc import Callable

VOCAB_SIZE = 32_000
PROMPT_TOKENS = 32  # of the texts that decode cases go on from
DECODE_STEPS = {1: 128}
MANY_STEPS = 32  # of more texts than one


def serve(decode: Callable[[int, int], float], prefill: Callable[[int], float], **facts: object) -> None:
    """Answer until the input ends. decode(batch, steps) and prefill(tokens) say how many seconds they took.

    facts: what is said once, when all is loaded.
    """
    print(json.dumps({"ready": True} | facts), flush=True)
    for line in sys.stdin:
        kind, count = line.split()
        number = int(count)
        if kind == "decode":
            steps = DECODE_STEPS.get(number, MANY_STEPS)
            answer = {"tokens_per_second": number * steps / decode(number, steps)}
        else:
            answer = {"tokens_per_second": number / prefill(number)}
        print(json.dumps(answer), flush=True)


def random_ids(count: int) -> list[int]:
    """Token ids that differ from text to text, so that experts are chosen as in texts that do."""
    return [random.randrange(2, VOCAB_SIZE) for _ in range(count)]
