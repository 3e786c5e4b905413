"""Text as windows of tokens, domain by domain, spread over what there is."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moesaic.data.corpus import Corpus
from moesaic.data.held_out import held_out_windows
from moesaic.data.packed import Packed
from moesaic.data.sources import FORMATS, is_text_file, read_documents
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError

_BYTES_A_TOKEN = 6  # characters read for each token that is wanted: few tokenizers need as many
_LOOKED_AT = 4  # times as many tokens as are wanted, from which these are spread


class Window(NamedTuple):
    """Tokens that go through a model together, and the number of their domain. document_ids_T: None is one document."""

    token_ids_T: np.ndarray
    domain: int
    document_ids_T: np.ndarray | None = None


class Windows(NamedTuple):
    """Windows to route, and the names of their domains."""

    domains: tuple[str, ...]
    windows: tuple[Window, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(window.token_ids_T) for window in self.windows)


def packed_windows(packed: Packed, length: int, max_tokens: int) -> Windows:
    """Up to `max_tokens` of each domain's held-out text, in windows spread over it."""
    windows = []
    for domain, batches in enumerate(held_out_windows(packed, length, max_tokens).values()):
        for batch in batches:
            kept = batch.mask_BS[0]
            windows.append(Window(batch.inputs_BS[0][kept], domain, batch.document_ids_BS[0][kept]))
    return _found(packed.names, windows)


def corpus_windows(corpus: Corpus, tokenizer: Tokenizer, length: int, max_tokens: int) -> Windows:
    """Up to `max_tokens` of each domain's held-out documents; a window holds one document."""
    return _tokenized({domain.name: domain.held_out for domain in corpus.domains}, tokenizer, length, max_tokens)


def file_windows(path: Path, tokenizer: Tokenizer, length: int, max_tokens: int) -> Windows:
    """Up to `max_tokens` of a file's text, which is one domain. Raises DataError for files that hold no text."""
    if not is_text_file(path):
        raise DataError(f"{path} is no text; give a {FORMATS} file, or a folder with a subfolder of them a domain")
    name = path.name.partition(".")[0]
    found = _tokenized({name: read_documents(path)}, tokenizer, length, max_tokens)
    if not found.windows:
        raise DataError(f"{path} holds no text; give a file with at least one token")
    return found


def _tokenized(texts: Mapping[str, Iterable[str]], tokenizer: Tokenizer, length: int, max_tokens: int) -> Windows:
    windows = [
        Window(ids, domain)
        for domain, documents in enumerate(texts.values())
        for ids in _spread(_pieces(documents, tokenizer, length, max_tokens), length, max_tokens)
    ]
    return _found(tuple(texts), windows)


def _pieces(documents: Iterable[str], tokenizer: Tokenizer, length: int, max_tokens: int) -> Iterator[np.ndarray]:
    """Documents' tokens in windows; of a long document only as many as are wanted of the domain are made."""
    for text in documents:
        head = text[: max_tokens * _BYTES_A_TOKEN]
        ids = np.array(tokenizer.encode(head, add_special_tokens=True), dtype=np.int64)
        for first in range(0, len(ids), length):
            yield ids[first : first + length]


def _spread(windows: Iterable[np.ndarray], length: int, max_tokens: int) -> list[np.ndarray]:
    """At most `max_tokens`, from windows all over the text. No more than a few times as many are looked at."""
    seen, total = [], 0
    for window in windows:
        seen.append(window)
        total += len(window)
        if total >= _LOOKED_AT * max_tokens:
            break
    step = max(1, total // max(1, max_tokens))
    kept, left = [], max_tokens
    for window in [window for first in range(step) for window in seen[first::step]]:
        if left <= 0:
            break
        kept.append(window[:left])
        left -= len(kept[-1])
    return kept


def _found(domains: tuple[str, ...], windows: list[Window]) -> Windows:
    return Windows(domains, tuple(window for window in windows if len(window.token_ids_T)))
