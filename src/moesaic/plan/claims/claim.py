"""A sentence that people write, and what comes out when it is computed."""

from typing import Literal, NamedTuple

Verdict = Literal["true", "false", "it depends"]

GIB = 2.0**30


class Claim(NamedTuple):
    """claim: the sentence. formula: what decides it. numbers: the formula with numbers in. finding: in one sentence
    what is the case."""

    claim: str
    verdict: Verdict
    formula: str
    numbers: str
    finding: str
