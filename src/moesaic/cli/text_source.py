"""Where demo and train get their text: the embedded corpus or a folder, tokenized and packed, with talk on the way."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moesaic.cli import output
from moesaic.hub.embedded import cache_folder

if TYPE_CHECKING:
    from moesaic.data.loader import Packed
    from moesaic.data.tokenizer import Tokenizer


class Text(NamedTuple):
    """A corpus ready to train on; `source` says in words where it is from."""

    source: str
    num_bytes: int
    tokenizer: "Tokenizer"
    packed: "Packed"


def add_corpus_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus",
        metavar="FOLDER",
        type=Path,
        help="text to train on: one subfolder a domain, .txt or .jsonl files (default: the embedded corpus)",
    )


def gather_text(corpus_folder: Path | None, vocab_size: int, tokenizer_folder: Path | None = None) -> Text:
    """Read the corpus, train a tokenizer on it (or load the one in `tokenizer_folder`), and pack.

    Raises DataError or MissingDependencyError with what to do when there is no usable text.
    """
    from moesaic.data.corpus import folder_corpus
    from moesaic.data.embedded import embedded_corpus
    from moesaic.data.loader import pack
    from moesaic.data.tokenizer import Tokenizer

    cache = cache_folder()
    corpus = folder_corpus(corpus_folder) if corpus_folder else embedded_corpus(cache, progress=output.talk)
    if tokenizer_folder is not None and (tokenizer_folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(tokenizer_folder)
    else:
        output.talk(f"training a tokenizer of {vocab_size} tokens on {output.size(corpus.num_bytes)} of text")
        tokenizer = Tokenizer.train({domain.name: domain.train for domain in corpus.domains}, vocab_size)
    packed = pack(corpus, tokenizer, cache / "packed", progress=output.talk)
    return Text(corpus.source, corpus.num_bytes, tokenizer, packed)
