"""A small corpus, its tokenizer, and its packed form."""

from collections.abc import Mapping

import numpy as np
import pytest

from moesaic.data.corpus import Corpus, build_corpus
from moesaic.data.packed import Packed, PackedDomain
from moesaic.data.packing import pack
from moesaic.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    prose = [f"Sentence {i} of the prose, größer als {i * i}.\n" for i in range(200)]
    code = [f"def f{i}(x):\n    return x + {i}  # <|endoftext|>\n" for i in range(120)]
    return build_corpus("test", {"prose": prose, "code": code})


@pytest.fixture(scope="session")
def tokenizer(corpus: Corpus) -> Tokenizer:
    return Tokenizer.train({domain.name: domain.train for domain in corpus.domains}, 300)


@pytest.fixture(scope="session")
def packed(corpus: Corpus, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack(corpus, tokenizer, tmp_path_factory.mktemp("packed") / "whole")


@pytest.fixture(scope="session")
def packed_in_shards(corpus: Corpus, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The same text in many small shards."""
    return pack(corpus, tokenizer, tmp_path_factory.mktemp("packed") / "shards", shard_tokens=100)


def numbered(sizes: Mapping[str, int]) -> Packed:
    """Domains whose training tokens are 1, 2, 3, ...: a window's first token tells where it lies."""
    empty = np.zeros(2, dtype=np.uint32)
    domains = [
        PackedDomain(name=name, train=np.arange(1, size + 1, dtype=np.uint32), held_out=empty)
        for name, size in sizes.items()
    ]
    return Packed(domains=tuple(domains), byte_lengths=np.ones(max(sizes.values()) + 1, dtype=np.int64), eos_id=0)
