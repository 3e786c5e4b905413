"""The text of tokens, and which tokens which experts love.

N tokens, E experts, V vocab, X frequent tokens.
"""

from typing import NamedTuple

import numpy as np
from tokenizers import decoders

from moesaic.data.tokenizer import Tokenizer

LEAST_TIMES = 8  # that a token occurs before anything is said of it
MOST_LOVED = 8  # tokens told of each expert
MOST_LISTED = 600  # tokens whose ways are told
_DEVIATIONS = 1.64  # below what is seen, so that chance alone does not put rare tokens first


class TokenTexts:
    """The text of every token id, its leading space included."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        special = tokenizer.backend.get_added_tokens_decoder()
        self.special = frozenset(token_id for token_id, added in special.items() if added.special)
        self._is_byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)

    def text(self, token_id: int) -> str:
        """What a token stands for in text; nothing for special tokens."""
        return "" if token_id in self.special else self._plain(token_id)

    def shown(self, token_id: int) -> str:
        """The same for a reader: special tokens by their names."""
        if token_id in self.special:
            return self.tokenizer.backend.id_to_token(token_id) or f"<{token_id}>"
        return self._plain(token_id) or f"<{token_id}>"

    def _plain(self, token_id: int) -> str:
        if self._is_byte_level:
            return self.tokenizer.decode([token_id], skip_special_tokens=False)
        token = self.tokenizer.backend.id_to_token(token_id) or ""
        if token.startswith("<0x") and token.endswith(">"):  # a byte, as SentencePiece writes it
            return bytes([int(token[3:-1], 16)]).decode("utf-8", "replace")
        return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")


class Frequent(NamedTuple):
    """Tokens that occur often enough to judge by. labels_N: which of them each place has, -1 for none."""

    ids_X: np.ndarray
    counts_X: np.ndarray
    labels_N: np.ndarray


def frequent(ids_N: np.ndarray, least: int = LEAST_TIMES) -> Frequent:
    """Tokens that occur `least` times or more, the most frequent first. An id of -1 is none."""
    counts_V = np.bincount(ids_N[ids_N >= 0], minlength=1)
    ids_X = np.flatnonzero(counts_V >= least)
    ids_X = ids_X[np.argsort(-counts_V[ids_X], kind="stable")]
    label_of_V = np.full(len(counts_V) + 1, -1, dtype=np.int64)  # the last is for -1
    label_of_V[ids_X] = np.arange(len(ids_X))
    return Frequent(ids_X, counts_V[ids_X], label_of_V[ids_N])


class Loved(NamedTuple):
    """A token of an expert: the share of its occurrences that the expert serves, and how often it occurs."""

    token_id: int
    share: float
    times: int


def loved(tokens: Frequent, counts_XE: np.ndarray) -> list[list[Loved]]:
    """For each expert the tokens of which it serves the largest share, rare ones put back for what chance may do.

    Ordered by the lower end of Wilson's interval for the share (J. Am. Stat. Assoc. 22, 1927).
    """
    times_X1 = tokens.counts_X[:, None].astype(np.float64)
    shares = counts_XE / np.maximum(times_X1, 1.0)
    z = _DEVIATIONS
    middle = shares + z * z / (2 * times_X1)
    spread = z * np.sqrt(np.maximum(shares * (1 - shares), 0.0) / times_X1 + (z / (2 * times_X1)) ** 2)
    low = (middle - spread) / (1 + z * z / times_X1)
    found = []
    for expert in range(counts_XE.shape[1]):
        best = np.argsort(-low[:, expert], kind="stable")[:MOST_LOVED]
        found.append(
            [
                Loved(int(tokens.ids_X[x]), float(shares[x, expert]), int(tokens.counts_X[x]))
                for x in best
                if counts_XE[x, expert]
            ]
        )
    return found


def heaviest(counts_E: np.ndarray, times: int, most: int = 3) -> list[tuple[int, float]]:
    """(expert, share of the token's occurrences) of the experts that serve a token most."""
    order = np.argsort(-counts_E, kind="stable")[:most]
    return [(int(expert), float(counts_E[expert] / times)) for expert in order if counts_E[expert]] if times else []
