"""The page of checked claims."""

from moesaic.plan.claims import capacity, speed, worth
from moesaic.plan.claims.claim import Claim

COMMAND = "moesaic plan claims --report docs/claims.md"

_INTRODUCTION = """\
Sentences that go around about MoE models, computed. GB are 10^9 bytes and GiB 2^30; cards sold as 24 GB hold 24 GiB.
Speeds are rooflines with the usual shares of stated rates (0.8 of the bandwidth, 0.7 of the operations)."""


def all_claims() -> list[Claim]:
    """Every claim, checked now."""
    return [*capacity.claims(), *speed.claims(), *worth.claims()]


def page(claims: list[Claim]) -> str:
    """All of it, Markdown."""
    counts = {verdict: sum(each.verdict == verdict for each in claims) for verdict in ("true", "false", "it depends")}
    told = f"{len(claims)} claims: {counts['true']} true, {counts['false']} false, {counts['it depends']} depend."
    parts = ["# Claims", f"<!-- Written by `{COMMAND}`; do not edit. -->", _INTRODUCTION, told]
    parts += [_section(each) for each in claims]
    return "\n\n".join(parts) + "\n"


def _section(claim: Claim) -> str:
    return (
        f"## {claim.claim}\n\n**{claim.verdict[0].upper()}{claim.verdict[1:]}.** {claim.finding}\n\n"
        f"- formula: {claim.formula}\n- numbers: {claim.numbers}"
    )
