"""What it costs a server to know which experts work: an engine's steps whose choices are counted, and the same without.

Both kinds take turns on one engine with 1, 8 and 32 texts, a token of each a step; reported are medians over rounds and
the median of the rounds' ratios. Counted are rows and distinct experts of every layer, by windows, as /v1/routing,
/metrics and the page tell them; a listener asks for them twice a second.

    python benchmarks/live_routing.py [--rounds 15] [--threads 2] [--json]
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece
from moesaic.families import family
from moesaic.models.decoder import Decoder
from moesaic.serve.live_routing import LiveRouting

MODEL: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "intermediate_size": 1024,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
}
STEPS = 32  # a sample
ASK_EVERY_S = 0.5
LONGEST = 900


class Stepping:
    """Texts that grow by a token a step, counted or not."""

    def __init__(self, engine: Engine, num_texts: int) -> None:
        self.engine, self.live = engine, LiveRouting(engine)
        self.texts = [Text() for _ in range(num_texts)]
        self._before, self._asked = self.live.total(), time.monotonic()

    def run(self, counted: bool) -> None:
        """One step."""
        for text in self.texts:
            if text.length >= LONGEST:
                self.engine.free(text)
        self.engine.step([Piece(text, [7 * number + 1]) for number, text in enumerate(self.texts)])
        if not counted:
            return
        self.live.hear()
        if time.monotonic() - self._asked >= ASK_EVERY_S:
            now, self._asked = self.live.total(), time.monotonic()
            json.dumps(self.live.counts(now.less(self._before)))
            self._before = now


def measure(stepping: Stepping, rounds: int) -> dict[str, float]:
    """Seconds a step, not counted and counted."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for counted in (False, True) if number % 2 else (True, False):  # neither always follows the other
            started = time.perf_counter()
            for _ in range(STEPS):
                stepping.run(counted)
            if number:
                spent[counted].append((time.perf_counter() - started) / STEPS)
    ratios = [on / off for off, on in zip(spent[False], spent[True], strict=True)]
    return {
        "step_s": statistics.median(spent[False]),
        "counted_step_s": statistics.median(spent[True]),
        "overhead": statistics.median(ratios) - 1,
    }


def main() -> None:
    """Time both kinds, print the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    engine = Engine(Decoder(family("qwen3_moe").from_hf(MODEL)).initialize(0), bits=4, threads=args.threads)
    results = {}
    for num_texts in (1, 8, 32):
        stepping = Stepping(engine, num_texts)
        results[num_texts] = measure(stepping, args.rounds)
        for text in stepping.texts:
            engine.free(text)
    if args.json:
        print(json.dumps(results))
        return
    for num_texts, result in results.items():
        plain, counted = result["step_s"] * 1e3, result["counted_step_s"] * 1e3
        print(f"{num_texts:3d} texts: {plain:8.2f} ms a step, {counted:8.2f} ms counted: {result['overhead']:+.2%}")


if __name__ == "__main__":
    main()
