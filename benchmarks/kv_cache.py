"""What a cache in fewer bits costs and brings: decoding at long context, and held-out bits per byte, format by format.

Every format has an engine of its own over the same packed weights, kept in a file that all of them map. A round takes
each format once at each context; reported are medians over rounds: tokens/s of all texts together, what attention has
of a step, and the median of the rounds' ratios to the first format. Texts are random tokens, as many as the context,
and stay so long: each step's tokens are cut off again. Held-out text is scored document by document; the errors are
those of the windows' paired differences to the first format.

    python benchmarks/kv_cache.py runs/first/model [--bits 4] [--contexts 2048 4096] [--texts 8] [--rounds 5]
        [--corpus my-texts] [--tokenizer FOLDER] [--max-tokens 8192] [--json]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from token_losses import Losses, engine_losses, held_out

from moesaic.cli import output
from moesaic.cli.text_source import gather_text
from moesaic.data.packed import Packed
from moesaic.engine.cache import Text
from moesaic.engine.engine import Engine, Piece, in_steps
from moesaic.kernels.paged import CACHE_FORMATS, CacheFormat

STEPS = 16  # of a sample
WINDOW = 1024  # tokens of a held-out window


class Sample(NamedTuple):
    """Of one step."""

    seconds: float
    attention_share: float


def fill(engine: Engine, num_texts: int, context: int) -> list[Text]:
    """Texts of random tokens."""
    generator = torch.Generator().manual_seed(context)
    texts = [Text() for _ in range(num_texts)]
    for text in texts:
        ids = torch.randint(engine.config.vocab_size, (context,), generator=generator).tolist()
        for pieces in in_steps([(text, ids)]):
            engine.step(pieces)
    return texts


def decode(engine: Engine, texts: list[Text]) -> Sample:
    """A few steps of one token for each text; afterwards the texts are as before."""
    length = texts[0].length
    engine.program.native.reset_times()
    start = time.perf_counter()
    for step in range(STEPS):
        engine.step([Piece(text, [(7 * step + index) % engine.config.vocab_size]) for index, text in enumerate(texts)])
    seconds = time.perf_counter() - start
    for text in texts:
        engine.cache.cut(text, length)
    parts: dict[str, float] = defaultdict(float)
    for part, _layer, spent in engine.program.native.times():
        parts[part] += spent
    return Sample(seconds / STEPS, parts["attention"] / sum(parts.values()))


def speeds(
    engines: dict[CacheFormat, Engine], contexts: list[int], num_texts: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each context and format."""
    rows = []
    for context in contexts:
        texts = {format: fill(engine, num_texts, context) for format, engine in engines.items()}
        samples: dict[CacheFormat, list[Sample]] = {format: [] for format in engines}
        for turn in range(rounds + 1):
            for format, engine in engines.items():
                sample = decode(engine, texts[format])
                if turn:  # the first warms up
                    samples[format].append(sample)
        rows += [speed_row(context, num_texts, format, samples) for format in engines]
        for format, engine in engines.items():
            for text in texts[format]:
                engine.free(text)
    return rows


def speed_row(
    context: int, num_texts: int, format: CacheFormat, samples: dict[CacheFormat, list[Sample]]
) -> dict[str, Any]:
    first, own = next(iter(samples.values())), samples[format]
    return {
        "context": context,
        "format": format,
        "tokens_per_s": num_texts / statistics.median(each.seconds for each in own),
        "attention_share": statistics.median(each.attention_share for each in own),
        "times_the_first": statistics.median(a.seconds / b.seconds for a, b in zip(first, own, strict=True)),
    }


def losses(engines: dict[CacheFormat, Engine], text: Packed, max_tokens: int) -> list[dict[str, Any]]:
    """A row for each format."""
    batches = held_out(text, WINDOW, max_tokens)
    found: dict[CacheFormat, Losses] = {format: engine_losses(engine, batches) for format, engine in engines.items()}
    first = next(iter(found.values()))
    return [
        {
            "format": format,
            "bits_per_byte": own.bits_per_byte,
            "tokens": len(own.nats_N),
            "more": own.more_than(first)._asdict(),
        }
        for format, own in found.items()
    ]


def report(document: dict[str, Any]) -> None:
    """Print the tables."""
    output.table(["cache", "bytes a token"], [[name, f"{size:,.0f}"] for name, size in document["token_bytes"].items()])
    cells = [
        (
            *(f"{row['context']:,}", row["format"], f"{row['tokens_per_s']:.1f}", f"{row['attention_share']:.0%}"),
            f"{row['times_the_first']:.2f}x",
        )
        for row in document["speeds"]
    ]
    output.table(["context", "cache", "tokens/s", "attention", "of the first"], cells)
    if document["losses"]:
        output.table(
            ["cache", "bits a byte", "more"],
            [
                [
                    row["format"],
                    f"{row['bits_per_byte']:.5f}",
                    f"{row['more']['mean']:+.5f} ± {row['more']['error']:.5f}",
                ]
                for row in document["losses"]
            ],
        )


def main() -> None:
    """Time the formats, score held-out text where there is some, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a .gguf file")
    parser.add_argument("--bits", type=int, choices=(8, 4), help="of the weights (as the files are)")
    parser.add_argument("--formats", nargs="+", choices=CACHE_FORMATS, default=["bf16", "int8"])
    parser.add_argument("--contexts", nargs="*", type=int, default=[2048, 4096])
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--corpus", type=Path, help="text to score; left out: none is scored")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="where tokenizer.json is (the model's folder)")
    parser.add_argument("--max-tokens", type=int, default=8192, help="a domain")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packed_file = Path(scratch) / "packed"
        engines: dict[CacheFormat, Engine] = {
            format: Engine(args.model, bits=args.bits, cache_format=format, packed_file=packed_file)
            for format in args.formats
        }
        document: dict[str, Any] = {
            "token_bytes": {format: engine.cache.bytes_per_token for format, engine in engines.items()},
            "speeds": speeds(engines, args.contexts, args.texts, args.rounds),
            "losses": [],
        }
        if args.corpus is not None:
            text = gather_text(args.corpus, 0, args.tokenizer or Path(args.model)).packed
            document["losses"] = losses(engines, cast(Packed, text), args.max_tokens)
    if args.json:
        print(json.dumps(document))
    else:
        report(document)


if __name__ == "__main__":
    main()
