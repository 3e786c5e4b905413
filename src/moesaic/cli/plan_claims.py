"""`moesaic plan claims`: what people write about these models, computed."""

import argparse
from pathlib import Path

from moesaic.cli import output
from moesaic.errors import ConfigError
from moesaic.plan.claims import all_claims, page


def run(args: argparse.Namespace) -> int:
    """Check every claim and print the verdicts; --report writes the page. Returns the exit code."""
    if len(args.words) > 1:
        raise ConfigError(f"plan claims {' '.join(args.words[1:])}; it takes no further words")
    claims = all_claims()
    if args.report:
        Path(args.report).write_text(page(claims), encoding="utf-8")
        output.talk(f"written: {args.report}")
    if args.json:
        output.print_json({"claims": [claim._asdict() for claim in claims]})
        return 0
    for claim in claims:
        output.write(
            f"{claim.verdict:<10}  {claim.claim}\n            {claim.finding}\n            {claim.numbers}\n\n"
        )
    output.next_command("moesaic plan disclosed")
    return 0
