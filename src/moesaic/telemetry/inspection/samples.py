"""Text to colour by expert, and the ways of frequent tokens: what the page shows beside the findings.

N tokens, E experts, K choices a token.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from moesaic.telemetry.inspection.choices import Choices
from moesaic.telemetry.inspection.tokens import TokenTexts, frequent, heaviest
from moesaic.trace import Trace

MOST_TOKENS = 220  # of a domain
MOST_CHOICES = 400_000  # of all texts and layers, so that the page stays a few megabytes
MOST_LISTED, MOST_WAYS = 600, 16_000  # tokens; tokens times layers


class Sample(NamedTuple):
    """A piece of text: its tokens as text, and by layer each one's experts, the first choice first."""

    domain: str
    tokens: list[str]
    experts: dict[int, list[list[int]]]


class Way(NamedTuple):
    """Where a token goes: by layer the experts that serve it most, each with its share of the occurrences."""

    text: str
    times: int
    experts: dict[int, list[tuple[int, float]]]


def samples(trace: Trace, texts: TokenTexts) -> list[Sample]:
    """The beginning of each domain's longest piece of text (of the first pieces, where there are no domains)."""
    choices = Choices(trace)
    ids_N, domains_N = choices.fact("token_ids"), choices.fact("domain_ids")
    if ids_N is None:
        return []
    per_token = sum(layer.top_k for layer in trace.fingerprint.layers)
    chosen = _chosen_texts(choices.unit_of_N, domains_N)
    most = max(24, min(MOST_TOKENS, MOST_CHOICES // (per_token * max(1, len(chosen)))))
    places = [np.flatnonzero(choices.unit_of_N == unit)[:most] for unit in chosen]
    found = [
        Sample(
            domain=trace.domains[int(domains_N[at[0]])] if domains_N is not None and domains_N[at[0]] >= 0 else "",
            tokens=[texts.shown(token_id) for token_id in ids_N[at].tolist()],
            experts={},
        )
        for at in places
    ]
    for layer in trace.layers:
        tokens_R, experts_R = choices.rows(layer)
        for sample, at in zip(found, places, strict=True):
            # The tokens of a text stand side by side, and so do their rows.
            bounds = np.searchsorted(tokens_R, np.append(at, at[-1] + 1))
            rows = experts_R[bounds[0] : bounds[-1]].tolist()
            cuts = (bounds - bounds[0]).tolist()
            sample.experts[layer] = [rows[a:b] for a, b in itertools.pairwise(cuts)]
    return found


def _chosen_texts(units_N: np.ndarray, domains_N: np.ndarray | None) -> list[int]:
    """One text for each domain: its longest. Without domains the first four."""
    sizes = np.bincount(units_N)
    if domains_N is None:
        return list(range(min(4, len(sizes))))
    domain_of_unit = np.full(len(sizes), -1, dtype=np.int64)
    domain_of_unit[units_N] = domains_N
    found = []
    for domain in range(int(domain_of_unit.max(initial=-1)) + 1):
        of_domain = np.flatnonzero(domain_of_unit == domain)
        if of_domain.size:
            found.append(int(of_domain[np.argmax(sizes[of_domain])]))
    return found


def ways(trace: Trace, texts: TokenTexts) -> list[Way]:
    """Where the most frequent tokens go, the most frequent first."""
    choices = Choices(trace)
    ids_N = choices.fact("token_ids")
    if ids_N is None:
        return []
    tokens = frequent(ids_N)
    most = min(MOST_LISTED, MOST_WAYS // len(trace.layers), len(tokens.ids_X))
    found = [Way(texts.shown(int(tokens.ids_X[x])), int(tokens.counts_X[x]), {}) for x in range(most)]
    labels_N = np.where(tokens.labels_N < most, tokens.labels_N, -1)
    for layer in trace.layers:
        for way, counts_E in zip(found, choices.crossed(layer, labels_N, most), strict=True):
            way.experts[layer] = [(expert, round(share, 3)) for expert, share in heaviest(counts_E, way.times)]
    return found


def to_json(parts: list[Sample] | list[Way]) -> list[dict[str, Any]]:
    """JSON-ready dictionaries."""
    return [part._asdict() for part in parts]
