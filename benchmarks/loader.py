"""How fast the loader makes batches on one core, beside the rate at which a model trains.

Reads packed text (`moesaic pack`), or makes some of random tokens: documents of about 500 tokens in several domains and
shards. Every batch is new, so the windows lie all over the files.

    python benchmarks/loader.py [--packed FOLDER] [--batch-size 8] [--sequence-length 256] [--training-rate 15000]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.data.loader import Batches
from moesaic.data.packed import Packed, PackedDomain, ShardedTokens, open_packed

ENOUGH = 20  # times the training rate: the loader is then a twentieth of a step at most


def random_tokens(folder: Path, num_tokens: int, num_domains: int = 8, num_shards: int = 4) -> Packed:
    """Domains of uint16 tokens in memory-mapped files."""
    generator = np.random.default_rng(0)
    domains = []
    for domain in range(num_domains):
        shards, starts, before = [], [], 0
        for shard in range(num_shards):
            ids = generator.integers(1, 16_000, num_tokens // num_domains // num_shards, dtype=np.uint16)
            begins = np.union1d([0], generator.integers(0, len(ids), len(ids) // 500))
            ids[begins] = 0
            ids.tofile(folder / f"{domain}-{shard}.bin")
            shards.append(np.memmap(folder / f"{domain}-{shard}.bin", dtype=np.uint16, mode="r").view(np.ndarray))
            starts.append(begins + before)
            before += len(ids)
        empty = np.zeros(2, dtype=np.uint16)
        domains.append(
            PackedDomain(
                name=f"domain {domain}",
                train=ShardedTokens(shards),
                held_out=empty,
                train_starts=np.concatenate(starts),
            )
        )
    return Packed(domains=tuple(domains), byte_lengths=np.ones(16_000, dtype=np.int64), eos_id=0)


def measure(packed: Packed, batch_size: int, sequence_length: int, seconds: float) -> dict[str, Any]:
    """The median over repetitions of tokens a second, every batch a new one."""
    batches = Batches(packed, batch_size, sequence_length, seed=0)
    rates, number = [], 0
    batches.batch(number)  # orders the first epoch of its domains
    for _ in range(5):
        started, first = time.perf_counter(), number
        while time.perf_counter() - started < seconds / 5:
            number += 1
            batches.batch(number)
        rates.append((number - first) * batches.tokens_per_batch / (time.perf_counter() - started))
    return {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "train_tokens": packed.num_train_tokens,
        "tokens_per_s": sorted(rates)[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, help="a folder that `moesaic pack` made")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="how many to make up (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure")
    parser.add_argument("--training-rate", type=float, help="tokens a second of the training to compare with")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packed = open_packed(args.packed) if args.packed else random_tokens(Path(scratch), args.tokens)
        result = measure(packed, args.batch_size, args.sequence_length, args.seconds)
    if args.training_rate:
        result["times_the_training_rate"] = result["tokens_per_s"] / args.training_rate
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['tokens_per_s'] / 1e6:.1f}M tokens/s in batches of {args.batch_size} x {args.sequence_length}")
    if args.training_rate:
        ratio = result["times_the_training_rate"]
        print(
            f"{ratio:.0f} times the training rate ({'enough' if ratio >= ENOUGH else 'too few'}: {ENOUGH} are wanted)"
        )


if __name__ == "__main__":
    main()
