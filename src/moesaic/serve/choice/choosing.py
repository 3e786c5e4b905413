"""From rows of logits to the tokens of requests, each by its own rules, the same whatever else is in the step.

N rows, V vocab.
"""

from collections.abc import Sequence

import numpy as np

from moesaic.engine.program import Program
from moesaic.serve.choice.drawing import NOTHING, draw_rows, random_number, score_rows
from moesaic.serve.choice.writing import Writing
from moesaic.serve.request import TokenInfo

LEAST_LOGPROB = -9999.0  # stands for anything below, as in vLLM: JSON has no infinite numbers


class Row:
    """A row of logits: what is to follow the tokens of a text, drafts behind its newest included."""

    def __init__(self, writing: Writing, drafts: Sequence[int] = ()) -> None:
        self.writing, self.drafts = writing, drafts


def choose(logits_NV: np.ndarray, rows: Sequence[Row], program: Program | None = None) -> list[TokenInfo]:
    """The token of each row, by the rules of its request and a random number of its seed and its place in the text.

    program: whose threads do it; None: this one.
    """
    all_V = list(logits_NV)
    infos = [TokenInfo(token) for token in chosen_ids(logits_NV, rows, program)]
    counts = [row.writing.request.top_logprobs for row in rows]
    wanted = [place for place, count in enumerate(counts) if count is not None]
    found = scored(
        [all_V[place] for place in wanted],
        [infos[place].token_id for place in wanted],
        [counts[place] or 0 for place in wanted],
        program,
    )
    for place, info in zip(wanted, found, strict=True):
        infos[place] = info
    return infos


def chosen_ids(logits_NV: np.ndarray, rows: Sequence[Row], program: Program | None = None) -> list[int]:
    """The token of each row alone."""
    changed = [_by_rules(logits_V, row) for logits_V, row in zip(logits_NV, rows, strict=True)]
    samplings, numbers = [row.writing.rules.sampling for row in rows], [_number(row) for row in rows]
    masks = [_mask(row) for row in rows]
    found = draw_rows(changed, samplings, numbers, program, masks)
    for place, token in enumerate(found):
        if token == NOTHING:
            found[place] = _draw_the_end(logits_NV[place], changed[place], rows[place], masks[place])
    return found


def _by_rules(logits_V: np.ndarray, row: Row) -> np.ndarray:
    return row.writing.rules.apply(logits_V, row.writing.token_ids, row.drafts)


def _mask(row: Row) -> np.ndarray | None:
    """What a grammar allows, where there is one."""
    guide = row.writing.guide
    return None if guide is None else guide.allowed(row.drafts)


def _draw_the_end(logits_V: np.ndarray, changed_V: np.ndarray, row: Row, mask: np.ndarray | None) -> int:
    """Where a grammar allows but an end that is too early, the end; where it allows nothing, the text has ended, and
    the token that is chosen will not be taken."""
    samplings, numbers = [row.writing.rules.sampling], [_number(row)]
    (token,) = draw_rows([logits_V], samplings, numbers, masks=[mask])
    return draw_rows([changed_V], samplings, numbers)[0] if token == NOTHING else token


def _number(row: Row) -> float:
    """How far to go along the weights; of no use where the likeliest token is taken."""
    sampling = row.writing.rules.sampling
    if sampling.temperature == 0:
        return 0.0
    assert sampling.seed is not None
    return random_number(sampling.seed, len(row.writing.token_ids) + len(row.drafts))


def scored(
    rows_V: Sequence[np.ndarray], token_ids: Sequence[int], counts: Sequence[int], program: Program | None = None
) -> list[TokenInfo]:
    """Tokens with their log probabilities under the model, before any rules, and those of the so many likeliest."""
    return [
        TokenInfo(token, _known(own), tuple(zip(ids, map(_known, logprobs), strict=True)))
        for token, (own, ids, logprobs) in zip(token_ids, score_rows(rows_V, token_ids, counts, program), strict=True)
    ]


def _known(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
