"""`moesaic pack`: text into token shards that training maps into memory."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import output
from moesaic.cli.text_source import make_tokenizer, pack_with_progress, read_corpus
from moesaic.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.data.packed import Index

VOCAB_SIZE = 16_384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic pack`."""
    parser.epilog = "example: moesaic pack my-texts --out my-packed --vocab-size 32768"
    parser.add_argument(
        "corpus",
        metavar="CORPUS",
        type=Path,
        help="a folder with one subfolder a domain, of .txt, .jsonl (both also .gz or .zst) or .parquet files",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="where the shards are written")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", type=Path, help="use the tokenizer.json in it (default: train one)"
    )
    parser.add_argument(
        "--vocab-size",
        metavar="N",
        type=int,
        help=f"tokens of the tokenizer that is trained (default: {VOCAB_SIZE})",
    )
    parser.add_argument(
        "--sentinels",
        metavar="N",
        type=int,
        default=0,
        help="special tokens at the end of the new vocabulary, for span corruption (T5 has 100; default: none)",
    )
    parser.add_argument("--workers", metavar="N", type=int, help="processes that tokenize (default: one a processor)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Survey the text, make or load a tokenizer, and pack. Returns the exit code."""
    from moesaic.data.packed import Index

    started = time.perf_counter()
    _check(args)
    corpus = read_corpus(args.corpus)
    vocab_size = args.vocab_size or VOCAB_SIZE
    tokenizer = make_tokenizer(corpus, vocab_size, args.tokenizer, num_sentinels=args.sentinels)
    pack_with_progress(corpus, tokenizer, args.out, args.workers)
    _show(Index.read(args.out), args.out, time.perf_counter() - started, args.json)
    output.next_command(f"moesaic train --corpus {args.out} --out runs/first")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers}; give 1 or more")
    if args.sentinels < 0:
        raise ConfigError(f"--sentinels {args.sentinels}; give 0 or more")
    if args.tokenizer is None:
        return
    if args.sentinels:
        raise ConfigError("--tokenizer has its vocabulary and --sentinels asks for a new one; give one of the two")
    if args.vocab_size is not None:
        raise ConfigError("--tokenizer has its vocabulary and --vocab-size asks for a new one; give one of the two")
    if not (args.tokenizer / "tokenizer.json").exists():
        raise ConfigError(f"no {args.tokenizer / 'tokenizer.json'}; give a folder that holds one, or leave it out")


def _show(index: "Index", folder: Path, seconds: float, as_json: bool) -> None:
    if as_json:
        domains = {
            name: {
                part: {"documents": facts.documents, "tokens": facts.tokens, "bytes": facts.num_bytes}
                for part, facts in parts.items()
            }
            for name, parts in index.domains.items()
        }
        output.print_json({"packed": str(folder), "digest": index.digest, "seconds": seconds, "domains": domains})
        return
    rows = []
    for name, parts in index.domains.items():
        train, held_out = parts["train"], parts["held_out"]
        rows.append(
            (
                name,
                str(train.documents),
                output.number(train.tokens),
                output.number(held_out.tokens),
                f"{train.num_bytes / train.tokens:.2f}",
            )
        )
    output.table(("domain", "documents", "tokens", "held out", "bytes a token"), rows)
