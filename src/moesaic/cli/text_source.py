"""Where the verbs get their text: the embedded corpus, a folder of text or packed text, with talk on the way."""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from moesaic.cli import output
from moesaic.errors import DataError
from moesaic.hub.embedded import cache_folder

if TYPE_CHECKING:
    from moesaic.data.corpus import Corpus
    from moesaic.data.packed import Packed
    from moesaic.data.pairs import PairCorpus
    from moesaic.data.tokenizer import Tokenizer
    from moesaic.data.translation import Pairs


Material = TypeVar("Material")


class Text(NamedTuple, Generic[Material]):
    """A corpus ready to train on; `source` says in words where it is from. packed: text, or pairs for translation."""

    source: str
    num_bytes: int
    tokenizer: "Tokenizer"
    packed: Material


class _HowFar(Protocol):
    @property
    def documents(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


def add_corpus_argument(parser: argparse.ArgumentParser) -> None:
    """Add --corpus, with one meaning for every verb that trains."""
    parser.add_argument(
        "--corpus",
        metavar="FOLDER",
        type=Path,
        help="text to train on: what `moesaic pack` made, or one subfolder a domain of .txt, .jsonl (both also .gz or "
        ".zst) or .parquet files (default: the embedded corpus); for translation the .jsonl that `moesaic align` made",
    )


AnyText = Text[Any]
"""Of either kind, where what is done with it does not depend on that."""


def gather_for(
    task: str, corpus: Path | None, vocab_size: int, tokenizer_folder: Path | None = None
) -> "Text[Packed] | Text[Pairs]":
    """What a recipe's task learns from: for translation `corpus` holds pairs, or is a file of them; else text."""
    from moesaic.data.special_tokens import NUM_SENTINELS

    if task == "translation":
        return _gather_pairs(corpus, vocab_size, tokenizer_folder)
    num_sentinels = NUM_SENTINELS if task == "span_corruption" else 0
    return gather_text(corpus, vocab_size, tokenizer_folder, num_sentinels=num_sentinels)


def gather_text(
    corpus_folder: Path | None, vocab_size: int, tokenizer_folder: Path | None = None, *, num_sentinels: int = 0
) -> "Text[Packed]":
    """Open packed text; or read a corpus, train a tokenizer on it (or load the one in `tokenizer_folder`), and pack.

    num_sentinels: of a new tokenizer.
    Raises DataError or MissingDependencyError with what to do when there is no usable text.
    """
    from moesaic.data.packed import is_packed, packed_digest

    if corpus_folder is not None and is_packed(corpus_folder):
        return _open_text(corpus_folder, tokenizer_folder)
    corpus = read_corpus(corpus_folder)
    tokenizer = make_tokenizer(corpus, vocab_size, tokenizer_folder, num_sentinels=num_sentinels)
    place = cache_folder() / "packed" / packed_digest(corpus.digest, tokenizer.digest)[:24]
    packed = pack_with_progress(corpus, tokenizer, place)
    return Text(corpus.source, corpus.num_bytes, tokenizer, packed)


def read_corpus(folder: Path | None) -> "Corpus":
    """Survey the text in a folder, or the embedded corpus."""
    from moesaic.data.corpus import folder_corpus
    from moesaic.data.embedded import embedded_corpus

    if folder is None:
        return embedded_corpus(cache_folder(), progress=output.talk)
    with _progress("reading the text") as listen:
        return folder_corpus(folder, listen=listen)


def make_tokenizer(
    corpus: "Corpus | PairCorpus", vocab_size: int, folder: Path | None = None, *, num_sentinels: int = 0
) -> "Tokenizer":
    """The tokenizer in `folder` if there is one there, else a new one trained on the corpus.

    A new one has `num_sentinels` sentinels, and a token for each language where the corpus has some.
    """
    from moesaic.data.corpus import Corpus
    from moesaic.data.special_tokens import language_token, sentinels
    from moesaic.data.tokenizer import Tokenizer

    if folder is not None and (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder)
    output.talk(f"training a tokenizer of {vocab_size} tokens on {output.size(corpus.num_bytes)} of text")
    if isinstance(corpus, Corpus):
        texts = {domain.name: domain.train for domain in corpus.domains}
        return Tokenizer.train(texts, vocab_size, extra_tokens=sentinels(num_sentinels))
    languages = map(language_token, corpus.languages)
    return Tokenizer.train(corpus.train_texts(), vocab_size, extra_tokens=tuple(languages))


def pack_with_progress(corpus: "Corpus", tokenizer: "Tokenizer", folder: Path, workers: int | None = None) -> "Packed":
    """Pack, unless `folder` holds the result; by a process on each processor it may use if not told otherwise."""
    from moesaic.data.packed import is_packed
    from moesaic.data.packing import pack

    if is_packed(folder):
        return pack(corpus, tokenizer, folder)
    with _progress("tokenizing", corpus.num_bytes) as listen:
        return pack(corpus, tokenizer, folder, workers=workers or _usable_processors(), listen=listen)


def _gather_pairs(path: Path | None, vocab_size: int, tokenizer_folder: Path | None) -> "Text[Pairs]":
    from moesaic.data.pairs import read_pairs
    from moesaic.data.translation import Pairs

    if path is None:
        raise DataError(
            "data.task='translation' needs pairs of texts; give --corpus FILE.jsonl, which `moesaic align` makes"
        )
    corpus = read_pairs(path)
    tokenizer = make_tokenizer(corpus, vocab_size, tokenizer_folder)
    pairs = Pairs.of(corpus, tokenizer)
    output.talk(
        f"{path}: {len(corpus.segments)} segments in {', '.join(corpus.languages)}, "
        f"{int(corpus.is_held_out.sum())} of them held out; {pairs.num_train_pairs} pairs to train on"
    )
    return Text(corpus.source, corpus.num_bytes, tokenizer, pairs)


def _usable_processors() -> int:
    """Those that this process may run on, where the system tells; a container often has fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open_text(folder: Path, tokenizer_folder: Path | None) -> "Text[Packed]":
    from moesaic.data.packed import TOKENIZER, Index, open_packed
    from moesaic.data.tokenizer import Tokenizer

    index, packed = Index.read(folder), open_packed(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    if tokenizer_folder is not None and (tokenizer_folder / "tokenizer.json").exists():
        before = Tokenizer.load(tokenizer_folder)
        if before.digest != tokenizer.digest:
            raise DataError(
                f"{folder} was packed with another tokenizer than the one in {tokenizer_folder}; pack the text again "
                f"with `--tokenizer {tokenizer_folder}`"
            )
    output.talk(f"{folder}: {output.number(packed.num_train_tokens)} tokens of {tokenizer.vocab_size} kinds")
    return Text(index.source, index.num_bytes, tokenizer, packed)


@contextmanager
def _progress(what: str, total_bytes: int | None = None) -> Iterator[Callable[[_HowFar], None]]:
    """Shows documents and bytes a second; work done before this run, told first, does not count as speed."""
    with output.progress(what, total_bytes) as advance:
        started, first, shown = time.perf_counter(), -1, 0

        def listen(far: _HowFar) -> None:
            nonlocal first, shown
            first = far.num_bytes if first < 0 else first
            rate = (far.num_bytes - first) / max(1e-9, time.perf_counter() - started)
            advance(far.num_bytes - shown, f"{far.documents} documents, {output.size(rate)}/s")
            shown = far.num_bytes

        yield listen
